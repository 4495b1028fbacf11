"""The elastic net along a path of penalties, for many targets at once: what `surrogate` solves with.

In standardised columns, and for each target of its own, it minimises

    ½ ‖y − X w‖² + α ‖w‖₁ + ½ β ‖w‖².

All targets go in step: each says which vector it wants to know `XᵀX v` of, one product of matrices answers them all,
and each goes on from its answer.  So nearly all of the time is in products of matrices, whatever the targets do.

A target moves by a semismooth Newton method (a primal-dual active set) with conjugate gradients: from a point w with
gradient g and D the diagonal of `XᵀX`, the active set is where `|D w − g| > α`, its signs are those of `D w − g`, and
on it the minimiser solves a linear system.  Newton's method may cycle where columns depend on one another.  Of a step
only a part along which the objective is certain to fall is taken, and where that is little, plain steps follow, twice
as many each time: every column moves to where it alone would be least, as far as all of them together help.  They
converge from anywhere.

Gradients move with the weights, and are computed anew, from the residual, before a target goes on to its next penalty:
the duality gap is then that of the weights.  From one penalty to the next the solution, and with it the gradient, is
extrapolated: both are piecewise linear.

Source: Hintermüller, Ito and Kunisch 2002 (primal-dual active sets are semismooth Newton steps); Griesse and Lorenz
2008 (for this problem); Fercoq, Gramfort and Salmon 2015 (the dual point of the gap); Tseng and Yun 2009 (plain steps
with a line search converge).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jattrib.core import mesh as meshes

FEWEST = 32
"""Targets in step on a device: with fewer left, products take as long."""

REDUCTION = 0.25
"""Of the residual of a linear system, at which its conjugate gradients end."""

CONJUGATE_STEPS = 40
"""At most so many of them for one system."""

SHORT = 0.2
"""Of a Newton step, what part must help for no plain step to follow."""

MOVES = 16
"""With so many moves a gradient is computed anew."""

CHECKS = 120
"""Of the gap at one penalty, before a target is given up there: it is then above the tolerance, and is reported."""

SAFETY = 0.3
"""Of the tolerance, at which the gap is worth a check."""

CHECK, BEGIN, CONJUGATE, PLAIN = np.arange(4, dtype=np.int32)
"""What a target wants its product for: the gradient at its weights; the gradient with the columns that a Newton step
turns off at zero; a conjugate gradient; a plain step."""


class Problem(NamedTuple):
    """The design, which all targets share, in standardised columns.

    Attributes:
        rows: X, its columns of mean 0.
        gram: `XᵀX`, or None where products with the rows cost less, or it is too large to keep.
        held_out: rows that are predicted and not fitted, in the same units.
        lipschitz: the largest eigenvalue of `XᵀX`, or a little more.
        energies: the diagonal of `XᵀX`.
    """

    rows: Float[Array, "m n"]
    gram: Float[Array, "n n"] | None
    held_out: Float[Array, "h n"]
    lipschitz: Float[Array, ""]
    energies: Float[Array, " n"]


class Targets(NamedTuple):
    """Targets, centred as the rows are, and the penalties that each visits, in descending order.

    Attributes:
        outputs: y.
        correlation: `Xᵀy`.
        energy: `‖y‖²`.
        held_out: the outputs of the rows that are not fitted.
        alpha: the penalties α.
        beta: the penalties β.
        start: the weights to start from.
    """

    outputs: Float[Array, "t m"]
    correlation: Float[Array, "t n"]
    energy: Float[Array, " t"]
    held_out: Float[Array, "t h"]
    alpha: Float[Array, "t k"]
    beta: Float[Array, "t k"]
    start: Float[Array, "t n"]


class Rule(NamedTuple):
    """When a target goes on to its next penalty, and when it ends.

    Attributes:
        tolerance: the duality gap divided by `½ ‖y‖²`.
        patience: a target ends when its held-out error has not improved for so many penalties; 0: at the last.
        keep_path: whether to keep the weights of every penalty.
    """

    tolerance: float
    patience: int = 0
    keep_path: bool = False


class Solution(NamedTuple):
    """Where the targets arrived.

    Attributes:
        weights: at the chosen penalty, in standardised columns.
        chosen: which penalty that is: the one of the least held-out error, or the last.
        gaps: the relative duality gap at every penalty, against all columns; NaN where the target did not go so far.
        errors: the sum of squares over the held-out rows at every penalty; NaN likewise.
        products: with the design, that it took.
        path: the weights at every penalty, if they were asked for.
    """

    weights: Float[Array, "t n"]
    chosen: Int[Array, " t"]
    gaps: Float[Array, "t k"]
    errors: Float[Array, "t k"]
    products: Int[Array, " t"]
    path: Float[Array, "t p n"]


class _Lane(NamedTuple):
    """A target on its way.

    Attributes:
        weights: w.
        gradient: `XᵀXw − Xᵀy`, without β's part.
        last_weights: those of the penalty before.
        last_gradient: likewise.
        step: of Newton's, as far as it is known.
        change: by how much it changes the gradient, without β's part.
        wanted: the vector to be multiplied.
        phase: what for.
        norm: the square of the linear system's residual.
        goal: at which it is solved.
        steps: conjugate ones that it took.
        plain: plain steps that are to follow.
        bouts: of plain steps, so far.
        moves: since the gradient was computed.
        checks: at this penalty.
        stage: which penalty.
        best: the least held-out error so far.
        record: what it leaves.
    """

    weights: Float[Array, "*t n"]
    gradient: Float[Array, "*t n"]
    last_weights: Float[Array, "*t n"]
    last_gradient: Float[Array, "*t n"]
    step: Float[Array, "*t n"]
    change: Float[Array, "*t n"]
    wanted: Float[Array, "*t n"]
    phase: Int[Array, "*t"]
    norm: Float[Array, "*t"]
    goal: Float[Array, "*t"]
    steps: Int[Array, "*t"]
    plain: Int[Array, "*t"]
    bouts: Int[Array, "*t"]
    moves: Int[Array, "*t"]
    checks: Int[Array, "*t"]
    stage: Int[Array, "*t"]
    best: Float[Array, "*t"]
    record: Solution


def descend(problem: Problem, targets: Targets, rule: Rule, *, mesh: Mesh | None = None) -> Solution:
    """Solve for every target along its penalties.

    Where half of those in step have arrived, the others go on in half as many places.

    Args:
        problem: the design, whole on every device.
        targets: spread over the mesh's first axis, of whose size their number is a multiple.
        rule: when to go on.
        mesh: where targets are.
    """
    lanes = _begin(problem, targets, rule, mesh=mesh)
    count, devices = targets.energy.shape[0], meshes.width(mesh)
    live = np.arange(count)
    while len(live):
        each, least = places(-(-len(live) // devices), most=count // devices)
        at = np.full(each * devices, count)
        at[: len(live)] = live
        lanes, going = _advance(problem, targets, lanes, at, np.int32(least), rule=rule, mesh=mesh)
        live = live[meshes.fetch(going)[: len(live)]]
    return lanes.record


def places(left: int, *, most: int) -> tuple[int, int]:
    """Return how many places a device has for the targets that are left, and how few may be left there in the end."""
    each = min(max(FEWEST, 1 << (left - 1).bit_length()), most)
    return each, each // 2 if each > FEWEST else 0


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


def _answers(problem: Problem, targets: Targets, lanes: _Lane) -> tuple[Float[Array, "t n"], Float[Array, "t h"]]:
    """Return `XᵀX v` of the wanted vectors, less `Xᵀy` where they are weights; and what they predict of held-out rows.

    With rows the residual is multiplied, since it rounds least.
    """
    is_check = (lanes.phase == CHECK)[:, None]
    if problem.gram is not None:
        answers = _product(lanes.wanted, problem.gram) - jnp.where(is_check, targets.correlation, 0)
    else:
        fitted = _product(lanes.wanted, problem.rows.T) - jnp.where(is_check, targets.outputs, 0)
        answers = _product(fitted, problem.rows)
    return answers, _product(lanes.wanted, problem.held_out.T)


_product = partial(jnp.matmul, precision="highest")


def _spread(function: Callable, mesh: Mesh | None, whole: int, split: int) -> Callable:
    """Map a function over the shards of its last arguments; the first are whole on every device."""
    if mesh is None:
        return function
    spec, rows = PartitionSpec(), meshes.row_spec(mesh)
    specs = (spec,) * whole + (rows,) * split
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)


@partial(jax.jit, static_argnames=("rule", "mesh"))
def _begin(problem: Problem, targets: Targets, rule: Rule, *, mesh: Mesh | None) -> _Lane:
    return _spread(partial(_begin_here, rule), mesh, 0, 1)(targets)


def _begin_here(rule: Rule, targets: Targets) -> _Lane:
    """Return targets that want to know the gradient where they start."""
    t, n = targets.start.shape
    k, none, nothing = targets.alpha.shape[1], jnp.zeros(t, jnp.int32), jnp.zeros_like(targets.start)
    unknown = jnp.full_like(targets.alpha, jnp.nan)
    path = jnp.zeros((t, k if rule.keep_path else 0, n), nothing.dtype)
    record = Solution(targets.start, none, unknown, unknown, none, path)
    return _Lane(
        weights=targets.start, gradient=nothing, last_weights=targets.start, last_gradient=nothing, step=nothing,
        change=nothing, wanted=targets.start, phase=none + CHECK, norm=jnp.zeros_like(targets.energy),
        goal=jnp.zeros_like(targets.energy), steps=none, plain=none, bouts=none, moves=none, checks=none, stage=none,
        best=jnp.full_like(targets.energy, jnp.inf), record=record,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("rule", "mesh"), donate_argnums=(2,))
def _advance(
    problem: Problem, targets: Targets, lanes: _Lane, places: Int[Array, " w"], least: Int[Array, ""], *,
    rule: Rule, mesh: Mesh | None,
) -> tuple[_Lane, Bool[Array, " w"]]:  # fmt: skip
    """Let the targets at some places go on until at most `least` a device are left, and say which those are.

    Places beyond the last are padding.
    """
    count, last = targets.alpha.shape
    some = tuple(jax.tree.map(lambda leaf: leaf[jnp.minimum(places, count - 1)], each) for each in (targets, lanes))
    some = (some[0], some[1]._replace(stage=jnp.where(places < count, some[1].stage, last)))
    if mesh is not None:
        some = jax.lax.with_sharding_constraint(some, meshes.rows(mesh))
    moved = _spread(partial(_advance_here, rule), mesh, 2, 2)(problem, least, *some)
    lanes = jax.tree.map(lambda old, new: old.at[places].set(new, mode="drop"), lanes, moved)
    return lanes, moved.stage < last


def _advance_here(rule: Rule, problem: Problem, least: Int[Array, ""], targets: Targets, lanes: _Lane) -> _Lane:
    def going(lanes: _Lane) -> Bool[Array, ""]:
        return jnp.sum(lanes.stage < targets.alpha.shape[1], dtype=jnp.int32) > least

    def iterate(lanes: _Lane) -> _Lane:
        answers, predicted = _answers(problem, targets, lanes)
        errors = jnp.sum(jnp.square(targets.held_out - predicted), axis=1)
        return jax.vmap(partial(_go_on, problem, rule))(targets, lanes, answers, errors)

    return jax.lax.while_loop(going, iterate, lanes)


def _go_on(
    problem: Problem, rule: Rule, target: Targets, lane: _Lane, answer: Float[Array, " n"], error: Float[Array, ""]
) -> _Lane:
    """Take a target from its product to the next that it wants: in few passes over its vectors, which cost as much."""
    is_check, live = lane.phase == CHECK, lane.stage < target.alpha.shape[0]
    moved, stays, continues = _move(problem, target, lane, answer)
    alpha, beta = _penalties(target, moved.stage)
    slope = moved.gradient + beta * moved.weights
    gap = relative_gap(moved.weights, slope, target.correlation, target.energy, alpha)
    judged = _judge(rule, target, moved, gap, error, live & is_check)
    is_worth_a_check = ~is_check & ((gap <= SAFETY * rule.tolerance) | (moved.moves >= MOVES))
    return _ask(problem, target, judged, stays, continues, is_worth_a_check)


def _move(
    problem: Problem, target: Targets, lane: _Lane, answer: Float[Array, " n"]
) -> tuple[_Lane, Bool[Array, ""], Bool[Array, ""]]:
    """Take a target's step as far as it is now known.

    Also say whether it stays where it was, the step unfinished, and whether it is within a series of conjugate ones.
    """
    alpha, beta = _penalties(target, lane.stage)
    is_check, is_begin, is_conjugate, is_plain = (lane.phase == each for each in (CHECK, BEGIN, CONJUGATE, PLAIN))
    signs = _signs(problem, lane.weights, lane.gradient, alpha, beta)
    length, is_solved = _conjugate_length(problem, lane, answer, signs, beta)
    length = jnp.where(is_conjugate, length, jnp.where(is_plain, 1, 0).astype(length.dtype))
    step = jnp.where(is_plain, 0, lane.step) + length * lane.wanted
    change = jnp.where(is_plain | is_begin, 0, lane.change) + jnp.where(is_begin, 1, length) * answer
    part = _part(lane.weights, lane.gradient + beta * lane.weights, step, change + beta * step, alpha)
    is_newton = is_conjugate & is_solved
    moves = is_newton | is_plain
    taken = jnp.where(moves, part, 0)
    fails = is_newton & (part <= SHORT)
    stays = ~(moves | is_check)
    moved = lane._replace(
        weights=lane.weights + taken * step,
        gradient=jnp.where(is_check, answer, lane.gradient + taken * change),
        step=jnp.where(stays, step, 0),
        change=jnp.where(stays, change, 0),
        plain=jnp.where(fails, 2 ** jnp.minimum(lane.bouts, 8), lane.plain - is_plain.astype(jnp.int32)),
        bouts=lane.bouts + fails.astype(jnp.int32),
        moves=jnp.where(is_check, 0, lane.moves + moves.astype(jnp.int32)),
    )
    return moved, stays, is_conjugate & ~is_solved


def _ask(
    problem: Problem,
    target: Targets,
    lane: _Lane,
    stays: Bool[Array, ""],
    continues: Bool[Array, ""],
    is_worth_a_check: Bool[Array, ""],
) -> _Lane:
    """Say what a target wants to know next."""
    alpha, beta = _penalties(target, lane.stage)
    signs, slope = _signs(problem, lane.weights, lane.gradient, alpha, beta), lane.gradient + beta * lane.weights
    residual = jnp.where(signs != 0, -(slope + lane.change + beta * lane.step + alpha * signs), 0)
    norm = jnp.sum(residual * residual)
    kept = jnp.where(continues, norm / jnp.where(lane.norm > 0, lane.norm, 1), 0)
    turned_off = jnp.where(signs != 0, 0, -lane.weights)
    phase = jnp.where(lane.plain > 0, PLAIN, jnp.where(jnp.any(turned_off != 0), BEGIN, CONJUGATE))
    phase = jnp.where(stays, CONJUGATE, jnp.where(is_worth_a_check, CHECK, phase))
    wanted = jnp.where(phase == BEGIN, turned_off, residual + kept * lane.wanted)
    wanted = jnp.where(phase == PLAIN, _alone(problem.energies + beta, lane.weights, slope, alpha), wanted)
    return lane._replace(
        phase=phase,
        wanted=jnp.where(phase == CHECK, lane.weights, wanted),
        step=jnp.where(phase == BEGIN, turned_off, lane.step),
        norm=norm,
        goal=jnp.where(continues, lane.goal, REDUCTION**2 * norm),
        steps=jnp.where(continues, lane.steps + 1, 0),
    )


def _signs(
    problem: Problem, weights: Float[Array, " n"], gradient: Float[Array, " n"], alpha: Float[Array, ""],
    beta: Float[Array, ""],
) -> Float[Array, " n"]:  # fmt: skip
    """Return the signs of the active set, and 0 elsewhere."""
    shifted = problem.energies * weights - (gradient + beta * weights)
    return jnp.where(jnp.abs(shifted) > alpha, jnp.sign(shifted), 0)


def _conjugate_length(
    problem: Problem, lane: _Lane, answer: Float[Array, " n"], signs: Float[Array, " n"], beta: Float[Array, ""]
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Return how far to go along a conjugate gradient, and whether the system is then solved well enough."""
    changed = answer + beta * lane.wanted
    curvature, squares = jnp.sum(lane.wanted * changed), jnp.sum(lane.wanted * lane.wanted)
    curved = curvature > jnp.finfo(answer.dtype).eps * (problem.lipschitz + beta) * squares
    length = jnp.where(curved, lane.norm / jnp.where(curved, curvature, 1), 0)
    norm = length * length * jnp.sum(jnp.where(signs != 0, changed * changed, 0)) - lane.norm
    return length, ~curved | (norm <= lane.goal) | (lane.steps + 1 >= CONJUGATE_STEPS)


