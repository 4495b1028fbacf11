"""The specification, in plain `jax.numpy`: a product, or products of chunks of rows with their sum compensated."""

import jax
import jax.numpy as jnp
from jax import lax

from jattrib_kernels.backend import accumulator
from jattrib_kernels.gram.sums import Sum, add

ROWS = 512  # of a chunk: within one, sums are plain


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return `leftᵀ right` of `(n, a)` and `(n, b)`, in float32 or wider."""
    contract = (((0,), (0,)), ((), ()))
    return lax.dot_general(
        left, right, contract, precision=lax.Precision.HIGHEST, preferred_element_type=accumulator(left.dtype)
    )


def compensated(left: jax.Array, right: jax.Array, start: Sum) -> Sum:
    """Return `start + leftᵀ right`, n a multiple of `ROWS`, chunk after chunk."""

    def chunk(total: Sum, index: jax.Array) -> tuple[Sum, None]:
        at = index * ROWS
        part = product(lax.dynamic_slice_in_dim(left, at, ROWS), lax.dynamic_slice_in_dim(right, at, ROWS))
        return add(total, part), None

    return lax.scan(chunk, start, jnp.arange(left.shape[0] // ROWS))[0]
