"""The dense random projection `x R` and its transpose."""

from jattrib_kernels.dense_projection.api import dense_projection, dense_projection_transpose

__all__ = ["dense_projection", "dense_projection_transpose"]
