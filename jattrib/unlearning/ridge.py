"""Unlearning where everything is known: ridge regression, its exact update, and the paths of iterative algorithms.

With `L(θ) = ½ Σ_i v_i (x_iᵀθ − y_i)² + ½ λ ‖θ‖²`, every algorithm here is an affine iteration `θ ← θ − η (A θ − b)`,
and its speed is the spectrum of A.  Descent on R is slow in the directions that F alone spans, since R hardly curves
there; matching the outputs of the retrained solution on a set that holds F is not, because its targets can be reached:
`A = X_Sᵀ W X_S` and `b = A θ_R`.

Source: Georgiev et al. 2024, section 4.2 (ridge regression).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jattrib.core.errors import InvalidInputError


class Ridge(NamedTuple):
    """A problem: all rows, and which of them are to be forgotten.

    Attributes:
        x: the rows.
        y: their targets.
        forget: 1 for the rows of F, 0 for those of R.
        penalty: λ.
    """

    x: Float[Array, "n p"]
    y: Float[Array, " n"]
    forget: Float[Array, " n"]
    penalty: float


class Iteration(NamedTuple):
    """An algorithm's gradient, `A θ − b`."""

    matrix: Float[Array, "p p"]
    target: Float[Array, " p"]


def fit(problem: Ridge, weights: Float[Array, " n"]) -> Float[Array, " p"]:
    """Return the minimiser `(Xᵀ V X + λI)⁻¹ Xᵀ V y` with data weights v.

    Raises:
        InvalidInputError: `Xᵀ V X + λI` is singular to working precision.
    """
    iteration = _least_squares(problem, weights, problem.penalty)
    return _solve(iteration.matrix, iteration.target)


def retrained(problem: Ridge) -> Float[Array, " p"]:
    """Return `θ_R`, the solution without F; the errors are those of `fit`."""
    return fit(problem, 1 - problem.forget)


def exact_update(problem: Ridge, full: Float[Array, " p"]) -> Float[Array, " p"]:
    """Return `θ_R = θ_full − (X_Rᵀ X_R + λI)⁻¹ X_Fᵀ r_F` with the residuals `r = y − X θ_full`: one solve, of rank |F|.

    Raises:
        InvalidInputError: `X_Rᵀ X_R + λI` is singular to working precision.

    Source: Georgiev et al. 2024, section 4.2; it is Newton's step, which is exact here.
    """
    curvature = _least_squares(problem, 1 - problem.forget, problem.penalty).matrix
    residuals = (problem.y - problem.x @ full) * problem.forget
    return full - _solve(curvature, problem.x.T @ residuals)


def retain_descent(problem: Ridge) -> Iteration:
    """Descend the objective of R."""
    return _least_squares(problem, 1 - problem.forget, problem.penalty)


def ascent_descent(problem: Ridge, ascent: float) -> Iteration:
    """Descend the objective of R and ascend the squares of F, `ascent` times as fast."""
    return _least_squares(problem, (1 - problem.forget) - ascent * problem.forget, problem.penalty)


def gradient_ascent(problem: Ridge) -> Iteration:
    """Ascend the squares of F."""
    return _least_squares(problem, -problem.forget, 0.0)


def oracle_matching(problem: Ridge, weights: Float[Array, " n"]) -> Iteration:
    """Descend `½ Σ_i w_i (x_iᵀθ − x_iᵀθ_R)²`, towards the retrained outputs; `weights` are zero outside of S."""
    matrix = (problem.x.T * weights[None, :]) @ problem.x
    return Iteration(matrix, matrix @ retrained(problem))


def best_rate(iteration: Iteration) -> Float[Array, ""]:
    """Return the constant rate whose worst contraction is best, `2 / (λ_min + λ_max)`.

    Raises:
        InvalidInputError: the iteration ascends in some direction: no rate makes it converge.
    """
    spectrum = jnp.linalg.eigvalsh(iteration.matrix)
    if not spectrum[0] > 0:
        raise InvalidInputError(
            f"an iteration with the smallest eigenvalue {float(spectrum[0]):.3g}",
            expected="a positive definite matrix",
            remedy="lower the ascent, or give a rate and few steps: it diverges",
        )
    return 2 / (spectrum[0] + spectrum[-1])


def path(
    iteration: Iteration, start: Float[Array, " p"], *, rate: Float[Array, ""] | float, steps: int
) -> Float[Array, "ends p"]:
    """Return where the iteration is after 0, 1, …, `steps` steps."""

    def step(theta: Float[Array, " p"], _: None) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
        theta = theta - jnp.asarray(rate, theta.dtype) * (iteration.matrix @ theta - iteration.target)
        return theta, theta

    _, found = jax.lax.scan(step, start, None, length=steps)
    return jnp.concatenate([start[None], found])


def distances(found: Float[Array, "ends p"], goal: Float[Array, " p"]) -> Float[Array, " ends"]:
    """Return `‖θ_t − θ_R‖ / ‖θ_0 − θ_R‖` along a path."""
    lengths = jnp.linalg.norm(found - goal[None], axis=1)
    return lengths / lengths[0]


def _solve(matrix: Float[Array, "p p"], target: Float[Array, " p"]) -> Float[Array, " p"]:
    sizes = jnp.abs(jnp.linalg.eigvalsh(matrix))
    if not sizes.min() > len(matrix) * jnp.finfo(matrix.dtype).eps * sizes.max():
        raise InvalidInputError(
            f"a matrix whose eigenvalues are between {float(sizes.min()):.3g} and {float(sizes.max()):.3g} in size",
            expected=f"one that is not singular in {matrix.dtype}",
            remedy="give a penalty, more rows than columns, or float64; check that the rows are finite",
        )
    return jnp.linalg.solve(matrix, target)


def _least_squares(problem: Ridge, weights: Float[Array, " n"], penalty: float) -> Iteration:
    weighted = problem.x.T * weights[None, :]
    identity = jnp.eye(problem.x.shape[1], dtype=problem.x.dtype)
    return Iteration(weighted @ problem.x + penalty * identity, weighted @ problem.y)
