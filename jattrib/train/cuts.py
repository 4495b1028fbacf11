"""How a replay is cut: the run into segments of steps, its outputs into blocks of queries."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jattrib.core import mesh as meshes
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch
from jattrib.train import loop
from jattrib.train.pullback import Rows


class Cut(NamedTuple):
    """Where a replay is cut; the last segment may be short, the last block is padded.

    Attributes:
        steps: of the run.
        segment: steps of a segment.
        queries: how many there are.
        blocks: how many blocks of them.
        block: queries of a block.
    """

    steps: int
    segment: int
    queries: int
    blocks: int
    block: int

    @property
    def segments(self) -> int:
        """How many segments there are."""
        return -(-self.steps // self.segment)


def cut(order: loop.Schedule, queries: Batch, segment: int | None, block: int | None, mesh: Mesh | None) -> Cut:
    """Return where to cut, `segment` and `block` left to choose or given.

    Raises:
        InvalidInputError: there are no queries, a size is not positive, or the mesh does not divide the batch.
    """
    steps, batch = order.indices.shape
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(queries)}
    if len(counts) != 1 or 0 in counts:
        raise InvalidInputError(
            f"queries of leading axes {sorted(counts)}",
            expected="arrays with one leading axis, one entry or more",
            remedy="stack the queries; a single one needs a leading axis of 1",
        )
    sizes = {"steps": steps, "segment": segment or 1, "block": block or 1}
    if min(sizes.values()) < 1 or segment == 0 or block == 0:
        raise InvalidInputError(
            f"steps = {steps}, segment = {segment}, block = {block}",
            expected="at least 1 each", remedy="leave segment and block out to have them chosen",
        )  # fmt: skip
    across = 1 if mesh is None else math.prod(mesh.axis_sizes[1:2])
    if batch % across:
        raise InvalidInputError(
            f"batches of {batch} examples on a mesh of {across} along its second axis",
            expected=f"a multiple of {across}",
            remedy="choose another batch size, or a mesh whose second axis divides it",
        )
    count = counts.pop()
    length = min(segment or _about_root(steps), steps)
    size = meshes.padded_size(min(block or count, count), meshes.width(mesh))
    return Cut(steps, length, count, -(-count // size), size)


def _about_root(steps: int) -> int:
    """Return ⌈√T⌉, or a number near it that divides T, so that one length of segment is compiled."""
    root = math.isqrt(max(steps - 1, 0)) + 1
    near = [size for size in range(-(-2 * root // 3), 3 * root // 2 + 1) if steps % size == 0]
    return min(near, key=lambda size: abs(size - root), default=root)


def rows(order: loop.Schedule, weights: Float[Array, "..."]) -> Rows:
    """Return the steps of a whole run, with the weight of each draw."""
    drawn = weights[order.indices] if weights.ndim == 1 else weights
    return Rows(jnp.arange(order.indices.shape[0], dtype=jnp.int32), order, drawn)


def rows_like(order: loop.Schedule, weights: Any, steps: int | None = None) -> Rows:
    """Return, abstractly, what `rows` returns of the whole run or of some steps."""
    whole = jax.eval_shape(rows, order, weights)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((steps or leaf.shape[0], *leaf.shape[1:]), leaf.dtype), whole)


def segments(order: loop.Schedule, weights: Float[Array, "..."], where: Cut, mesh: Mesh | None) -> list[Rows]:
    """Return the segments' steps, on the devices: batches are spread over the mesh's second axis, if it has one."""
    whole = rows(order, weights)
    bounds = range(0, where.steps, where.segment)
    parts = [jax.tree.map(lambda leaf, at=at: leaf[at : at + where.segment], whole) for at in bounds]
    return parts if mesh is None else [jax.device_put(part, row_shardings(part, mesh)) for part in parts]


def row_shardings(part: Rows, mesh: Mesh) -> PyTree:
    """Return how a segment's steps lie on the mesh."""
    axes = (None, *mesh.axis_names[1:2])
    return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec(*axes[: len(leaf.shape)])), part)


def blocked(queries: Batch, where: Cut) -> Batch:
    """Return queries with two leading axes, blocks and queries; the last query fills up the last block."""
    at = np.minimum(np.arange(where.blocks * where.block), where.queries - 1).reshape(where.blocks, where.block)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[at], queries)


def joined(leaf: Float[Array, "blocks *axes block"], where: Cut) -> Float[Array, "*axes q"]:
    """Return an array of blocks, its queries last, as one of all queries, without the padding."""
    leaf = jnp.moveaxis(leaf, 0, -2)
    return leaf.reshape(*leaf.shape[:-2], where.blocks * where.block)[..., : where.queries]


def spread(value: PyTree, mesh: Mesh | None, *, last: bool = False) -> PyTree:
    """Put arrays on the devices, their queries (the second axis, or the last) over the mesh's first axis."""

    def put(leaf: Any) -> Array:
        return jax.device_put(leaf, None if mesh is None else meshes.rows(mesh, axis=np.ndim(leaf) - 1 if last else 1))

    return jax.tree.map(put, value)
