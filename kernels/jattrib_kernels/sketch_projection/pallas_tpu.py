"""The sketch on a TPU: tiles of x stream through vector memory once, and each block is rotated in registers.

The grid is (rows, groups of blocks), groups innermost, so a tile of y stays in vector memory.  Signs are hashed anew
every 64 blocks; rotations, one word a block, come through scalar memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jattrib_kernels.backend import ceil_to, output, refuse
from jattrib_kernels.random import threefry2x32
from jattrib_kernels.sketch_projection.reference import BLOCKS, copy_keys, rotations, sign

Tile = tuple[int, int]
"""Rows and blocks of a step."""

_LANES = 128
_BYTES = 1 << 21  # of a tile in float32
_MEMORY = 48 * 2**20  # of vector memory: the smallest chip that is supported has 64 MiB


def supports(dim: int, copies: int) -> bool:
    """Return whether the kernel has this number of buckets: whole vector registers, and few enough for its memory."""
    # Sixteen rows of what is read and of what is written, twice each, and registers for the signs of every copy.
    return dim % _LANES == 0 and dim * (256 + 64 * copies) <= _MEMORY


def project(
    x: jax.Array,
    keys: jax.Array,
    offset: jax.Array,
    *,
    dim: int,
    copies: int,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return the sketch of `x`, as `reference.project`.

    Raises:
        ValueError: dim is not a multiple of 128, or too large; see `supports`.
    """
    n, p = x.shape
    _check(dim, copies)
    rows, group = tile or _tile(n, p, dim)
    steps = pl.cdiv(p, group * dim)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(n, rows), steps),
        in_specs=[_rotation_spec(copies, group), pl.BlockSpec((rows, group * dim), lambda i, s, seed: (i, s))],
        out_specs=pl.BlockSpec((rows, dim), lambda i, s, seed: (i, 0)),
        scratch_shapes=[pltpu.VMEM((2 * copies, dim), jnp.uint32)],
    )
    kernel = functools.partial(_project_kernel, p=p, group=group, copies=copies)
    seed, turns = _operands(keys, offset, steps, group, dim, copies)
    y = _call(kernel, spec, output((n, dim), jnp.float32, x, seed), "sketch_projection", interpret)(seed, turns, x)
    return y * jnp.float32(1 / math.sqrt(copies))


