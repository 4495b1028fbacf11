"""The one place that names devices: meshes, partition specs, placing and fetching."""

import os
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch

DATA = "data"
"""The axis of a mesh over which rows (examples, models) are spread: its first."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of one axis over `devices`: all of them, of all processes, unless told otherwise.

    Its axis is `Auto`: the compiler places what no one has placed (`jax.make_mesh` alone would make it `Explicit`).
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def row_spec(mesh: Mesh, *, axis: int = 0) -> PartitionSpec:
    """Return the partition of an array whose rows, its dimension `axis`, are spread over the mesh's first axis."""
    return PartitionSpec(*[None] * axis, mesh.axis_names[0])


def rows(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Return the sharding that spreads an array's rows, its dimension `axis`, over the mesh's first axis."""
    return NamedSharding(mesh, row_spec(mesh, axis=axis))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that gives every device the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def width(mesh: Mesh | None) -> int:
    """Return over how many devices rows are spread."""
    return 1 if mesh is None else mesh.shape[mesh.axis_names[0]]


def padded_size(count: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is no less than `count`.

    >>> padded_size(10, 8)
    16
    """
    if multiple < 1:
        raise InvalidInputError(f"multiple = {multiple}", expected="a positive number", remedy="pass 1 or more")
    return -(-count // multiple) * multiple


def local_rows(mesh: Mesh | None, count: int) -> np.ndarray:
    """Return which of `count` rows, spread over the mesh, this process's devices hold, in ascending order."""
    if mesh is None or not _spans_processes(mesh):
        return np.arange(count)
    held = rows(mesh).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in held if index is not None]))


def place_rows(batch: Batch, mesh: Mesh | None, count: int) -> Batch:
    """Put a batch of `count` rows on the devices, spread over the mesh's first axis.

    Args:
        batch: this process's rows alone (`local_rows`), in ascending order; with one process, all of them.
        mesh: where to; None is the default device.
        count: rows of the whole batch, over all processes.
    """
    if mesh is None:
        return jax.device_put(batch)
    sharding = rows(mesh)
    if not _spans_processes(mesh):
        return jax.device_put(batch, sharding)
    held = local_rows(mesh, count)

    def put(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)

        def shard(index: Any) -> np.ndarray:
            return leaf[np.searchsorted(held, np.arange(count)[index[0]])]

        return jax.make_array_from_callback((count, *leaf.shape[1:]), sharding, shard)

    return jax.tree.map(put, batch)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Put a pytree on every device of the mesh, or on the default device; every process must hold the same values."""
    if mesh is None:
        return jax.device_put(tree)
    sharding = replicated(mesh)
    if not _spans_processes(mesh):
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and is_key(leaf):
            return keyed(put(words(leaf)), leaf)
        value = fetch(jnp.asarray(leaf))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree)


def is_split(tree: Any, mesh: Mesh | None) -> bool:
    """Return whether some leaf, an array or its abstract form, lies in parts on the devices of a mesh."""
    return mesh is not None and any(_split(leaf, mesh) for leaf in jax.tree.leaves(tree))


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Put a pytree on every device of the mesh, as `replicate` does, but for leaves that lie there in parts already."""
    if mesh is None or not is_split(tree, mesh):
        return replicate(tree, mesh)
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [leaf if _split(leaf, mesh) else replicate(leaf, mesh) for leaf in leaves])


def spread(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Return the sharding that splits an array over all axes of the mesh, each along the longest dimension it divides.

    >>> spread(jax.make_mesh((1, 1), ("data", "model")), (3, 8)).spec
    PartitionSpec(None, ('data', 'model'))
    """
    left, names = list(shape), [cast("tuple[str, ...]", ()) for _ in shape]
    for axis, size in mesh.shape.items():
        options = [number for number, length in enumerate(left) if length and length % size == 0]
        if options:
            number = max(options, key=lambda each: left[each])
            left[number], names[number] = left[number] // size, (*names[number], axis)
    parts = [each if len(each) > 1 else each[0] if each else None for each in names]
    return NamedSharding(mesh, PartitionSpec(*parts))


def is_key(leaf: Any) -> bool:
    """Return whether an array, or its abstract form, is of typed keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def words(leaf: Any) -> Any:
    """Return an array, of typed keys their words, which NumPy and stores can hold."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def keyed(leaf: Any, like: Any) -> Any:
    """Return words as typed keys again, of the implementation of `like`, if that is one of keys; it may be abstract."""
    if not is_key(like):
        return leaf
    return jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(jnp.empty((0,), like.dtype)))


def fetch(array: Any) -> np.ndarray:
    """Return the whole of an array on the host, on every process, wherever its parts are; of typed keys, their words.

    Where some parts belong to other processes this is a collective: every process must call it.
    """
    array = words(array) if isinstance(array, jax.Array) else array
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _split(leaf: Any, mesh: Mesh) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh == mesh and not sharding.is_fully_replicated


def _spans_processes(mesh: Mesh) -> bool:
    return jax.process_count() > 1 and mesh.is_multi_process
