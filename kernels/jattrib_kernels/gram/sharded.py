"""The Gram matrix of rows that are spread over a mesh, whole on every device or spread by rows itself."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jattrib_kernels.backend import Backend, accumulator, refuse
from jattrib_kernels.gram import api
from jattrib_kernels.gram.sums import Sum, on_grid

_BATCH = 4096  # rows gathered at a time, where columns are spread

Axes = str | tuple[str, ...] | None


def gram(
    x: jax.Array,
    *,
    mesh: Mesh,
    rows: Axes = None,
    columns: Axes = None,
    compensated: bool = False,
    backend: Backend = "auto",
) -> jax.Array | Sum:
    """Return `ΦᵀΦ` of `(n, k)` rows that are sharded over `rows` (n) and `columns` (k).

    Each device makes the rows of the result that face its own columns, from its own rows of Φ; columns are gathered for
    it and the results are summed.  Compensated, what is summed over devices loses nothing either (`on_grid`).

    Args:
        x: Φ, sharded by `PartitionSpec(rows, columns)`, which must divide it.
        mesh: the devices.
        rows: axes of the mesh over which n is spread.
        columns: axes over which k is spread.
        compensated: keep rounding errors, and return a `Sum`.
        backend: which kernel runs on each device.

    Returns:
        `(k, k)`, or two of them, sharded by `PartitionSpec(columns)`: whole on every device if k is not spread.

    Raises:
        ValueError: the mesh has no such axis, or x does not divide over it.
    """
    over_rows, over_columns = _names(mesh, rows), _names(mesh, columns)
    for size, names in zip(x.shape, (over_rows, over_columns), strict=True):
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        if size % parts:
            raise refuse(
                f"`x` has shape {x.shape}, of which {size} is spread over {parts} devices",
                expected=f"a multiple of {parts}",
                remedy="pad with rows or columns of zeros",
            )

    def local(x: jax.Array) -> jax.Array | Sum:
        parts = _own_rows(x, over_columns, compensated=compensated, backend=backend)
        made = Sum(*parts) if compensated else parts[0]
        if not over_rows or not isinstance(made, Sum):
            return lax.psum(made, over_rows) if over_rows else made
        squares = jnp.square(x.astype(made.high.dtype))
        bound = jnp.max(lax.psum(jnp.sum(squares, axis=0), over_rows))
        bound = lax.pmax(bound, over_columns) if over_columns else bound
        return lax.psum(on_grid(made, bound), over_rows)

    out = PartitionSpec(over_columns or None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=PartitionSpec(over_rows or None, over_columns or None),
        out_specs=Sum(out, out) if compensated else out,  # type: ignore[arg-type]
        check_vma=False,
    )(x)


def _own_rows(x: jax.Array, columns: tuple[str, ...], *, compensated: bool, backend: Backend) -> tuple[jax.Array, ...]:
    """Return the product of a device's columns with all columns, of which a batch of rows at a time is gathered."""
    if not columns:
        return api.product(x, x, compensated=compensated, backend=backend)
    n, width = x.shape
    batch = min(_BATCH, n)
    x = jnp.pad(x, ((0, -n % batch), (0, 0)))
    everything = width * lax.axis_size(columns)
    zero = jnp.zeros((width, everything), accumulator(x.dtype))

    def pair(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = lax.dynamic_slice_in_dim(x, first, batch)
        return rows, lax.all_gather(rows, columns, axis=1, tiled=True)

    def plain(total: tuple[jax.Array, ...], first: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        (part,) = api.product(*pair(first), backend=backend)
        return (total[0] + part,), None

    def kept(total: tuple[jax.Array, ...], first: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        return api.product(*pair(first), accumulator=Sum(*total), compensated=True, backend=backend), None

    start = (zero, zero) if compensated else (zero,)
    return lax.scan(kept if compensated else plain, start, jnp.arange(0, x.shape[0], batch))[0]


def _names(mesh: Mesh, axes: Axes) -> tuple[str, ...]:
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    if not set(names) <= set(mesh.axis_names):
        raise refuse(f"axes {axes!r}", expected=f"axes of the mesh: {mesh.axis_names}", remedy="name some of them")
    return names
