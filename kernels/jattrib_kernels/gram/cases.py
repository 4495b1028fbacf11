"""Shapes, types and seeds that feed the tests, the compile tests and the benchmarks of the Gram matrix."""

from typing import Literal, NamedTuple

import numpy as np


class Case(NamedTuple):
    """Rows of features.

    Attributes:
        n: rows.
        k: columns.
        dtype: of the features.
        compensated: whether rounding errors are kept.
        seed: of the features.
    """

    n: int
    k: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    compensated: bool = False
    seed: int = 0

    def __str__(self) -> str:
        """Return a short name."""
        return f"n{self.n}-k{self.k}-{self.dtype}{'-compensated' * self.compensated}"


NUMERIC = (
    Case(1, 1),
    Case(700, 37),
    Case(700, 37, compensated=True),
    Case(512, 300, dtype="bfloat16"),
    Case(1100, 300, compensated=True),
)
"""Small ones for the tests: chunks and tiles that do not fill up, several of each."""

COMPILED = tuple(
    Case(4096, k, dtype, compensated)
    for k in (1024, 16384)
    for dtype in ("float32", "bfloat16")
    for compensated in (False, True)
)
"""Those of one device, for the compile tests."""

POD = (Case(1 << 17, 16384), Case(1 << 17, 16384, compensated=True))
"""Those that are spread over 256 chips."""


def features(case: Case) -> np.ndarray:
    """Return Φ in float64: columns of unequal size, some of them far from zero mean, as gradients are."""
    generator = np.random.default_rng(case.seed)
    scale = np.exp(generator.standard_normal(case.k))
    return scale * (generator.standard_normal(case.k) + generator.standard_normal((case.n, case.k)))
