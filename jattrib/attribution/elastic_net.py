"""The elastic net along a path of penalties, for many targets at once: what `surrogate` solves with.

In standardised columns, and for each target of its own, it minimises

    ½ ‖y − X w‖² + α ‖w‖₁ + ½ β ‖w‖².

All targets go in step: each says which vector it wants to know `XᵀX v` of, one product of matrices answers them all,
and each goes on from its answer, by `active_set`'s method.  So most of the time is in products of matrices, whatever
the targets do: four fifths of it on a CPU.  On a TPU all the rest of a round is one pass over memory.

Gradients move with the weights, and are computed anew, from the residual, before a target goes on to its next penalty:
the duality gap is then that of the weights.  From one penalty to the next the solution, and with it the gradient, is
extrapolated: both are piecewise linear.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from jattrib.attribution import active_set
from jattrib.core import mesh as meshes
from jattrib_kernels.by_rows import by_rows

TOGETHER = 32
"""Targets in step on a device at the least: with fewer, products take as long.  On a core of a CPU at the most, too:
more do not fit its cache."""

SHARE = 16
"""Targets that are worth a core of their own."""

FEW = 4
"""At a time, of targets that something is computed of which few need."""

REDUCTION = 0.4
"""Of the residual of a linear system, at which its conjugate gradients end."""

CONJUGATE_STEPS = 40
"""At most so many of them for one system."""

MOVES = 16
"""With so many moves a gradient is computed anew."""

CHECKS = 60
"""Of the gap at one penalty, before a target is given up there: it is then above the tolerance, and is reported."""

SAFETY = 0.7
"""Of the tolerance, at which the gap is worth a check."""

CHECK, BEGIN, CONJUGATE = np.arange(3, dtype=np.int32)
"""What a target wants its product for: the gradient at its weights; a step's beginning, with the columns off the active
set at zero and those on it down their slopes; a conjugate gradient."""


class Problem(NamedTuple):
    """The design, which all targets share, in standardised columns.

    Attributes:
        rows: X, its columns of mean 0.
        columns: `Xᵀ` beside the rows, for a CPU, whose products with it are faster; or None.
        gram: `XᵀX`, or None where products with the rows cost less, or it is too large to keep.
        held_out: rows that are predicted and not fitted, in the same units.
        lipschitz: the largest eigenvalue of `XᵀX`, or a little more.
        energies: the diagonal of `XᵀX`.
    """

    rows: Float[Array, "m n"]
    columns: Float[Array, "n m"] | None
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

    outputs: Float[Array, "*t m"]
    correlation: Float[Array, "*t n"]
    energy: Float[Array, "*t"]
    held_out: Float[Array, "*t h"]
    alpha: Float[Array, "*t k"]
    beta: Float[Array, "*t k"]
    start: Float[Array, "*t n"]


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

    weights: Float[Array, "*t n"]
    chosen: Int[Array, "*t"]
    gaps: Float[Array, "*t k"]
    errors: Float[Array, "*t k"]
    products: Int[Array, "*t"]
    path: Float[Array, "*t p n"]


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
        steps: products that this step has had.
        norm: the square of its linear system's residual.
        goal: at which that is solved.
        pace: how far the last conjugate gradient went.
        damping: μ.
        moves: since the gradient was computed.
        checks: at this penalty.
        stage: which penalty; beyond the last where it has arrived.
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
    steps: Int[Array, "*t"]
    norm: Float[Array, "*t"]
    goal: Float[Array, "*t"]
    pace: Float[Array, "*t"]
    damping: Float[Array, "*t"]
    moves: Int[Array, "*t"]
    checks: Int[Array, "*t"]
    stage: Int[Array, "*t"]
    best: Float[Array, "*t"]
    record: Solution


class _Scale(NamedTuple):
    """What all targets know of the design: the diagonal of `XᵀX`, its mean, and the largest eigenvalue."""

    energies: Float[Array, " n"]
    energy: Float[Array, ""]
    lipschitz: Float[Array, ""]


class _Known(NamedTuple):
    """What a target knows when its turn comes: see `Targets`, but for what follows.

    Attributes:
        answer: `XᵀX v` of the vector that it wanted to be multiplied, less `Xᵀy` where that was w.
        error: of its weights over the held-out rows, if it wanted to know; None where no rows are held out.
    """

    answer: Float[Array, "*t n"]
    error: Float[Array, "*t"] | None
    correlation: Float[Array, "*t n"]
    energy: Float[Array, "*t"]
    alpha: Float[Array, "*t k"]
    beta: Float[Array, "*t k"]


def descend(
    problem: Problem,
    targets: Targets,
    rule: Rule,
    *,
    mesh: Mesh | None = None,
    report: Callable[[int], None] = lambda count: None,
) -> Solution:
    """Solve for every target along its penalties.

    Where half of those in step have arrived, the others go on in half as many places.  Of many targets each core of a
    CPU takes a part, and some of them at a time: where an eighth of these have arrived, others take their places.

    Args:
        problem: the design, whole on every device.
        targets: spread over the mesh's first axis, of whose size their number is a multiple.
        rule: when to go on.
        mesh: where targets are.
        report: called now and then, from any thread, with how many penalties targets have been taken past.
    """
    count = targets.energy.shape[0]
    workers = min(meshes.cores(), count // SHARE) if mesh is None and jax.default_backend() == "cpu" else 1
    if workers <= 1:
        return _descend(problem, targets, rule, mesh, report)

    def work(share: Int[np.ndarray, " s"]) -> Solution:
        with jax.enable_x64(problem.rows.dtype == jnp.float64):  # a thread has settings of its own
            return _descend(problem, jax.tree.map(lambda leaf: leaf[share], targets), rule, None, report)

    size = -(-count // workers)
    shares = np.minimum(np.arange(workers * size), count - 1).reshape(workers, size)
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(work, shares))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:count], *found)


def _descend(
    problem: Problem, targets: Targets, rule: Rule, mesh: Mesh | None, report: Callable[[int], None]
) -> Solution:
    lanes = _begin(problem, targets, rule, mesh=mesh)
    count, devices = targets.energy.shape[0], meshes.width(mesh)
    last, stages = targets.alpha.shape[1], np.zeros(count, np.int32)
    while len(left := np.flatnonzero(stages < last)):
        each, least = places(-(-len(left) // devices), most=count // devices)
        group = left[np.argsort(stages[left], kind="stable")][: each * devices]
        at = np.full(each * devices, count)
        at[: len(group)] = group
        lanes, there = _advance(problem, targets, lanes, at, np.int32(least), rule=rule, mesh=mesh)
        before, stages[group] = stages[group], meshes.fetch(there)[: len(group)]
        report(int((stages[group] - before).sum()))
    return lanes.record


def places(left: int, *, most: int) -> tuple[int, int]:
    """Return how many places a device has for the targets left, and how few of those in them may be left in the end."""
    widest = min(TOGETHER, most) if jax.default_backend() == "cpu" else most
    each = min(max(TOGETHER, 1 << (left - 1).bit_length()), widest)
    if left > each:
        return each, each - max(each // 8, 1)
    return each, each // 2 if each > TOGETHER else 0


def product(problem: Problem, v: Float[Array, "n t"], shift: Float[Array, "m t"] | None = None) -> Float[Array, "n t"]:
    """Return `XᵀX v`, or `Xᵀ(Xv − shift)` where products are with the rows."""
    if problem.gram is not None:
        return _matmul(problem.gram, v)
    fitted = _matmul(problem.rows, v)
    columns = problem.rows.T if problem.columns is None else problem.columns
    return _matmul(columns, fitted if shift is None else fitted - shift)


_matmul = partial(jnp.matmul, precision="highest")


def _answers(problem: Problem, targets: Targets, lanes: _Lane) -> Float[Array, "t n"]:
    """Return `XᵀX v` of the wanted vectors, less `Xᵀy` where they are weights.

    With rows the residual is multiplied, since it rounds least.
    """
    is_check = (lanes.phase == CHECK)[:, None]
    shift = jnp.where(is_check, targets.outputs, 0).T
    answers = _as_it_is(product(problem, _as_it_is(lanes.wanted.T), shift)).T
    return answers if problem.gram is None else answers - jnp.where(is_check, targets.correlation, 0)


def _errors(problem: Problem, targets: Targets, lanes: _Lane) -> Float[Array, " t"] | None:
    """Return the sum of squares over the held-out rows, if there are any, of the targets that want their gradient."""
    if not problem.held_out.shape[0]:
        return None

    def some(weights: Float[Array, "t n"], outputs: Float[Array, "t h"]) -> Float[Array, " t"]:
        predicted = _matmul(problem.held_out, _as_it_is(weights.T)).T
        return jnp.sum(jnp.square(outputs - predicted), axis=1)

    return _of_few(lanes.phase == CHECK, some, lanes.wanted, targets.held_out)


def _of_few(
    flags: Bool[Array, " t"], function: Callable[..., Float[Array, " f"]], *inputs: PyTree[Float[Array, "t ..."]]
) -> Float[Array, " t"]:
    """Return a function of the flagged targets' inputs, and 0 for others: few at a time, as seldom more are flagged."""
    order, few = jnp.argsort(~flags), max(FEW, len(flags) // 8)

    def some(number: Int[Array, ""], found: Float[Array, " t"]) -> Float[Array, " t"]:
        at = order.at[number * few + jnp.arange(few, dtype=number.dtype)].get(mode="clip")
        return found.at[at].set(jnp.where(flags[at], function(*jax.tree.map(lambda leaf: leaf[at], inputs)), 0))

    rounds = -(-jnp.sum(flags, dtype=jnp.int32) // few)
    return jax.lax.fori_loop(0, rounds, some, jnp.zeros(len(flags), jax.tree.leaves(inputs)[0].dtype))


def _if_any(
    flags: Bool[Array, " t"], function: Callable[..., Float[Array, " t"]], *inputs: PyTree[Float[Array, "t ..."]]
) -> Float[Array, " t"]:
    """Return a function of the flagged targets' inputs, and 0 for others: of all, in one place, if any is flagged."""
    zero = jnp.zeros(flags.shape, jax.tree.leaves(inputs)[0].dtype)
    some = jnp.max(jnp.where(flags, 1, 0)) > 0
    return jax.lax.cond(some, lambda: jnp.where(flags, function(*inputs), zero), lambda: zero)


def _as_it_is(matrix: Float[Array, "a b"]) -> Float[Array, "a b"]:
    """Keep XLA from turning a CPU's products: with the design on the left, those of few targets take half as long."""
    return jax.lax.optimization_barrier(matrix) if jax.default_backend() == "cpu" else matrix


def _spread(function: Callable, mesh: Mesh | None, whole: int, split: int) -> Callable:
    """Map a function over the shards of its last arguments; the first are whole on every device."""
    if mesh is None:
        return function
    spec, rows = PartitionSpec(), meshes.row_spec(mesh)
    specs = (spec,) * whole + (rows,) * split
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)


@partial(jax.jit, static_argnames=("rule", "mesh"))
def _begin(problem: Problem, targets: Targets, rule: Rule, *, mesh: Mesh | None) -> _Lane:
    return _spread(partial(_begin_here, rule), mesh, 1, 1)(problem, targets)


def _begin_here(rule: Rule, problem: Problem, targets: Targets) -> _Lane:
    """Return targets that want to know the gradient where they start."""
    t, n = targets.start.shape
    k, none, nothing = targets.alpha.shape[1], jnp.zeros(t, jnp.int32), jnp.zeros_like(targets.start)
    unknown, zero = jnp.full_like(targets.alpha, jnp.nan), jnp.zeros_like(targets.energy)
    path = jnp.zeros((t, k if rule.keep_path else 0, n), nothing.dtype)
    record = Solution(targets.start, none, unknown, unknown, none, path)
    return _Lane(
        weights=targets.start, gradient=nothing, last_weights=targets.start, last_gradient=nothing, step=nothing,
        change=nothing, wanted=targets.start, phase=none + CHECK, steps=none, norm=zero, goal=zero,
        pace=zero + 1 / problem.lipschitz, damping=zero, moves=none, checks=none, stage=none, best=zero + jnp.inf,
        record=record,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("rule", "mesh"), donate_argnums=(2,))
def _advance(
    problem: Problem, targets: Targets, lanes: _Lane, places: Int[Array, " w"], least: Int[Array, ""], *,
    rule: Rule, mesh: Mesh | None,
) -> tuple[_Lane, Int[Array, " w"]]:  # fmt: skip
    """Let the targets at some places go on until at most `least` a device are left, and say at which stages they are.

    Places beyond the last are padding.
    """
    count, last = targets.alpha.shape
    some = tuple(jax.tree.map(lambda leaf: leaf[jnp.minimum(places, count - 1)], each) for each in (targets, lanes))
    some = (some[0], some[1]._replace(stage=jnp.where(places < count, some[1].stage, last)))
    if mesh is not None:
        some = jax.lax.with_sharding_constraint(some, meshes.rows(mesh))
    moved = _spread(partial(_advance_here, rule), mesh, 2, 2)(problem, least, *some)
    lanes = jax.tree.map(lambda old, new: old.at[places].set(new, mode="drop"), lanes, moved)
    return lanes, moved.stage


def _advance_here(rule: Rule, problem: Problem, least: Int[Array, ""], targets: Targets, lanes: _Lane) -> _Lane:
    def going(lanes: _Lane) -> Bool[Array, ""]:
        return jnp.sum(lanes.stage < targets.alpha.shape[1], dtype=jnp.int32) > least

    return jax.lax.while_loop(going, partial(_round, problem, rule, targets), lanes)


def _round(problem: Problem, rule: Rule, targets: Targets, lanes: _Lane) -> _Lane:
    """Take all targets from their products to the next that they want."""
    answers, errors = _answers(problem, targets, lanes), _errors(problem, targets, lanes)
    scale = _Scale(problem.energies, jnp.mean(problem.energies), problem.lipschitz)
    known = _Known(answers, errors, targets.correlation, targets.energy, targets.alpha, targets.beta)
    path = lanes.record.path
    bare = lanes._replace(record=lanes.record._replace(path=()))
    moved = by_rows(partial(_turn, rule, _if_any), scale, bare, known, whole=partial(_turn, rule, _of_few))
    if rule.keep_path:
        at = jnp.where(moved.stage > lanes.stage, lanes.stage, path.shape[1])
        path = path.at[jnp.arange(len(at)), at].set(moved.last_weights, mode="drop")
    return moved._replace(record=moved.record._replace(path=path))


def _turn(rule: Rule, of_some: Callable[..., Array], scale: _Scale, lanes: _Lane, known: _Known) -> _Lane:
    """Take targets from what they know to what they want to know next: vectors and numbers of each, no products."""
    moved, onward, ends, is_whole = jax.vmap(partial(_conjugate, scale))(lanes, known)
    penalties = jax.vmap(_penalties)(known, lanes.stage)
    line = active_set.Line(lanes.weights, lanes.gradient, moved.step, moved.change, *penalties)
    parts = of_some(ends & ~is_whole, jax.vmap(active_set.best_part), line)
    parts = jnp.where(ends & is_whole, 1, parts)
    return jax.vmap(partial(_go_on, rule, scale))(moved, known, onward, ends, parts)


def _conjugate(
    scale: _Scale, lane: _Lane, known: _Known
) -> tuple[_Lane, Float[Array, " n"], Bool[Array, ""], Bool[Array, ""]]:
    """Take what is now known into a target's step.

    Also return the next conjugate gradient, whether the step has ended, and whether all of it helps.
    """
    answer, (alpha, beta) = known.answer, _penalties(known, lane.stage)
    extra, is_begin = beta + lane.damping, lane.phase == BEGIN
    curvature = jnp.sum(lane.wanted * (answer + extra * lane.wanted))
    flat = jnp.finfo(answer.dtype).eps * (scale.lipschitz + beta) * jnp.sum(lane.wanted * lane.wanted)
    curved = curvature > flat
    pace = jnp.where(curved, lane.norm / jnp.where(curved, curvature, 1), 0)
    far, fresh = jnp.where(is_begin, 1, pace), lane.steps == 0
    step = jnp.where(fresh, 0, lane.step) + far * lane.wanted
    change = jnp.where(fresh, 0, lane.change) + far * answer
    slope = lane.gradient + beta * lane.weights
    signs = active_set.signs(lane.weights, slope, scale.energies + extra, alpha)
    residual = active_set.downwards(slope + change + extra * step, signs, alpha)
    norm = jnp.sum(residual * residual)
    kept = jnp.where(is_begin, 0, norm / jnp.where(lane.norm > 0, lane.norm, 1))
    is_solved = (norm <= lane.goal) | (lane.steps + 1 >= CONJUGATE_STEPS) | ~(curved | is_begin)
    is_whole = active_set.is_whole(active_set.Line(lane.weights, lane.gradient, step, change, alpha, beta))
    moved = lane._replace(
        step=step,
        change=change,
        steps=lane.steps + 1,
        norm=norm,
        pace=jnp.where((lane.phase == CONJUGATE) & curved, pace, lane.pace),
    )
    ends = is_solved & (lane.phase != CHECK) & (lane.stage < known.alpha.shape[0])
    return moved, residual + kept * lane.wanted, ends, is_whole


def _go_on(
    rule: Rule, scale: _Scale, lane: _Lane, known: _Known, onward: Float[Array, " n"], ends: Bool[Array, ""],
    part: Float[Array, ""],
) -> _Lane:  # fmt: skip
    """Take a part of a target's step, if that has ended, or judge where it is; and say what it wants to know next."""
    is_check = lane.phase == CHECK
    alpha, beta = _penalties(known, lane.stage)
    weights = lane.weights + part * lane.step
    gradient = jnp.where(is_check, known.answer, lane.gradient + part * lane.change)
    gap = active_set.relative_gap(weights, gradient + beta * weights, known.correlation, known.energy, alpha)
    damping = active_set.damped(lane.damping, part, scale.energy, scale.lipschitz)
    moved = lane._replace(
        weights=weights,
        gradient=gradient,
        damping=jnp.where(ends, damping, lane.damping),
        moves=jnp.where(is_check, 0, lane.moves + ends.astype(jnp.int32)),
    )
    judged = _judge(rule, moved, known, gap, is_check)
    checks = ends & ((gap <= SAFETY * rule.tolerance) | (moved.moves >= MOVES))
    return _ask(scale, judged, known, onward, ends | is_check, checks)


def _judge(rule: Rule, lane: _Lane, known: _Known, gap: Float[Array, ""], is_check: Bool[Array, ""]) -> _Lane:
    """Where a target's gap is small enough, record it, and go to where the next penalty's solution should be."""
    stages, stage, record = known.alpha.shape[0], lane.stage, lane.record
    weights, gradient = lane.weights, lane.gradient
    advance = is_check & ((gap <= rule.tolerance) | (lane.checks + 1 >= CHECKS))
    error = jnp.zeros_like(gap) if known.error is None else known.error
    better = advance if known.error is None else advance & (error < lane.best)
    is_here = _is_at(stage, stages) & advance
    chosen = jnp.where(better, stage, record.chosen)
    record = record._replace(
        weights=jnp.where(better, weights, record.weights),
        chosen=chosen,
        gaps=jnp.where(is_here, gap, record.gaps),
        errors=jnp.where(is_here, error, record.errors),
        products=record.products + (stage < stages).astype(jnp.int32),
    )
    following = jnp.where(advance, stage + 1, stage)
    if rule.patience:
        following = jnp.where(advance & (stage - chosen >= rule.patience), stages, following)
    before, here, there = (_penalties(known, each)[0] for each in (jnp.maximum(stage - 1, 0), stage, following))
    extends = advance & (before != here) & (following < stages)
    factor = jnp.where(extends, (there - here) / jnp.where(extends, here - before, 1), 0)
    return lane._replace(
        weights=weights + factor * (weights - lane.last_weights),
        gradient=gradient + factor * (gradient - lane.last_gradient),
        last_weights=jnp.where(advance, weights, lane.last_weights),
        last_gradient=jnp.where(advance, gradient, lane.last_gradient),
        checks=jnp.where(advance, 0, lane.checks + is_check.astype(jnp.int32)),
        stage=following,
        best=jnp.where(better, error, lane.best),
        record=record,
    )


def _ask(
    scale: _Scale, lane: _Lane, known: _Known, onward: Float[Array, " n"], anew: Bool[Array, ""],
    checks: Bool[Array, ""],
) -> _Lane:  # fmt: skip
    """Ask for the first product of a target's next step, for its gradient, or for the product with a direction."""
    alpha, beta = _penalties(known, lane.stage)
    slope = lane.gradient + beta * lane.weights
    signs = active_set.signs(lane.weights, slope, scale.energies + beta + lane.damping, alpha)
    off, downwards = jnp.where(signs != 0, 0, -lane.weights), active_set.downwards(slope, signs, alpha)
    begins = anew & (jnp.max(jnp.abs(off)) > 0)
    first = jnp.where(begins, off + lane.pace * downwards, downwards)
    norm = jnp.where(anew, jnp.sum(downwards * downwards), lane.norm)
    return lane._replace(
        wanted=jnp.where(checks, lane.weights, jnp.where(anew, first, onward)),
        phase=jnp.where(checks, CHECK, jnp.where(begins, BEGIN, CONJUGATE)),
        steps=jnp.where(anew, 0, lane.steps),
        norm=norm,
        goal=jnp.where(anew, REDUCTION**2 * norm, lane.goal),
    )


def _penalties(known: _Known, stage: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return a target's α and β at one stage; beyond the last, the last."""
    stages = known.alpha.shape[0]
    is_here = _is_at(jnp.minimum(stage, stages - 1), stages)
    return jnp.sum(jnp.where(is_here, known.alpha, 0)), jnp.sum(jnp.where(is_here, known.beta, 0))


def _is_at(stage: Int[Array, ""], stages: int) -> Bool[Array, " k"]:
    """Return which of all stages is the given one: none where it is beyond the last."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, stages), 1)[0] == stage


def lipschitz(rows: Float[Array, "m n"], *, steps: int = 30) -> Float[Array, ""]:
    """Return an upper estimate of the largest eigenvalue of `XᵀX`, by power iteration from a fixed vector."""
    v = jnp.asarray(np.random.default_rng(0).normal(size=rows.shape[1]), rows.dtype)

    def multiplied(v):
        return _matmul(_matmul(rows, v), rows)

    def iterate(_, v):
        v = multiplied(v)
        return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)

    largest = jnp.linalg.norm(multiplied(jax.lax.fori_loop(0, steps, iterate, v)))
    return jnp.maximum(1.05 * largest, jnp.finfo(v.dtype).tiny)
