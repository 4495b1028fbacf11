"""The elastic net of one target on some columns: a primal-dual active set with a way back where it cycles.

From a point w with gradient g and D the diagonal of `XᵀX`, the active set is where `|D w − g| > α`, its signs are those
of `D w − g`, and on it the minimiser of `½ ‖y − X w‖² + α ‖w‖₁ + ½ β ‖w‖²` solves a linear system: a semismooth Newton
step, found by conjugate gradients.

Newton's method may cycle where columns depend on one another.  Of a step only the part along which the objective falls
is taken; where that is little, sweeps over the columns follow, twice as many each time: they converge from
anywhere.

Source: Hintermüller, Ito and Kunisch 2002 (primal-dual active sets are semismooth Newton steps); Griesse and Lorenz
2008 (for this problem); Fercoq, Gramfort and Salmon 2015 (the dual point of the gap); Tseng 2001 (minimising over one
column at a time converges).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

REDUCTION = 0.05
"""Of the residual of a linear system, at which its conjugate gradients end."""

CONJUGATE_STEPS = 40
"""At most so many of them for one system."""

HALVINGS = 24
"""Of the interval that holds the best part of a step."""

SHORT = 0.2
"""Of a step, what part must help for no sweep to follow."""

SLOPE = 0.1
"""Of the objective's slope at the beginning of a step, which may be left, upwards, at the end of a whole one."""

NEWTON_STEPS = 16
"""At most so many in one round."""


class Task(NamedTuple):
    """One target's problem at one penalty on some columns.

    Attributes:
        multiply: takes v to `XᵀX v`.
        column: takes a column's place to that column of `XᵀX`.
        energies: the diagonal of `XᵀX`.
        correlation: `Xᵀy`.
        energy: `‖y‖²`.
        alpha: the penalty α.
        beta: the penalty β.
        flat: a curvature along a unit vector that is rounding.
    """

    multiply: Callable[[Array], Array]
    column: Callable[[Array], Array]
    energies: Float[Array, " w"]
    correlation: Float[Array, " w"]
    energy: Float[Array, ""]
    alpha: Float[Array, ""]
    beta: Float[Array, ""]
    flat: Float[Array, ""]

    def change(self, step: Float[Array, " w"]) -> Float[Array, " w"]:
        """Return by how much a step changes the gradient of the smooth part.

        Gradients are moved, never computed anew from these columns: their error is then that of the whole design's
        product, which a round begins with, and rounding falls with the steps.
        """
        return self.multiply(step) + self.beta * step


def relative_gap(
    weights: Float[Array, " n"],
    gradient: Float[Array, " n"],
    correlation: Float[Array, " n"],
    energy: Float[Array, ""],
    alpha: Float[Array, ""],
) -> Float[Array, ""]:
    """Return the duality gap divided by the objective at w = 0, which is `½ ‖y‖²`.

    With r the residual of the problem in which β is written as further rows, the gradient is `g = −Xᵀr`, and the dual
    point is `s r` with `s = min(1, α / max|g|)`, which is feasible.  The gap is then a sum of terms that are not
    negative, `½ (1 − s)² ‖r‖² + Σ_j (α |w_j| + s w_j g_j)`, and is computed so: nothing large cancels.

    Args:
        weights: w.
        gradient: g, of the smooth part: with `β w`.
        correlation: `Xᵀy`.
        energy: `‖y‖²`; where it is 0, so is the gap.
        alpha: α.
    """
    tiny = jnp.finfo(weights.dtype).tiny
    shrink = jnp.minimum(1, alpha / jnp.maximum(jnp.max(jnp.abs(gradient)), tiny))
    squares = jnp.maximum(energy + jnp.sum(weights * (gradient - correlation)), 0)
    rest = jnp.sum(jnp.maximum(alpha * jnp.abs(weights) + shrink * weights * gradient, 0))
    gap = 0.5 * jnp.square(1 - shrink) * squares + rest
    return jnp.where(energy > 0, gap / jnp.maximum(0.5 * energy, tiny), 0)


