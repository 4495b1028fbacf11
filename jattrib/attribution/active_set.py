"""The elastic net of one target, a step at a time: a primal-dual active set, damped where it cycles.

From a point w with gradient g and D the diagonal of `XᵀX`, the active set is where `|(D + μ) w − g| > α`, its signs are
those of `(D + μ) w − g`, and on it the minimiser of

    ½ ‖y − X v‖² + α ‖v‖₁ + ½ β ‖v‖² + ½ μ ‖v − w‖²

solves a linear system: a semismooth Newton step, found by conjugate gradients.  Off it v is 0.

Newton's method may cycle where columns depend on one another.  Of a step only the part along which the objective falls
most is taken; where that is little, the damping μ grows, up to where steps are those of a proximal gradient, which
converge from anywhere; where the whole step helps, it shrinks.

Source: Hintermüller, Ito and Kunisch 2002 (primal-dual active sets are semismooth Newton steps); Griesse and Lorenz
2008 (for this problem); Fercoq, Gramfort and Salmon 2015 (the dual point of the gap); Lee, Sun and Saunders 2014
(Newton's steps of composite functions with line search); Rockafellar 1976 (the proximal point).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

HALVINGS = 8
"""Of the interval that holds the best part of a step: more make no difference to how many products it takes."""

SLOPE = 0.1
"""Of the objective's slope at the beginning of a step, which may be left, upwards, at the end of a whole one."""

SHORT = 0.4
"""Of a step, what part must help for the damping not to grow."""

DAMPING = 0.1
"""The first damping, in units of the mean energy of a column."""

FACTOR = 8.0
"""By which it grows, or shrinks."""


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


def signs(
    weights: Float[Array, " n"], gradient: Float[Array, " n"], curvatures: Float[Array, " n"], alpha: Float[Array, ""]
) -> Float[Array, " n"]:
    """Return the signs of the active set, and 0 elsewhere; curvatures are those of single columns, with the damping."""
    shifted = curvatures * weights - gradient
    return jnp.where(jnp.abs(shifted) > alpha, jnp.sign(shifted), 0)


def downwards(slope: Float[Array, " n"], signs: Float[Array, " n"], alpha: Float[Array, ""]) -> Float[Array, " n"]:
    """Return minus the objective's slope on the active set, and 0 off it; `slope` is that of its smooth part."""
    return jnp.where(signs != 0, -(slope + alpha * signs), 0)


class Line(NamedTuple):
    """A step from a point, and what a part of it changes: along it the objective is convex and piecewise quadratic.

    Attributes:
        weights: w.
        gradient: `Xᵀ(Xw − y)`.
        step: v − w.
        change: `XᵀX (v − w)`.
        alpha: α.
        beta: β.
    """

    weights: Float[Array, "*t n"]
    gradient: Float[Array, "*t n"]
    step: Float[Array, "*t n"]
    change: Float[Array, "*t n"]
    alpha: Float[Array, "*t"]
    beta: Float[Array, "*t"]

    def slope(self, part: Float[Array, ""]) -> Float[Array, ""]:
        """Return the objective's slope, from the left, at a part of the step."""
        point = self.weights + part * self.step
        sign = jnp.where(self.weights != 0, jnp.sign(self.weights), jnp.sign(self.step))
        sign = jnp.where(point != 0, jnp.sign(point), sign)
        return jnp.sum(self.step * (self.gradient + part * self.change + self.beta * point + self.alpha * sign))


def is_whole(line: Line) -> Bool[Array, ""]:
    """Return whether the objective falls nearly to the end of a step."""
    return line.slope(jnp.ones_like(line.alpha)) <= SLOPE * jnp.abs(line.slope(jnp.zeros_like(line.alpha)))


def best_part(line: Line) -> Float[Array, ""]:
    """Return the part of a step, at most the whole, at which the objective is least."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        falls = line.slope(middle) <= 0
        return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

    return jax.lax.fori_loop(0, HALVINGS, halve, (jnp.zeros_like(line.alpha), jnp.ones_like(line.alpha)))[0]


def damped(
    damping: Float[Array, ""], part: Float[Array, ""], energy: Float[Array, ""], most: Float[Array, ""]
) -> Float[Array, ""]:
    """Return the damping of the next step.

    Args:
        damping: of the last one.
        part: what part of it was taken.
        energy: the mean one of a column.
        most: more than this is never needed: the largest eigenvalue of `XᵀX`.
    """
    first = DAMPING * energy
    grown = jnp.minimum(jnp.maximum(FACTOR * damping, first), most)
    shrunk = jnp.where(damping > first, damping / FACTOR, 0)
    return jnp.where(part <= SHORT, grown, jnp.where(part >= 1, shrunk, damping))
