"""Shapes, spectra and seeds that feed the tests, the compile tests and the benchmarks of the kernel inverse."""

from typing import Literal, NamedTuple

import numpy as np

Spectrum = Literal["linear", "geometric", "outlier"]


class Case(NamedTuple):
    """A system with a known spectrum, whose largest eigenvalue is 1.

    Attributes:
        k: its size.
        columns: of targets.
        condition: the largest eigenvalue over the smallest.
        spectrum: how eigenvalues are spaced between them; `outlier` has one of 1 and the rest at the other end.
        seed: of eigenvectors and targets.
    """

    k: int
    columns: int = 5
    condition: float = 1e4
    spectrum: Spectrum = "linear"
    seed: int = 0

    def __str__(self) -> str:
        """Return a short name."""
        return f"k{self.k}-q{self.columns}-{self.condition:.0e}-{self.spectrum}"


NUMERIC = (
    Case(1, columns=1, condition=1.0),
    Case(300, spectrum="outlier"),
    Case(384, columns=2),
    Case(384, columns=2, spectrum="geometric"),
)
"""Small systems for the tests: a single number, blocks that do not fill up, several blocks, each kind of spectrum."""

COMPILED = (Case(1024, columns=256), Case(4096, columns=256), Case(16384, columns=256), Case(32768, columns=256))
"""Systems of one device, for the compile tests."""

ENSEMBLE = (8, Case(512, columns=128))
"""As many systems of one shape, under `vmap`."""

POD = (Case(32768, columns=256), Case(131072, columns=256))
"""Systems that are spread over 256 chips; the second, of 64 GiB, fits no single one."""

TIMED = (1024, 2048, 4096, 8192, 16384)
"""Sizes that the benchmark times, as far as the device's speed allows."""


def eigenvalues(case: Case) -> np.ndarray:
    """Return the spectrum in float64, from the largest down."""
    least = 1 / case.condition
    if case.spectrum == "outlier":
        return np.concatenate([np.ones(1), np.full(case.k - 1, least)])
    if case.spectrum == "geometric":
        return np.geomspace(1.0, least, case.k)
    return np.linspace(1.0, least, case.k)


def system(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return K, B and eigenvectors in float64: `K = Q diag(s) Qᵀ` with Haar-distributed Q, B of normal numbers."""
    generator = np.random.default_rng(case.seed)
    vectors, upper = np.linalg.qr(generator.standard_normal((case.k, case.k)))
    vectors = vectors * np.sign(np.diagonal(upper))
    matrix = (vectors * eigenvalues(case)) @ vectors.T
    return (matrix + matrix.T) / 2, generator.standard_normal((case.k, case.columns)), vectors
