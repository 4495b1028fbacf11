"""The door: checks shapes, chooses a backend, refines the solution and reports what became of it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jattrib_kernels.backend import Backend, refuse, resolve
from jattrib_kernels.kernel_inverse import blocked, pallas_gpu, pallas_tpu, reference
from jattrib_kernels.kernel_inverse import refine as refinement


class Factor(NamedTuple):
    """The Cholesky factor of `K + λI = L Lᵀ`.

    Attributes:
        lower: L, `(k, k)`, zero above the diagonal; of no meaning where the smallest pivot is not positive.
        inverse_blocks: inverses of L's diagonal blocks, `(k' / b, b, b)`, with k' = k rounded up to whole blocks: they
            turn substitution into matrix products.  The reference keeps none.
        smallest_pivot: `min_j L_jj²`, or the first pivot that is not positive.
        positive_definite: whether the smallest pivot is above rounding error, `4 √k ε max_j A_jj`.
    """

    lower: jax.Array
    inverse_blocks: jax.Array | None
    smallest_pivot: jax.Array
    positive_definite: jax.Array


class Info(NamedTuple):
    """What became of a solve.

    Attributes:
        residual: `‖B − (K + λI) X‖ / ‖B‖` in the Frobenius norm; infinite where there is no solution.
        smallest_pivot: of the factorisation, in the units of K; the first that is not positive, if one is not.
        positive_definite: whether `K + λI` is positive definite to working precision.  Where it is false, the solution
            is NaN or has no correct digits.
    """

    residual: jax.Array
    smallest_pivot: jax.Array
    positive_definite: jax.Array


def factorize(matrix: jax.Array, *, damping: float | jax.Array = 0.0, backend: Backend = "auto") -> Factor:
    """Factorise `K + λI = L Lᵀ`.

    Args:
        matrix: symmetric K, `(k, k)`, float32 or (reference only) float64; its lower triangle is read.
        damping: λ, added to the diagonal.
        backend: which implementation runs; one asked for by name never falls back to another.

    Raises:
        ValueError: K is not a square matrix of a supported dtype, λ is negative or no number, or the backend is not
            known.

    Source: Golub and Van Loan 2013, "Matrix computations", 4th edition, section 4.2.
    """
    matrix = jnp.asarray(matrix)
    check_matrix(matrix, damping)
    chosen = choose(backend, matrix.dtype)
    k = matrix.shape[0]
    diagonal = jnp.diagonal(matrix) + jnp.asarray(damping, matrix.dtype)
    if chosen == "reference":
        lower, smallest = reference.cholesky(blocked.prepare(matrix, diagonal, 1))
        inverses = None
    else:
        kernels = kernels_of(chosen, k)
        padded = blocked.prepare(matrix, diagonal, kernels.block)
        lower, inverses, smallest = blocked.cholesky(padded, kernels=kernels)
        lower = lower[:k, :k]
    return Factor(lower, inverses, smallest, definite(smallest, jnp.max(diagonal), k))


def solve(factor: Factor, targets: jax.Array) -> jax.Array:
    """Return `(L Lᵀ)⁻¹ B` for targets of shape `(k,)` or `(k, q)`, without refinement; NaN where there is no factor.

    Raises:
        ValueError: B's shape or dtype does not match the factor's.
    """
    targets = jnp.asarray(targets)
    check_targets(factor.lower, targets)
    columns, k = as_columns(targets), targets.shape[0]
    if factor.inverse_blocks is None:
        solution = reference.substitute(factor.lower, columns)
    else:
        count, block, _ = factor.inverse_blocks.shape
        lower = jnp.pad(factor.lower, (0, count * block - k))
        columns = jnp.pad(columns, ((0, count * block - k), (0, 0)))
        solution = blocked.substitute(lower, factor.inverse_blocks, columns)[:k]
    return jnp.where(factor.smallest_pivot > 0, solution, jnp.nan).reshape(targets.shape)


def kernel_inverse(
    matrix: jax.Array,
    targets: jax.Array,
    *,
    damping: float | jax.Array = 0.0,
    refine: int = 1,
    backend: Backend = "auto",
) -> tuple[jax.Array, Info]:
    """Solve `(K + λI) X = B` by Cholesky factorisation and iterative refinement.

    A step of refinement solves for the residual, computed in about twice the working precision, and keeps the
    correction of a column where it makes that column's residual smaller.  What then remains is the rounding of X
    itself, `ε ‖K‖ ‖X‖ / ‖B‖` or so: no float32 X has a much smaller residual.

    Args:
        matrix: symmetric K, `(k, k)`, float32 or (reference only) float64.
        targets: B, `(k,)` or `(k, q)`, of K's dtype.
        damping: λ, added to the diagonal.
        refine: steps of refinement; at none, the residual is that of plain float32 products.
        backend: which implementation runs; one asked for by name never falls back to another.

    Returns:
        X, of B's shape, and `Info`.

    Raises:
        ValueError: an argument's shape, dtype or sign is not as above, or the backend is not known.

    Source: Higham 2002, "Accuracy and stability of numerical algorithms", sections 10.1 and 12.1.
    """
    matrix, targets = jnp.asarray(matrix), jnp.asarray(targets)
    check_matrix(matrix, damping)
    check_targets(matrix, targets)
    check_refine(refine)
    chosen = choose(backend, matrix.dtype)
    operand = slices_dtype(chosen)
    scale = jnp.asarray(damping, matrix.dtype)
    columns = as_columns(targets)
    factor = factorize(matrix, damping=damping, backend=chosen)
    solution, relative = refinement.refine(
        partial(solve, factor), matrix, columns, damping=scale, steps=refine, operand=operand
    )
    return solution.reshape(targets.shape), Info(relative, factor.smallest_pivot, factor.positive_definite)


def as_columns(targets: jax.Array) -> jax.Array:
    """Return a vector as one column, and columns as they are."""
    return targets[:, None] if targets.ndim == 1 else targets


def choose(backend: Backend, dtype: jnp.dtype) -> Backend:
    """Resolve a backend for a dtype: the kernels are of float32.

    Raises:
        ValueError: the backend is not known, or was asked for by name and does not have the dtype.
    """
    if backend == "auto" and dtype == jnp.float64:
        return "reference"
    chosen = resolve(backend)
    if chosen != "reference" and dtype != jnp.float32:
        raise refuse(
            f"backend {backend!r} was asked for a {dtype} matrix",
            expected="float32",
            remedy="cast to float32, or use backend='reference'",
        )
    return chosen


def kernels_of(backend: Backend, k: int) -> blocked.Kernels:
    """Return the kernels of a resolved backend for a matrix of k rows, or refuse one that is too large."""
    if backend == "pallas_gpu":
        if k > pallas_gpu.LARGEST:
            raise refuse(
                f"a matrix of {k} rows on one GPU", expected=f"at most {pallas_gpu.LARGEST}", remedy="use `sharded`"
            )
        return pallas_gpu.kernels()
    return pallas_tpu.kernels(pallas_tpu.block_for(k), interpret=backend == "interpret")


def slices_dtype(backend: Backend) -> jnp.dtype:
    """Return the dtype in which a resolved backend multiplies the slices of a residual fastest."""
    return jnp.dtype(jnp.float32 if backend == "reference" else jnp.bfloat16)


def definite(smallest: jax.Array, largest: jax.Array, k: int) -> jax.Array:
    """Return whether the smallest pivot is above the rounding error of elimination in k columns."""
    return smallest > 4 * k**0.5 * float(jnp.finfo(smallest.dtype).eps) * largest


def check_matrix(matrix: jax.Array, damping: float | jax.Array) -> None:
    """Refuse K where it is not a square matrix of float32 or float64, and λ where it is no number or negative."""
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not square or matrix.dtype not in (jnp.float32, jnp.float64):
        raise refuse(
            f"`matrix` has shape {matrix.shape} and type {matrix.dtype}",
            expected="a square matrix of float32 or float64, of one row at least",
            remedy="accumulate Gram matrices in float32 or better; vmap over a stack of matrices",
        )
    if jnp.ndim(damping):
        raise refuse(
            f"`damping` has shape {jnp.shape(damping)}",
            expected="one number",
            remedy="vmap over several, or add a diagonal to the matrix",
        )
    if not isinstance(damping, Tracer) and not damping >= 0:
        raise refuse(f"`damping` is {damping}", expected="a number of at least 0", remedy="add a non-negative damping")


def check_targets(matrix: jax.Array, targets: jax.Array) -> None:
    """Refuse B where it is not one or several columns of K's height and type."""
    if targets.ndim not in (1, 2) or targets.shape[0] != matrix.shape[0] or targets.dtype != matrix.dtype:
        raise refuse(
            f"`targets` has shape {targets.shape} and type {targets.dtype}, for a {matrix.dtype} matrix {matrix.shape}",
            expected="(k,) or (k, q), of the matrix's type",
            remedy="transpose rows to columns, and cast",
        )


def check_refine(refine: int) -> None:
    """Refuse a negative number of steps."""
    if refine < 0:
        raise refuse(f"`refine` is {refine}", expected="a number of steps, at least 0", remedy="leave it out for one")