def _part(
    weights: Float[Array, " n"], slope: Float[Array, " n"], step: Float[Array, " n"], change: Float[Array, " n"],
    alpha: Float[Array, ""],
) -> Float[Array, ""]:  # fmt: skip
    """Return what part of a step to take: the whole of it, or what is sure to help more.

    With δ the objective's change in one step without its curvature κ, the part t changes it by at most `tδ + ½t²κ`,
    since the penalty is convex, and the whole by `δ + ½κ`.
    """
    point = weights + step
    sign = jnp.where(weights != 0, jnp.sign(weights), jnp.sign(step))
    straight = step * (slope + alpha * sign)  # nothing cancels that is not small
    across = step * slope + alpha * (jnp.abs(point) - jnp.abs(weights))
    linear, curvature = jnp.sum(jnp.where(point * sign >= 0, straight, across)), jnp.sum(step * change)
    best = jnp.clip(-linear / jnp.where(curvature > 0, curvature, 1), 0, 1)
    best = jnp.where(curvature > 0, best, jnp.where(linear < 0, 1, 0).astype(best.dtype))
    sure = best * linear + 0.5 * best * best * curvature
    return jnp.where(linear + 0.5 * curvature <= sure, 1, best)


def _alone(
    curvature: Float[Array, " n"], weights: Float[Array, " n"], slope: Float[Array, " n"], alpha: Float[Array, ""]
) -> Float[Array, " n"]:
    """Return the step of every column to where it alone would be least."""
    shifted = curvature * weights - slope
    shrunk = jnp.sign(shifted) * jnp.maximum(jnp.abs(shifted) - alpha, 0)
    return jnp.where(curvature > 0, shrunk / jnp.where(curvature > 0, curvature, 1), 0) - weights


