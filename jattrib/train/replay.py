"""Replay: the exact derivative of training, for any number of outputs in one pass back through the run.

With its order fixed, a run is a deterministic function of data weights, hyper-parameters and initial parameters.  The
run is cut into segments.  Going forward, the carry (parameters, model state, the optimiser's moments) at the start of
each is kept; going backward, each segment is run again, every step kept, and the cotangents of all outputs are pulled
back through each step together: a step is linearised once, whatever the number of outputs.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from jattrib.core import mesh as meshes
from jattrib.core import store, tree
from jattrib.core.errors import DivergedError, InvalidInputError, check_choice
from jattrib.core.progress import track
from jattrib.core.types import Batch, Params
from jattrib.train import cuts, loop, pullback
from jattrib.train.cuts import Cut
from jattrib.train.ensemble import Ensemble
from jattrib.train.pullback import Optimizer, Output
from jattrib.train.shelf import Shelf

__all__ = [
    "Checkpoints",
    "Inputs",
    "Metagradient",
    "Optimizer",
    "Output",
    "Run",
    "member",
    "metagradient",
    "scaled",
    "train",
]

Checkpoints = Literal["device", "host", "recompute"]
"""What becomes of the carries at the starts of the S segments.

`device`, `host`: all are kept, in the memory of either.  `recompute`: about log₂ S of them are kept at a time, and the
others are computed again when their turn comes, each step about ½ log₂ S times.
"""


class Run(NamedTuple):
    """A training run, but for what it is differentiated with respect to.

    Attributes:
        loss: per-example losses of a batch.
        optimizer: an optax transformation, or how to make one of the hyper-parameters.
        data: the whole training set, arrays with leading axis n.
        order: which examples each step sees; cut it short to differentiate an earlier model.
    """

    loss: loop.LossFn
    optimizer: Optimizer
    data: Batch
    order: loop.Schedule


class Inputs(NamedTuple):
    """What a run is a function of.

    Attributes:
        weights: of the examples, or of every single draw.
        params: the initial parameters.
        state: the initial model state, which is not differentiated.
        hyper: a pytree of floating-point arrays, for the run's `optimizer`.
    """

    weights: Float[Array, " n"] | Float[Array, "steps batch"]
    params: Params
    state: Any = ()
    hyper: Any = ()


class Metagradient(NamedTuple):
    """The derivative of q outputs of the trained model; queries are everywhere the last axis.

    Attributes:
        values: the outputs.
        weights: with respect to the data weights.
        params: with respect to the initial parameters.
        hyper: with respect to the hyper-parameters.
        trained: the final parameters and model state.
        norms: of the derivative with respect to the parameters at the start of each segment and, last, at the end of
            the run.  Where they grow towards the start, training magnifies small changes.
    """

    values: Float[Array, " q"]
    weights: Float[Array, "n q"] | Float[Array, "steps batch q"]
    params: PyTree[Float[Array, "... q"]]
    hyper: PyTree[Float[Array, "... q"]]
    trained: tuple[Params, Any]
    norms: Float[np.ndarray, "ends q"]


def scaled(optimizer: optax.GradientTransformation) -> Callable[[Any], optax.GradientTransformation]:
    """Return `optimizer` with its updates multiplied by a hyper-parameter m.

    m is one number for the whole run, or a vector of one a step.  It multiplies the learning rate wherever this is the
    last factor of an update, as in optax's SGD, Adam and AdamW; at m = 1 its derivative is that of the schedule.

    `train` and `metagradient` raise InvalidInputError if m is a vector of fewer than the run's steps.
    """
    return _Scaled(optimizer)


class _Scaled(NamedTuple):
    optimizer: optax.GradientTransformation

    def __call__(self, multiplier: Float[Array, "*steps"]) -> optax.GradientTransformation:
        def factor(count: Any) -> Float[Array, ""]:
            return multiplier[count] if multiplier.ndim else multiplier

        return optax.chain(self.optimizer, optax.scale_by_schedule(factor))


class _Progress(NamedTuple):
    """How far the way back has come: everything but the carries."""

    segment: Any
    values: Any
    cotangent: pullback.Cotangent
    total: pullback.Total
    norms: Any
    trained: tuple[Params, Any]


def member(group: Ensemble, data: Batch, key: Key[Array, ""]) -> tuple[Run, Inputs]:
    """Return the run of an ensemble's member that trains on all of the data, and its inputs, at weights of one.

    Members of the same key and `removal="zero_weight"` are what this run does with weights of zero and one.

    Raises:
        InvalidInputError: `plan.size` is not the number of examples.
    """
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(data)}
    if counts != {group.plan.size}:
        raise InvalidInputError(
            f"plan.size = {group.plan.size}, data of {sorted(counts)} examples",
            expected="a run that sees every example in every epoch",
            remedy="set plan.size to the number of examples",
        )
    init_key, order_key = jax.random.split(key)
    params, state = group.model.init(init_key)
    order = loop.schedule(order_key, jnp.ones(group.plan.size, bool), group.plan)
    run = Run(loop.classification_loss(group.model), group.optimizer, jax.tree.map(jnp.asarray, data), order)
    return run, Inputs(jnp.ones(group.plan.size), params, state)


def train(run: Run, inputs: Inputs) -> tuple[Params, Any]:
    """Return the parameters and the model state that the run ends with.

    Raises:
        InvalidInputError: weights, data and order disagree, or they or a hyper-parameter are no floating-point arrays.
    """
    return _train(pullback.Program(run.loss, run.optimizer), run.data, run.order, _checked(run, inputs))


@partial(jax.jit, static_argnums=0)
def _train(program: pullback.Program, data: Batch, order: loop.Schedule, inputs: Inputs) -> tuple[Params, Any]:
    carry = pullback.begin(program, inputs.params, inputs.state, inputs.hyper)
    return pullback.advance(program, data, inputs.hyper, carry, cuts.rows(order, inputs.weights))[:2]


def metagradient(
    output: Output,
    run: Run,
    inputs: Inputs,
    queries: Batch,
    *,
    segment: int | None = None,
    block: int | None = None,
    checkpoints: Checkpoints = "device",
    directory: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    checkpoint_every: float = 30.0,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Metagradient:
    """Return `∂f(θ_T(w, h, θ_0); z_j) / ∂(w, h, θ_0)` for all queries j, exactly, from one replay of the run.

    It costs three runs (two, if there is one segment) and, for each query, a product with each step's Hessian: one to
    two times the arithmetic of a step (one where the first layer is most of the model, whose inputs need no
    derivative).  Sharing the replay saves the runs, latency and memory traffic, no arithmetic: where steps are bound
    by latency, as small ones on accelerators are, tens of queries cost a few runs; where they are bound by arithmetic,
    as on a CPU, q queries cost about q.

    In memory are T / `segment` + `segment` carries (log₂(T / `segment`) + `segment` with `checkpoints="recompute"`),
    and the floating-point part of one carry for each query.

    Args:
        output: what is differentiated, one scalar a query.
        run: the training run; it is compiled once for each identity of its `loss` and `optimizer`.
        inputs: with respect to what, and where: usually at weights of one.
        queries: arrays with leading axis q.
        segment: steps in a segment; about √T when left out.  With T steps every carry is kept and nothing is run
            twice; one step and `checkpoints="recompute"` keep the fewest.
        block: queries pulled back at once, which bounds the activations in memory; all when left out.
        checkpoints: where the carries at the starts of segments are kept; `directory` comes before it.
        directory: keeps them on disk, and with them how far the replay has come: called again after it was killed, it
            goes on from there, to the same bits.  What it wrote is removed when it is done.
        identity: what else the run depends on (a model's configuration, say), to refuse a directory of another.
        checkpoint_every: seconds between two writes of how far the replay has come.
        mesh: its first axis spreads the queries; its second, if it has one, the examples of each batch.
        progress: whether to show it.

    Raises:
        InvalidInputError: weights, data and order disagree, they or a hyper-parameter are no floating-point arrays,
            the model or the optimiser holds complex numbers, `checkpoints` is none of those, there are no queries, or
            the mesh does not divide the batch.
        DivergedError: an output or a derivative is not finite.
        StoreError: `directory` cannot be written, belongs to another run, or is damaged.

    Source: Engstrom et al. 2025, section 2 (REPLAY), which replays the run once an output, on a k-ary tree of
    checkpoints.
    """
    check_choice("checkpoints", checkpoints, get_args(Checkpoints))
    inputs = _checked(run, inputs)
    _check_real(run, inputs)
    plan = cuts.cut(run.order, queries, segment, block, mesh)
    shelf = Shelf(checkpoints, directory, mesh)
    if directory is not None:
        parts = {"data": run.data, "order": run.order, "inputs": inputs, "queries": queries}
        digests = {name: tree.digest(part) for name, part in parts.items()}
        numbers = {f"cut.{name}": number for name, number in plan._asdict().items()}
        shelf = shelf._replace(identity=store.identified({**digests, **numbers}, identity))
    with track(2 * plan.steps, "replaying", progress=progress and jax.process_index() == 0) as report:
        found = _replay(tree.callable_tree(output), run, inputs, queries, plan, shelf, checkpoint_every, report)
    _check_finite(found, plan)
    shelf.clear()
    return found


def _replay(
    output: Output,
    run: Run,
    inputs: Inputs,
    queries: Batch,
    plan: Cut,
    shelf: Shelf,
    every: float,
    report: Callable[[int], None],
) -> Metagradient:
    mesh = shelf.mesh
    program, (data, inputs) = (
        pullback.Program(run.loss, run.optimizer, mesh),
        meshes.replicate((run.data, inputs), mesh),
    )
    parts = cuts.segments(run.order, inputs.weights, plan, mesh)
    asked = cuts.spread(cuts.blocked(queries, plan), mesh)
    start = pullback.begin(program, inputs.params, inputs.state, inputs.hyper)
    state = _resume(program, output, inputs, asked, start, plan, shelf)
    first, saved = plan.segments if state is None else int(state.segment), time.monotonic()
    report(2 * sum(len(part.numbers) for part in parts[first:]))

    def advance(carry: loop.Carry, number: int) -> loop.Carry:
        return pullback.advance(program, data, inputs.hyper, carry, parts[number])

    for number, carry in _backwards(advance, shelf, start, first):
        part = parts[number]
        end, carries = pullback.trace(program, data, inputs.hyper, carry, part)
        if state is None:
            report(plan.steps)
            state = _turn(program, output, inputs, asked, end, plan)
        cotangent, total, length = pullback.pull(
            program, data, inputs.hyper, carries, part, state.cotangent, state.total
        )
        state.norms[number] = meshes.fetch(length)  # this waits: no more than two segments are ever in memory
        state = state._replace(segment=np.int32(number), cotangent=cotangent, total=total)
        if number and shelf.directory is not None and time.monotonic() - saved >= every:
            shelf.save("progress", state)
            saved = time.monotonic()
        report(len(part.numbers))
    assert state is not None
    params, hyper = pullback.finish(program, inputs.params, inputs.state, inputs.hyper, state.cotangent, state.total)
    whole = jax.tree.map(partial(cuts.joined, where=plan), (state.values, state.total.weights, params, hyper))
    norms = np.asarray(cuts.joined(jnp.asarray(np.moveaxis(state.norms, 1, 0)), plan))
    values, weights, params, hyper = whole
    return Metagradient(values, weights, params, hyper, state.trained, norms)


def _backwards(
    advance: Callable[[loop.Carry, int], loop.Carry], shelf: Shelf, start: loop.Carry, count: int
) -> Iterator[tuple[int, loop.Carry]]:
    """Yield the segments' numbers and carries, last first; carries are put on the shelf on the way to them."""
    kept = [(0, start), *((number, None) for number in shelf.stored() if 0 < number < count)]
    for segment in reversed(range(count)):
        at, carry = kept[-1]
        carry = shelf.get(at, carry, start) if at else start
        while at < segment:
            stop = (at + segment + 1) // 2 if shelf.kind == "recompute" else at + 1
            for number in range(at, stop):
                carry = advance(carry, number)
            at = stop
            kept.append((at, shelf.put(at, carry) if at < segment else carry))
        kept.pop()
        yield segment, carry


def _turn(
    program: pullback.Program, output: Output, inputs: Inputs, asked: Batch, end: loop.Carry, plan: Cut
) -> _Progress:
    """Return how the way back begins."""
    values, cotangent = pullback.read(program, output, asked, end)
    norms = np.zeros((plan.segments + 1, *values.shape), values.dtype)
    norms[-1] = meshes.fetch(pullback.norm(end[0], cotangent))
    zeros = pullback.zeros(inputs.weights, inputs.hyper, plan.blocks, plan.block)
    total = cuts.spread(zeros, program.mesh, last=True)
    return _Progress(np.int32(plan.segments), values, cotangent, total, norms, end[:2])


def _resume(
    program: pullback.Program,
    output: Output,
    inputs: Inputs,
    asked: Batch,
    start: loop.Carry,
    plan: Cut,
    shelf: Shelf,
) -> _Progress | None:
    """Return how far an earlier process came, or None."""
    if not shelf.holds("progress"):
        return None
    values, cotangent = jax.eval_shape(partial(pullback.read, program), output, asked, start)
    total = jax.eval_shape(lambda: pullback.zeros(inputs.weights, inputs.hyper, plan.blocks, plan.block))
    norms = np.zeros((plan.segments + 1, *values.shape), values.dtype)
    like = _Progress(np.int32(0), values, cotangent, total, norms, start[:2])
    found = shelf.load("progress", like)
    cotangent = cuts.spread(found.cotangent, program.mesh)
    total = cuts.spread(found.total, program.mesh, last=True)
    trained = shelf.place(found.trained, like.trained)
    return found._replace(cotangent=cotangent, total=total, norms=np.array(found.norms), trained=trained)


def _checked(run: Run, inputs: Inputs) -> Inputs:
    """Return the inputs as arrays, if they and the run belong together."""
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(run.data)}
    shape = jnp.shape(inputs.weights)
    if len(counts) != 1 or shape not in ((*counts,), run.order.indices.shape):
        raise InvalidInputError(
            f"weights of shape {shape}, data of {sorted(counts)} examples, an order of shape {run.order.indices.shape}",
            expected="one weight an example, or one a draw of the order",
            remedy="pass jnp.ones(n) to attribute to examples, jnp.ones(order.indices.shape) to single draws",
        )
    for name, leaf in tree.to_names(inputs.hyper).items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InvalidInputError(
                f"the hyper-parameter {name!r} of dtype {jnp.result_type(leaf)}",
                expected="floating-point numbers, which have a derivative",
                remedy="leave others out of `hyper`: bind them in the optimiser",
            )
    if not jnp.issubdtype(jnp.result_type(inputs.weights), jnp.floating):
        raise InvalidInputError(
            f"weights of dtype {jnp.result_type(inputs.weights)}",
            expected="floating-point numbers, which have a derivative",
            remedy="pass jnp.ones(n), or weights.astype(jnp.float32)",
        )
    steps = run.order.indices.shape[0]
    if isinstance(run.optimizer, _Scaled) and np.ndim(inputs.hyper) and len(inputs.hyper) < steps:
        raise InvalidInputError(
            f"{len(inputs.hyper)} multipliers of the updates of {steps} steps",
            expected="one number, or a vector of one a step",
            remedy=f"pass jnp.ones({steps}) as the hyper-parameter",
        )
    arrays = jax.tree.map(jnp.asarray, (inputs.weights, inputs.params, inputs.hyper))
    return Inputs(arrays[0], arrays[1], inputs.state, arrays[2])


