"""`(K + λI)⁻¹B` for symmetric positive definite K: blocked Cholesky, substitution, iterative refinement."""

from jattrib_kernels.kernel_inverse.api import Factor, Info, factorize, kernel_inverse, solve

__all__ = ["Factor", "Info", "factorize", "kernel_inverse", "solve"]
