"""The kernel inverse of a matrix that is spread by rows over a mesh: for k that does not fit one chip.

Each of P devices holds k / P rows of K, of its factor, of B and of X.  Beside them a device holds one block row of the
factor, `b × k`, at a time in the factorisation, and all of X, `k × q`, in the refinement.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jattrib_kernels.backend import Backend, refuse
from jattrib_kernels.kernel_inverse import api, blocked, reference
from jattrib_kernels.kernel_inverse import refine as refinement
from jattrib_kernels.kernel_inverse.place import Place


def kernel_inverse(
    matrix: jax.Array,
    targets: jax.Array,
    *,
    mesh: Mesh,
    axis: str | tuple[str, ...],
    damping: float | jax.Array = 0.0,
    refine: int = 1,
    backend: Backend = "auto",
) -> tuple[jax.Array, api.Info]:
    """Solve `(K + λI) X = B` over a mesh: the same as `kernel_inverse` on one device, to rounding.

    Args:
        matrix: symmetric K, `(k, k)`, sharded by rows over `axis`; all of it is read.
        targets: B, `(k,)` or `(k, q)`, sharded by rows likewise.
        mesh: the devices.
        axis: the axis of the mesh, or several, over which rows are spread.
        damping: λ, added to the diagonal.
        refine: steps of refinement.
        backend: which kernels run on each device.

    Returns:
        X, sharded as B, and `Info`, the same on every device.

    Raises:
        ValueError: an argument's shape, dtype or sign is not as above, or the mesh has no such axis.
    """
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    if not set(names) <= set(mesh.axis_names):
        raise refuse(f"`axis` is {axis!r}", expected=f"axes of the mesh: {mesh.axis_names}", remedy="name one of them")
    matrix, targets = jnp.asarray(matrix), jnp.asarray(targets)
    api.check_matrix(matrix, damping)
    api.check_targets(matrix, targets)
    api.check_refine(refine)
    chosen, k = api.choose(backend, matrix.dtype), matrix.shape[0]
    place = Place(names, math.prod(mesh.shape[name] for name in names))
    block = min(128, -(-k // place.size))
    kernels = reference.kernels(block) if chosen == "reference" else api.kernels_of(chosen, -(-k // place.size))
    columns = api.as_columns(targets)
    grown = -k % (place.size * kernels.block)
    by_row, whole = PartitionSpec(names), PartitionSpec()

    def solve(rows: jax.Array, right: jax.Array, damping: jax.Array) -> tuple[jax.Array, ...]:
        lower, inverses, smallest, definite = _factorize(rows, damping, kernels=kernels, place=place, k=k)

        def substitute(x: jax.Array) -> jax.Array:
            return jnp.where(smallest > 0, blocked.substitute(lower, inverses, x, place=place), jnp.nan)

        operand = api.slices_dtype(chosen)
        solution, relative = refinement.refine(
            substitute, rows, right, damping=damping, steps=refine, operand=operand, place=place
        )
        return solution, relative, smallest, definite

    solution, *info = jax.shard_map(
        solve,
        mesh=mesh,
        in_specs=(by_row, by_row, whole),
        out_specs=(by_row, whole, whole, whole),
        check_vma=False,
    )(jnp.pad(matrix, (0, grown)), jnp.pad(columns, ((0, grown), (0, 0))), jnp.asarray(damping, matrix.dtype))
    return solution[:k].reshape(targets.shape), api.Info(*info)


def _factorize(
    rows: jax.Array, damping: jax.Array, *, kernels: blocked.Kernels, place: Place, k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Factorise K + λI from this device's rows of K, `(m, k')`, which are padded with zeros beyond k."""
    (m, size), block = rows.shape, kernels.block
    here = place.number * m + jnp.arange(m)
    position = ((jnp.arange(m) // block) * place.size + place.number) * block + jnp.arange(m) % block
    diagonal = jnp.take_along_axis(rows, here[:, None], axis=1)[:, 0] + damping
    largest = place.largest(jnp.max(jnp.where(here < k, diagonal, -jnp.inf)))
    diagonal = jnp.where(here < k, diagonal, blocked.filler(largest))
    order = rows.reshape(m, place.size, m // block, block).swapaxes(1, 2).reshape(m, size)
    column = jnp.arange(size)[None, :]
    order = jnp.where(column < position[:, None], order, 0)
    order = jnp.where(column == position[:, None], diagonal[:, None], order)
    lower, inverses, smallest = blocked.cholesky(order, kernels=kernels, place=place)
    return lower, inverses, smallest, api.definite(smallest, largest, k)