def _check_real(run: Run, inputs: Inputs) -> None:
    """Refuse a carry of complex numbers, which would be taken for constants."""
    begin = partial(pullback.begin, pullback.Program(run.loss, run.optimizer))
    start = jax.eval_shape(begin, inputs.params, inputs.state, inputs.hyper)
    for part, carried in zip(("parameters", "model state", "optimiser's moments"), start, strict=True):
        for name, leaf in tree.to_names(carried).items():
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise InvalidInputError(
                    f"the {part} at {name!r} of dtype {leaf.dtype}",
                    expected="real numbers, by which there is a derivative",
                    remedy="hold real and imaginary parts in arrays of their own, and put them together in the model",
                )


def _check_finite(found: Metagradient, plan: Cut) -> None:
    finite = np.isfinite(found.values)
    if not finite.all():
        at = int(finite.argmin())
        raise DivergedError(
            f"the output of query {at} is {float(found.values[at])} after training",
            expected="finite outputs",
            remedy="lower the learning rate, lengthen its warm-up, or check the inputs for extreme values",
        )
    bad = ~np.isfinite(found.norms).all(axis=1)
    parts = jax.tree.leaves((found.weights, found.params, found.hyper))
    if bad.any() or not all(bool(jnp.isfinite(part).all()) for part in parts):
        last = int(np.flatnonzero(bad)[-1]) if bad.any() else 0
        raise DivergedError(
            f"training is finite, its derivative is not, from step {min((last + 1) * plan.segment, plan.steps)} back",
            expected="a step that is differentiable wherever training goes",
            remedy="a square root of zero is the usual cause: give Adam an eps_root (1e-8, say), and add a small "
            "constant under any norm or standard deviation in the model; else lower the learning rate",
        )
