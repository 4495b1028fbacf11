"""The door: checks, padding to whole tiles, the choice of a backend, and the half that symmetry spares."""

import jax
import jax.numpy as jnp

from jattrib_kernels.backend import Backend, ceil_to, check_rows, refuse, resolve
from jattrib_kernels.backend import accumulator as sum_type
from jattrib_kernels.gram import pallas_gpu, pallas_tpu, reference
from jattrib_kernels.gram.sums import Sum, on_grid, value

__all__ = ["Sum", "gram", "on_grid", "product", "value"]


def gram(
    x: jax.Array,
    *,
    accumulator: Sum | None = None,
    compensated: bool = False,
    backend: Backend = "auto",
) -> jax.Array | Sum:
    """Return `ΦᵀΦ = Σ_i φ_i φ_iᵀ` over the rows of Φ.

    Plain, it is one matrix: the increment of a sum over batches, in a loop or a fold.  Compensated, it is a `Sum` of
    two, to which each chunk of 512 rows adds with its rounding error kept: after any number of rows, the error is that
    of a chunk.  A loop hands its sum on as `accumulator`; a fold, which adds increments itself, takes
    `on_grid(increment, bound)`; `value` ends either.

    Args:
        x: rows φ, `(n, k)`: float32 or bfloat16, summed in float32; float64 by the reference alone.  Rows that are not
            to count have to be zero.
        accumulator: a sum to add to, `(k, k)` twice; it implies `compensated`.
        compensated: keep rounding errors.
        backend: which implementation runs; one asked for by name never falls back to another.

    Returns:
        A symmetric matrix `(k, k)`, or two.

    Raises:
        ValueError: x is no matrix of floats, `accumulator` does not fit it, or the backend is not known.
    """
    compensated = compensated or accumulator is not None
    made = product(x, x, accumulator=accumulator, compensated=compensated, backend=backend)
    return Sum(*made) if compensated else made[0]


def product(
    left: jax.Array,
    right: jax.Array,
    *,
    accumulator: Sum | None = None,
    compensated: bool = False,
    backend: Backend = "auto",
) -> tuple[jax.Array, ...]:
    """Return `leftᵀ right`, rows of a Gram matrix, in one part or two; if both are one array, from half the work.

    Raises:
        ValueError: as `gram`.
    """
    symmetric = left is right
    left, right = jnp.asarray(left), jnp.asarray(right)
    for x in (left, right):
        check_rows("x", x)
    (n, a), b, dtype = left.shape, right.shape[1], sum_type(left.dtype)
    _check_sum(accumulator, (a, b), dtype)
    chosen = _choose(backend, left.dtype)
    if chosen == "reference":
        if not compensated:
            return (_whole(reference.product(left, right), symmetric),)
        zero = jnp.zeros((a, b), dtype)
        pad = ((0, max(ceil_to(n, reference.ROWS), reference.ROWS) - n), (0, 0))
        made = reference.compensated(jnp.pad(left, pad), jnp.pad(right, pad), accumulator or Sum(zero, zero))
        return tuple(_whole(part, symmetric) for part in made)
    kernel = pallas_gpu if chosen == "pallas_gpu" else pallas_tpu
    up, over = (-width % kernel.tile_for(width) for width in (a, b))
    down = max(ceil_to(n, kernel.ROWS), kernel.ROWS) - n
    if kernel is pallas_gpu and max(left.size, right.size, a * b) >= 2**31:
        raise refuse(
            f"{n} rows of {a} by {b} columns",
            expected="arrays of fewer than 2³¹ entries",
            remedy="pass rows in batches",
        )
    start = None if accumulator is None else Sum(*(jnp.pad(part, ((0, up), (0, over))) for part in accumulator))
    made = kernel.product(
        jnp.pad(left, ((0, down), (0, up))),
        jnp.pad(right, ((0, down), (0, over))),
        start,
        symmetric=symmetric,
        compensated=compensated,
        interpret=chosen == "interpret",
    )
    return tuple(_whole(part[:a, :b], symmetric) for part in made)


def _whole(half: jax.Array, symmetric: bool) -> jax.Array:
    """Return the matrix with its lower half above the diagonal, too: a product may round the two apart."""
    if not symmetric:
        return half
    row, column = (jax.lax.broadcasted_iota(jnp.int32, half.shape, axis) for axis in (0, 1))
    return jnp.where(row >= column, half, half.T)


def _choose(backend: Backend, dtype: jnp.dtype) -> Backend:
    chosen = resolve(backend)
    if chosen == "reference" or dtype in (jnp.float32, jnp.bfloat16):
        return chosen
    if backend == "auto":
        return "reference"
    raise refuse(
        f"backend {backend!r} was asked for the Gram matrix of {dtype} rows",
        expected="float32 or bfloat16",
        remedy="cast to float32, or use backend='reference'",
    )


def _check_sum(total: Sum | None, shape: tuple[int, int], dtype: jnp.dtype) -> None:
    for part in total or ():
        if part.shape != shape or part.dtype != dtype:
            raise refuse(
                f"`accumulator` has shape {part.shape} and type {part.dtype}",
                expected=f"two arrays {shape} of {dtype}",
                remedy="begin with the sum that `gram(x, compensated=True)` returns",
            )
