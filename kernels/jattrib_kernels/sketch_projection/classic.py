"""The textbook CountSketch and SJLT, which scatter: a second reference, to compare errors and speed with.

    h(i) and σ_i from (w₀, w₁) = threefry(key, (i, c)):   h = w₀ mod k,   σ = 1 − 2·bit(0) of w₁,
    y[h_c(i)] += σ_c[i] · x[i] / √s   for every copy c < s.

Two coordinates collide with probability 1/k wherever they are, so inner products are unbiased with variance
`(‖x‖²‖x'‖² + ⟨x, x'⟩² − 2 Σ_i x_i² x'_i²) / k` for s = 1.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jattrib_kernels.backend import accumulator, check_key, check_rows, check_size
from jattrib_kernels.random import Stream, fold_in, threefry2x32


def count_sketch(x: jax.Array, key: jax.Array, dim: int, *, copies: int = 1) -> jax.Array:
    """Return the CountSketch of `(n, p)` rows, `(n, dim)`; with s copies, the SJLT with s entries a coordinate.

    Args:
        x: rows, summed in float32 (float64 for float64 rows).
        key: uint32 `(2,)`.
        dim: number of buckets k.
        copies: s.

    Raises:
        ValueError: x is no matrix of floats, the key not two words, dim or copies below 1.

    Source: Charikar, Chen and Farach-Colton 2002, section 3; Kane and Nelson 2014, section 3 (the graph construction).
    """
    check_rows("x", x)
    check_key(key)
    check_size("dim", dim)
    check_size("copies", copies)
    bucket, sign = buckets_and_signs(key, x.shape[1], dim, copies)
    dtype = accumulator(x.dtype)
    y = jnp.zeros((x.shape[0], dim), dtype)
    for copy in range(copies):
        y = y.at[:, bucket[copy]].add(x.astype(dtype) * sign[copy][None, :].astype(dtype))
    return y * jnp.asarray(1 / math.sqrt(copies), dtype)


def buckets_and_signs(key: jax.Array, size: int, dim: int, copies: int) -> tuple[jax.Array, jax.Array]:
    """Return h, int32 `(copies, size)`, and σ, float32 `(copies, size)`."""
    shape = (copies, size)
    counter = (lax.broadcasted_iota(jnp.uint32, shape, 1), lax.broadcasted_iota(jnp.uint32, shape, 0))
    place, coin = threefry2x32(fold_in((key[0], key[1]), int(Stream.COUNT_SKETCH)), counter)
    sign = 1 - 2 * (coin & jnp.uint32(1)).astype(jnp.int32)
    return (place % jnp.uint32(dim)).astype(jnp.int32), sign.astype(jnp.float32)
