"""The elastic net along a path of penalties, for many targets at once: what `surrogate` solves with.

In standardised columns, and for each target of its own, it minimises

    ½ ‖y − X w‖² + α ‖w‖₁ + ½ β ‖w‖².

A round solves each target's problem on a working set of columns, whose part of the Gram matrix is gathered and kept as
long as it suffices, and then makes one product with the whole of it, for all targets together: the duality gap says
whether a target goes on to its next penalty, the gradient which columns its working set lacked.  On the working set the
method is `active_set`'s.  From one penalty to the next the solution, and with it the gradient, is extrapolated: both
are piecewise linear.

Source: Massias, Gramfort and Salmon 2018 (working sets).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jattrib.attribution import active_set
from jattrib.core import mesh as meshes

SIZES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Sizes of working sets, each compiled once; a target that needs more works on all columns."""

GROUP = 64
"""Targets that go through their rounds together on a device, at most."""

GROUP_BYTES = 2**29
"""What their parts of the Gram matrix may take."""

SHARE = 16
"""Targets that are worth a core of their own."""

TOGETHER = 8
"""Targets whose steps on their working sets an accelerator takes side by side: each waits for the slowest of them."""

MARGIN = 0.8
"""Columns whose gradient is above this part of the penalty enter a working set with those above the whole."""

ROUNDS = 60
"""At one penalty, before a target is given up there: its gap is then above the tolerance, and is reported."""

SAFETY = 0.3
"""The working set's problem is solved to this part of the tolerance."""


class Problem(NamedTuple):
    """The design, which all targets share, in standardised columns.

    Attributes:
        rows: X, its columns of mean 0.
        gram: `XᵀX`, or None where it is too large to keep.
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
        rounds: how many products with the whole design it took.
        path: the weights at every penalty, if they were asked for.
    """

    weights: Float[Array, "t n"]
    chosen: Int[Array, " t"]
    gaps: Float[Array, "t k"]
    errors: Float[Array, "t k"]
    rounds: Int[Array, " t"]
    path: Float[Array, "t p n"]


class _Lane(NamedTuple):
    """A target on its way.

    Attributes:
        weights: w.
        gradient: `XᵀXw − Xᵀy`, without β's part.
        last_weights: those of the penalty before.
        last_gradient: likewise.
        inside: the working set.
        indices: its columns; n where there are fewer than its size.
        stage: which penalty.
        tries: rounds at it.
        best: the least held-out error so far.
        record: what it leaves.
    """

    weights: Float[Array, "*t n"]
    gradient: Float[Array, "*t n"]
    last_weights: Float[Array, "*t n"]
    last_gradient: Float[Array, "*t n"]
    inside: Bool[Array, "*t n"]
    indices: Int[Array, "*t w"]
    stage: Int[Array, "*t"]
    tries: Int[Array, "*t"]
    best: Float[Array, "*t"]
    record: Solution


def descend(problem: Problem, targets: Targets, rule: Rule, *, mesh: Mesh | None = None) -> Solution:
    """Solve for every target along its penalties.

    Targets whose working sets are of one size go through their rounds in groups; a group ends when half of it needs
    more, or is done.  Of many targets each core of a CPU takes a part.

    Args:
        problem: the design, whole on every device.
        targets: spread over the mesh's first axis, of whose size their number is a multiple.
        rule: when to go on.
        mesh: where targets are.
    """
    count = targets.energy.shape[0]
    workers = min(meshes.cores(), count // SHARE) if mesh is None and jax.default_backend() == "cpu" else 1
    if workers <= 1:
        return _descend(problem, targets, rule, mesh=mesh)

    def work(places: Int[np.ndarray, " t"]) -> Solution:
        with jax.enable_x64(problem.rows.dtype == jnp.float64):  # a thread has settings of its own
            return _descend(problem, jax.tree.map(lambda leaf: leaf[places], targets), rule, mesh=None)

    share = -(-count // workers)
    places = np.minimum(np.arange(workers * share), count - 1).reshape(workers, share)
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(work, places))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:count], *found)


