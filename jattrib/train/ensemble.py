"""Many training runs at once, each on its own mask and its own key.

An ensemble is one pass over its members: `core.stream` takes them in chunks of a fixed width, the last one padded, so
that a model has the same bits whichever chunk it falls into; finished chunks may be kept on disk, where a killed
ensemble resumes and a longer one extends a shorter one; and a mesh spreads the models of a chunk over its devices.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Integer, Key, PyTree

from jattrib.core import store, stream, tree
from jattrib.core.errors import DivergedError, InvalidInputError, StoreError
from jattrib.core.types import Batch
from jattrib.models.model import Model
from jattrib.train import loop

Strategy = Literal["vmap", "map", "threads", "steps"]
"""How a device runs the models of a chunk.

`vmap`: side by side, in one program.  `map`: one after another, in one program.  `threads`, for the CPU: as many at a
time as there are cores, each in a program of one thread, so that no core waits for another.  `steps`: one after
another, a call a step, for programs that the compiler makes slow inside a loop (convolutions on the CPU).  The last
two take no mesh.
"""

CALLS: tuple[Strategy, ...] = ("threads", "steps")
"""The strategies that are Python around compiled programs, not a program."""

PROBE_STEPS = 16
"""Steps by which `choose` compares strategies."""


class Ensemble(NamedTuple):
    """Everything that the members of an ensemble share.

    Attributes:
        model: initialisation and forward pass.
        optimizer: an optax transformation.
        plan: epochs, batch size, examples an epoch.
        removal: `skip`: a member passes over its own mask's examples only.  `zero_weight`: every member passes over
            all n examples, in an order that depends on its key alone, and those outside its mask weigh nothing:
            members with one key are then **paired**, alike but for what was removed.
        strategy: how a device runs the models of a chunk (see `choose`).
        width: models in a chunk, all in memory at once.
    """

    model: Model
    optimizer: optax.GradientTransformation
    plan: loop.Plan
    removal: Literal["skip", "zero_weight"] = "skip"
    strategy: Strategy = "vmap"
    width: int = 16


Members = tuple[Bool[Array, "w n"], Key[Array, " w"]]
"""Masks and keys."""


def member_keys(
    key: Key[Array, ""], subsets: Integer[np.ndarray, " m"], seeds: Integer[np.ndarray, " m"]
) -> Key[Array, " m"]:
    """Return the key of each member, which depends on the number of its subset and on its seed, and on nothing else."""

    def one(subset: Integer[Array, ""], seed: Integer[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(key, subset), seed)

    return jax.vmap(one)(jnp.asarray(subsets, jnp.uint32), jnp.asarray(seeds, jnp.uint32))


def train(
    ensemble: Ensemble,
    data: Batch,
    masks: Bool[np.ndarray, "m n"],
    keys: Key[Array, " m"],
    *,
    mesh: jax.sharding.Mesh | None = None,
    directory: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    label: str = "training",
) -> loop.Trained:
    """Train m models and return parameters, states and losses, stacked along a leading axis, on the host.

    The arguments and errors are those of `collect`.
    """
    return collect(whole, ensemble, data, masks, keys, mesh=mesh, directory=directory, identity=identity, label=label)


def collect(
    outputs: Callable[[loop.Trained], PyTree],
    ensemble: Ensemble,
    data: Batch,
    masks: Bool[np.ndarray, "m n"],
    keys: Key[Array, " m"],
    *,
    mesh: jax.sharding.Mesh | None = None,
    directory: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    label: str = "training",
) -> PyTree:
    """Train m models and return `outputs` of each, stacked along a leading axis, on the host; the models are let go.

    Args:
        outputs: a pure function of one trained model (the margins of all queries, say), run where it was trained; the
            arrays that it needs are best bound by `jax.tree_util.Partial`.
        ensemble: what the members share.
        data: the whole training set, arrays with leading axis n.
        masks: the examples that each member trains on.
        keys: one a member (`member_keys`): its initialisation and its order.
        mesh: spreads the models of a chunk over its first axis.
        directory: where finished chunks are kept, and looked for; a later call may ask for more members.
        identity: what else the results depend on (a model's configuration, say), to refuse a directory of another run.
        label: what the progress display calls it.

    Raises:
        InvalidInputError: masks, keys and data disagree, a mask is empty, or the strategy does not fit the mesh.
        DivergedError: a loss is not finite.
        StoreError: `directory` cannot be written, belongs to another run, or is damaged.
    """
    _check(ensemble, data, masks, keys, mesh)
    data = jax.tree.map(jnp.asarray, data)
    members = _MemberSource(masks, keys)
    operand = (tree.callable_tree(outputs), data)
    shapes = partial(_train_chunk, ensemble._replace(strategy="vmap"))  # quick to trace, and alike
    like = jax.eval_shape(shapes, operand, members.take(np.arange(1)))
    into = None
    if directory is not None:
        into = store.Rows.create_or_open(
            directory,
            arrays=store.row_arrays(like),
            length=len(members),
            chunk=ensemble.width,
            identity={**_identity(ensemble, data), **(identity or {})},
        )
        _check_members(into, members)
    found = stream.map_rows(
        partial(_train_chunk, ensemble), operand, members, chunk=ensemble.width, mesh=mesh, into=into, label=label,
        check=_check_finite, compiled=ensemble.strategy not in CALLS,
    )  # fmt: skip
    if into is not None:
        found = tree.from_names(like, {name: into.array(name) for name in tree.to_names(like)})
    return found["outputs"]


def choose(
    ensemble: Ensemble, data: Batch, masks: Bool[np.ndarray, "m n"], keys: Key[Array, " m"]
) -> dict[Strategy, float]:
    """Return the seconds a model of each strategy here, fastest first, from a few steps of one chunk."""
    plan = ensemble.plan._replace(epochs=1, size=min(ensemble.plan.size, PROBE_STEPS * ensemble.plan.batch_size))
    chosen = np.arange(ensemble.width) % len(masks)
    members = _MemberSource(masks, keys).take(chosen)
    operand = (tree.callable_tree(_nothing), jax.tree.map(jnp.asarray, data))
    seconds: dict[Strategy, float] = {}
    for strategy in get_args(Strategy):
        run = partial(_train_chunk, ensemble._replace(plan=plan, strategy=strategy))
        run = run if strategy in CALLS else jax.jit(run)
        jax.block_until_ready(run(operand, members))  # compiles
        begun = time.perf_counter()
        jax.block_until_ready(run(operand, members))
        seconds[strategy] = (time.perf_counter() - begun) / ensemble.width
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def whole(trained: loop.Trained) -> loop.Trained:
    """Return all of a trained model: what `train` collects."""
    return trained


def _nothing(trained: loop.Trained) -> Float[Array, ""]:
    return trained.losses[-1]


_Rows = dict[str, PyTree]
"""What is kept of members: outputs and losses."""


class _MemberSource(NamedTuple):
    """The members as a `Source`: what the pass over an ensemble passes over."""

    masks: Bool[np.ndarray, "m n"]
    keys: Key[Array, " m"]

    def __len__(self) -> int:
        return self.masks.shape[0]

    def take(self, indices: Integer[np.ndarray, " w"], /) -> dict[str, np.ndarray]:
        words = np.asarray(jax.random.key_data(self.keys))[indices]
        masks = self.masks[indices]
        names = [
            hashlib.sha256(np.packbits(mask).tobytes() + key.tobytes()).digest()
            for mask, key in zip(masks, words, strict=True)
        ]
        return {"masks": masks, "keys": words, "names": np.frombuffer(b"".join(names), np.uint8).reshape(-1, 32)}


Operand = tuple[Callable[[loop.Trained], PyTree], Batch]
"""What is wanted of a trained model, and the data."""


def _train_chunk(ensemble: Ensemble, operand: Operand, members: Mapping[str, Any]) -> dict[str, PyTree]:
    """Train the members of a chunk: the rows of the pass."""
    keys = jax.random.wrap_key_data(members["keys"])
    run = {"vmap": _side_by_side, "map": _one_by_one, "threads": _core_by_core, "steps": _step_by_step}
    found = run[ensemble.strategy](ensemble, operand, jnp.asarray(members["masks"]), keys)
    return {**found, "names": members["names"]}


def _side_by_side(ensemble: Ensemble, operand: Operand, masks: Bool[Array, "w n"], keys: Key[Array, " w"]) -> _Rows:
    return jax.vmap(partial(_train_member, ensemble, operand))(masks, keys)


def _one_by_one(ensemble: Ensemble, operand: Operand, masks: Bool[Array, "w n"], keys: Key[Array, " w"]) -> _Rows:
    return jax.lax.map(lambda member: _train_member(ensemble, operand, *member), (masks, keys))


def _core_by_core(ensemble: Ensemble, operand: Operand, masks: Bool[Array, "w n"], keys: Key[Array, " w"]) -> _Rows:
    def row(mask: Bool[Array, " n"], key: Key[Array, ""]) -> _Rows:
        return jax.block_until_ready(_train_on_one_core(ensemble, operand, mask, key))

    with ThreadPoolExecutor(cores()) as pool:
        return _stack(pool.map(row, masks, keys))


def _step_by_step(ensemble: Ensemble, operand: Operand, masks: Bool[Array, "w n"], keys: Key[Array, " w"]) -> _Rows:
    outputs, data = operand
    found = []
    for mask, key in zip(masks, keys, strict=True):
        start = _start_jitted(ensemble, mask, key)
        carry: loop.Carry = (*start.initial, ensemble.optimizer.init(start.initial[0]))
        values = []
        for row in range(ensemble.plan.steps):
            order = jax.tree.map(lambda leaf, row=row: leaf[row], start.order)
            carry, value = _one_step(ensemble, data, start.weights, carry, order)
            values.append(value)
        losses = jnp.stack(values).reshape(ensemble.plan.epochs, -1).mean(axis=1)
        found.append(_finish_jitted(outputs, loop.Trained(carry[0], carry[1], losses)))
    return _stack(found)


def _stack(rows: Iterable[_Rows]) -> _Rows:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


class _Start(NamedTuple):
    """What a member's training starts from."""

    initial: tuple[Any, Any]
    order: loop.Schedule
    weights: Float[Array, " n"] | None


def _start(ensemble: Ensemble, mask: Bool[Array, " n"], key: Key[Array, ""]) -> _Start:
    init_key, order_key = jax.random.split(key)
    initial = ensemble.model.init(init_key)
    if ensemble.removal == "skip":
        return _Start(initial, loop.schedule(order_key, mask, ensemble.plan), None)
    return _Start(initial, loop.schedule(order_key, jnp.ones_like(mask), ensemble.plan), mask.astype(jnp.float32))


_start_jitted = jax.jit(_start, static_argnums=0)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _one_step(ensemble: Ensemble, data: Batch, weights: Any, carry: loop.Carry, row: loop.Schedule):
    return loop.step(loop.classification_loss(ensemble.model), ensemble.optimizer, data, weights)(carry, row)


def _train_member(ensemble: Ensemble, operand: Operand, mask: Bool[Array, " n"], key: Key[Array, ""]) -> _Rows:
    outputs, data = operand
    start = _start(ensemble, mask, key)
    trained = loop.train(
        loop.classification_loss(ensemble.model), ensemble.optimizer, start.initial, data, start.order,
        weights=start.weights, epochs=ensemble.plan.epochs,
    )  # fmt: skip
    return _finish(outputs, trained)


_train_on_one_core = jax.jit(_train_member, static_argnums=0, compiler_options={"xla_cpu_multi_thread_eigen": False})


def _finish(outputs: Callable[[loop.Trained], PyTree], trained: loop.Trained) -> _Rows:
    return {"outputs": outputs(trained), "losses": trained.losses}


_finish_jitted = jax.jit(_finish)


def _identity(ensemble: Ensemble, data: Batch) -> dict[str, Any]:
    plan = {f"plan.{name}": value for name, value in ensemble.plan._asdict().items()}
    return {"data": tree.digest(data), **plan, "removal": ensemble.removal, "strategy": ensemble.strategy}


def _check(
    ensemble: Ensemble,
    data: Batch,
    masks: Bool[np.ndarray, "m n"],
    keys: Key[Array, " m"],
    mesh: jax.sharding.Mesh | None,
) -> None:
    loop.check_plan(ensemble.plan, masks.shape[1])
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(data)}
    if lengths != {masks.shape[1]} or len(keys) != len(masks) or len(masks) == 0:
        raise InvalidInputError(
            f"{len(masks)} masks of {masks.shape[1]} examples, {len(keys)} keys, data of {sorted(lengths)} examples",
            expected="one mask and one key a model, each mask as long as the data",
            remedy="draw the masks with data.masks.subsets(key, n, ...) for this data and the keys with member_keys",
        )
    included = masks.sum(axis=1)
    if included.min() == 0 or included.max() > ensemble.plan.size:
        at = int(included.argmin() if included.min() == 0 else included.argmax())
        raise InvalidInputError(
            f"mask {at} includes {included[at]} examples",
            expected=f"from 1 to plan.size = {ensemble.plan.size} of them",
            remedy="drop empty masks, and set plan.size to the count of the largest mask",
        )
    if mesh is not None and ensemble.strategy in CALLS:
        raise InvalidInputError(
            f"strategy {ensemble.strategy!r} on a mesh", expected="'vmap' or 'map'",
            remedy="choose either, or pass no mesh",
        )  # fmt: skip


def _check_members(rows: store.Rows, members: _MemberSource) -> None:
    """Refuse finished rows that were trained on other masks or keys."""
    for number in np.flatnonzero(rows.completed):
        start = int(number) * rows.chunk
        stop = min(start + rows.chunk, len(rows))
        other = (rows.read("names", start, stop) != members.take(np.arange(start, stop))["names"]).any(axis=1)
        if other.any():
            raise StoreError(
                f"{rows.path}: model {start + int(other.argmax())} was trained on another mask or key",
                expected="the masks and keys that the directory was begun with, and more of them at most",
                remedy="choose another directory, or draw masks and keys from the same key as before",
            )


def _check_finite(start: int, rows: dict[str, PyTree]) -> None:
    bad = ~np.isfinite(rows["losses"])
    if bad.any():
        model = int(bad.any(axis=1).argmax())
        epoch = int(bad[model].argmax())
        raise DivergedError(
            f"the loss of model {start + model} is {rows['losses'][model, epoch]} in epoch {epoch + 1} of "
            f"{bad.shape[1]} ({int(bad.any(axis=1).sum())} of the {len(bad)} models of its chunk diverged)",
            expected="finite losses",
            remedy="lower the learning rate, lengthen its warm-up, or check the inputs for extreme values",
        )
