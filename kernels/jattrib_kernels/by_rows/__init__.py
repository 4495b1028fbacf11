"""A function of rows, computed a few rows at a time in the memory beside a TPU's vector unit."""

from jattrib_kernels.by_rows.api import by_rows

__all__ = ["by_rows"]