def _descend(problem: Problem, targets: Targets, rule: Rule, *, mesh: Mesh | None) -> Solution:
    n, devices = problem.rows.shape[1], meshes.width(mesh)
    sizes = [*(size for size in SIZES if size < n), n]
    lanes, needs = _begin(problem, targets, rule, mesh=mesh)
    needs, stages = np.array(meshes.fetch(needs)), np.zeros(len(needs), np.int32)
    while needs.any():
        bucket = np.searchsorted(sizes, needs)
        size = sizes[bucket[needs > 0].min()]
        waiting = np.flatnonzero((needs > 0) & (bucket == sizes.index(size)))
        width = devices * min(_width(size, problem.rows.itemsize), len(needs) // devices)
        group = waiting[np.argsort(stages[waiting], kind="stable")][:width]
        least = width // devices // 2 if len(waiting) > len(group) else 0
        places = np.full(width, len(needs))
        places[: len(group)] = group
        lanes, needs_there, stages_there = _rounds(
            problem, targets, lanes, places, np.int32(least), rule=rule, size=size, mesh=mesh
        )
        needs[group] = meshes.fetch(needs_there)[: len(group)]
        stages[group] = meshes.fetch(stages_there)[: len(group)]
    return lanes.record


def _width(size: int, itemsize: int) -> int:
    """Return how many targets go together on a device: as many as their parts of the Gram matrix leave room for."""
    return int(np.clip(GROUP_BYTES // (size * size * itemsize), 8, GROUP))


def product(problem: Problem, v: Float[Array, "*t n"]) -> Float[Array, "*t n"]:
    """Return `XᵀX v`, by whichever is cheaper."""
    gram = _cheap_gram(problem)
    if gram is not None:
        return jnp.matmul(v, gram, precision="highest")
    return jnp.matmul(jnp.matmul(v, problem.rows.T, precision="highest"), problem.rows, precision="highest")


def _gradient(problem: Problem, targets: Targets, weights: Float[Array, "t n"]) -> Float[Array, "t n"]:
    """Return `Xᵀ(Xw − y)`: from the residual where products with the rows are as cheap, since it rounds least."""
    if _cheap_gram(problem) is not None:
        return product(problem, weights) - targets.correlation
    residual = jnp.matmul(weights, problem.rows.T, precision="highest") - targets.outputs
    return jnp.matmul(residual, problem.rows, precision="highest")


def _cheap_gram(problem: Problem) -> Float[Array, "n n"] | None:
    """Return the Gram matrix if a product with it costs no more than two with the rows."""
    m, n = problem.rows.shape
    return problem.gram if n <= 2 * m else None


def _spread(function: Callable, mesh: Mesh | None, whole: int, split: int) -> Callable:
    """Map a function over the shards of its last arguments; the first are whole on every device."""
    if mesh is None:
        return function
    spec, rows = PartitionSpec(), meshes.row_spec(mesh)
    specs = (spec,) * whole + (rows,) * split
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)


@partial(jax.jit, static_argnames=("rule", "mesh"))
def _begin(problem: Problem, targets: Targets, rule: Rule, *, mesh: Mesh | None):
    return _spread(partial(_begin_here, rule), mesh, 1, 1)(problem, targets)


def _begin_here(rule: Rule, problem: Problem, targets: Targets) -> tuple[_Lane, Int[Array, " t"]]:
    t, n = targets.start.shape
    k, none = targets.alpha.shape[1], jnp.zeros(t, jnp.int32)
    gradient = _gradient(problem, targets, targets.start)
    unknown = jnp.full_like(targets.alpha, jnp.nan)
    path = jnp.zeros((t, k if rule.keep_path else 0, n), gradient.dtype)
    record = Solution(targets.start, none, unknown, unknown, none, path)
    lane = _Lane(
        targets.start, gradient, targets.start, gradient, jnp.zeros((t, n), bool), jnp.zeros((t, 0), jnp.int32),
        none, none, jnp.full_like(targets.energy, jnp.inf), record,
    )  # fmt: skip
    return lane, _needs(targets, lane)


@partial(jax.jit, static_argnames=("rule", "size", "mesh"), donate_argnums=(2,))
def _rounds(
    problem: Problem, targets: Targets, lanes: _Lane, places: Int[Array, " w"], least: Int[Array, ""], *,
    rule: Rule, size: int, mesh: Mesh | None,
):  # fmt: skip
    """Let the targets at some places make rounds, and put them back; places beyond the last are padding."""
    count = targets.energy.shape[0]
    some = tuple(jax.tree.map(lambda leaf: leaf[jnp.minimum(places, count - 1)], each) for each in (targets, lanes))
    stage = jnp.where(places < count, some[1].stage, targets.alpha.shape[1])
    some = (some[0], some[1]._replace(stage=stage))
    if mesh is not None:
        some = jax.lax.with_sharding_constraint(some, meshes.rows(mesh))
    run = _spread(partial(_rounds_here, rule, size), mesh, 2, 2)
    moved, needs = run(problem, least, *some)
    lanes = jax.tree.map(lambda old, new: old.at[places].set(new, mode="drop"), lanes, moved)
    return lanes, needs, moved.stage


def _rounds_here(
    rule: Rule, size: int, problem: Problem, least: Int[Array, ""], targets: Targets, lanes: _Lane
) -> tuple[_Lane, Int[Array, " t"]]:
    """Make rounds while more than `least` targets are to and a working set of `size` suffices them."""
    t, n = targets.start.shape
    everything = size == n
    indices = jnp.broadcast_to(jnp.arange(n), (t, n)) if everything else jnp.full((t, size), n, jnp.int32)
    lanes = lanes._replace(indices=indices, inside=jnp.full((t, n), everything))
    grams = jnp.zeros((t, 0, 0) if everything else (t, size, size), lanes.weights.dtype)

    def going(carry):
        return jnp.sum(_live(carry[2], size), dtype=jnp.int32) > least

    def iterate(carry):
        lanes, grams, needs = carry
        live = _live(needs, size)
        if not everything:
            lanes, grams = _gather(problem, targets, lanes, grams, live)
        work = partial(_work, rule, problem)
        together = None if jax.default_backend() == "cpu" else TOGETHER
        weights = jax.lax.map(lambda each: work(*each), (targets, lanes, grams, live), batch_size=together)
        gradient = _gradient(problem, targets, weights)
        predicted = jnp.matmul(weights, problem.held_out.T, precision="highest")
        errors = jnp.sum(jnp.square(targets.held_out - predicted), axis=1)
        lanes = jax.vmap(partial(_judge, rule))(targets, lanes, live, weights, gradient, errors)
        return lanes, grams, _needs(targets, lanes)

    lanes, _, needs = jax.lax.while_loop(going, iterate, (lanes, grams, _needs(targets, lanes)))
    return lanes._replace(indices=jnp.zeros((t, 0), jnp.int32)), needs


def _live(needs: Int[Array, " t"], size: int) -> Bool[Array, " t"]:
    return (needs > 0) & (needs <= size)


def _penalties(target: Targets, stage: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return α and β at one stage; beyond the last, the last."""
    at = jnp.minimum(stage, target.alpha.shape[0] - 1)
    return target.alpha[at], target.beta[at]


def _wanted(target: Targets, lane: _Lane, part: float = 1.0) -> Bool[Array, " n"]:
    """Return which columns a target's working set must have."""
    alpha, beta = _penalties(target, lane.stage)
    return (lane.weights != 0) | (jnp.abs(lane.gradient + beta * lane.weights) > part * alpha)


def _needs(targets: Targets, lanes: _Lane) -> Int[Array, " t"]:
    """Return how large a working set each target needs: 0 where it is done, 1 where what it has suffices."""

    def one(target: Targets, lane: _Lane) -> Int[Array, ""]:
        lacks = jnp.any(_wanted(target, lane) & ~lane.inside)
        count = jnp.where(lacks, jnp.sum(_wanted(target, lane, MARGIN), dtype=jnp.int32), 1)
        return jnp.where(lane.stage < target.alpha.shape[0], jnp.maximum(count, 1), 0)

    return jax.vmap(one)(targets, lanes)


def _gather(
    problem: Problem, targets: Targets, lanes: _Lane, grams: Float[Array, "t w w"], live: Bool[Array, " t"]
) -> tuple[_Lane, Float[Array, "t w w"]]:
    """Choose a new working set, and take its part of the Gram matrix, where a target's lacks columns."""
    n, size = lanes.weights.shape[1], grams.shape[1]
    lacking = jax.vmap(lambda target, lane: jnp.any(_wanted(target, lane) & ~lane.inside))(targets, lanes)
    lacking &= live
    order = jnp.argsort(~lacking)

    def one(number, carry):
        inside, indices, grams = carry
        at = order[number]
        target, lane = (jax.tree.map(lambda leaf: leaf[at], each) for each in (targets, lanes))
        wanted = _wanted(target, lane, MARGIN)
        chosen = jnp.nonzero(wanted, size=size, fill_value=n)[0].astype(jnp.int32)
        return inside.at[at].set(wanted), indices.at[at].set(chosen), grams.at[at].set(_part(problem, chosen))

    carry = (lanes.inside, lanes.indices, grams)
    inside, indices, grams = jax.lax.fori_loop(0, jnp.sum(lacking, dtype=jnp.int32), one, carry)
    return lanes._replace(inside=inside, indices=indices), grams


def _part(problem: Problem, chosen: Int[Array, " w"]) -> Float[Array, "w w"]:
    if problem.gram is not None:
        n = problem.gram.shape[0]
        part = problem.gram.at[chosen[:, None], chosen[None, :]].get(mode="clip")
        return jnp.where((chosen < n)[:, None] & (chosen < n)[None, :], part, 0)
    columns = problem.rows.at[:, chosen].get(mode="fill", fill_value=0)
    return jnp.matmul(columns.T, columns, precision="highest")


def _work(
    rule: Rule, problem: Problem, target: Targets, lane: _Lane, gram: Float[Array, "w w"], live: Bool[Array, ""]
) -> Float[Array, " n"]:
    """Return the weights that solve a target's problem on its working set."""
    everything = gram.size == 0
    take = (lambda leaf: leaf) if everything else lambda leaf: leaf.at[lane.indices].get(mode="fill", fill_value=0)
    multiply = partial(product, problem) if everything else lambda v: jnp.matmul(gram, v, precision="highest")
    column = partial(_column, problem) if everything else lambda at: gram[at]
    alpha, beta = _penalties(target, lane.stage)
    flat = jnp.finfo(lane.weights.dtype).eps * (problem.lipschitz + beta)
    task = active_set.Task(
        multiply, column, take(problem.energies), take(target.correlation), target.energy, alpha, beta, flat
    )
    tolerance = jnp.where(live, SAFETY * rule.tolerance, jnp.inf)
    weights = active_set.minimise(task, take(lane.weights), take(lane.gradient), tolerance)
    if everything:
        return weights
    return jnp.zeros_like(lane.weights).at[lane.indices].set(weights, mode="drop")


def _column(problem: Problem, at: Int[Array, ""]) -> Float[Array, " n"]:
    if problem.gram is not None:
        return problem.gram[at]
    return jnp.matmul(problem.rows[:, at], problem.rows, precision="highest")


def _judge(
    rule: Rule,
    target: Targets,
    lane: _Lane,
    active: Bool[Array, ""],
    weights: Float[Array, " n"],
    gradient: Float[Array, " n"],
    error: Float[Array, ""],
) -> _Lane:
    """Where a target has arrived, record it, and go to where the next penalty's solution should be."""
    stages, stage, record = target.alpha.shape[0], lane.stage, lane.record
    alpha, beta = _penalties(target, stage)
    gap = active_set.relative_gap(weights, gradient + beta * weights, target.correlation, target.energy, alpha)
    advance = active & ((gap <= rule.tolerance) | (lane.tries + 1 >= ROUNDS))
    better = advance & (error < lane.best) if target.held_out.shape[0] else advance
    at = jnp.where(advance, stage, stages)
    chosen = jnp.where(better, stage, record.chosen)
    record = Solution(
        weights=jnp.where(better, weights, record.weights),
        chosen=chosen,
        gaps=record.gaps.at[at].set(gap, mode="drop"),
        errors=record.errors.at[at].set(error, mode="drop"),
        rounds=jnp.where(active, record.rounds + 1, record.rounds),
        path=record.path.at[at].set(weights, mode="drop") if rule.keep_path else record.path,
    )
    following = jnp.where(advance, stage + 1, stage)
    if rule.patience:
        following = jnp.where(advance & (stage - chosen >= rule.patience), stages, following)
    before, here, there = (_penalties(target, each)[0] for each in (jnp.maximum(stage - 1, 0), stage, following))
    known = advance & (before != here) & (following < stages)
    factor = jnp.where(known, (there - here) / jnp.where(known, here - before, 1), 0)
    keep = lambda new, old: jnp.where(active, new, old)  # noqa: E731
    return _Lane(
        weights=keep(weights + factor * (weights - lane.last_weights), lane.weights),
        gradient=keep(gradient + factor * (gradient - lane.last_gradient), lane.gradient),
        last_weights=jnp.where(advance, weights, lane.last_weights),
        last_gradient=jnp.where(advance, gradient, lane.last_gradient),
        inside=lane.inside,
        indices=lane.indices,
        stage=following,
        tries=jnp.where(advance, 0, jnp.where(active, lane.tries + 1, lane.tries)),
        best=jnp.where(better, error, lane.best),
        record=record,
    )


def lipschitz(rows: Float[Array, "m n"], *, steps: int = 30) -> Float[Array, ""]:
    """Return an upper estimate of the largest eigenvalue of `XᵀX`, by power iteration from a fixed vector."""
    v = jnp.asarray(np.random.default_rng(0).normal(size=rows.shape[1]), rows.dtype)
    of_both = partial(jnp.matmul, precision="highest")

    def multiplied(v):
        return of_both(of_both(rows, v), rows)

    def iterate(_, v):
        v = multiplied(v)
        return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)

    largest = jnp.linalg.norm(multiplied(jax.lax.fori_loop(0, steps, iterate, v)))
    return jnp.maximum(1.05 * largest, jnp.finfo(v.dtype).tiny)
