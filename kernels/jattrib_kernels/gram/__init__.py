"""`ΦᵀΦ` of a stream of rows, in float32 or with compensated accumulation."""

from jattrib_kernels.gram.api import Sum, gram, on_grid, value

__all__ = ["Sum", "gram", "on_grid", "value"]
