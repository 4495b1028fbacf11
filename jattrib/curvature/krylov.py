"""Damped inverses by products alone: conjugate gradients, LiSSA, power iteration.

They solve `(C + λI) X = B` for an operator C on vectors (`products.streamed`); vectors are pytrees like the
parameters with a leading axis, one row a right-hand side.  They are loops on the host, since a product with a curvature
may be a pass over data on disk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jattrib.core import tree
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.core.progress import track
from jattrib.core.types import Params
from jattrib.curvature.products import Operator, RandomOperator, Vectors, check_rows, random_vectors

MARGIN = 1.2
"""LiSSA's scale over the largest eigenvalue that was met."""


class Info(NamedTuple):
    """How a system was solved, by right-hand side.

    Attributes:
        residual: `‖b − (C + λI)x‖ / ‖b‖`, from a product of its own.
        iterations: products that it took.
        converged: whether the residual is within the tolerance.
    """

    residual: Float[np.ndarray, " q"]
    iterations: Int[np.ndarray, " q"]
    converged: Bool[np.ndarray, " q"]


class LissaInfo(NamedTuple):
    """How LiSSA ended.

    Attributes:
        scale: what the curvature was divided by.
        residual: of the last step of each repetition, `‖b − (C_t + λI)x‖ / ‖b‖` with its own random C_t: the mean.
    """

    scale: float
    residual: Float[np.ndarray, " q"]


class _Conjugate(NamedTuple):
    solution: Vectors
    residual: Vectors
    direction: Vectors
    product: Float[Array, " q"]
    size: Float[Array, " q"]


def conjugate_gradient(
    operator: Operator,
    targets: Vectors,
    *,
    damping: float | int = 0.0,
    tolerance: float = 1e-5,
    iterations: int = 100,
    precondition: Operator | None = None,
    progress: bool = False,
) -> tuple[Vectors, Info]:
    """Solve `(C + λI) X = B` by conjugate gradients, every right-hand side at its own pace.

    Where rounding has carried the running residual away from the true one, the directions start afresh from the true
    one, for as long as that halves it.

    Args:
        operator: the product with C, symmetric and positive semi-definite.
        targets: B.
        damping: λ, added to the mean curvature.
        tolerance: of the relative residual.
        iterations: products at most.
        precondition: an approximate inverse of C + λI, symmetric and positive definite; none when left out.
        progress: whether to show it.

    Returns:
        X, and `Info(residual, iterations, converged)`: a system that is not solved to the tolerance is reported there.

    Raises:
        InvalidInputError: `damping`, `tolerance` or `iterations` will not do, or B's leaves share no leading axis.
        DivergedError: a direction has negative curvature, or a number is not finite.

    Source: Hestenes and Stiefel 1952; for influence Koh and Liang 2017, section 3.
    """
    _check_settings(damping, tolerance=tolerance, iterations=iterations)
    targets = jax.tree.map(jnp.asarray, targets)
    check_rows(targets)
    check_finite(_norms(targets), "a right-hand side")
    targets, sizes = _level(targets)  # the squares of small ones would be 0
    ridge, norms = jnp.asarray(damping, _kind(targets)), _norms(targets)
    precondition = precondition or _same
    solution, taken, left = tree.zeros_like(targets), np.zeros(norms.shape, np.int32), iterations
    residual, size, largest = targets, np.where(np.asarray(norms) > 0, 1.0, 0.0), 0.0
    with track(iterations, "conjugate gradients", progress=progress) as advance:
        while True:
            active = size > tolerance
            if not active.any() or left <= 0:
                break
            state = _start(solution, residual, precondition(residual), norms)
            while left > 0 and active.any():
                state, curvature = _advance(state, operator(state.direction), ridge, jnp.asarray(active))
                flat, largest = _flat(np.asarray(curvature), active, largest, damping)
                preconditioned = precondition(state.residual)
                state = _turn(state, preconditioned, norms, jnp.asarray(active))
                check_finite(state.size, "the residual of conjugate gradients")
                taken, left = taken + active, left - 1
                active = active & ~flat & (np.asarray(state.size) > tolerance)
                advance(1)
            before, solution = size, state.solution
            residual, size = _residual(targets, solution, operator(solution), ridge, norms)
            size = np.asarray(size)
            if (size > before / 2)[size > tolerance].all():
                break
    return _scaled(sizes, solution), Info(size, taken, size <= tolerance)


