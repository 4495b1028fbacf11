"""Checks, the choice of an implementation, and the derivative of the sketch."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattrib_kernels.backend import (
    Backend,
    accumulator,
    check_key,
    check_rows,
    check_size,
    cores,
    for_rows,
    in_32_bits,
    offset_word,
    rowwise,
)
from jattrib_kernels.random import Stream, fold_in
from jattrib_kernels.sketch_projection import reference

PART = 1 << 20
"""Numbers that are worth the thread of another core."""


def sketch_projection(
    x: jax.Array,
    key: jax.Array,
    dim: int,
    *,
    block_offset: jax.Array | int = 0,
    copies: int = 1,
    backend: Backend = "auto",
) -> jax.Array:
    """Return `y = Σ_b roll(σ_b ⊙ x_b, r_b)`, the block-rotated sign sketch: one pass over x, no scatter.

    x is cut into blocks of k = dim coordinates; σ has independent signs, r_b is uniform in [0, k) and independent of
    them.  Write `h(b, j) = (j + r_b) mod k` for the bucket of a coordinate i = (b, j), so y_m = Σ_i [h(i) = m] σ_i x_i.

    *Unbiased.*  `⟨y, y'⟩ = Σ_{i,i'} [h(i) = h(i')] σ_i σ_i' x_i x'_i'`.  The signs are independent of h, so
    `E[σ_i σ_i'] = [i = i']` leaves `Σ_i x_i x'_i = ⟨x, x'⟩`.

    *Variance.*  The error is `Σ_{i<i'} [h(i) = h(i')] σ_i σ_i' (x_i x'_i' + x_i' x'_i)`.  Products of signs over
    distinct pairs are uncorrelated whatever h is, so only the squares remain, and
    `P(h(i) = h(i'))` is 1/k for coordinates of different blocks (`r_b − r_b'` is uniform) and 0 within a block
    (`j ≠ j'`):

        `Var = (1/k) Σ_{i<i', b≠b'} (x_i x'_i' + x_i' x'_i)²
             = (1/k) (‖x‖²‖x'‖² + ⟨x, x'⟩² − 2 Σ_i x_i² x'_i² − Σ_b [pairs within block b])`,

    CountSketch's variance less the pairs that cannot collide, hence never above `(‖x‖²‖x'‖² + ⟨x, x'⟩²)/k`.

    *Copies.*  `y = Σ_c y_c / √s` is a sketch of the s-fold vector x/√s whose pairs from different copies always
    collide with probability 1/k, so `Var_s = Var/s + (1 − 1/s)(‖x‖²‖x'‖² + ⟨x, x'⟩²)/k`.  More copies do not lower the
    variance; they thin the tails, since no single collision of two large coordinates counts in full.

    On a CPU each core takes a part of the rows, where the call is not part of a jitted program.

    Source: Charikar, Chen and Farach-Colton 2002 (CountSketch); Kane and Nelson 2014, section 3 (s > 1).  Signs and
    rotations by blocks replace their hash of every coordinate.

    Args:
        x: `(n, p)` rows: bfloat16 or float32, summed in float32; other types by the reference alone.
        key: uint32 `(2,)`; may be traced, and batched by `vmap`.
        dim: number of buckets k, and block length.
        block_offset: number of x's first block, so that a vector may be sketched in parts; may be traced.
        copies: sketches s that are summed; each coordinate then goes to s buckets.
        backend: `auto`, or an implementation by name, which is then never replaced by another.

    Returns:
        `(n, dim)` in float32 (float64 for float64 rows).

    Raises:
        ValueError: x is no matrix of floats, the key not two words, dim or copies below 1, the offset out of range, or
            a backend or type unknown.
    """
    check_rows("x", x)
    check_size("dim", dim)
    check_size("copies", copies)
    check_key(key)
    offset = offset_word("block_offset", block_offset, span=-(-x.shape[1] // dim))
    chosen = _chosen(backend, x.dtype, dim, copies)
    parts = min(cores(x, key, offset), x.size // PART, x.shape[0]) if chosen == "reference" else 1
    if parts > 1:
        return _core_by_core(parts, jnp.asarray(x), key, offset, dim=dim, copies=copies)
    return _project(dim, x.shape[1], x.dtype, copies, chosen, x, _streams(key), offset)


def _core_by_core(
    parts: int, x: jax.Array, key: jax.Array, offset: jax.Array | np.uint32, *, dim: int, copies: int
) -> jax.Array:
    """Sketch an equal part of the rows on each core, each in a program of one thread: cores do not wait for each other.

    The programs of JAX's CPU divide single operations, which are too short here: two cores are no faster then than one.
    What is large, or ready all at once, they leave to threads that all programs share, and there one part may wait for
    the other to end.  So the tables and the memory of the results come from a program of their own, and in that of a
    part one step follows another.
    """
    n = x.shape[0]
    count = -(-n // parts)
    firsts = [min(first, n - count) for first in range(0, n, count)]  # the last part repeats rows of the one before
    blocks = -(-x.shape[1] // dim)
    every, memory = _begin(len(firsts), count, dim, copies, blocks, accumulator(x.dtype), key, offset)

    def part(number: int) -> jax.Array:
        with jax.enable_x64(x.dtype == jnp.float64):  # a thread has settings of its own
            return jax.block_until_ready(_part(memory[number], x, every, firsts[number]))

    others = [_threads(parts - 1).submit(part, number) for number in range(1, len(firsts))]
    return _joined(n, part(0), *(other.result() for other in others))


_threads = cache(ThreadPoolExecutor)  # kept, and with it the memory that threads have asked for


@partial(jax.jit, static_argnums=range(6))
def _begin(parts, count, dim, copies, blocks, dtype, key, offset):
    every = reference.tables(_streams(key), offset, blocks=blocks, dim=dim, copies=copies)
    return every, [jnp.zeros((count, dim), dtype) for _ in range(parts)]


_part = jax.jit(reference.project_into, donate_argnums=0, compiler_options={"xla_cpu_multi_thread_eigen": False})


@partial(jax.jit, static_argnums=0)
def _joined(n, *parts):
    """Return the rows of all parts, each once."""
    rest = n - sum(len(part) for part in parts[:-1])
    return jnp.concatenate([*parts[:-1], parts[-1][len(parts[-1]) - rest :]])


def sketch_projection_transpose(
    y: jax.Array,
    key: jax.Array,
    size: int,
    *,
    block_offset: jax.Array | int = 0,
    copies: int = 1,
    backend: Backend = "auto",
) -> jax.Array:
    """Return the adjoint of `sketch_projection`: `x̂_b = σ_b ⊙ roll(y, −r_b)`, from `(n, k)` rows back to `(n, size)`.

    Args:
        y: `(n, k)` rows.
        key: uint32 `(2,)`.
        size: number of coordinates.
        block_offset: number of the result's first block.
        copies: as in `sketch_projection`.
        backend: as in `sketch_projection`.

    Returns:
        `(n, size)` in float32 (float64 for float64 rows).

    Raises:
        ValueError: as `sketch_projection`.
    """
    check_rows("y", y)
    check_size("size", size)
    check_size("copies", copies)
    check_key(key)
    offset = offset_word("block_offset", block_offset, span=-(-size // y.shape[1]))
    chosen = _chosen(backend, y.dtype, y.shape[1], copies)
    return _transpose(y.shape[1], size, y.dtype, copies, chosen, y, _streams(key), offset)


def _streams(key: jax.Array) -> jax.Array:
    streams = jnp.array([Stream.SKETCH_SIGNS, Stream.SKETCH_ROTATIONS], jnp.uint32)
    return jnp.stack(fold_in((key[0], key[1]), streams), axis=1)


def _chosen(backend: Backend, dtype: jnp.dtype, dim: int, copies: int) -> Backend:
    chosen = for_rows(backend, dtype)
    if backend != "auto" or chosen != "pallas_tpu":
        return chosen
    from jattrib_kernels.sketch_projection import pallas_tpu

    # The TPU kernel rotates whole registers of 128 lanes in vector memory; asked for by name, it refuses another dim.
    return chosen if pallas_tpu.supports(dim, copies) else "reference"


# Both maps are linear in their rows, and each is the other's derivative.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _project(dim, size, dtype, copies, backend, x, keys, offset):
    del size, dtype
    return _implementation(backend, "project", dim=dim, copies=copies)(x, keys, offset)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _transpose(dim, size, dtype, copies, backend, y, keys, offset):
    del dim, dtype
    return _implementation(backend, "transpose", size=size, copies=copies)(y, keys, offset)


def _project_bwd(dim, size, dtype, copies, backend, seeds, cotangent):
    return jnp.asarray(_transpose(dim, size, accumulator(dtype), copies, backend, cotangent, *seeds), dtype), None, None


def _transpose_bwd(dim, size, dtype, copies, backend, seeds, cotangent):
    return jnp.asarray(_project(dim, size, accumulator(dtype), copies, backend, cotangent, *seeds), dtype), None, None


_project.defvjp(lambda *args: (_project(*args), args[-2:]), _project_bwd)
_transpose.defvjp(lambda *args: (_transpose(*args), args[-2:]), _transpose_bwd)


def _implementation(backend: Backend, name: str, **static: Any) -> Callable[..., jax.Array]:
    """Return an implementation's `project` or `transpose`; kernels are imported where they are asked for."""
    if backend == "reference":
        return rowwise(partial(getattr(reference, name), **static))
    if backend == "pallas_gpu":
        from jattrib_kernels.sketch_projection import pallas_gpu as module
    else:
        from jattrib_kernels.sketch_projection import pallas_tpu as module
    if backend == "interpret":
        static["interpret"] = True
    return rowwise(in_32_bits(partial(getattr(module, name), **static)))
