"""The sketch on a CUDA GPU: every program owns some buckets of some rows and reads the coordinates that fall into them.

A rotation moves a program's window within the block, so reads stay contiguous and nothing is scattered.  The signs
of a stretch of blocks, one bit a coordinate and at most 32 MB, are hashed first and read back through the caches.
Where rows are few, the blocks are split among programs and a second pass adds their sums.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jattrib_kernels.backend import output
from jattrib_kernels.sketch_projection.reference import BLOCKS, copy_keys, rotations, sign_words

Tile = tuple[int, int]
"""Rows and buckets of a program; powers of two."""

_WORDS = 1 << 23  # uint32 words of signs alive at a time: they fit the second-level cache
_PROGRAMS = 528  # four for each multiprocessor of an H200
_UNROLL = 4  # blocks whose reads are under way together


def project(
    x: jax.Array,
    keys: jax.Array,
    offset: jax.Array,
    *,
    dim: int,
    copies: int,
    tile: Tile | None = None,
    words: int = _WORDS,
    interpret: bool = False,
) -> jax.Array:
    """Return the sketch of `x`, as `reference.project`."""
    n, p = x.shape
    rows, buckets = tile or _tile(n, dim)
    stretch = _stretch(p, dim, copies, words)
    tiles = pl.cdiv(n, rows) * pl.cdiv(dim, buckets)
    splits = max(1, min(pl.cdiv(_PROGRAMS, tiles), stretch // (2 * _UNROLL)))
    steps = pl.cdiv(stretch, splits * _UNROLL)
    kernel = functools.partial(_project_kernel, tile=(rows, buckets), steps=steps, stretch=stretch, copies=copies)
    call = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(dim, buckets), pl.cdiv(n, rows), splits),
        out_shape=output((splits, n, dim), jnp.float32, x, keys, offset),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="sketch_projection",
    )

    def part(i: jax.Array | int) -> jax.Array:
        return call(*_operands(keys, offset, i, stretch, dim, copies), x).sum(axis=0)

    y = part(0)
    count = pl.cdiv(p, stretch * dim)
    y = y if count == 1 else lax.fori_loop(1, count, lambda i, y: y + part(i), y)
    return y * jnp.float32(1 / math.sqrt(copies))


def transpose(
    y: jax.Array,
    keys: jax.Array,
    offset: jax.Array,
    *,
    size: int,
    copies: int,
    tile: Tile | None = None,
    words: int = _WORDS,
    interpret: bool = False,
) -> jax.Array:
    """Return the adjoint, as `reference.transpose`."""
    n, dim = y.shape
    rows, positions = tile or _tile(n, dim)
    stretch = _stretch(size, dim, copies, words)
    call = pl.pallas_call(
        functools.partial(_transpose_kernel, tile=(rows, positions), copies=copies),
        grid=(pl.cdiv(dim, positions), pl.cdiv(n, rows), stretch),
        out_shape=output((n, size), jnp.float32, y, keys, offset),
        input_output_aliases={4: 0},  # every stretch fills its own columns
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="sketch_projection_transpose",
    )
    y = y.astype(jnp.float32) * jnp.float32(1 / math.sqrt(copies))

    def part(i: jax.Array | int, x: jax.Array) -> jax.Array:
        return call(*_operands(keys, offset, i, stretch, dim, copies), y, x)

    x = part(0, jnp.zeros((n, size), jnp.float32))
    count = pl.cdiv(size, stretch * dim)
    return x if count == 1 else lax.fori_loop(1, count, part, x)


def _project_kernel(place, words, turns, x, y, *, tile, steps, stretch, copies):
    rows, buckets = tile
    n, p = x.shape
    dim = y.shape[2]
    bucket = pl.program_id(0) * buckets + lax.iota(jnp.int32, buckets)
    row = pl.program_id(1) * rows + lax.iota(jnp.int32, rows)
    split = pl.program_id(2)
    inside = bucket < dim
    mask = (row < n)[:, None] & inside[None, :]
    full, rest = divmod(p, dim)

    def step(i, total):
        for local in [(split * steps + i) * _UNROLL + j for j in range(_UNROLL)]:
            block = place[1] + local
            for copy in range(copies):
                position = bucket - turns[copy, jnp.minimum(local, stretch - 1)]
                position = jnp.where(position < 0, position + dim, position)
                valid = inside & (local < stretch) & ((block < full) | ((block == full) & (position < rest)))
                bits = _sign_bits(place, words, local, copy, position, valid)
                index = (row[:, None], jnp.where(valid, block * dim + position, 0)[None, :])
                part = plgpu.load(x.at[index], mask=mask & valid[None, :], other=0.0).astype(jnp.float32)
                total = total + _signed(part, bits[None, :])
        return total

    total = lax.fori_loop(0, steps, step, jnp.zeros((rows, buckets), jnp.float32))
    plgpu.store(y.at[split, row[:, None], bucket[None, :]], total, mask=mask)


def _transpose_kernel(place, words, turns, y, _, x, *, tile, copies):
    rows, positions = tile
    n, dim = y.shape
    full, rest = divmod(x.shape[1], dim)
    position = pl.program_id(0) * positions + lax.iota(jnp.int32, positions)
    row = pl.program_id(1) * rows + lax.iota(jnp.int32, rows)
    local = pl.program_id(2)
    block = place[1] + local
    inside = (position < dim) & ((block < full) | ((block == full) & (position < rest)))
    mask = (row < n)[:, None] & inside[None, :]
    total = jnp.zeros((rows, positions), jnp.float32)
    for copy in range(copies):
        bucket = position + turns[copy, local]
        bucket = jnp.where(bucket < dim, bucket, bucket - dim)
        bits = _sign_bits(place, words, local, copy, position, inside)
        part = plgpu.load(y.at[row[:, None], bucket[None, :]], mask=mask, other=0.0)
        total = total + _signed(part, bits[None, :])
    plgpu.store(x.at[row[:, None], (block * dim + position)[None, :]], total, mask=mask)


def _sign_bits(place, words, local, copy, position, mask):
    """Return the sign of each position of a block in the highest bit of a word."""
    number = place[0] + local
    word = plgpu.load(words.at[number // 32, copy, position], mask=mask, other=0)
    return lax.shift_left(word, (31 - number % 32).astype(jnp.uint32)) & jnp.uint32(0x80000000)


def _signed(part, bits):
    flipped = lax.bitcast_convert_type(part, jnp.uint32) ^ jnp.broadcast_to(bits, part.shape)
    return lax.bitcast_convert_type(flipped, jnp.float32)


def _operands(keys, offset, i, stretch, dim, copies):
    """Return where a stretch of blocks begins (within its signs, within x), its sign words and its rotations."""
    first = jnp.asarray(i) * stretch
    block = offset + first.astype(jnp.uint32)
    words = sign_words(
        copy_keys(keys[0], copies), block // jnp.uint32(BLOCKS), units=(stretch - 1) // BLOCKS + 2, dim=dim
    )
    turns = rotations(copy_keys(keys[1], copies), block, blocks=stretch, dim=dim)
    return jnp.stack([(block % jnp.uint32(BLOCKS)).astype(jnp.int32), first.astype(jnp.int32)]), words, turns


def _stretch(size, dim, copies, words):
    """Return how many blocks have their signs in memory at a time."""
    return min(pl.cdiv(size, dim), max(BLOCKS, words * 32 // (dim * copies)))


def _tile(n, dim):
    return min(8, 1 << (n - 1).bit_length()), min(512, 1 << (dim - 1).bit_length())