def _judge(
    rule: Rule, target: Targets, lane: _Lane, gap: Float[Array, ""], error: Float[Array, ""], active: Bool[Array, ""]
) -> _Lane:
    """Where an active target's gap is small enough, record it, and go to where the next solution should be."""
    stages, stage, record = target.alpha.shape[0], lane.stage, lane.record
    weights, gradient = lane.weights, lane.gradient
    advance = active & ((gap <= rule.tolerance) | (lane.checks + 1 >= CHECKS))
    better = advance & (error < lane.best) if target.held_out.shape[0] else advance
    at = jnp.where(advance, stage, stages)
    chosen = jnp.where(better, stage, record.chosen)
    record = Solution(
        weights=jnp.where(better, weights, record.weights),
        chosen=chosen,
        gaps=record.gaps.at[at].set(gap, mode="drop"),
        errors=record.errors.at[at].set(error, mode="drop"),
        products=record.products + (stage < stages).astype(jnp.int32),
        path=record.path.at[at].set(weights, mode="drop") if rule.keep_path else record.path,
    )
    following = jnp.where(advance, stage + 1, stage)
    if rule.patience:
        following = jnp.where(advance & (stage - chosen >= rule.patience), stages, following)
    before, here, there = (_penalties(target, each)[0] for each in (jnp.maximum(stage - 1, 0), stage, following))
    known = advance & (before != here) & (following < stages)
    factor = jnp.where(known, (there - here) / jnp.where(known, here - before, 1), 0)
    return lane._replace(
        weights=weights + factor * (weights - lane.last_weights),
        gradient=gradient + factor * (gradient - lane.last_gradient),
        last_weights=jnp.where(advance, weights, lane.last_weights),
        last_gradient=jnp.where(advance, gradient, lane.last_gradient),
        plain=jnp.where(advance, 0, lane.plain),
        bouts=jnp.where(advance, 0, lane.bouts),
        checks=jnp.where(advance, 0, lane.checks + active.astype(jnp.int32)),
        stage=following,
        best=jnp.where(better, error, lane.best),
        record=record,
    )


def _penalties(target: Targets, stage: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return α and β at one stage; beyond the last, the last."""
    at = jnp.minimum(stage, target.alpha.shape[0] - 1)
    return target.alpha[at], target.beta[at]


def lipschitz(rows: Float[Array, "m n"], *, steps: int = 30) -> Float[Array, ""]:
    """Return an upper estimate of the largest eigenvalue of `XᵀX`, by power iteration from a fixed vector."""
    v = jnp.asarray(np.random.default_rng(0).normal(size=rows.shape[1]), rows.dtype)

    def iterate(_, v):
        v = jnp.matmul(rows.T, jnp.matmul(rows, v, precision="highest"), precision="highest")
        return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)

    v = jax.lax.fori_loop(0, steps, iterate, v)
    largest = jnp.linalg.norm(jnp.matmul(rows.T, jnp.matmul(rows, v, precision="highest"), precision="highest"))
    return jnp.maximum(1.05 * largest, jnp.finfo(v.dtype).tiny)
