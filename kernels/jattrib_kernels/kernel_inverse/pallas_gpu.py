"""The three steps of blocked Cholesky as GPU kernels (Triton), in float32.

Products are of float32 operands on the tensor cores, each product of three in TF32: about 22 bits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jattrib_kernels.kernel_inverse.blocked import Kernels

BLOCK = 128
LARGEST = 46208  # rows of a square matrix whose entries are counted in 31 bits, in whole blocks
_BASE = 32  # columns eliminated one by one, in registers
_TILE = 64  # rows and columns of one program
_DEPTH = 32  # of the contraction, at a time


def kernels(*, interpret: bool = False) -> Kernels:
    """Return the kernels; their logic alone can be run by the interpreter."""
    return Kernels(
        block=BLOCK,
        update=partial(_update, interpret=interpret),
        diagonal=partial(_diagonal, interpret=interpret),
        panel=partial(_panel, interpret=interpret),
    )


def _dot(a: jax.Array, b: jax.Array, *, interpret: bool, transpose: bool = False) -> jax.Array:
    precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def _update(steps: jax.Array, rows: jax.Array, row: jax.Array, *, interpret: bool) -> jax.Array:
    m = rows.shape[0]

    def kernel(steps, rows, row, out):
        i, c = pl.program_id(0), pl.program_id(1)
        at, across = pl.ds(i * _TILE, _TILE), pl.ds(c * _TILE, _TILE)
        j = steps[0]

        @pl.when(i >= steps[1] * (BLOCK // _TILE))
        def _():
            def add(t, total):
                depth = pl.ds(t * _DEPTH, _DEPTH)
                return total + _dot(rows[at, depth], row[across, depth], transpose=True, interpret=interpret)

            total = lax.fori_loop(0, j * (BLOCK // _DEPTH), add, jnp.zeros((_TILE, _TILE), jnp.float32))
            out[at, across] = rows[at, pl.ds(j * BLOCK + c * _TILE, _TILE)] - total

    return pl.pallas_call(
        kernel,
        grid=(m // _TILE, BLOCK // _TILE),
        out_shape=jax.ShapeDtypeStruct((m, BLOCK), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="cholesky_update",
    )(steps, rows, row)


def _panel(
    steps: jax.Array,
    rows: jax.Array,
    updated: jax.Array,
    lower: jax.Array,
    inverse: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    m = updated.shape[0]

    def kernel(steps, rows, updated, lower, inverse, out):
        del rows
        i, c = pl.program_id(0), pl.program_id(1)
        at, across = pl.ds(i * _TILE, _TILE), pl.ds(c * _TILE, _TILE)
        to = pl.ds(steps[0] * BLOCK + c * _TILE, _TILE)
        block = i // (BLOCK // _TILE)

        @pl.when(block == steps[2])
        def _():
            out[at, to] = lower[pl.ds(i % (BLOCK // _TILE) * _TILE, _TILE), across]

        @pl.when((block >= steps[1]) & (block != steps[2]))
        def _():
            def add(t, total):
                depth = pl.ds(t * _DEPTH, _DEPTH)
                return total + _dot(updated[at, depth], inverse[across, depth], transpose=True, interpret=interpret)

            out[at, to] = lax.fori_loop(0, BLOCK // _DEPTH, add, jnp.zeros((_TILE, _TILE), jnp.float32))

    return pl.pallas_call(
        kernel,
        grid=(m // _TILE, BLOCK // _TILE),
        out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.float32),
        input_output_aliases={1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="cholesky_panel",
    )(steps, rows, updated, lower, inverse)


def _diagonal(corner: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    lower, inverse, smallest = pl.pallas_call(
        partial(_diagonal_kernel, interpret=interpret),
        out_shape=(
            jax.ShapeDtypeStruct((BLOCK, BLOCK), jnp.float32),
            jax.ShapeDtypeStruct((BLOCK, BLOCK), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="cholesky_diagonal",
    )(corner)
    return lower, inverse, smallest[0]


def _diagonal_kernel(corner, lower, inverse, smallest, *, interpret: bool):
    """Eliminate `[A | I]` by blocks of 32 columns: `lower` holds what remains of A, `inverse` what becomes of I.

    One program does it all; a barrier stands wherever its threads read what others of them have written.
    """
    dot = partial(_dot, interpret=interpret)
    barrier = (lambda: None) if interpret else plgpu.debug_barrier
    strips = [pl.ds(c * _TILE, _TILE) for c in range(BLOCK // _TILE)]
    down = lax.broadcasted_iota(jnp.int32, (BLOCK, _TILE), 0)
    across = lax.broadcasted_iota(jnp.int32, (BLOCK, _TILE), 1)
    for c, strip in enumerate(strips):
        lower[:, strip] = jnp.where(across + c * _TILE <= down, corner[:, strip], 0)
        inverse[:, strip] = (across + c * _TILE == down).astype(jnp.float32)
    barrier()

    def stage(s: jax.Array, least: jax.Array) -> jax.Array:
        here = pl.ds(s * _BASE, _BASE)
        below = lax.broadcasted_iota(jnp.int32, (BLOCK, _BASE), 0) >= (s + 1) * _BASE
        upper, own, least = _eliminate(lower[here, here], least)
        column = jnp.where(below, dot(lower[:, here], own, transpose=True), 0)
        passed = [dot(own, inverse[here, strip]) for strip in strips]
        barrier()
        plgpu.store(lower.at[:, here], column, mask=below)
        lower[here, here] = upper.T
        for strip, new in zip(strips, passed, strict=True):
            inverse[here, strip] = new
        barrier()
        for c, strip in enumerate(strips):
            inverse[:, strip] -= dot(column, passed[c])
            right = jnp.where(
                lax.broadcasted_iota(jnp.int32, (_TILE, _BASE), 0) + c * _TILE >= (s + 1) * _BASE, lower[strip, here], 0
            )
            lower[:, strip] -= jnp.where(across + c * _TILE <= down, dot(column, right, transpose=True), 0)
        barrier()
        return least

    smallest[0] = lax.fori_loop(0, BLOCK // _BASE, stage, jnp.float32(jnp.inf))


def _eliminate(matrix: jax.Array, least: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `Lᵀ`, `L⁻¹` of `matrix = L Lᵀ`, and the least pivot, or the first that is not positive.

    Gaussian elimination of `[A | I]`, every row scaled by the root of its pivot.  A pivot that is not positive is
    replaced by 1: what follows is of no use.
    """
    across = lax.broadcasted_iota(jnp.int32, (_BASE, _BASE), 1)
    down = lax.broadcasted_iota(jnp.int32, (_BASE, _BASE), 0)
    line = lax.iota(jnp.int32, _BASE)

    def step(t: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        a, w, least = carry
        row = jnp.sum(jnp.where(down == t, a, 0), axis=0)
        pivot = jnp.sum(jnp.where(line == t, row, 0))
        root = 1 / jnp.sqrt(jnp.where(pivot > 0, pivot, 1))
        column = jnp.sum(jnp.where((across == t) & (down > t), a, 0), axis=1) * root
        scaled = jnp.where(line >= t, row * root, 0)
        passed = jnp.sum(jnp.where(down == t, w, 0), axis=0) * root
        a = jnp.where(down == t, scaled[None, :], a - column[:, None] * scaled[None, :])
        w = jnp.where(down == t, passed[None, :], w - column[:, None] * passed[None, :])
        return a, w, jnp.where(least > 0, jnp.minimum(least, pivot), least)

    whole = jnp.where(across <= down, matrix, matrix.T)
    return lax.fori_loop(0, _BASE, step, (whole, (across == down).astype(jnp.float32), least))
