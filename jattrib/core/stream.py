"""The one pass over data: `fold` sums, `map_rows` computes a row an example.

Both go through a source in chunks of one shape, the last one padded by repeating a row, spread over the devices of a
mesh, the next chunk read and sent while the last one is computed.  What a pass is given (parameters, a projection) is
whole on every device, but what lies on the mesh in parts already stays so, and the compiler splits the work with it.
The results are the same for any chunk and mesh, to rounding, and the same to the bit when an interrupted pass is
resumed.  In a program of several processes every process calls them alike, reads only its own rows, and has the whole
result; stores and checkpoints are written by the first.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from jattrib.core import mesh as meshes
from jattrib.core import params, tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.progress import track
from jattrib.core.sources import InMemory, Items, Subset
from jattrib.core.store import Rows
from jattrib.core.types import Batch, Fold, Source

__all__ = ["InMemory", "Items", "Subset", "fold", "lower_rows", "map_rows"]


def fold(
    statistic: Fold,
    source: Source,
    *,
    chunk: int = 256,
    mesh: Mesh | None = None,
    label: str = "summing",
    progress: bool = True,
    checkpoint: Path | None = None,
    checkpoint_every: float = 30.0,
    identity: Mapping[str, Any] | None = None,
) -> Any:
    """Return `finish(init() + Σ_c update(batch_c, valid_c))`, over the chunks c of the source.

    `update` is compiled once for each identity of the function: make it with `jax.tree_util.Partial(function, arrays)`
    for new arrays to enter without a new compilation.

    Args:
        statistic: the sum.  Its state is whole on every device, and each device adds its own rows; where arrays of
            `update` are split over the mesh, the state is split over all of it (`mesh.spread`), and stays so.  Leaves
            of half precision are summed, and finished, in single.
        source: the examples.
        chunk: examples at a time, over all devices; rounded up to a multiple of their number.
        mesh: spreads the examples over its first axis; None is the default device.
        label: what the progress display calls it.
        progress: whether to show it.
        checkpoint: a directory for the running sum, from which an interrupted fold goes on; removed when it is done.
        checkpoint_every: seconds between two writes of it.
        identity: what the sum is of (digests, seeds); a checkpoint of another is refused.

    Raises:
        InvalidInputError: the source is empty, or increments are not like the state.
        StoreError: the checkpoint is of another source length, chunk or identity, was altered, or cannot be written.
    """
    count, size = _sizes(source, chunk, mesh)
    update = meshes.place(tree.callable_tree(statistic.update), mesh)
    split = meshes.is_split(update, mesh)
    start, state = 0, _begin(statistic, mesh if split else None)
    state = state if split else meshes.replicate(state, mesh)
    keep = {**dict(identity or {}), "source length": count, "chunk": size}
    if checkpoint is not None:
        start, state = _resume(checkpoint, state, keep)
    written, before = time.monotonic(), None
    with track(count, label, progress=progress and jax.process_index() == 0) as advance:
        advance(start)
        for first in range(start, count, size):
            batch, valid = _read(source, first, count, size, mesh)
            state, ticket = _add(update, state, batch, valid, mesh=mesh, split=split)
            if before is not None:
                before.block_until_ready()
            before = ticket
            last = min(first + size, count)
            if checkpoint is not None and last < count and time.monotonic() - written >= checkpoint_every:
                _save_sum(checkpoint, last, state, keep)
                written = time.monotonic()
            advance(last - first)
    if mesh is not None and not split:
        state = jax.tree.map(lambda leaf: jnp.asarray(meshes.fetch(leaf)), state)
    result = statistic.finish(state)
    if checkpoint is not None and jax.process_index() == 0:
        params.remove(checkpoint)
    return result


def lower_fold(statistic: Fold, batch: Batch, *, chunk: int, mesh: Mesh | None = None) -> jax.stages.Lowered:
    """Lower the program of one chunk of `fold` and run nothing; see `lower_rows`.

    `update` is a `jax.tree_util.Partial`, whose arrays may be abstract: those with a sharding on the mesh are split.
    """
    update = tree.callable_tree(statistic.update)
    function, batch = _abstract(update, batch, chunk, mesh)
    split = meshes.is_split(update, mesh)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return leaf
        return leaf.update(sharding=meshes.spread(mesh, leaf.shape) if split else meshes.replicated(mesh))

    state, rows = jax.tree.map(placed, jax.eval_shape(partial(_start, statistic))), jax.tree.leaves(batch)[0]
    valid = jax.ShapeDtypeStruct(rows.shape[:1], bool, sharding=rows.sharding)
    return _lowered(partial(_add.trace, function, state, batch, valid, mesh=mesh, split=split), mesh)


def _begin(statistic: Fold, mesh: Mesh | None) -> PyTree:
    """Return the state before anything is added; on a mesh, split over all of it."""
    start = partial(_start, statistic)
    if mesh is None:
        return start()
    placed = jax.tree.map(lambda leaf: meshes.spread(mesh, leaf.shape), jax.eval_shape(start))
    return jax.jit(start, out_shardings=placed)()


def _start(statistic: Fold) -> PyTree:
    """Return a copy of the state before anything is added, in the types of the sums: what is added to is consumed."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree.widen(statistic.init()))


