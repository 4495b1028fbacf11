"""The dense projection on a TPU: tiles of R are made in vector memory and multiplied by the matrix unit.

The grid is (rows, columns, coordinates), coordinates innermost, so a tile of y stays in vector memory while tiles of x
stream past it.  A tile of R costs about three vector operations an entry and is used by every row of the tile of x:
from about a hundred rows on, the matrix unit is the bound.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jattrib_kernels.backend import bfloat16_parts, ceil_to, output
from jattrib_kernels.dense_projection.reference import ROWS, Distribution, box_muller
from jattrib_kernels.random import threefry2x32

Tile = tuple[int, int, int]
"""Rows, coordinates and columns of a step."""

TILE: Tile = (512, 512, 512)


def project(
    x: jax.Array,
    seed: jax.Array,
    *,
    dim: int,
    distribution: Distribution,
    tile: Tile = TILE,
    interpret: bool = False,
) -> jax.Array:
    """Return `x R`, as `reference.project`."""
    n, p = x.shape
    rows, coordinates, columns = _fitted(tile, n, p, dim)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(n, rows), pl.cdiv(dim, columns), pl.cdiv(p, coordinates)),
        in_specs=[pl.BlockSpec((rows, coordinates), lambda i, j, s, seed: (i, s))],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, s, seed: (i, j)),
        scratch_shapes=[_scratch(coordinates, columns, distribution)],
    )
    kernel = functools.partial(_project_kernel, p=p, distribution=distribution)
    return _call(kernel, spec, output((n, dim), jnp.float32, x, seed), "dense_projection", interpret)(seed, x)


def transpose(
    y: jax.Array,
    seed: jax.Array,
    *,
    size: int,
    distribution: Distribution,
    tile: Tile = TILE,
    interpret: bool = False,
) -> jax.Array:
    """Return `y Rᵀ`, as `reference.transpose`."""
    n, dim = y.shape
    rows, coordinates, columns = _fitted(tile, n, size, dim)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(n, rows), pl.cdiv(size, coordinates), pl.cdiv(dim, columns)),
        in_specs=[pl.BlockSpec((rows, columns), lambda i, j, s, seed: (i, s))],
        out_specs=pl.BlockSpec((rows, coordinates), lambda i, j, s, seed: (i, j)),
        scratch_shapes=[_scratch(coordinates, columns, distribution)],
    )
    kernel = functools.partial(_transpose_kernel, dim=dim, distribution=distribution)
    return _call(kernel, spec, output((n, size), jnp.float32, y, seed), "dense_projection_transpose", interpret)(
        seed, y
    )


def _project_kernel(seed, x, y, r, *, p, distribution):
    _accumulate(seed, x, y, r, (pl.program_id(2), pl.program_id(1)), p, ((1,), (0,)), distribution)


def _transpose_kernel(seed, y, x, r, *, dim, distribution):
    _accumulate(seed, y, x, r, (pl.program_id(1), pl.program_id(2)), dim, ((1,), (1,)), distribution)


def _accumulate(seed, rows, out, r, position, length, contraction, distribution):
    """Add the product of a tile of rows and the tile of R at `position` to a tile of the result."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    fill = _fill_signs if distribution == "rademacher" else _fill_normal
    fill(seed, r, *position)
    part = rows[...]
    full, rest = divmod(length, part.shape[1])
    if rest:
        # What a last tile holds beyond the end is undefined.
        left = jnp.where(step < full, part.shape[1], rest)
        inside = lax.broadcasted_iota(jnp.int32, part.shape, 1) < left
        # In float32: Mosaic has no such choice among bfloat16 numbers of three rows or fewer.
        part = jnp.where(inside, part.astype(jnp.float32), jnp.float32(0)).astype(part.dtype)
    out[...] += _product(part, r[...], contraction)


def _fill_signs(seed, r, block, column):
    """Write a tile of signs, in bfloat16, two rows in each 32-bit word."""
    coordinates, columns = r.shape
    shape = (coordinates // ROWS, columns)
    first, col = _origin(seed, block, column, r.shape)
    counter = (first + lax.broadcasted_iota(jnp.uint32, shape, 0), col + lax.broadcasted_iota(jnp.uint32, shape, 1))
    words = threefry2x32((seed[0], seed[1]), counter)
    shift = jnp.uint32(30) - jnp.uint32(2) * lax.broadcasted_iota(jnp.uint32, (16, columns), 0)
    for part in range(coordinates // 32):
        word = words[part % 2][part // 2 : part // 2 + 1, :]
        # The bit of an odd row comes to position 31, that of the even row before it to 30, and thence to 15.
        shifted = lax.shift_left(jnp.broadcast_to(word, shift.shape), shift)
        even = lax.shift_right_logical(shifted, jnp.full(shift.shape, 15, jnp.uint32)) & jnp.uint32(0x8000)
        pair = (shifted & jnp.uint32(0x80000000)) | even | jnp.uint32(0x3F803F80)
        r[pl.ds(part * 32, 32), :] = pltpu.bitcast(pair, jnp.bfloat16)


def _fill_normal(seed, r, block, column):
    """Write a tile of normal numbers in float32; each row of a pair makes the pair's hash anew."""
    first, col = _origin(seed, block, column, r.shape)
    shape = (ROWS, r.shape[1])
    row = lax.broadcasted_iota(jnp.uint32, shape, 0)
    col = col + lax.broadcasted_iota(jnp.uint32, shape, 1)

    def fill(i, carry):
        pair = (first + i.astype(jnp.uint32)) * jnp.uint32(ROWS // 2)
        pair = pair + lax.shift_right_logical(row, jnp.full(shape, 1, jnp.uint32))
        words = threefry2x32((seed[0], seed[1]), (pair, col))
        r[pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS), :] = box_muller(words, (row & jnp.uint32(1)).astype(jnp.int32))
        return carry

    lax.fori_loop(0, r.shape[0] // ROWS, fill, 0)


def _origin(seed, block, column, shape):
    """Return the first 64-row block and the first column of a tile, counted from the start of R."""
    first = seed[2] + (block * (shape[0] // ROWS)).astype(jnp.uint32)
    return first, seed[3] + (column * shape[1]).astype(jnp.uint32)


def _product(rows, r, contraction):
    """Return the product in float32: signs meet rows cut into parts that bfloat16 holds exactly."""
    if r.dtype == jnp.float32:
        rows, precision = [rows.astype(jnp.float32)], lax.Precision.HIGHEST
    else:
        rows, precision = [rows] if rows.dtype == jnp.bfloat16 else bfloat16_parts(rows), lax.Precision.DEFAULT
    dot = functools.partial(
        lax.dot_general,
        dimension_numbers=(contraction, ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return functools.reduce(jnp.add, [dot(part, r) for part in rows])


def _scratch(coordinates, columns, distribution):
    return pltpu.VMEM((coordinates, columns), jnp.bfloat16 if distribution == "rademacher" else jnp.float32)


def _fitted(tile, rows, coordinates, columns):
    """Return the tile, no larger than the arrays, in whole registers and whole 64-row blocks."""
    return min(tile[0], ceil_to(rows, 16)), min(tile[1], ceil_to(coordinates, 128)), min(tile[2], ceil_to(columns, 128))


def _call(kernel, spec, out, name, interpret):
    return pl.pallas_call(
        kernel,
        grid_spec=spec,
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )
