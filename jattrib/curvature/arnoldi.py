"""Eigenvectors of a curvature by Arnoldi's iteration, and the damped inverse on the space that they span."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jattrib.core import tree
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.core.progress import track
from jattrib.core.types import Params, Projector
from jattrib.curvature.krylov import check_finite
from jattrib.curvature.products import Operator, Vectors, check_vectors


class Subspace(NamedTuple):
    """Eigenvectors of a curvature, approximate ones unless the iteration went all the way.

    Attributes:
        basis: orthonormal vectors w.
        eigenvalues: λ, the largest in absolute value first.
        residuals: `‖Cw − λw‖`, from the iteration's own remainder.
    """

    basis: Vectors
    eigenvalues: Float[Array, " k"]
    residuals: Float[Array, " k"]


def arnoldi(
    operator: Operator,
    like: Params,
    *,
    key: Key[Array, ""],
    steps: int = 100,
    rank: int | None = None,
    progress: bool = False,
) -> Subspace:
    """Return eigenvectors of C from the Krylov space of a random vector, `span{v, Cv, …, C^(m−1)v}`.

    Every new vector is made orthogonal to all before, twice, so no eigenvalue appears twice by rounding; where the
    space is exhausted (C has fewer distinct eigenvalues than steps) a new random vector goes on.  With as many steps as
    parameters the eigenvectors are C's own.  Of parameters in half precision they are in single.

    Args:
        operator: the product with C, symmetric.
        like: the parameters.
        key: of the start.
        steps: m, products; m · p numbers are in memory.
        rank: eigenvectors kept, those of the largest eigenvalues in absolute value; all m when left out.
        progress: whether to show it.

    Raises:
        InvalidInputError: there are more steps than parameters, or a larger rank than steps.
        DivergedError: a product is not finite.

    Source: Arnoldi 1951; Schioppa et al. 2022, section 3 and algorithm 2, which orthogonalises once and keeps the
    whole Hessenberg matrix; here its upper triangle is mirrored, as C is symmetric.
    """
    size, rank = tree.size(like), steps if rank is None else rank
    if not 1 <= rank <= steps <= size:
        raise InvalidInputError(
            f"steps = {steps}, rank = {rank} for {size} parameters",
            expected="1 <= rank <= steps <= parameters",
            remedy="50 to 200 steps and half as many eigenvectors are usual; all parameters for an exact inverse",
        )
    flat, unravel = tree.ravel(tree.widen(like))  # in half precision no vector is orthogonal to another
    kinds = jax.tree.map(jnp.result_type, like)
    space, projected = jnp.zeros((steps, size), flat.dtype), np.zeros((steps, steps))
    draws = iter(range(2 * steps))
    vector, remainder = _fresh(key, next(draws), space), 0.0
    with track(steps, "Arnoldi", progress=progress) as advance:
        for step in range(steps):
            space = space.at[step].set(vector)
            asked = jax.tree.map(lambda leaf, kind: leaf[None].astype(kind), unravel(vector), kinds)
            image = tree.ravel(tree.widen(operator(asked)))[0]
            vector, overlap, norms = _orthogonal(space, image)
            check_finite(norms, "a product with the curvature")
            projected[:, step], remainder = np.asarray(overlap, np.float64), float(norms[1])
            if remainder <= 1e3 * jnp.finfo(flat.dtype).eps * float(norms[0]):
                vector, remainder = _fresh(key, next(draws), space) if step + 1 < steps else vector, 0.0
            advance(1)
    values, vectors = np.linalg.eigh(np.triu(projected) + np.triu(projected, 1).T)
    chosen = np.argsort(-np.abs(values), kind="stable")[:rank]
    rows = jnp.matmul(jnp.asarray(vectors[:, chosen].T, flat.dtype), space, precision="highest")
    residuals = remainder * np.abs(vectors[-1, chosen])
    return Subspace(jax.vmap(unravel)(rows), *(jnp.asarray(each, flat.dtype) for each in (values[chosen], residuals)))


def inverse(subspace: Subspace, *, damping: float | int = 0.0) -> Operator:
    """Return the preconditioner `v ↦ W (Λ + λI)⁻¹ Wᵀ v`: the damped inverse on the subspace, zero across it.

    Raises:
        InvalidInputError: the damping is not finite.
        DivergedError: an eigenvalue and the damping cancel.

    Source: Schioppa et al. 2022, section 3, equation 5.
    """
    return jax.tree_util.Partial(_within, subspace.basis, 1 / _damped(subspace, damping))


def projector(subspace: Subspace, *, damping: float | int = 0.0) -> Projector:
    """Return the projector `φ = (Λ + λI)^−½ Wᵀ g`, whose plain inner products are those of `inverse`.

    The features of a training set can be kept and queried again; the state is the basis.

    Raises:
        InvalidInputError: the damping is not finite.
        DivergedError: an eigenvalue plus the damping is not positive.

    Source: Schioppa et al. 2022, section 3.
    """
    damped = _damped(subspace, damping)
    if not (damped > 0).all():
        raise DivergedError(
            f"an eigenvalue of {float(subspace.eigenvalues.min()):.3g} with damping {damping:g}",
            expected="positive eigenvalues", remedy="use the generalised Gauss-Newton matrix, a larger damping or a "
            "smaller rank",
        )  # fmt: skip
    state = subspace.basis, 1 / jnp.sqrt(damped)

    def apply(state: Any, gradients: Params) -> Float[Array, "n k"]:
        return _coordinates(state[0], gradients) * state[1][None]

    return Projector(len(damped), lambda key, params: state, apply)


def _fresh(key: Key[Array, ""], number: int, space: Float[Array, "m p"]) -> Float[Array, " p"]:
    vector = jax.random.normal(jax.random.fold_in(key, number), space.shape[1:], space.dtype)
    return _orthogonal(space, vector / jnp.linalg.norm(vector))[0]


@jax.jit
def _orthogonal(
    space: Float[Array, "m p"], image: Float[Array, " p"]
) -> tuple[Float[Array, " p"], Float[Array, " m"], Float[Array, "2"]]:
    """Return the unit vector of what is left of `image`, its overlaps, and the norms of both."""
    overlap = jnp.matmul(space, image, precision="highest")
    left = image - jnp.matmul(overlap, space, precision="highest")
    again = jnp.matmul(space, left, precision="highest")
    left, overlap = left - jnp.matmul(again, space, precision="highest"), overlap + again
    norm = jnp.linalg.norm(left)
    return left / jnp.where(norm > 0, norm, 1), overlap, jnp.stack([jnp.linalg.norm(image), norm])


def _damped(subspace: Subspace, damping: float | int) -> Float[Array, " k"]:
    values = subspace.eigenvalues
    damped = values + jnp.asarray(damping, values.dtype)
    if not np.isfinite(damping):
        raise InvalidInputError(f"damping = {damping}", expected="a finite number", remedy="change damping")
    if not (jnp.abs(damped) > jnp.finfo(values.dtype).eps * jnp.abs(values).max()).all():
        raise DivergedError(
            f"an eigenvalue of {float(values[jnp.argmin(jnp.abs(damped))]):.3g} with damping {damping:g}",
            expected="a sum away from zero: the curvature is singular on this subspace",
            remedy="give a larger damping, or keep fewer eigenvectors (`rank`)",
        )
    return damped


def _coordinates(basis: Vectors, vectors: Vectors) -> Float[Array, "q k"]:
    """Return `v Wᵀ`; a leaf that is a `jax.ShapeDtypeStruct` is absent and contributes nothing."""
    pairs = zip(jax.tree.leaves(basis), jax.tree.leaves(vectors), strict=True)
    parts = [
        jnp.matmul(v.reshape(len(v), -1).astype(w.dtype), w.reshape(len(w), -1).T, precision="highest")
        for w, v in pairs
        if not isinstance(v, jax.ShapeDtypeStruct)
    ]
    return functools.reduce(jnp.add, parts)


@jax.jit
def _within(basis: Vectors, factors: Float[Array, " k"], vectors: Vectors) -> Vectors:
    check_vectors(jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], basis)), vectors)
    along = _coordinates(basis, vectors) * factors[None]
    return jax.tree.map(
        lambda w, v: jnp.tensordot(along, w, axes=1, precision="highest").astype(v.dtype), basis, vectors
    )
