"""Many training runs at once, each on its own mask and its own key.

An ensemble is one pass over its members: `core.stream` takes them in chunks of a fixed width, the last one padded, so
that a model has the same bits whichever chunk it falls into; finished chunks may be kept on disk, where a killed
ensemble resumes and a longer one extends a shorter one; and a mesh spreads the models of a chunk over its devices.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Integer, Key, PyTree, UInt8, UInt32

from jattrib.core import files, store, stream, tree
from jattrib.core import mesh as meshes
from jattrib.core.errors import DivergedError, InvalidInputError, StoreError, check_choice
from jattrib.core.types import Batch
from jattrib.train import chunk, loop
from jattrib.train import fit as fits
from jattrib.train.chunk import Ensemble, Strategy

PROBE_STEPS, PROBE_MODELS = 16, 8
"""Steps by which `choose` compares strategies, and models where no width is given."""

MOST = 64
"""The most models of a device's chunk when no width is given: more are no faster, and a killed run loses a chunk."""


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
        InvalidInputError: masks, keys and data disagree, a mask is empty or leaves the last batches of an epoch
            empty, or the strategy does not fit the mesh.
        DivergedError: a loss or an output is not finite.
        StoreError: `directory` cannot be written, belongs to another run, or is damaged.
        WorkerError: a process of the strategy `processes` was killed.
    """
    _check(ensemble, data, masks, keys, mesh)
    data = jax.tree.map(jnp.asarray, data)
    width = _width(outputs, ensemble, data, len(masks), mesh, directory)
    ensemble = ensemble._replace(width=None)  # compiled for shapes, not for a setting
    members = _MemberSource(masks, keys)
    operand = (tree.callable_tree(outputs), data)
    like = chunk.row_like(ensemble, operand, masks.shape[1])
    into = None
    if directory is not None:
        into = store.Rows.create_or_open(
            directory,
            arrays=store.row_arrays(like),
            length=len(members),
            chunk=width,
            identity=store.identified(_identity(ensemble, data), identity),
        )
        _check_members(into, members)
    with chunk.trainer(ensemble, operand, masks.shape[1]) as run:
        found = stream.map_rows(
            run, operand, members, chunk=width, mesh=mesh, into=into, label=label, check=_check_finite,
            compiled=ensemble.strategy not in chunk.CALLS,
        )  # fmt: skip
    if into is not None:
        found = tree.from_names(like, {name: into.array(name) for name in tree.to_names(like)})
    return jax.tree.map(meshes.keyed, found["outputs"], like["outputs"])


def choose(
    ensemble: Ensemble, data: Batch, masks: Bool[np.ndarray, "m n"], keys: Key[Array, " m"]
) -> dict[Strategy, float]:
    """Return the seconds a model of each strategy here, fastest first, from a few steps of one chunk.

    But for `processes`, whose start would take longer than the measurement: choose it for a thousand models.
    """
    plan = ensemble.plan._replace(epochs=1, size=min(ensemble.plan.size, PROBE_STEPS * ensemble.plan.batch_size))
    width = ensemble.width or PROBE_MODELS
    chosen = np.arange(width) % len(masks)
    members = _MemberSource(masks, keys).take(chosen)
    operand = (tree.callable_tree(_nothing), jax.tree.map(jnp.asarray, data))
    seconds: dict[Strategy, float] = {}
    for strategy in (each for each in get_args(Strategy) if each != "processes"):
        run = partial(chunk.train_chunk, ensemble._replace(plan=plan, strategy=strategy))
        run = run if strategy in chunk.CALLS else jax.jit(run)
        jax.block_until_ready(run(operand, members))  # compiles
        begun = time.perf_counter()
        jax.block_until_ready(run(operand, members))
        seconds[strategy] = (time.perf_counter() - begun) / width
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def fit(
    outputs: Callable[[loop.Trained], PyTree],
    ensemble: Ensemble,
    data: Batch,
    count: int,
    *,
    mesh: jax.sharding.Mesh | None = None,
    capacity: int | None = None,
) -> fits.Fit:
    """Return how `collect` would train `count` models here, or on devices that are only described, and run nothing.

    The program of a chunk is compiled for the devices, and its memory is what the compiler says; without
    `ensemble.width`, the width is the largest that fits, up to `MOST` models a device, or four a core for the
    strategies that are calls.

    Args:
        outputs: as in `collect`.
        ensemble: what the members share.
        data: the whole training set; its arrays may be abstract (`jax.ShapeDtypeStruct`).
        count: models.
        mesh: spreads the models of a chunk over its first axis.
        capacity: bytes of a device; when left out, nine tenths of what it has.

    Raises:
        InvalidInputError: there are no models, not even one a device fits, the strategy does not fit the mesh, or a
            described device's memory is unknown.
    """
    _check_strategy(ensemble, mesh)
    if count < 1:
        raise InvalidInputError(f"count = {count} models", expected="at least 1", remedy="ask for as many as there are")
    devices = meshes.width(mesh)
    capacity = capacity or fits.capacity(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    held = partial(_memory, outputs, ensemble, data, mesh)
    if ensemble.width is not None:
        each = meshes.padded_size(ensemble.width, devices) // devices
    else:
        most = min(-(-count // devices), 4 * meshes.cores() if ensemble.strategy in chunk.CALLS else MOST)
        each = fits.widest(lambda width: held(width).total, most, capacity)
    return fits.Fit(each * devices, -(-count // (each * devices)), devices, held(each), capacity)


def _memory(
    outputs: Callable[[loop.Trained], PyTree],
    ensemble: Ensemble,
    data: Batch,
    mesh: jax.sharding.Mesh | None,
    each: int,
) -> fits.Memory:
    """Return what a chunk of `each` models a device holds there."""
    n = len(jax.tree.leaves(data)[0])
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    operand = (tree.callable_tree(outputs), data)
    if ensemble.strategy not in chunk.CALLS:
        rows = {"masks": ((n,), bool), "keys": (words.shape, words.dtype), "names": ((32,), np.uint8)}
        batch = {name: jax.ShapeDtypeStruct((1, *shape), dtype) for name, (shape, dtype) in rows.items()}
        run = partial(chunk.train_chunk, ensemble)
        return fits.memory(stream.lower_rows(run, operand, batch, chunk=each * meshes.width(mesh), mesh=mesh).compile())
    one = fits.memory(chunk.train_on_one_core.lower(ensemble, operand, *chunk.member_like(n)).compile())
    at_once = meshes.cores() if ensemble.strategy in chunk.BY_CORE else 1
    return fits.Memory(one.arguments, each * one.outputs, at_once * one.temporaries)


def _width(
    outputs: Callable[[loop.Trained], PyTree],
    ensemble: Ensemble,
    data: Batch,
    count: int,
    mesh: jax.sharding.Mesh | None,
    directory: Path | None,
) -> int:
    """Return the width that is given, or the directory's, or the largest that fits; the same on every process."""
    if ensemble.width is not None:
        return ensemble.width
    if directory is not None and (directory / files.MANIFEST).is_file():
        width = store.Rows.open(directory).chunk
    else:
        width = fit(outputs, ensemble, data, count, mesh=mesh).width
    return int(multihost_utils.broadcast_one_to_all(np.int32(width))) if jax.process_count() > 1 else width


