"""`leftᵀ right` on a GPU (Triton): a program makes a tile of the result in registers.

Where left and right are the same, only tiles on and below the diagonal are made.  float32 operands are multiplied on
the tensor cores, each product of three in TF32: about 22 bits.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jattrib_kernels.backend import output
from jattrib_kernels.gram.sums import Sum, two_sum

TILE = 64

ROWS = 512
"""Rows of a chunk: the number of rows must be a multiple."""

_DEPTH = 32  # rows at a time


def tile_for(width: int) -> int:
    """Return the side of a tile: the width must be a multiple."""
    del width
    return TILE


def product(
    left: jax.Array,
    right: jax.Array,
    start: Sum | None,
    *,
    symmetric: bool,
    compensated: bool,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Return `start + leftᵀ right`, as `pallas_tpu.product`."""
    (n, a), b = left.shape, right.shape[1]
    tiles = [(i, j) for i in range(a // TILE) for j in range(i + 1 if symmetric else b // TILE)]
    places = [jnp.asarray([tile[axis] for tile in tiles], jnp.int32) for axis in (0, 1)]
    precision = _precision(left.dtype, interpret)
    parts = 2 if compensated else 1

    def kernel(rows, columns, left, right, *refs):
        given, made = refs[:-parts], refs[-parts:]
        index = pl.program_id(0)
        i, j = pl.ds(rows[index] * TILE, TILE), pl.ds(columns[index] * TILE, TILE)

        def add(step, total):
            at = pl.ds(step * _DEPTH, _DEPTH)
            contract = (((0,), (0,)), ((), ()))
            return total + lax.dot_general(
                left[at, i], right[at, j], contract, precision=precision, preferred_element_type=jnp.float32
            )

        zero = jnp.zeros((TILE, TILE), jnp.float32)
        begun = [part[i, j] for part in given] or [zero] * parts
        if not compensated:
            made[0][i, j] = begun[0] + lax.fori_loop(0, n // _DEPTH, add, zero)
            return

        def chunk(step, total):
            first = step * (ROWS // _DEPTH)
            high, error = two_sum(total[0], lax.fori_loop(first, first + ROWS // _DEPTH, add, zero))
            return high, total[1] + error

        made[0][i, j], made[1][i, j] = lax.fori_loop(0, n // ROWS, chunk, tuple(begun))

    given = list(start or ())
    made = pl.pallas_call(
        kernel,
        grid=(len(tiles),),
        out_shape=[output((a, b), jnp.float32, left, right)] * parts,
        input_output_aliases={4 + index: index for index in range(len(given))},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="gram",
    )(*places, left, right, *given)
    return tuple(made)


def _precision(dtype: jnp.dtype, interpret: bool) -> lax.Precision | lax.DotAlgorithmPreset | None:
    if dtype != jnp.float32:
        return None
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
