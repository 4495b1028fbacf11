"""The specification of the dense random matrix, and a reference that makes it block by block.

A Python integer `bit` and the words of one hash give 64 rows of a column:

    (w₀, w₁) = threefry(key, (row // 64, column)),   R[row, column] = 1 − 2·bit(row mod 32) of w[(row // 32) mod 2].

The normal matrix takes two rows from a hash by the Box-Muller transform:

    (w₀, w₁) = threefry(key, (row // 2, column)),   u = (w₀ div 2⁸ + ½)/2²⁴,   v = (w₁ div 2⁸)/2²⁴,
    R[row, column] = √(−2 ln u) · (cos 2πv for even rows, sin 2πv for odd ones).

Signs are the same bits on every backend; normal numbers agree to the rounding of `log`, `cos` and `sin`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jattrib_kernels.backend import accumulator
from jattrib_kernels.random import Words, threefry2x32

Distribution = Literal["rademacher", "normal"]

ROWS = 64
"""Rows of the matrix that one hash serves, and the unit of `block_offset`."""

_TILE = 1 << 20  # entries of R alive at a time: they stay in the last-level cache of a small CPU


def sign_words(key: Words, block: jax.Array, col: jax.Array, *, blocks: int, cols: int) -> jax.Array:
    """Return the bits of rows `64·block …` and columns `col …`: uint32 `(2·blocks, cols)`, 32 rows in each."""
    return jnp.stack(threefry2x32(key, _counters(block, col, blocks, cols)), axis=1).reshape(2 * blocks, cols)


def signs(key: Words, block: jax.Array, col: jax.Array, *, blocks: int, cols: int) -> jax.Array:
    """Return rows `64·block …` and columns `col …` of the sign matrix: `(64·blocks, cols)` in float32."""
    return from_bits(sign_words(key, block, col, blocks=blocks, cols=cols))


def from_bits(words: jax.Array) -> jax.Array:
    """Return the signs whose bits `(w, cols)` words hold: `(32·w, cols)` in float32."""
    words = words[:, None, :]
    shift = jnp.uint32(31) - lax.broadcasted_iota(jnp.uint32, (1, 32, 1), 1)
    # The bit becomes the sign bit of a float32 one.
    bits = (jnp.left_shift(words, shift) & jnp.uint32(0x80000000)) | jnp.uint32(0x3F800000)
    return lax.bitcast_convert_type(bits, jnp.float32).reshape(-1, words.shape[-1])


def normal(key: Words, block: jax.Array, col: jax.Array, *, blocks: int, cols: int) -> jax.Array:
    """Return rows `64·block …` and columns `col …` of the normal matrix: `(64·blocks, cols)` in float32."""
    return from_pairs(pair_words(key, block, col, blocks=blocks, cols=cols))


def pair_words(key: Words, block: jax.Array, col: jax.Array, *, blocks: int, cols: int) -> Words:
    """Return the hashes of the pairs of rows from row `64·block` on: two uint32 arrays `(32·blocks, cols)`."""
    half = ROWS // 2
    return threefry2x32(key, _counters(block * jnp.uint32(half), col, blocks * half, cols))


def from_pairs(words: Words) -> jax.Array:
    """Return the normal numbers of pairs of rows from their `(w, cols)` hashes: `(2·w, cols)` in float32."""
    odd = jnp.ones(words[0].shape, jnp.int32)
    return jnp.stack([box_muller(words, 0 * odd), box_muller(words, odd)], axis=1).reshape(-1, words[0].shape[-1])


def box_muller(words: Words, odd: jax.Array) -> jax.Array:
    """Return the normal number of an even row or, where `odd` is 1, of the odd row after it, from the hash of both."""
    # Through int32: 24 bits fit, and Mosaic converts no unsigned integers.
    u, v = (lax.shift_right_logical(w, jnp.full(w.shape, 8, jnp.uint32)).astype(jnp.int32) for w in words)
    scale = jnp.float32(2.0**-24)
    radius = jnp.sqrt(jnp.float32(-2.0) * jnp.log((u.astype(jnp.float32) + jnp.float32(0.5)) * scale))
    # A sine is the cosine a quarter of a turn before; turns are exact as integers, within half a turn of 0.
    turn = ((v - odd * 2**22 + 2**23) & (2**24 - 1)) - 2**23
    return radius * jnp.cos(turn.astype(jnp.float32) * (jnp.float32(2.0 * math.pi) * scale))


def project(x: jax.Array, seed: jax.Array, *, dim: int, distribution: Distribution) -> jax.Array:
    """Return `x R`: blocks of R are made one after another and never kept.

    Args:
        x: `(n, p)` rows.
        seed: uint32 `(4,)`: the two words of the key, the first block of 64 rows, the first column.
        dim: columns of R.
        distribution: of the entries.
    """
    n, p = x.shape
    dtype = accumulator(x.dtype)
    words, entries = _generator(seed, dim, distribution)
    blocks, full = _tiles(p, dim)
    width = blocks * ROWS

    def product(part: jax.Array, hashes: Any) -> jax.Array:
        r = entries(hashes)[: part.shape[1]]
        return jnp.matmul(part.astype(dtype), r.astype(dtype), precision=lax.Precision.HIGHEST)

    # A loop that starts from a product, not from zeros, has the same varying axes throughout under `shard_map`.
    rest = p - full * width
    y = product(x[:, full * width :], words(full * blocks, -(-rest // ROWS))) if rest else None
    first = 0 if rest else 1
    y = product(x[:, :width], words(0, blocks)) if y is None else y
    if first == full:
        return y

    def step(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        y, hashes = carry
        y = y + product(lax.dynamic_slice(x, (0, i * width), (n, width)), hashes)
        # Carried, lest the compiler hash anew for every one of the rows that a word serves.
        return y, words((i + 1) * blocks, blocks)

    return lax.fori_loop(first, full, step, (y, words(first * blocks, blocks)))[0]


def transpose(y: jax.Array, seed: jax.Array, *, size: int, distribution: Distribution) -> jax.Array:
    """Return `y Rᵀ`, `(n, size)`, from `(n, k)` rows."""
    n, dim = y.shape
    dtype = accumulator(y.dtype)
    words, entries = _generator(seed, dim, distribution)
    blocks, full = _tiles(size, dim)
    width = blocks * ROWS

    def product(hashes: Any, rows: int) -> jax.Array:
        r = entries(hashes)[:rows]
        return jnp.matmul(y.astype(dtype), r.astype(dtype).T, precision=lax.Precision.HIGHEST)

    x = jnp.zeros((n, size), dtype)
    if full:

        def put(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            x, hashes = carry
            x = lax.dynamic_update_slice(x, product(hashes, width), (0, i * width))
            return x, words((i + 1) * blocks, blocks)

        x = lax.dynamic_update_slice(x, product(words(0, blocks), width), (0, 0))
        x = lax.fori_loop(1, full, put, (x, words(blocks, blocks)))[0] if full > 1 else x
    if rest := size - full * width:
        x = lax.dynamic_update_slice(x, product(words(full * blocks, -(-rest // ROWS)), rest), (0, full * width))
    return x


def _generator(seed: jax.Array, cols: int, distribution: Distribution) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return how the hashes of some blocks of rows are made, and how the matrix's entries are made of them."""
    key, make = (seed[0], seed[1]), sign_words if distribution == "rademacher" else pair_words

    def words(block: jax.Array | int, blocks: int) -> Any:
        return make(key, seed[2] + jnp.asarray(block).astype(jnp.uint32), seed[3], blocks=blocks, cols=cols)

    return words, from_bits if distribution == "rademacher" else from_pairs


def _counters(row: jax.Array, col: jax.Array, rows: int, cols: int) -> Words:
    shape = (rows, cols)
    return row + lax.broadcasted_iota(jnp.uint32, shape, 0), col + lax.broadcasted_iota(jnp.uint32, shape, 1)


def _tiles(rows: int, cols: int) -> tuple[int, int]:
    """Return the number of 64-row blocks in a tile, and of whole tiles among `rows`."""
    blocks = max(1, _TILE // (ROWS * cols))
    return blocks, rows // (blocks * ROWS)
