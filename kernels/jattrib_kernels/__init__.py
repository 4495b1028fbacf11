"""Random projections and kernel inversion for JAX: one folder an operation, one specification a folder.

* `dense_projection`: `x R` and `y Rᵀ` with R of random signs or normal numbers, made where they are used
* `sketch_projection`: the block-rotated sign sketch, one pass over the data, and its transpose
* `kernel_inverse`: `(K + λI)⁻¹ B` of a symmetric positive definite K
* `gram`: `ΦᵀΦ` of a stream of rows
* `by_rows`: a function of rows in one pass over memory
* `random`: the counter-based generator that makes every random matrix here
* `backend`: which implementation runs

In each folder `reference` is the specification in plain `jax.numpy`, `pallas_tpu` and `pallas_gpu` are the kernels,
`api` checks the arguments and chooses between them, and `cases` lists the shapes that tests, compilation and benchmarks
share.
"""
