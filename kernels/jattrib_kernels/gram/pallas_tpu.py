"""`leftᵀ right` on a TPU: a tile of the result stays in vector memory while chunks of rows stream past it.

Where left and right are the same, only tiles on and below the diagonal are made.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jattrib_kernels.backend import output
from jattrib_kernels.gram.sums import Sum, two_sum

ROWS = 512
"""Rows of a chunk: the number of rows must be a multiple."""


def tile_for(width: int) -> int:
    """Return the side of a tile for a result of some width; the width must be a multiple."""
    return 512 if width >= 2048 else 256 if width >= 512 else 128


def product(
    left: jax.Array,
    right: jax.Array,
    start: Sum | None,
    *,
    symmetric: bool,
    compensated: bool,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Return `start + leftᵀ right`, high and low parts if compensated; half of a symmetric result may hold anything.

    Args:
        left: `(n, a)`, float32 or bfloat16.
        right: `(n, b)`, likewise.
        start: of a compensated sum, `(a, b)` each; zero when left out.
        symmetric: whether left is right: then only tiles on and below the diagonal are made.
        compensated: keep what rounding loses from chunk to chunk.
        interpret: run Pallas' interpreter.
    """
    (n, a), b = left.shape, right.shape[1]
    tall, wide = tile_for(a), tile_for(b)
    tiles = [(i, j) for i in range(a // tall) for j in range(i + 1 if symmetric else b // wide)]
    places = [jnp.asarray([tile[axis] for tile in tiles], jnp.int32) for axis in (0, 1)]
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    parts = 2 if compensated else 1

    def kernel(rows, columns, left, right, *refs):
        del rows, columns
        given, made = refs[:-parts], refs[-parts:]

        @pl.when(pl.program_id(1) == 0)
        def _():
            for index, out in enumerate(made):
                out[...] = given[index][...] if given else jnp.zeros_like(out)

        contract = (((0,), (0,)), ((), ()))
        term = lax.dot_general(left[...], right[...], contract, precision=precision, preferred_element_type=jnp.float32)
        if compensated:
            high, error = two_sum(made[0][...], term)
            made[0][...] = high
            made[1][...] += error
        else:
            made[0][...] += term

    result = pl.BlockSpec((tall, wide), lambda p, s, rows, columns: (rows[p], columns[p]))
    given = list(start or ())
    made = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(tiles), n // ROWS),
            in_specs=[
                pl.BlockSpec((ROWS, tall), lambda p, s, rows, columns: (s, rows[p])),
                pl.BlockSpec((ROWS, wide), lambda p, s, rows, columns: (s, columns[p])),
                *[result] * len(given),
            ],
            out_specs=[result] * parts,
        ),
        out_shape=[output((a, b), jnp.float32, left, right)] * parts,
        input_output_aliases={4 + index: index for index in range(len(given))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        interpret=interpret,
        name="gram",
    )(*places, left, right, *given)
    return tuple(made)
