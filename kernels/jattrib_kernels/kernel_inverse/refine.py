"""Iterative refinement, with residuals in about twice float32's precision.

The residual is made of products that a matrix unit computes without error.  Every row of A and every column of X is
cut into slices of at most eight bits, aligned below its largest entry, so that `A = Σ_i A_i` and `X = Σ_j X_j`.  A
product of two slices is, up to a power of two, an integer matrix whose terms are at most 2¹⁴: sums of 1,024 of them are
exact in float32, and the slices themselves are exact in bfloat16.  Products with i + j ≤ 4 are formed, which leaves an
error near 2⁻⁴⁰ of the largest terms, and their sum is compensated.

Source: Ozaki et al. 2012, "Error-free transformations of matrix multiplication by using fast routines of matrix
multiplication", section 3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jattrib_kernels.gram.sums import two_sum
from jattrib_kernels.kernel_inverse.place import Place

_SLICES = 5
_BITS = 8
_CHUNK = 128  # level i + j = l sums (l + 1) * 128 terms
_ROWS = 512  # rows of A that are sliced at once: it bounds the temporaries


def refine(
    solve: Callable[[jax.Array], jax.Array],
    matrix: jax.Array,
    targets: jax.Array,
    *,
    damping: jax.Array,
    steps: int,
    operand: jnp.dtype,
    place: Place | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return X with `(K + λI) X = B`, refined, and the relative residual that remains, in the Frobenius norm.

    Args:
        solve: an approximate `(K + λI)⁻¹`, of columns `(m, q)`.
        matrix: this device's rows of K, `(m, k)`.
        targets: the same rows of B, `(m, q)`.
        damping: λ.
        steps: how often to refine; at none, the residual is that of plain products, and rounding is part of it.
        operand: dtype of the residual's products.
        place: this device; rows of the devices follow one another.
    """
    place = place or Place()
    rows = place.number * matrix.shape[0] + jnp.arange(matrix.shape[0])
    solution = solve(targets)
    if steps:
        left = residual(matrix, place.gather(solution), targets, damping=damping, rows=rows, operand=operand)
    else:  # only to be reported
        product = jnp.matmul(matrix, place.gather(solution), precision=lax.Precision.HIGHEST)
        left = targets - product - damping * solution
    for _ in range(steps):
        corrected = solution + solve(left)
        change = corrected - solution  # what was added, exactly; it is so small that a plain product will do
        product = jnp.matmul(matrix, place.gather(change), precision=lax.Precision.HIGHEST)
        remaining = left - product - damping * change
        better = place.largest(jnp.max(jnp.abs(remaining), axis=0)) < place.largest(jnp.max(jnp.abs(left), axis=0))
        solution = jnp.where(better[None, :], corrected, solution)
        left = jnp.where(better[None, :], remaining, left)
    largest = place.largest(jnp.max(jnp.abs(targets), initial=0))
    unit = jnp.where(largest > 0, largest, 1)  # squares of small numbers would vanish
    above, below = (place.total(jnp.sum(jnp.square(x / unit))) for x in (left, targets))
    ratio = jnp.sqrt(above / jnp.where(below > 0, below, 1))
    return solution, jnp.where(jnp.isfinite(ratio), ratio, jnp.inf)