@partial(jax.jit, static_argnames=("mesh", "split"), donate_argnums=(1,))
def _add(
    update: Callable[..., Any], state: PyTree, batch: Batch, valid: Bool[Array, " b"], *, mesh: Mesh | None, split: bool
) -> tuple[PyTree, Int[Array, ""]]:
    def whole(update: Callable[..., Any], batch: Batch, valid: Bool[Array, " b"]) -> PyTree:
        increment = tree.widen(update(batch, valid))
        return increment if mesh is None or split else jax.lax.psum(increment, mesh.axis_names[0])

    if mesh is not None and not split:
        rows, spec = meshes.row_spec(mesh), PartitionSpec()
        whole = jax.shard_map(whole, mesh=mesh, in_specs=(spec, rows, rows), out_specs=spec, check_vma=False)
    increment = whole(update, batch, valid)
    _check_increment(state, increment)
    new = tree.to_names(increment)
    total = tree.from_names(state, {name: jnp.add(leaf, new[name]) for name, leaf in tree.to_names(state).items()})
    if mesh is not None and split:
        total = jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(leaf, meshes.spread(mesh, leaf.shape)), total
        )
    return total, jnp.sum(valid, dtype=jnp.int32)


def _check_increment(state: PyTree, increment: PyTree) -> None:
    was, new = ({name: (jnp.shape(leaf), jnp.result_type(leaf)) for name, leaf in tree.to_names(each).items()}
                for each in (state, increment))  # fmt: skip
    for name in sorted(was.keys() | new.keys()):
        if was.get(name) != new.get(name):
            state_has, update_has = (
                f"{each[name][1]}{list(each[name][0])}" if name in each else "nothing" for each in (was, new)
            )
            raise InvalidInputError(
                f"a fold whose update gives {update_has} at {name!r}, where its state has {state_has}",
                expected="an increment of the state's structure, shapes and dtypes",
                remedy="make `init` and `update` agree",
            )


def _resume(checkpoint: Path, state: PyTree, keep: Mapping[str, Any]) -> tuple[int, PyTree]:
    """Return how far a sum has come, and it, placed as `state` is; that, from the start, if there is no checkpoint."""
    like = {"cursor": np.zeros((), np.int64), "state": state}
    found, saved = np.zeros((), bool), jax.tree.map(np.asarray, {**like, "state": jax.tree.map(meshes.fetch, state)})
    if jax.process_index() == 0 and params.exists(checkpoint):
        found, saved = np.ones((), bool), jax.tree.map(np.asarray, params.load_params(checkpoint, like, keep))
    if jax.process_count() > 1:
        found, saved = multihost_utils.broadcast_one_to_all((found, saved))
    if not found:
        return 0, state

    def put(value: np.ndarray, like: Any) -> jax.Array:
        if isinstance(like.sharding, jax.sharding.NamedSharding):
            return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
        return jnp.asarray(value)

    return int(saved["cursor"]), jax.tree.map(put, saved["state"], state)


def _save_sum(checkpoint: Path, cursor: int, state: PyTree, keep: Mapping[str, Any]) -> None:
    if jax.process_index() == 0:
        saved = {"cursor": np.asarray(cursor, np.int64), "state": jax.tree.map(meshes.fetch, state)}
        params.save_params(checkpoint, saved, keep)


