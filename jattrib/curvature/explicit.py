"""The curvature as a matrix, and its damped inverse: for few parameters, and what the others are held against.

It is the inverse of the curvature of all examples.  A sum of the inverses of batches, which `dattri` 0.3 calls explicit
influence, is another thing: a cosine of .93 to this for batches of 50 in `bench/results/fidelity_dattri.jsonl`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Params
from jattrib.curvature.products import Operator, Vectors, check_rows
from jattrib.curvature.solve import solve

LIMIT = 20_000
"""Parameters at most: their matrix is 1.6 GB in float32."""


def matrix(operator: Operator, like: Params, *, columns: int = 256) -> Float[Array, "p p"]:
    """Return C as a matrix, rows and columns in the order of `core.tree.ravel`.

    Args:
        operator: the product with C, symmetric (`products.streamed`).
        like: the parameters.
        columns: of the matrix, made in one call of the operator.

    Raises:
        InvalidInputError: there are more than 20,000 parameters.
    """
    size = tree.size(like)
    if size > LIMIT:
        raise InvalidInputError(
            f"{size} parameters",
            expected=f"at most {LIMIT} for an explicit matrix",
            remedy="use `ekfac`, `krylov` or `arnoldi`, or select a few layers with `core.tree.select`",
        )
    flat, unravel = tree.ravel(like)
    rows = []
    for first in range(0, size, columns):
        unit = jax.nn.one_hot(jnp.arange(first, first + columns), size, dtype=flat.dtype)  # beyond the last: zeros
        rows.append(_ravel_rows(operator(jax.vmap(unravel)(unit))))
    whole = jnp.concatenate(rows)[:size]
    return (whole + whole.T) / 2


def inverse(matrix: Float[Array, "p p"], *, damping: float | int = 0.0) -> Operator:
    """Return the preconditioner `v ↦ (C + λI)⁻¹ v`, by Cholesky factorisation (`curvature.solve`).

    Args:
        matrix: C.
        damping: λ, added to the mean curvature.

    Raises:
        InvalidInputError: the matrix is not square, symmetric and finite, or the damping is negative.
        DivergedError: C + λI is not positive definite.
    """
    whole, _ = solve(matrix, jnp.eye(matrix.shape[0], dtype=matrix.dtype), damping=damping)
    return jax.tree_util.Partial(_times, whole)


@jax.jit
def _times(matrix: Float[Array, "p p"], vectors: Vectors) -> Vectors:
    check_rows(vectors)
    each = {name: math.prod(leaf.shape[1:]) for name, leaf in tree.to_names(vectors).items()}
    if sum(each.values()) != len(matrix):
        raise InvalidInputError(
            f"vectors of {sum(each.values())} numbers ({', '.join(f'{n} at {name!r}' for name, n in each.items())})",
            expected=f"{len(matrix)} numbers each, as many as the matrix has rows",
            remedy="pass a tree like the parameters, every leaf with a leading axis over vectors",
        )
    _, unravel = tree.ravel(jax.tree.map(lambda leaf: leaf[0], vectors))
    return jax.vmap(unravel)(jnp.matmul(_ravel_rows(vectors), matrix, precision="highest"))


def _ravel_rows(vectors: Vectors) -> Float[Array, "q p"]:
    return jax.vmap(lambda vector: tree.ravel(vector)[0])(vectors)
