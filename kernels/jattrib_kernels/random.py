"""A counter-based generator: Threefry-2x32 with 20 rounds, in integer operations that every backend has.

A random matrix made from it is a pure function of (seed, row, column): it has the same bits on a CPU, a GPU and a TPU,
inside a kernel or outside, on any tiling, mesh or number of hosts.  The function equals the generator behind
`jax.random.key` bit for bit.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.2.
"""

from enum import IntEnum

import jax
import jax.numpy as jnp
from jax import lax

Words = tuple[jax.Array, jax.Array]
"""Two uint32 arrays of one shape: 64 random bits an entry."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # the Threefish key-schedule constant, cut to 32 bits


class Stream(IntEnum):
    """What a key is folded with, so that one seed serves every random matrix without sharing bits between them."""

    DENSE_SIGNS = 1
    DENSE_NORMAL = 2
    SKETCH_SIGNS = 3
    SKETCH_ROTATIONS = 4
    COUNT_SKETCH = 5


def threefry2x32(key: Words, counter: Words) -> Words:
    """Encrypt `counter` under `key`: 64 random bits for each pair of words.

    Args:
        key: two uint32 words, scalars or arrays of the counter's shape.
        counter: two uint32 arrays of one shape.

    Returns:
        Two uint32 arrays of the counter's shape.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x0 = counter[0] + schedule[0]
    x1 = counter[1] + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (lax.shift_left(x1, _word(rotation, x1)) | lax.shift_right_logical(x1, _word(32 - rotation, x1))) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + (schedule[(group + 2) % 3] + jnp.uint32(group + 1))
    return x0, x1


def fold_in(key: Words, data: jax.Array | int) -> Words:
    """Derive an independent key from `key` for each number below 2**32: `threefry2x32(key, (0, data))`.

    Not for the inside of a kernel: it goes through `jax.random`, whose hash is a loop on the CPU.  One straight-line
    hash of another's words takes XLA's CPU compiler minutes.
    """
    typed = jax.random.wrap_key_data(jnp.stack(key), impl="threefry2x32")
    data = jnp.asarray(data, jnp.uint32)
    words = jax.random.key_data(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(typed, data.reshape(-1)))
    return words[:, 0].reshape(data.shape), words[:, 1].reshape(data.shape)


def _word(value: int, like: jax.Array) -> jax.Array:
    return jnp.full(jnp.shape(like), value, jnp.uint32)
