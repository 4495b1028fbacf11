"""Shapes of the sketch that tests, compilation and benchmarks share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Case(NamedTuple):
    """One call: n rows of p coordinates to `dim` buckets."""

    name: str
    n: int
    p: int
    dim: int
    dtype: str = "float32"
    copies: int = 1
    block_offset: int = 0


SMALL = (
    Case("one block", 1, 128, 128),
    Case("part of a block", 3, 50, 128),
    Case("ragged", 20, 3000, 256),
    Case("ragged bfloat16", 20, 3000, 256, "bfloat16"),
    Case("words change", 5, 70 * 128, 128, block_offset=61),
    Case("far", 5, 1000, 128, block_offset=2**32 - 20),
    Case("copies", 5, 5 * 128, 128, copies=3),
)
"""Seconds in the interpreter; `far` ends before the last block number."""

LARGE = (
    Case("mlp", 256, 524_288, 1024),
    Case("mlp bfloat16", 256, 524_288, 1024, "bfloat16"),
    Case("resnet bfloat16", 512, 4_194_304, 4096, "bfloat16"),
    Case("gpt", 16, 134_217_728, 4096),
    Case("copies", 256, 524_288, 1024, copies=4),
)
"""For hardware and its compilers: p is whole blocks on each of 512 devices."""

TIMED = (Case("mlp", 256, 101_770, 1024), Case("few rows", 64, 500_000, 512))
"""What a CPU projects in a moment, densely too: the rows of the demo's network, and fewer and longer ones."""


def operands(case: Case, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Return the rows and the key of a case."""
    x = jax.random.normal(jax.random.key(seed), (case.n, case.p), jnp.float32).astype(case.dtype)
    return x, jax.random.key_data(jax.random.key(seed + 1))
