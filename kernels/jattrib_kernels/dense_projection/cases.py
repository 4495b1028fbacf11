"""Shapes of the dense projection that tests, compilation and benchmarks share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jattrib_kernels.dense_projection.reference import Distribution


class Case(NamedTuple):
    """One call: n rows of p coordinates to `dim` columns."""

    name: str
    n: int
    p: int
    dim: int
    dtype: str = "float32"
    distribution: Distribution = "rademacher"
    block_offset: int = 0
    col_offset: int = 0


SMALL = (
    Case("one block", 1, 64, 128),
    Case("part of a block", 3, 50, 130),
    Case("ragged", 20, 1000, 300),
    Case("ragged bfloat16", 20, 1000, 300, "bfloat16"),
    Case("offsets", 5, 200, 128, block_offset=2**31 + 5, col_offset=7),
    Case("normal", 5, 200, 100, distribution="normal", block_offset=3, col_offset=7),
    Case("normal bfloat16", 3, 130, 64, "bfloat16", distribution="normal"),
)
"""Seconds in the interpreter."""

LARGE = (
    Case("mlp", 256, 131_072, 1024),
    Case("mlp bfloat16", 256, 131_072, 1024, "bfloat16"),
    Case("resnet bfloat16", 512, 4_194_304, 4096, "bfloat16"),
    Case("gpt", 16, 134_217_728, 4096),
    Case("normal", 256, 131_072, 1024, distribution="normal"),
)
"""For hardware and its compilers: p is whole blocks on each of 512 devices."""


def operands(case: Case, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Return the rows and the key of a case."""
    x = jax.random.normal(jax.random.key(seed), (case.n, case.p), jnp.float32).astype(case.dtype)
    return x, jax.random.key_data(jax.random.key(seed + 1))