def transpose(
    y: jax.Array,
    keys: jax.Array,
    offset: jax.Array,
    *,
    size: int,
    copies: int,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return the adjoint, as `reference.transpose`.

    Raises:
        ValueError: the number of columns of y is not a multiple of 128, or too large; see `supports`.
    """
    n, dim = y.shape
    _check(dim, copies)
    rows, group = tile or _tile(n, size, dim)
    steps = pl.cdiv(size, group * dim)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(n, rows), steps),
        in_specs=[_rotation_spec(copies, group), pl.BlockSpec((rows, dim), lambda i, s, seed: (i, 0))],
        out_specs=pl.BlockSpec((rows, group * dim), lambda i, s, seed: (i, s)),
        scratch_shapes=[pltpu.VMEM((2 * copies, dim), jnp.uint32)],
    )
    kernel = functools.partial(_transpose_kernel, group=group, copies=copies)
    seed, turns = _operands(keys, offset, steps, group, dim, copies)
    y = y.astype(jnp.float32) * jnp.float32(1 / math.sqrt(copies))
    return _call(kernel, spec, output((n, size), jnp.float32, y, seed), "sketch_projection_transpose", interpret)(
        seed, turns, y
    )


def _project_kernel(seed, turns, x, y, words, *, p, group, copies):
    dim = y.shape[1]
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        y[...] = jnp.zeros_like(y)

    def block(g, carry):
        signs = _signs(seed, words, step, g, group, copies)
        full, rest = divmod(p, dim)
        local = step * group + g
        left = jnp.where(local < full, dim, jnp.where(local == full, rest, 0))

        def chunk(rows, carry):
            part = x[rows, pl.ds(pl.multiple_of(g * dim, _LANES), dim)].astype(jnp.float32)
            if p % (group * dim):
                # What a last tile holds beyond the end is undefined.
                part = jnp.where(lax.broadcasted_iota(jnp.int32, part.shape, 1) < left, part, jnp.zeros_like(part))
            for copy in range(copies):
                y[rows, :] += pltpu.roll(part * signs[copy], turns[0, copy, g], 1)
            return carry

        return _by_rows(chunk, x.shape[0], x.dtype, carry)

    lax.fori_loop(0, group, block, 0)


def _transpose_kernel(seed, turns, y, x, words, *, group, copies):
    dim = y.shape[1]
    step = pl.program_id(1)

    def block(g, carry):
        signs = _signs(seed, words, step, g, group, copies)

        def chunk(rows, carry):
            total = jnp.zeros((8, dim), jnp.float32)
            for copy in range(copies):
                turn = turns[0, copy, g]
                back = pltpu.roll(y[rows, :], jnp.where(turn == 0, 0, dim - turn), 1)
                total += back * signs[copy]
            x[rows, pl.ds(pl.multiple_of(g * dim, _LANES), dim)] = total
            return carry

        return _by_rows(chunk, y.shape[0], y.dtype, carry)

    lax.fori_loop(0, group, block, 0)


def _signs(seed, words, step, g, group, copies):
    """Return the signs of block g, one row a copy; at the first of 64 blocks, hash the signs of all of them."""
    local = step * group + g
    number = seed[0] + local.astype(jnp.uint32)
    inside = (number & jnp.uint32(BLOCKS - 1)).astype(jnp.int32)

    @pl.when((inside == 0) | (local == 0))
    def _():
        shape = (1, words.shape[1])
        unit = jnp.full(shape, number // jnp.uint32(BLOCKS), jnp.uint32)
        counter = (unit, lax.broadcasted_iota(jnp.uint32, shape, 1))
        for copy in range(copies):
            pair = threefry2x32((seed[1 + 2 * copy], seed[2 + 2 * copy]), counter)
            words[pl.ds(2 * copy, 1), :], words[pl.ds(2 * copy + 1, 1), :] = pair

    bit, half = (inside % 32).astype(jnp.uint32), inside // 32
    return [sign(words[pl.ds(2 * copy + half, 1), :], bit) for copy in range(copies)]


def _by_rows(chunk, rows, dtype, carry):
    """Run `chunk` over a tile in slices of one register's height, so that its values stay in registers."""
    height = 8 if dtype == jnp.float32 else 16
    steps = rows // height

    def slices(i, carry):
        return chunk(pl.ds(pl.multiple_of(i * height, height), height), carry)

    return lax.fori_loop(0, steps, slices, carry, unroll=math.gcd(steps, 4))


def _operands(keys, offset, steps, group, dim, copies):
    signs = copy_keys(keys[0], copies)
    turns = rotations(copy_keys(keys[1], copies), offset, blocks=steps * group, dim=dim)
    seed = jnp.concatenate([offset[None], signs.reshape(-1)])
    return seed, jnp.swapaxes(turns.reshape(copies, steps, group), 0, 1)


def _rotation_spec(copies, group):
    return pl.BlockSpec((1, copies, group), lambda i, s, seed: (s, 0, 0), memory_space=pltpu.SMEM)


def _check(dim, copies):
    if not supports(dim, copies):
        raise refuse(
            f"the TPU kernel was asked for a sketch of {dim} buckets with {copies} copies",
            expected=f"a multiple of {_LANES}, and dim · (256 + 64 · copies) at most {_MEMORY}",
            remedy="choose such a dim, or backend='reference'",
        )


def _tile(n, p, dim):
    rows = min(256, ceil_to(n, 16))
    while rows > 16 and rows * dim * 4 > _BYTES:
        rows //= 2
    rows = ceil_to(rows, 16)
    return rows, max(1, min(BLOCKS, pl.cdiv(p, dim), _BYTES // (rows * dim * 4)))


def _call(kernel, spec, out, name, interpret):
    return pl.pallas_call(
        kernel,
        grid_spec=spec,
        out_shape=out,
        # Signs carry over from one group to the next: the groups of a tile of rows stay in order.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_MEMORY),
        interpret=interpret,
        name=name,
    )