def lissa(
    operator: RandomOperator,
    targets: Vectors,
    *,
    key: Key[Array, ""],
    damping: float | int,
    scale: float | None = None,
    steps: int = 1000,
    repeats: int = 1,
    progress: bool = False,
) -> tuple[Vectors, LissaInfo]:
    """Solve `(C + λI) X = B` by the series of Neumann with random products: `x ← b + x − (C_t + λI) x / s`.

    It converges if `s` exceeds every eigenvalue of every `C_t + λI`, in about `s / (λ_min + λ)` steps; X is then
    `x / s`.

    Args:
        operator: unbiased products with C, a key each (`products.sampled`); it may also pass over all the data.
        targets: B.
        key: of the random products.
        damping: λ, added to the mean curvature.
        scale: s; when left out, 1.2 times the largest eigenvalue that power iteration finds, plus λ.
        steps: terms of the series.
        repeats: independent series, averaged.
        progress: whether to show it.

    Returns:
        X, and `LissaInfo(scale, residual)`.

    Raises:
        InvalidInputError: `damping`, `scale`, `steps` or `repeats` will not do, or B's leaves share no leading axis.
        DivergedError: the series grows beyond what any convergent one can.

    Source: Agarwal, Bullins and Hazan 2017; Koh and Liang 2017, section 3.  Its scale is measured, not guessed.
    """
    _check_settings(damping, steps=steps, repeats=repeats, scale=1.0 if scale is None else scale)
    targets = jax.tree.map(jnp.asarray, targets)
    check_rows(targets)
    norms, spectrum, walk = _norms(targets), *jax.random.split(key)
    if scale is None:
        found = largest_eigenvalue(operator, jax.tree.map(lambda leaf: leaf[0], targets), key=spectrum)
        scale = MARGIN * found + damping or 1.0
    ridge, divisor = (jnp.asarray(each, _kind(targets)) for each in (damping, scale))
    total, residual = tree.zeros_like(targets), np.zeros(norms.shape)
    with track(steps * repeats, "LiSSA", progress=progress) as advance:
        for repeat in range(repeats):
            x, change = targets, norms
            for step in range(steps):
                which = jax.random.fold_in(jax.random.fold_in(walk, repeat), step)
                x, change, size = _neumann(x, targets, operator(which, x), ridge, divisor)
                if step % 25 == 24 or step == steps - 1:
                    _check_series(np.asarray(size), np.asarray(norms), step + 1, scale=scale, damping=damping)
                advance(1)
            total = tree.axpy(1 / (repeats * scale), x, total)
            residual += np.asarray(change) / np.where(norms > 0, norms, 1) / repeats
    return total, LissaInfo(scale, residual)


def largest_eigenvalue(operator: RandomOperator, like: Params, *, key: Key[Array, ""], iterations: int = 20) -> float:
    """Return the largest absolute eigenvalue that power iteration finds, from below: the largest `‖C_t v‖ / ‖v‖` met.

    Args:
        operator: products with C, a key each: with random ones the largest of all batches counts.
        like: the parameters.
        key: of the start and the products.
        iterations: products.

    Raises:
        DivergedError: a product is not finite.
    """
    vector, largest = random_vectors(jax.random.fold_in(key, 0), like, 1), 0.0
    vector, _ = _unit(vector)
    for number in range(1, iterations + 1):
        vector, norm = _unit(operator(jax.random.fold_in(key, number), vector))
        check_finite(norm, "a product with the curvature")
        largest = max(largest, float(norm[0]))
        if norm[0] == 0:
            break
    return largest


def _kind(vectors: Vectors) -> Any:
    return jnp.result_type(jax.tree.leaves(vectors)[0])


def _same(vectors: Vectors) -> Vectors:
    return vectors


_dots, _norms = jax.jit(jax.vmap(tree.dot)), jax.jit(jax.vmap(tree.norm))
_level, _scaled = jax.jit(jax.vmap(tree.level)), jax.jit(jax.vmap(tree.scale))


@jax.jit
def _unit(vectors: Vectors) -> tuple[Vectors, Float[Array, " q"]]:
    norms = _norms(vectors)
    return jax.vmap(tree.scale)(1 / jnp.where(norms > 0, norms, 1), vectors), norms


def _over(top: Float[Array, " q"], bottom: Float[Array, " q"]) -> Float[Array, " q"]:
    return jnp.where(bottom != 0, top / jnp.where(bottom != 0, bottom, 1), 0)


@jax.jit
def _start(solution: Vectors, residual: Vectors, preconditioned: Vectors, norms: Float[Array, " q"]) -> _Conjugate:
    return _Conjugate(
        solution, residual, preconditioned, _dots(residual, preconditioned), _over(_norms(residual), norms)
    )


