"""The three steps of blocked Cholesky as TPU kernels, in float32.

Products are of float32 operands at full precision: the matrix unit takes each apart into three bfloat16 numbers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jattrib_kernels.kernel_inverse.blocked import Kernels

_BASE = 128  # columns eliminated one by one: one tile of lanes
_VMEM = 48 * 2**20


def block_for(k: int) -> int:
    """Return the block size for a matrix of k rows: large ones are worth their longer diagonal step."""
    return 512 if k >= 8192 else 256 if k >= 1024 else _BASE


def kernels(block: int, *, interpret: bool = False) -> Kernels:
    """Return the kernels for blocks of `block`, a multiple of 128."""
    return Kernels(
        block=block,
        update=partial(_update, interpret=interpret),
        diagonal=partial(_diagonal, interpret=interpret),
        panel=partial(_panel, interpret=interpret),
    )


def _dot(a: jax.Array, b: jax.Array, *, transpose: bool = False) -> jax.Array:
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    return lax.dot_general(a, b, contract, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _update(steps: jax.Array, rows: jax.Array, row: jax.Array, *, interpret: bool) -> jax.Array:
    m, block = rows.shape[0], row.shape[0]

    def kernel(steps, here, left, right, out):
        @pl.when(pl.program_id(1) == 0)
        def _():
            out[...] = here[...]

        @pl.when(pl.program_id(1) < steps[0])
        def _():
            out[...] -= _dot(left[...], right[...], transpose=True)

    square = (block, block)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(m // block - steps[1], jnp.maximum(steps[0], 1)),
        in_specs=[
            pl.BlockSpec(square, lambda i, t, steps: (i + steps[1], steps[0])),
            pl.BlockSpec(square, lambda i, t, steps: (i + steps[1], t)),
            pl.BlockSpec(square, lambda i, t, steps: (0, t)),
        ],
        out_specs=pl.BlockSpec(square, lambda i, t, steps: (i + steps[1], 0)),
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((m, block), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM),
        interpret=interpret,
        name="cholesky_update",
    )(steps, rows, rows, row)


def _panel(
    steps: jax.Array,
    rows: jax.Array,
    updated: jax.Array,
    lower: jax.Array,
    inverse: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    m, block = updated.shape

    def kernel(steps, rows, left, corner, right, out):
        del rows
        on_diagonal = pl.program_id(0) + steps[1] == steps[2]

        @pl.when(on_diagonal)
        def _():
            out[...] = corner[...]

        @pl.when(jnp.logical_not(on_diagonal))
        def _():
            out[...] = _dot(left[...], right[...], transpose=True)

    square = (block, block)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(m // block - steps[1],),
        in_specs=[
            pl.BlockSpec((8, _BASE), lambda i, steps: (0, 0)),  # written, never read
            pl.BlockSpec(square, lambda i, steps: (i + steps[1], 0)),
            pl.BlockSpec(square, lambda i, steps: (0, 0)),
            pl.BlockSpec(square, lambda i, steps: (0, 0)),
        ],
        out_specs=pl.BlockSpec(square, lambda i, steps: (i + steps[1], steps[0])),
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.float32),
        input_output_aliases={1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM),
        interpret=interpret,
        name="cholesky_panel",
    )(steps, rows, updated, lower, inverse)


def _diagonal(corner: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    block = corner.shape[0]
    lower, inverse, smallest = pl.pallas_call(
        _diagonal_kernel,
        out_shape=(
            jax.ShapeDtypeStruct((block, block), jnp.float32),
            jax.ShapeDtypeStruct((block, block), jnp.float32),
            jax.ShapeDtypeStruct((8, _BASE), jnp.float32),
        ),
        scratch_shapes=[pltpu.VMEM((block, block), jnp.float32), pltpu.VMEM((_BASE, 2 * _BASE), jnp.float32)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM),
        interpret=interpret,
        name="cholesky_diagonal",
    )(corner)
    return lower, inverse, smallest[0, 0]


def _diagonal_kernel(corner, lower, inverse, smallest, rest, scratch):
    """Factorise a block by sub-blocks of 128: `rest` is what remains to be eliminated."""
    count = corner.shape[0] // _BASE
    at = [pl.ds(i * _BASE, _BASE) for i in range(count)]
    rest[...] = corner[...]
    lower[...] = jnp.zeros_like(lower)
    inverse[...] = jnp.zeros_like(inverse)
    least = jnp.full((1, 1), jnp.inf, jnp.float32)
    for s in range(count):
        least = _eliminate(rest[at[s], at[s]], scratch, least)
        upper, own = scratch[:, :_BASE], scratch[:, _BASE:]
        lower[at[s], at[s]] = upper.T
        inverse[at[s], at[s]] = own
        for i in range(s + 1, count):
            lower[at[i], at[s]] = _dot(rest[at[i], at[s]], own, transpose=True)
            for u in range(s + 1, i + 1):
                rest[at[i], at[u]] -= _dot(lower[at[i], at[s]], lower[at[u], at[s]], transpose=True)
        for t in range(s):
            known = _dot(lower[at[s], at[t]], inverse[at[t], at[t]])
            for u in range(t + 1, s):
                known += _dot(lower[at[s], at[u]], inverse[at[u], at[t]])
            inverse[at[s], at[t]] = -_dot(own, known)
    smallest[...] = jnp.broadcast_to(least, smallest.shape)


def _eliminate(matrix: jax.Array, scratch, least: jax.Array) -> jax.Array:
    """Write `[Lᵀ | L⁻¹]` of `matrix = L Lᵀ` to `scratch`; return the least pivot, or the first that is not positive.

    Gaussian elimination of `[A | I]`, every row scaled by the root of its pivot.  A pivot that is not positive is
    replaced by 1: what follows is of no use.
    """
    lane = lax.broadcasted_iota(jnp.int32, (_BASE, 2 * _BASE), 1)
    sublane = lax.broadcasted_iota(jnp.int32, (_BASE, 2 * _BASE), 0)
    scratch[:, :_BASE] = jnp.where((lane <= sublane)[:, :_BASE], matrix, matrix.T)
    scratch[:, _BASE:] = (lane == sublane)[:, :_BASE].astype(jnp.float32)

    def step(t: jax.Array, least: jax.Array) -> jax.Array:
        now = scratch[...]
        row = scratch[pl.ds(t, 1), :]
        pivot = jnp.sum(jnp.where(lane[:1] == t, row, 0), axis=1, keepdims=True)
        safe = jnp.where(pivot > 0, pivot, 1)
        root = lax.rsqrt(safe)
        root = root * (1.5 - 0.5 * safe * root * root)  # the hardware's estimate, made exact
        column = jnp.sum(jnp.where((lane == t) & (sublane > t), now, 0), axis=1, keepdims=True) * root
        scaled = jnp.where((lane[:1] >= t), row * root, 0)
        scratch[...] = now - column * scaled
        scratch[pl.ds(t, 1), :] = scaled
        return jnp.where(least > 0, jnp.minimum(least, pivot), least)

    return lax.fori_loop(0, _BASE, step, least)