def names(masks: Bool[np.ndarray, "m n"], words: UInt32[np.ndarray, "m k"]) -> UInt8[np.ndarray, "m 32"]:
    """Return the digest of each member's mask and words of the key: what a directory knows it by."""
    found = [
        hashlib.sha256(np.packbits(mask).tobytes() + key.tobytes()) for mask, key in zip(masks, words, strict=True)
    ]
    return np.frombuffer(b"".join(each.digest() for each in found), np.uint8).reshape(-1, 32)


def whole(trained: loop.Trained) -> loop.Trained:
    """Return all of a trained model: what `train` collects."""
    return trained


def _nothing(trained: loop.Trained) -> Float[Array, ""]:
    return trained.losses[-1]


class _MemberSource(NamedTuple):
    """The members as a `Source`: what the pass over an ensemble passes over."""

    masks: Bool[np.ndarray, "m n"]
    keys: Key[Array, " m"]

    def __len__(self) -> int:
        return self.masks.shape[0]

    def take(self, indices: Integer[np.ndarray, " w"], /) -> dict[str, np.ndarray]:
        masks, words = self.masks[indices], np.asarray(jax.random.key_data(self.keys))[indices]
        return {"masks": masks, "keys": words, "names": names(masks, words)}


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
    if np.ndim(masks) != 2:
        raise InvalidInputError(
            f"masks of shape {np.shape(masks)}", expected="a row of all examples for each model",
            remedy="of a single model, pass mask[None] and its key as keys[None]",
        )  # fmt: skip
    loop.check_plan(ensemble.plan, masks.shape[1])
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(data)}
    if lengths != {masks.shape[1]} or len(keys) != len(masks) or len(masks) == 0:
        raise InvalidInputError(
            f"{len(masks)} masks of {masks.shape[1]} examples, {len(keys)} keys, data of {sorted(lengths)} examples",
            expected="one mask and one key a model, each mask as long as the data",
            remedy="draw the masks with data.masks.subsets(key, n, ...) for this data and the keys with member_keys",
        )
    usual = jax.random.key_impl(jax.random.key(0))
    if meshes.is_key(keys) and jax.random.key_impl(keys) != usual:  # stores and processes have the words alone
        raise InvalidInputError(
            f"keys of {jax.random.key_impl(keys)!r}",
            expected=f"keys of {usual!r}, which jax.random.key makes here",
            remedy="make them without `impl`, or set jax_default_prng_impl for the whole program",
        )
    included = masks.sum(axis=1)
    if included.min() == 0 or included.max() > ensemble.plan.size:
        at = int(included.argmin() if included.min() == 0 else included.argmax())
        raise InvalidInputError(
            f"mask {at} includes {included[at]} examples",
            expected=f"from 1 to plan.size = {ensemble.plan.size} of them",
            remedy="drop empty masks, and set plan.size to the count of the largest mask",
        )
    at, plan = int(included.argmin()), ensemble.plan
    if ensemble.removal == "skip" and included[at] <= (plan.steps_per_epoch - 1) * plan.batch_size:
        raise InvalidInputError(
            f"mask {at} includes {included[at]} examples, plan.size is {plan.size}",
            expected=f"none that leaves whole batches of {plan.batch_size} empty at the end of an epoch: the optimiser "
            "would take steps without examples",
            remedy="train models of so few examples in an ensemble of their own, whose plan.size is their count",
        )
    _check_strategy(ensemble, mesh)


def _check_strategy(ensemble: Ensemble, mesh: jax.sharding.Mesh | None) -> None:
    check_choice("strategy", ensemble.strategy, get_args(Strategy))
    check_choice("removal", ensemble.removal, get_args(chunk.Removal))
    if mesh is not None and ensemble.strategy in chunk.CALLS:
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
    for name, leaf in tree.to_names(rows["outputs"]).items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.isfinite(leaf).all():
            model = int(np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1).argmin())
            raise DivergedError(
                f"the output {name!r} of model {start + model} is not finite, its losses are",
                expected="finite outputs",
                remedy="lower the learning rate of the last steps, or check the queries for extreme values",
            )
