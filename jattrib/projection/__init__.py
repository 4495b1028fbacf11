"""Random projections of gradient pytrees, `φ = g P`: the only door to the kernels.

* `dense`: independent signs or normal numbers, 2·n·p·k operations
* `sketch`: the block-rotated sign sketch, one pass over the gradients
* `leaves`: how the leaves of a pytree share one matrix
* `factored`: a matrix a side of each layer, on inputs and output gradients; no gradient is made
* `gradients`: per-example gradients that are projected as they appear
"""