def minimise(
    task: Task, weights: Float[Array, " w"], gradient: Float[Array, " w"], tolerance: Float[Array, ""]
) -> Float[Array, " w"]:
    """Take Newton steps, and sweeps over the columns where those do not help, until the gap is small enough.

    `gradient` is that of the weights without β's part.
    """

    def going(carry):
        weights, gradient, steps, _ = carry
        gap = relative_gap(weights, gradient, task.correlation, task.energy, task.alpha)
        return (gap > tolerance) & (steps < NEWTON_STEPS)

    def iterate(carry):
        weights, gradient, steps, bouts = carry
        step, change = _newton(task, weights, gradient)
        length = _length(task, weights, gradient, step, change)
        weights, gradient = weights + length * step, gradient + length * change
        helps = length > SHORT
        sweeps = jnp.where(helps, 0, 2 ** jnp.minimum(bouts, 8))
        weights, gradient = _sweeps(task, weights, gradient, sweeps)
        return weights, gradient, steps + 1, jnp.where(helps, bouts, bouts + 1)

    none = jnp.zeros((), jnp.int32)
    carry = (weights, gradient + task.beta * weights, none, none)
    return jax.lax.while_loop(going, iterate, carry)[0]


def _newton(
    task: Task, weights: Float[Array, " w"], gradient: Float[Array, " w"]
) -> tuple[Float[Array, " w"], Float[Array, " w"]]:
    """Return the step to the minimiser on the active set with its signs, by conjugate gradients.

    Also by how much it changes the gradient.
    """
    shifted = task.energies * weights - gradient
    signs = jnp.where(jnp.abs(shifted) > task.alpha, jnp.sign(shifted), 0)
    step = jnp.where(signs != 0, 0, -weights)
    change = task.change(step)
    residual = jnp.where(signs != 0, -(gradient + change + task.alpha * signs), 0)
    start = jnp.sum(residual * residual)

    def going(carry):
        *_, norm, steps = carry
        return (norm > REDUCTION**2 * start) & (steps < CONJUGATE_STEPS)

    def iterate(carry):
        step, change, residual, direction, norm, steps = carry
        changed = task.change(direction)
        curvature, squares = jnp.sum(direction * changed), jnp.sum(direction * direction)
        curved = curvature > task.flat * squares
        length = jnp.where(curved, norm / jnp.where(curved, curvature, 1), 0)
        step, change = step + length * direction, change + length * changed
        residual = residual - length * jnp.where(signs != 0, changed, 0)
        after = jnp.sum(residual * residual)
        direction = residual + after / jnp.where(norm > 0, norm, 1) * direction
        return step, change, residual, direction, after, jnp.where(curved, steps + 1, CONJUGATE_STEPS)

    carry = (step, change, residual, residual, start, jnp.zeros((), jnp.int32))
    step, change, *_ = jax.lax.while_loop(going, iterate, carry)
    return step, change


def _length(
    task: Task,
    weights: Float[Array, " w"],
    gradient: Float[Array, " w"],
    step: Float[Array, " w"],
    change: Float[Array, " w"],
) -> Float[Array, ""]:
    """Return what part of a step has the least objective: the whole of it, if the objective falls nearly to its end.

    Along a step the objective is convex and piecewise quadratic; its slope, from the left, needs no product.
    """

    def slope(length: Float[Array, ""]) -> Float[Array, ""]:
        point = weights + length * step
        sign = jnp.where(point != 0, jnp.sign(point), jnp.where(weights != 0, jnp.sign(weights), jnp.sign(step)))
        return jnp.sum(step * (gradient + length * change + task.alpha * sign))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        falls = slope(middle) <= 0
        return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

    zero, one = jnp.zeros((), weights.dtype), jnp.ones((), weights.dtype)
    is_whole = slope(one) <= SLOPE * jnp.abs(slope(zero))
    low, _ = jax.lax.fori_loop(0, jnp.where(is_whole, 0, HALVINGS), halve, (zero, one))
    return jnp.where(is_whole, one, low)


def _sweeps(
    task: Task, weights: Float[Array, " w"], gradient: Float[Array, " w"], count: Int[Array, ""]
) -> tuple[Float[Array, " w"], Float[Array, " w"]]:
    """Minimise over each column in turn, so many times."""
    size = weights.shape[0]
    curvatures = task.energies + task.beta

    def iterate(carry):
        weights, gradient, steps = carry
        at = steps % size
        curvature = curvatures[at]
        target = curvature * weights[at] - gradient[at]
        target = jnp.sign(target) * jnp.maximum(jnp.abs(target) - task.alpha, 0)
        moved = jnp.where(curvature > 0, target / jnp.where(curvature > 0, curvature, 1), 0)
        change = moved - weights[at]
        gradient = (gradient + change * task.column(at)).at[at].add(task.beta * change)
        return weights.at[at].set(moved), gradient, steps + 1

    carry = (weights, gradient, jnp.zeros((), count.dtype))
    weights, gradient, _ = jax.lax.while_loop(lambda carry: carry[2] < count * size, iterate, carry)
    return weights, gradient
