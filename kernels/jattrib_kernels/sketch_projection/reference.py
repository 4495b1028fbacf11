"""The specification of the sketch, and a reference that reads the rows once.

Cut the p coordinates into blocks of k.  Block b has a sign for each of its positions j and one rotation:

    (w₀, w₁) = threefry(key_signs, (b // 64, j)),   σ[b, j] = 1 − 2·bit(b mod 32) of w[(b // 32) mod 2],
    r[b] = w mod k,   w the first word of threefry(key_rotations, (b, 0)),
    y = Σ_b roll(σ_b ⊙ x_b, r_b),   that is   y[(j + r_b) mod k] += σ[b, j] · x[b k + j].

So k words serve 64 consecutive blocks, and nothing is scattered.  r is uniform to 2⁻³² (exactly, for k a power of two).
With s copies, each has keys of its own, `fold_in(key, copy)`, and their sum is divided by √s.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jattrib_kernels.backend import accumulator
from jattrib_kernels.random import fold_in, threefry2x32

BLOCKS = 64
"""Consecutive blocks whose signs come from the same hashes."""

_TILE = 1 << 15  # entries of a tile's sum, twice the row's own: it stays in the caches of a core


def copy_keys(key: jax.Array, copies: int) -> jax.Array:
    """Return the keys of the copies: uint32 `(copies, 2)`."""
    return jnp.stack(fold_in((key[0], key[1]), lax.iota(jnp.uint32, copies)), axis=1)


def rotations(keys: jax.Array, block: jax.Array, *, blocks: int, dim: int) -> jax.Array:
    """Return the rotations of blocks `block …`: int32 `(copies, blocks)`, from keys `(copies, 2)`."""
    counter = block + lax.iota(jnp.uint32, blocks)

    def of(key: jax.Array) -> jax.Array:
        word, _ = threefry2x32((key[0], key[1]), (counter, jnp.zeros_like(counter)))
        return (word % jnp.uint32(dim)).astype(jnp.int32)

    return jnp.stack([of(key) for key in keys])


def sign_words(keys: jax.Array, unit: jax.Array, *, units: int, dim: int) -> jax.Array:
    """Return the sign bits of blocks `64·unit …`: uint32 `(2·units, copies, dim)`, 32 blocks a row."""
    shape = (units, dim)
    counter = (unit + lax.broadcasted_iota(jnp.uint32, shape, 0), lax.broadcasted_iota(jnp.uint32, shape, 1))
    words = [jnp.stack(threefry2x32((key[0], key[1]), counter), axis=1) for key in keys]
    return jnp.stack(words, axis=2).reshape(2 * units, len(words), dim)


def sign(word: jax.Array, bit: jax.Array) -> jax.Array:
    """Return ±1 in float32 from one bit of each word."""
    shifted = jnp.left_shift(word, jnp.uint32(31) - bit)
    return lax.bitcast_convert_type((shifted & jnp.uint32(0x80000000)) | jnp.uint32(0x3F800000), jnp.float32)


class Tables(NamedTuple):
    """What consecutive blocks are rotated by, and their signs.

    Attributes:
        words: the sign bits, uint32 `(units, copies, k)`, 32 blocks a unit.
        turns: the rotations, int32 `(copies, blocks)`.
        start: where in the first unit the first block is, uint32 `()`.
    """

    words: jax.Array
    turns: jax.Array
    start: jax.Array

    def at(self, i: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Return the signs `(copies, k)` and rotations `(copies,)` of block i."""
        b = self.start + jnp.asarray(i).astype(jnp.uint32)
        return sign(self.words[(b // jnp.uint32(32)).astype(jnp.int32)], b % jnp.uint32(32)), self.turns[:, i]


def tables(keys: jax.Array, offset: jax.Array, *, blocks: int, dim: int, copies: int) -> Tables:
    """Return the tables of blocks `offset …`, of as many as `blocks`; see `project`."""
    unit = offset // jnp.uint32(BLOCKS)
    words = sign_words(copy_keys(keys[0], copies), unit, units=(blocks - 1) // BLOCKS + 2, dim=dim)
    turns = rotations(copy_keys(keys[1], copies), offset, blocks=blocks, dim=dim)
    return Tables(words, turns, offset % jnp.uint32(BLOCKS))


def project(x: jax.Array, keys: jax.Array, offset: jax.Array, *, dim: int, copies: int) -> jax.Array:
    """Return the sketch of `x`.

    Args:
        x: `(n, p)` rows.
        keys: uint32 `(2, 2)`: the two words for the signs, the two for the rotations.
        offset: uint32 `()`: the number of x's first block.
        dim: block length and number of buckets k.
        copies: independent sketches s, summed and divided by √s.
    """
    n = x.shape[0]
    every = tables(keys, offset, blocks=-(-x.shape[1] // dim), dim=dim, copies=copies)
    rows = _tile(n, dim)
    if rows == n:
        return _project_tile(x, every, 0, rows)
    whole = -(-n // rows) * rows
    tiles = lax.map(lambda i: _project_tile(x, every, jnp.minimum(i * rows, n - rows), rows), jnp.arange(whole // rows))
    # The last tile starts early enough to be full, and repeats rows of the one before.
    return (
        jnp.concatenate([tiles[:-1].reshape(-1, dim), tiles[-1, whole - n :]]) if whole > n else tiles.reshape(n, dim)
    )


def project_into(out: jax.Array, x: jax.Array, every: Tables, first: jax.Array | int) -> jax.Array:
    """Return the sketch of as many rows of `x` as `out` has, from row `first` on, in the place of `out`.

    The same bits as `project`'s, and nothing large is made beside the result.
    """
    count, dim = out.shape
    rows = _tile(count, dim)
    if rows == count:
        return out.at[:].set(_project_tile(x, every, first, rows))

    def put(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * rows, count - rows)
        return lax.dynamic_update_slice(out, _project_tile(x, every, first + start, rows), (start, jnp.int32(0)))

    return lax.fori_loop(0, -(-count // rows), put, out)


def _tile(count: int, dim: int) -> int:
    return min(count, max(8, _TILE // (2 * dim)))


def _project_tile(x: jax.Array, every: Tables, first: jax.Array | int, rows: int) -> jax.Array:
    """Return the sketch of a few rows of `x`, from row `first` on."""
    p, (copies, dim) = x.shape[1], every.words.shape[1:]
    dtype = accumulator(x.dtype)
    full, rest = divmod(p, dim)

    def add(part: jax.Array, i: jax.Array | int, y: jax.Array) -> jax.Array:
        sigma, turn = every.at(i)
        for copy in range(copies):
            at = (jnp.int32(0), turn[copy])
            window = lax.dynamic_slice(y, at, part.shape)
            window = window + part.astype(dtype) * sigma[copy][None, :].astype(dtype)
            y = lax.dynamic_update_slice(y, window, at)
        return y

    def step(i: jax.Array | int, y: jax.Array) -> jax.Array:
        return add(lax.dynamic_slice(x, (first, i * dim), (rows, dim)), i, y)

    # 2k columns, folded at the end: a rotation is a contiguous window.  One block is added before the loop, so that
    # y varies over the same mesh axes throughout under `shard_map`.
    y = jnp.zeros((rows, 2 * dim), dtype)
    if rest:
        part = lax.dynamic_slice(x, (first, full * dim), (rows, rest))
        y = add(jnp.pad(part, ((0, 0), (0, dim - rest))), full, y)
    else:
        y = step(0, y)
    done = 0 if rest else 1
    y = lax.fori_loop(done, full, step, y) if done < full else y
    return (y[:, :dim] + y[:, dim:]) * jnp.asarray(1 / math.sqrt(copies), dtype)


def transpose(y: jax.Array, keys: jax.Array, offset: jax.Array, *, size: int, copies: int) -> jax.Array:
    """Return the adjoint: `(n, size)` from `(n, k)` rows, `x̂[b k + j] = σ[b, j] · y[(j + r_b) mod k]`."""
    n, dim = y.shape
    dtype = accumulator(y.dtype)
    blocks = -(-size // dim)
    every = tables(keys, offset, blocks=blocks, dim=dim, copies=copies)
    y = y.astype(dtype) * jnp.asarray(1 / math.sqrt(copies), dtype)
    twice = jnp.concatenate([y, y], axis=1)

    def put(i: jax.Array | int, x: jax.Array) -> jax.Array:
        sigma, turn = every.at(i)
        parts = [
            lax.dynamic_slice(twice, (jnp.int32(0), turn[copy]), (n, dim)) * sigma[copy][None, :].astype(dtype)
            for copy in range(copies)
        ]
        return lax.dynamic_update_slice(x, sum(parts[1:], start=parts[0]), (0, i * dim))

    x = put(0, jnp.zeros((n, blocks * dim), dtype))
    x = lax.fori_loop(1, blocks, put, x) if blocks > 1 else x
    return x[:, :size]