def residual(
    matrix: jax.Array,
    solution: jax.Array,
    targets: jax.Array,
    *,
    damping: jax.Array,
    rows: jax.Array,
    operand: jnp.dtype,
) -> jax.Array:
    """Return `B − (K + damping·I) X`, rounded once; float64 arrays are multiplied as they are.

    The diagonal, which is the largest entry of its row in most Gram matrices, is multiplied apart: what is sliced is
    then of one size, and the slices reach below the rounding of X.

    Args:
        matrix: some rows of K, `(m, k)`.
        solution: X, `(k, q)`.
        targets: the same rows of B, `(m, q)`.
        damping: a scalar.
        rows: which rows of K these are, `(m,)`.
        operand: dtype in which slices are multiplied: bfloat16 for a matrix unit, float32 where that is faster.
    """
    own = solution[rows]
    if matrix.dtype != jnp.float32:
        return targets - jnp.matmul(matrix, solution, precision=lax.Precision.HIGHEST) - damping * own
    (m, k), q = matrix.shape, solution.shape[1]
    width, step = -k % _CHUNK, min(_ROWS, m)
    right = _slices(jnp.pad(solution, ((0, width), (0, 0))), axis=0, operand=operand)

    def block(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        some, diagonal = part
        apart = jnp.where(jnp.arange(k + width)[None, :] == diagonal[:, None], 0, some)
        return _product(_slices(apart, axis=1, operand=operand), right)

    def blocks(x: jax.Array, columns: int = 0) -> jax.Array:
        pad = [(0, -m % step), *[(0, columns)] * (x.ndim - 1)]
        return jnp.pad(x, pad).reshape(-1, step, *([k + columns] if x.ndim == 2 else []))

    product = lax.map(block, (blocks(matrix, width), blocks(rows)))
    high, low = (x.reshape(m + -m % step, q)[:m] for x in product)
    total, error = two_sum(targets, -high)
    error = error - low
    diagonal = jnp.take_along_axis(matrix, rows[:, None], axis=1)
    for factor in (diagonal, jnp.full_like(diagonal, damping)):
        (top, bottom), (high, low) = _halves(factor), _halves(own)
        total, rest = two_sum(total, -(top * high))
        error = error + (rest - (top * low + bottom * own))
    return total + error


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split float32 numbers into twelve leading bits and the rest: products of such halves are exact."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    top = lax.bitcast_convert_type(bits, jnp.float32)
    return top, x - top


def _slices(x: jax.Array, *, axis: int, operand: jnp.dtype) -> tuple[jax.Array, list[jax.Array]]:
    """Return `(scale, integers)` with `x = scale · Σ_i integers_i 2^(−7 − 8i)`, integers of at most 128 in size."""
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=axis, keepdims=True), jnp.float32(2.0**-100))
    exponent = lax.bitcast_convert_type(largest, jnp.uint32) >> 23  # biased; scale is the next power of two
    scale = lax.bitcast_convert_type((exponent + 1) << 23, jnp.float32)
    rest = x * (lax.bitcast_convert_type((253 - exponent) << 23, jnp.float32) * jnp.float32(2.0 ** (_BITS - 1)))
    pieces = []
    for _ in range(_SLICES):
        piece = jnp.round(rest)
        pieces.append(piece.astype(operand))
        rest = (rest - piece) * jnp.float32(2.0**_BITS)
    return scale, pieces


def _product(left: tuple[jax.Array, list[jax.Array]], right: tuple[jax.Array, list[jax.Array]]) -> tuple:
    """Multiply two sliced matrices, `(m, k)` by `(k, q)`: an unevaluated sum of two `(m, q)` arrays."""
    (row_scale, a), (column_scale, b) = left, right
    m, k = a[0].shape

    def chunk(total: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        high, low = total
        ours = [lax.dynamic_slice_in_dim(x, start, _CHUNK, 1) for x in a]
        theirs = [lax.dynamic_slice_in_dim(x, start, _CHUNK, 0) for x in b]
        for level in range(_SLICES):
            term = jnp.matmul(
                jnp.concatenate(ours[: level + 1], axis=1),
                jnp.concatenate(theirs[level::-1], axis=0),
                preferred_element_type=jnp.float32,
                precision=lax.Precision.HIGHEST if a[0].dtype == jnp.float32 else None,
            ) * jnp.float32(2.0 ** (-2 * (_BITS - 1) - _BITS * level))
            high, error = two_sum(high, term)
            low = low + error
        return (high, low), None

    zero = jnp.zeros((m, b[0].shape[1]), jnp.float32)
    (high, low), _ = lax.scan(chunk, (zero, zero), jnp.arange(0, k, _CHUNK))
    scale = row_scale * column_scale
    return high * scale, low * scale
