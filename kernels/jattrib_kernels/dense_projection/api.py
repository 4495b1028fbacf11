"""Checks, the choice of an implementation, and the derivative of the dense projection."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jattrib_kernels.backend import (
    Backend,
    accumulator,
    check_key,
    check_rows,
    check_size,
    for_rows,
    in_32_bits,
    offset_word,
    refuse,
    rowwise,
)
from jattrib_kernels.dense_projection import reference
from jattrib_kernels.dense_projection.reference import ROWS, Distribution
from jattrib_kernels.random import Stream, fold_in


def dense_projection(
    x: jax.Array,
    key: jax.Array,
    dim: int,
    *,
    block_offset: jax.Array | int = 0,
    col_offset: jax.Array | int = 0,
    distribution: Distribution = "rademacher",
    backend: Backend = "auto",
) -> jax.Array:
    """Return `y = x R`, where R has independent entries of mean 0 and variance 1 that are made where they are used.

    `R[row, column]` is a pure function of the key, the row and the column (see `reference`), so the columns of x may be
    projected apart and the results added: `x R = Σ_s x_s R_s`.  It is not scaled: `E[y yᵀ] = dim · x xᵀ`.

    Args:
        x: `(n, p)` rows: bfloat16 or float32, summed in float32; other types by the reference alone.
        key: uint32 `(2,)`; may be traced, and batched by `vmap`.
        dim: number of columns of R.
        block_offset: the row of R that x's first column meets, divided by 64; may be traced.  R has `2³²` blocks of 64
            rows of signs, `2²⁷` of normal numbers: beyond, a traced one begins anew.
        col_offset: the column of R that y's first column is; may be traced.
        distribution: `rademacher`, signs, the same bits on every backend; `normal`, the same to rounding.
        backend: `auto`, or an implementation by name, which is then never replaced by another.

    Returns:
        `(n, dim)` in float32 (float64 for float64 rows).

    Raises:
        ValueError: x is no matrix of floats, the key not two words, dim below 1, an offset out of range, or a backend,
            distribution or type unknown.
    """
    check_rows("x", x)
    check_size("dim", dim)
    seed = _seed(key, block_offset, col_offset, distribution, (x.shape[1], dim))
    return _project(dim, x.shape[1], x.dtype, distribution, for_rows(backend, x.dtype), x, seed)


def dense_projection_transpose(
    y: jax.Array,
    key: jax.Array,
    size: int,
    *,
    block_offset: jax.Array | int = 0,
    col_offset: jax.Array | int = 0,
    distribution: Distribution = "rademacher",
    backend: Backend = "auto",
) -> jax.Array:
    """Return `y Rᵀ`, from `(n, k)` rows back to `(n, size)`, with the same R as `dense_projection`.

    Args:
        y: `(n, k)` rows.
        key: uint32 `(2,)`.
        size: number of rows of R.
        block_offset: the row of R that the result's first column is, divided by 64.
        col_offset: the column of R that y's first column meets.
        distribution: `rademacher` or `normal`.
        backend: as in `dense_projection`.

    Returns:
        `(n, size)` in float32 (float64 for float64 rows).

    Raises:
        ValueError: as `dense_projection`.
    """
    check_rows("y", y)
    check_size("size", size)
    seed = _seed(key, block_offset, col_offset, distribution, (size, y.shape[1]))
    return _transpose(y.shape[1], size, y.dtype, distribution, for_rows(backend, y.dtype), y, seed)


def _seed(
    key: jax.Array, block_offset: Any, col_offset: Any, distribution: Distribution, shape: tuple[int, int]
) -> jax.Array:
    check_key(key)
    if distribution not in get_args(Distribution):
        raise refuse(
            f"`distribution` is {distribution!r}",
            expected=f"one of {', '.join(get_args(Distribution))}",
            remedy="use signs unless a proof asks for normal entries",
        )
    stream = Stream.DENSE_SIGNS if distribution == "rademacher" else Stream.DENSE_NORMAL
    words = fold_in((key[0], key[1]), int(stream))
    # A word counts blocks of signs, or pairs of normal numbers.
    end = 2**32 if distribution == "rademacher" else 2**32 // (ROWS // 2)
    block = offset_word("block_offset", block_offset, span=-(-shape[0] // ROWS), end=end)
    return jnp.stack([*words, block, offset_word("col_offset", col_offset, span=shape[1])])


# Both maps are linear in their rows, and each is the other's derivative.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _project(dim, size, dtype, distribution, backend, x, seed):
    del size, dtype
    return _implementation(backend, "project", dim=dim, distribution=distribution)(x, seed)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _transpose(dim, size, dtype, distribution, backend, y, seed):
    del dim, dtype
    return _implementation(backend, "transpose", size=size, distribution=distribution)(y, seed)


def _project_bwd(dim, size, dtype, distribution, backend, seed, cotangent):
    return jnp.asarray(_transpose(dim, size, accumulator(dtype), distribution, backend, cotangent, seed), dtype), None


def _transpose_bwd(dim, size, dtype, distribution, backend, seed, cotangent):
    return jnp.asarray(_project(dim, size, accumulator(dtype), distribution, backend, cotangent, seed), dtype), None


_project.defvjp(lambda *args: (_project(*args), args[-1]), _project_bwd)
_transpose.defvjp(lambda *args: (_transpose(*args), args[-1]), _transpose_bwd)


def _implementation(backend: Backend, name: str, **static: Any) -> Callable[..., jax.Array]:
    """Return an implementation's `project` or `transpose`; kernels are imported where they are asked for."""
    if backend == "reference":
        return rowwise(partial(getattr(reference, name), **static))
    if backend == "pallas_gpu":
        from jattrib_kernels.dense_projection import pallas_gpu as module
    else:
        from jattrib_kernels.dense_projection import pallas_tpu as module
    if backend == "interpret":
        static["interpret"] = True
    return rowwise(in_32_bits(partial(getattr(module, name), **static)))
