"""The dense projection on a CUDA GPU: tiles of R are expanded from hash words in registers and go to the tensor cores.

One hash makes 64 entries of a column.  Made inside the product it would be made again by every tile of rows, so the
words of a stretch of coordinates are made first, one bit an entry and at most 32 MB whatever the size of R, and are
read back from the second-level cache.  An entry then costs a shift, a mask and half a packing.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jattrib_kernels.backend import bfloat16_parts, ceil_to, output
from jattrib_kernels.dense_projection.reference import ROWS, Distribution, box_muller, sign_words
from jattrib_kernels.random import threefry2x32

Tile = tuple[int, int, int]
"""Rows, coordinates and columns of a step; powers of two."""

_WORDS = 1 << 23  # uint32 words of R alive at a time: they fit the second-level cache
_PROGRAMS = 264  # two for each multiprocessor of an H200


def project(
    x: jax.Array,
    seed: jax.Array,
    *,
    dim: int,
    distribution: Distribution,
    tile: Tile | None = None,
    words: int = _WORDS,
    interpret: bool = False,
) -> jax.Array:
    """Return `x R`, as `reference.project`."""
    n, p = x.shape
    rows, coordinates, columns = tile or _tile(n, distribution)
    unit = max(ROWS, coordinates)
    stretch = min(ceil_to(p, unit), max(unit, words * 32 // dim // unit * unit))
    tiles = pl.cdiv(n, rows) * pl.cdiv(dim, columns)
    splits = max(1, min(_PROGRAMS // tiles, stretch // (8 * unit)))
    steps = pl.cdiv(stretch // coordinates, splits)
    kernel = functools.partial(
        _project_kernel, tile=(rows, coordinates, columns), steps=steps, stretch=stretch, distribution=distribution
    )
    call = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, rows), pl.cdiv(dim, columns), splits),
        out_shape=output((splits, n, dim), jnp.float32, x, seed),
        compiler_params=_params(x.dtype, distribution),
        interpret=interpret,
        name="dense_projection",
    )

    def part(i: jax.Array | int) -> jax.Array:
        return call(*_operands(seed, i, stretch, dim, distribution), x).sum(axis=0)

    y = part(0)
    count = pl.cdiv(p, stretch)
    return y if count == 1 else lax.fori_loop(1, count, lambda i, y: y + part(i), y)


def transpose(
    y: jax.Array,
    seed: jax.Array,
    *,
    size: int,
    distribution: Distribution,
    tile: Tile | None = None,
    words: int = _WORDS,
    interpret: bool = False,
) -> jax.Array:
    """Return `y Rᵀ`, as `reference.transpose`."""
    n, dim = y.shape
    rows, columns, coordinates = tile or _tile(n, distribution)
    unit = max(ROWS, coordinates)
    stretch = min(ceil_to(size, unit), max(unit, words * 32 // dim // unit * unit))
    kernel = functools.partial(_transpose_kernel, tile=(rows, coordinates, columns), distribution=distribution)
    call = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, rows), pl.cdiv(stretch, coordinates)),
        out_shape=output((n, size), jnp.float32, y, seed),
        input_output_aliases={3: 0},  # every stretch fills its own columns
        compiler_params=_params(y.dtype, distribution),
        interpret=interpret,
        name="dense_projection_transpose",
    )

    def part(i: jax.Array | int, x: jax.Array) -> jax.Array:
        return call(*_operands(seed, i, stretch, dim, distribution), y, x)

    x = part(0, jnp.zeros((n, size), jnp.float32))
    count = pl.cdiv(size, stretch)
    return x if count == 1 else lax.fori_loop(1, count, part, x)


def _project_kernel(seed, words, x, y, *, tile, steps, stretch, distribution):
    rows, coordinates, columns = tile
    n, p = x.shape
    dim = y.shape[2]
    split = pl.program_id(2)
    row = pl.ds(pl.program_id(0) * rows, rows)
    col = pl.ds(pl.program_id(1) * columns, columns)
    first = seed[4].astype(jnp.int32)
    inside = _below(row, n)[:, None]

    def step(i, total):
        local = (split * steps + i) * coordinates
        # The hint lets x be copied in 16-byte pieces, asynchronously, where p is a multiple of 8.
        at = pl.ds(pl.multiple_of(first + local, coordinates), coordinates)
        # The last split may reach beyond the stretch, the last stretch beyond x.
        valid = _below(at, p) & _below(pl.ds(local, coordinates), stretch)
        part = plgpu.load(x.at[row, at], mask=inside & valid[None, :], other=0.0)
        if distribution == "rademacher":
            half = pl.ds(local // 32, coordinates // 32)
            mask = _below(half, words.shape[0])[:, None] & _below(col, dim)[None, :]
            r = _signs(plgpu.load(words.at[half, col], mask=mask, other=0), axis=1).reshape(coordinates, columns)
        else:
            r = _normal(seed, at, col, axis=0)
        return _product(part, r, total)

    total = lax.fori_loop(0, steps, step, jnp.zeros((rows, columns), jnp.float32))
    plgpu.store(y.at[split, row, col], total, mask=inside & _below(col, dim)[None, :])


def _transpose_kernel(seed, words, y, _, x, *, tile, distribution):
    rows, coordinates, columns = tile
    n, dim = y.shape
    row = pl.ds(pl.program_id(0) * rows, rows)
    first = pl.multiple_of(seed[4].astype(jnp.int32), coordinates)
    at = pl.ds(first + pl.program_id(1) * coordinates, coordinates)
    half = pl.ds(pl.program_id(1) * (coordinates // 32), coordinates // 32)
    inside = _below(row, n)[:, None]

    def step(i, total):
        col = pl.ds(i * columns, columns)
        valid = _below(col, dim)
        part = plgpu.load(y.at[row, col], mask=inside & valid[None, :], other=0.0)
        if distribution == "rademacher":
            mask = _below(half, words.shape[0])[:, None] & valid[None, :]
            bits = plgpu.load(words.at[half, col], mask=mask, other=0)
            r = _signs(bits.T, axis=2).reshape(columns, coordinates)
        else:
            r = _normal(seed, at, col, axis=1)
        return _product(part, r, total)

    total = lax.fori_loop(0, pl.cdiv(dim, columns), step, jnp.zeros((rows, coordinates), jnp.float32))
    plgpu.store(x.at[row, at], total, mask=inside & _below(at, x.shape[1])[None, :])


def _signs(words, *, axis):
    """Return ±1 in bfloat16: 32 from each word, along a new axis."""
    shape = list(words.shape)
    shape.insert(axis, 32)
    words = jnp.broadcast_to(jnp.expand_dims(words, axis), tuple(shape))
    bits = lax.shift_left(words, jnp.uint32(31) - lax.broadcasted_iota(jnp.uint32, tuple(shape), axis))
    ones = (bits & jnp.uint32(0x80000000)) | jnp.uint32(0x3F800000)
    # Two conversions are one instruction; the sign of a float32 one is the bit.
    return lax.bitcast_convert_type(ones, jnp.float32).astype(jnp.bfloat16)


def _normal(seed, at, col, *, axis):
    """Return a tile of normal numbers in float32, rows along `axis`; each row of a pair makes the pair's hash anew."""
    shape = (at.size, col.size) if axis == 0 else (col.size, at.size)
    row = (at.start + lax.broadcasted_iota(jnp.int32, shape, axis)).astype(jnp.uint32)
    column = seed[3] + (col.start + lax.broadcasted_iota(jnp.int32, shape, 1 - axis)).astype(jnp.uint32)
    pair = seed[2] * jnp.uint32(ROWS // 2) + lax.shift_right_logical(row, jnp.full(shape, 1, jnp.uint32))
    return box_muller(threefry2x32((seed[0], seed[1]), (pair, column)), (row & jnp.uint32(1)).astype(jnp.int32))


def _product(rows, r, total):
    dot = functools.partial(
        lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    if r.dtype == jnp.float32:
        return total + dot(rows.astype(jnp.float32), r, precision=lax.Precision.HIGHEST)
    for part in [rows] if rows.dtype == jnp.bfloat16 else bfloat16_parts(rows):
        total = total + dot(part, r)
    return total


def _below(at, end):
    return at.start + lax.iota(jnp.int32, at.size) < end


def _operands(seed, i, stretch, dim, distribution):
    """Return the seed with a stretch's first coordinate, and the stretch's words (none for normal numbers)."""
    first = (jnp.asarray(i) * stretch).astype(jnp.uint32)
    extended = jnp.concatenate([seed, first[None]])
    if distribution != "rademacher":
        return extended, jnp.zeros((1, 1), jnp.uint32)
    block = seed[2] + first // jnp.uint32(ROWS)
    return extended, sign_words((seed[0], seed[1]), block, seed[3], blocks=stretch // ROWS, cols=dim)


def _tile(n, distribution):
    if distribution == "normal":
        return (16 if n <= 16 else 32), 32, 64
    return max(16, min(128, 1 << (n - 1).bit_length())), 64, 128


def _params(dtype, distribution):
    # The three parts of float32 rows, and Box-Muller's arithmetic, want more registers than four warps have.
    warps = 4 if dtype == jnp.bfloat16 and distribution == "rademacher" else 8
    return plgpu.CompilerParams(num_warps=warps, num_stages=3)