def map_rows(
    fn: Callable[[Any, Batch], PyTree],
    operand: PyTree,
    source: Source,
    *,
    chunk: int = 256,
    mesh: Mesh | None = None,
    into: Rows | None = None,
    label: str = "mapping",
    progress: bool = True,
    check: Callable[[int, PyTree], None] | None = None,
    compiled: bool = True,
) -> Any:
    """Return `fn(operand, batch)` of every example, rows in the order of the source.

    It is compiled once for each identity of `fn`; `operand` (a checkpoint, a projection) may change from call to call.
    What `fn` gives for a row must not depend on the other rows: on several devices each sees its own rows only.

    Args:
        fn: `fn(operand, batch)`, a pytree of arrays whose leading axis is the batch's: pure, and of stable identity.
        operand: a pytree, whole on every device, or split over the mesh as it is.
        source: the examples.
        chunk: examples at a time, over all devices; rounded up to a multiple of their number.
        mesh: spreads the examples over its first axis; None is the default device.
        into: a store for the rows, its arrays named by path (`store.row_arrays`); what it already has is not computed
            again.  The only array of a store takes a bare array, whatever its name.
        label: what the progress display calls it.
        progress: whether to show it.
        check: called with the number of its first row and the rows of each chunk, on the host, before they are kept;
            what it raises ends the pass, and nothing of that chunk is stored.
        compiled: whether to compile `fn`; a function that calls compiled ones itself need not be, without a mesh.

    Returns:
        A pytree of NumPy arrays, or `into`.

    Raises:
        InvalidInputError: the source is empty, is not as long as the store, or `fn` does not give a row an example.
        StoreError: the store cannot be written.
    """
    count, size = _sizes(source, chunk, mesh)
    if into is not None and len(into) != count:
        raise InvalidInputError(
            f"a source of {count} examples for {into.path}, which has {len(into)} rows",
            expected="as many rows as examples",
            remedy="extend the store (`Rows.extend`), or open one made for this source",
        )
    sink = _Arrays(count) if into is None else _Stored(into)
    starts = [first for first in range(0, count, size) if sink.wants(first, min(first + size, count))]
    function, operand = meshes.place((tree.callable_tree(fn), operand), mesh)
    with track(count, label, progress=progress and jax.process_index() == 0) as advance:
        advance(count - sum(min(first + size, count) - first for first in starts))
        run = _rows if compiled else _rows_as_they_are
        call = partial(run, function, operand, mesh=mesh, split=meshes.is_split((function, operand), mesh))
        for first, rows in _computed(call, source, starts, count, size, mesh):
            if check is not None:
                check(first, rows)
            sink.put(first, rows)
            advance(len(jax.tree.leaves(rows)[0]))
    return sink.result()


def lower_rows(
    fn: Callable[[Any, Batch], PyTree], operand: PyTree, batch: Batch, *, chunk: int, mesh: Mesh | None = None
) -> jax.stages.Lowered:
    """Lower the program of one chunk of `map_rows` and run nothing: its `compile().memory_analysis()` says what fits.

    `operand` and `batch` (some examples, any number) may be abstract, and the mesh of devices that are only described.
    """
    size, given = meshes.padded_size(chunk, meshes.width(mesh)), (tree.callable_tree(fn), operand)
    (function, operand), batch = _abstract(given, batch, chunk, mesh)
    split = meshes.is_split(given, mesh)
    return _lowered(partial(_rows.trace, function, operand, batch, size=size, mesh=mesh, split=split), mesh)


def _abstract(whole: PyTree, batch: Batch, chunk: int, mesh: Mesh | None) -> tuple[PyTree, Batch]:
    """Return what a pass is given, and a chunk, as shapes where they lie."""
    size = meshes.padded_size(chunk, meshes.width(mesh))

    def given(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else leaf.sharding if meshes.is_split(leaf, mesh) else meshes.replicated(mesh)
        return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=sharding)

    def row(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else meshes.rows(mesh)
        return jax.ShapeDtypeStruct((size, *np.shape(leaf)[1:]), jnp.result_type(leaf), sharding=sharding)

    return jax.tree.map(given, whole), jax.tree.map(row, batch)


def _lowered(trace: Callable[[], Any], mesh: Mesh | None) -> jax.stages.Lowered:
    if mesh is None:
        return trace().lower()
    platform = mesh.devices.flat[0].platform.replace("gpu", "cuda")
    with jax.set_mesh(mesh):  # the lowering asks the current mesh, not the arguments, which device it is for
        return trace().lower(lowering_platforms=(platform,))


def _computed(
    run: Callable[..., PyTree], source: Source, starts: list[int], count: int, size: int, mesh: Mesh | None
) -> Iterator[tuple[int, PyTree]]:
    """Yield the rows of each chunk, one chunk behind the one that is being computed."""
    before: tuple[int, PyTree] | None = None
    for first in [*starts, None]:
        now = None
        if first is not None:
            batch, _ = _read(source, first, count, size, mesh)
            now = first, run(batch, size=size)
            for leaf in jax.tree.leaves(now[1]):
                if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
                    leaf.copy_to_host_async()
        if before is not None:
            begun, rows = before
            keep = min(size, count - begun)
            yield begun, jax.tree.map(lambda leaf, keep=keep: meshes.fetch(leaf)[:keep], rows)
        before = now


def _rows_as_they_are(
    function: Callable[..., Any], operand: PyTree, batch: Batch, *, size: int, mesh: Mesh | None, split: bool
) -> PyTree:
    del split
    if mesh is not None:
        raise InvalidInputError(
            "compiled=False on a mesh", expected="no mesh", remedy="let the function be compiled, or pass mesh=None"
        )
    return _check_rows(function(operand, batch), size)


@partial(jax.jit, static_argnames=("size", "mesh", "split"))
def _rows(
    function: Callable[..., Any], operand: PyTree, batch: Batch, *, size: int, mesh: Mesh | None, split: bool
) -> PyTree:
    here = size if mesh is None or split else size // meshes.width(mesh)

    def call(function: Callable[..., Any], operand: PyTree, batch: Batch) -> PyTree:
        return _check_rows(function(operand, batch), here)

    if mesh is not None and split:
        return jax.lax.with_sharding_constraint(call(function, operand, batch), meshes.rows(mesh))
    if mesh is not None:
        rows, spec = meshes.row_spec(mesh), PartitionSpec()
        call = jax.shard_map(call, mesh=mesh, in_specs=(spec, spec, rows), out_specs=rows, check_vma=False)
    return call(function, operand, batch)


def _check_rows(rows: PyTree, size: int) -> PyTree:
    if not jax.tree.leaves(rows):
        raise InvalidInputError(
            "a function whose result has no array", expected="a row for each example", remedy="return what it computes"
        )
    for name, leaf in tree.to_names(rows).items():
        if jnp.shape(leaf)[:1] != (size,):
            raise InvalidInputError(
                f"a function whose result has the shape {list(jnp.shape(leaf))} at {name!r} for a batch of {size}",
                expected="a row for each example: a leading axis as long as the batch's",
                remedy="vmap a function of one example; for sums over examples there is `fold`",
            )
    return rows


class _Arrays:
    """Collects rows in memory."""

    def __init__(self, count: int):
        self.count = count
        self.arrays: Any = None

    def wants(self, first: int, last: int) -> bool:
        return True

    def put(self, first: int, rows: PyTree) -> None:
        if self.arrays is None:
            self.arrays = jax.tree.map(lambda leaf: np.empty((self.count, *leaf.shape[1:]), leaf.dtype), rows)
        for whole, part in zip(jax.tree.leaves(self.arrays), jax.tree.leaves(rows), strict=True):
            whole[first : first + len(part)] = part

    def result(self) -> Any:
        return self.arrays


class _Stored:
    """Collects rows until they fill a chunk of the store that it does not have, and writes it."""

    def __init__(self, store: Rows):
        self.store = store
        completed = store.completed
        if jax.process_count() > 1:
            completed = np.asarray(multihost_utils.broadcast_one_to_all(completed))
        self.missing = deque(int(number) * store.chunk for number in np.flatnonzero(~completed))
        self.missing_before = np.concatenate([[0], np.cumsum(~completed)])
        self.parts: list[tuple[int, dict[str, np.ndarray]]] = []

    def wants(self, first: int, last: int) -> bool:
        chunk = self.store.chunk
        return bool(self.missing_before[(last - 1) // chunk + 1] > self.missing_before[first // chunk])

    def put(self, first: int, rows: PyTree) -> None:
        named: dict[str, Any] = tree.to_names(rows)
        if list(named) == [tree.BARE] and len(self.store.arrays) == 1:
            named = {next(iter(self.store.arrays)): named[tree.BARE]}
        self.parts.append((first, named))
        reached = first + len(next(iter(named.values())))
        while self.missing:
            start = self.missing[0]
            stop = min(start + self.store.chunk, len(self.store))
            if reached < stop:
                break
            if jax.process_index() == 0:
                self.store.write(start, {name: self._between(name, start, stop) for name in named})
            self.missing.popleft()
        first_needed = self.missing[0] if self.missing else len(self.store)
        self.parts = [(at, part) for at, part in self.parts if at + len(next(iter(part.values()))) > first_needed]

    def _between(self, name: str, start: int, stop: int) -> np.ndarray:
        cut = [part[name][max(start - at, 0) : max(stop - at, 0)] for at, part in self.parts]
        return np.concatenate([each for each in cut if len(each)])

    def result(self) -> Rows:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("rows are stored")
            self.store.refresh()
        return self.store


def _sizes(source: Source, chunk: int, mesh: Mesh | None) -> tuple[int, int]:
    count = len(source)
    if count < 1 or chunk < 1:
        raise InvalidInputError(
            f"a source of {count} examples in chunks of {chunk}",
            expected="one example or more, in chunks of one or more",
            remedy="check the path and the selection that made the source",
        )
    return count, meshes.padded_size(chunk, meshes.width(mesh))


def _read(source: Source, first: int, count: int, size: int, mesh: Mesh | None) -> tuple[Batch, Bool[Array, " b"]]:
    """Return the chunk from row `first` on, on the devices, and which of its rows are no padding."""
    mine = first + meshes.local_rows(mesh, size)
    batch = source.take(np.minimum(mine, count - 1))
    return meshes.place_rows((batch, mine < count), mesh, size)