@jax.jit
def _advance(
    state: _Conjugate, image: Vectors, ridge: Float[Array, ""], active: Bool[Array, " q"]
) -> tuple[_Conjugate, Float[Array, " q"]]:
    """Step along the directions, except along those that curve down, and return their curvatures."""
    image = tree.axpy(ridge, state.direction, image)
    curvature, squares = _dots(state.direction, image), _dots(state.direction, state.direction)
    length = jnp.where(active & (curvature > 0), _over(state.product, curvature), 0)
    along = jax.vmap(tree.axpy)
    moved = state._replace(
        solution=along(length, state.direction, state.solution), residual=along(-length, image, state.residual)
    )
    return moved, _over(curvature, squares)


@jax.jit
def _turn(
    state: _Conjugate, preconditioned: Vectors, norms: Float[Array, " q"], active: Bool[Array, " q"]
) -> _Conjugate:
    product = _dots(state.residual, preconditioned)
    ratio = jnp.where(active, _over(product, state.product), 0)
    direction = jax.vmap(tree.axpy)(ratio, state.direction, preconditioned)
    return state._replace(direction=direction, product=product, size=_over(_norms(state.residual), norms))


@jax.jit
def _residual(
    targets: Vectors, solution: Vectors, image: Vectors, ridge: Float[Array, ""], norms: Float[Array, " q"]
) -> tuple[Vectors, Float[Array, " q"]]:
    residual = tree.axpy(-1, tree.axpy(ridge, solution, image), targets)
    return residual, _over(_norms(residual), norms)


@jax.jit
def _neumann(
    x: Vectors, targets: Vectors, image: Vectors, ridge: Float[Array, ""], scale: Float[Array, ""]
) -> tuple[Vectors, Float[Array, " q"], Float[Array, " q"]]:
    change = tree.axpy(-1 / scale, tree.axpy(ridge, x, image), targets)
    x = tree.axpy(1, change, x)
    return x, _norms(change), _norms(x)


def _check_settings(damping: float | int, **positive: float | int) -> None:
    wrong = {name: value for name, value in positive.items() if not value > 0}
    if not (np.isfinite(damping) and damping >= 0) or wrong:
        name, value = next(iter(wrong.items()), ("damping", damping))
        raise InvalidInputError(
            f"{name} = {value:g}", expected="a positive number (a damping may be 0)", remedy=f"change {name}"
        )


def check_finite(norms: Array | np.ndarray, what: str) -> None:
    """Refuse norms that are not finite numbers.

    Raises:
        DivergedError: one is not.
    """
    bad = ~np.isfinite(np.asarray(norms))
    if bad.any():
        raise DivergedError(
            f"{what} is not finite (row {int(bad.argmax())})",
            expected="finite numbers",
            remedy="look for NaN or overflow: a diverged checkpoint, an input, gradients in half precision",
        )


def _flat(
    curvature: np.ndarray, active: np.ndarray, largest: float, damping: float
) -> tuple[Bool[np.ndarray, " q"], float]:
    """Return where a direction is flat to rounding, and the largest curvature so far; refuse one that curves down."""
    check_finite(np.where(active, curvature, 0), "a product with the curvature")
    largest, lowest = (
        max(largest, float(curvature.max(initial=0, where=active))),
        float(curvature.min(where=active, initial=np.inf)),
    )
    if lowest < -100 * float(np.finfo(curvature.dtype).eps) * largest or largest == 0:
        raise DivergedError(
            f"a direction of curvature {lowest:.3g} with damping {damping:g}",
            expected="a positive definite curvature: a Hessian away from a minimum has negative eigenvalues",
            remedy=f"use the generalised Gauss-Newton matrix, or a damping well above {damping - lowest:.3g}",
        )
    return active & (curvature <= 0), largest


def _check_series(sizes: np.ndarray, norms: np.ndarray, steps: int, *, scale: float, damping: float | int) -> None:
    bound = norms * min(10 * scale / damping if damping > 0 else np.inf, steps + 1.0)
    grown = ~(sizes <= bound * (1 + 1e-3))
    if grown.any():
        at = int(grown.argmax())
        raise DivergedError(
            f"LiSSA's series of right-hand side {at} has grown to {sizes[at]:.3g} times the scale after {steps} steps, "
            f"with scale {scale:.3g} and damping {damping:g}",
            expected="eigenvalues between 0 and the scale, for every batch",
            remedy=f"give a larger scale ({2 * scale:.3g}, say), larger batches, or a curvature without negative "
            "eigenvalues",
        )
