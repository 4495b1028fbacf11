"""The block-rotated sign sketch and its transpose."""

from jattrib_kernels.sketch_projection.api import sketch_projection, sketch_projection_transpose

__all__ = ["sketch_projection", "sketch_projection_transpose"]
