"""Cholesky factorisation and substitution by blocks, on one device or on rows spread over several.

The factor is made column block by column block, looking left: with the rows of L up to block j known,

    C_i = A_ij − Σ_{l<j} L_il L_jlᵀ,    L_jj L_jjᵀ = C_j,    L_ij = C_i L_jj⁻ᵀ    (i ≥ j).

The three steps are `Kernels.update`, `diagonal` and `panel`, which a backend supplies; all but the diagonal block is
matrix products.  `L_jj⁻¹` is kept, so that substitution is matrix products too.

Spread over P devices, device p holds a contiguous slice of rows, and blocks are eliminated in turn: the first of every
device, then the second of every device.  No row ever moves: cyclic order, which keeps all devices busy to the end, is
only another order of elimination, `ΠAΠᵀ = LLᵀ`, and costs one local permutation of columns.  Step j sends its block row
of L, `b × k` numbers, to all, and every device makes the same diagonal block of it.

Source: Golub and Van Loan 2013, "Matrix computations", 4th edition, section 4.2.7 (blocked Cholesky).
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jattrib_kernels.kernel_inverse.place import Place

HIGHEST = lax.Precision.HIGHEST


class Kernels(NamedTuple):
    """What a backend supplies; `steps` is int32 `[j, first, own]`.

    They are the column block, the first of the device's blocks of rows that is needed, and the one of them that is on
    the diagonal, or −1.

    Attributes:
        block: b.
        update: `(steps, rows, row)` to `C`, `(m, b)`: `rows` is `(m, k)`, the first j column blocks of it and of `row`,
            `(b, k)`, are of L, and column block j of `rows` is of A.  Blocks before `first` may hold anything.
        diagonal: `C_j`, `(b, b)`, of which the lower triangle is read, to `(L_jj, L_jj⁻¹, smallest)`; `smallest` is the
            least pivot, or the first that is not positive.
        panel: `(steps, rows, C, L_jj, L_jj⁻¹)` to `rows` with column block j, from block `first` on, replaced by L.
    """

    block: int
    update: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    diagonal: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    panel: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def cholesky(
    matrix: jax.Array, *, kernels: Kernels, place: Place | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Factorise, on one device, or on each device's rows with columns in the order of elimination.

    Args:
        matrix: `(m, k)`, m = k / P rows, both multiples of b, zero right of the diagonal blocks.
        kernels: the backend's.
        place: this device among P.

    Returns:
        The rows of L, `(m, k)`; `L_jj⁻¹` for the device's own blocks, `(m / b, b, b)`; the smallest pivot, or the first
        that is not positive, with which the factor ceases to mean anything.
    """
    place = place or Place()
    (m, k), block = matrix.shape, kernels.block

    def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows, inverses, smallest = carry
        local, owned = j // place.size, place.owns(j)
        first = jnp.minimum((j - place.number + place.size - 1) // place.size, m // block - 1)
        steps = jnp.stack([j, first, jnp.where(owned, local, -1)]).astype(jnp.int32)
        row = place.from_owner(j, lax.dynamic_slice_in_dim(rows, local * block, block, 0))
        updated = kernels.update(steps, rows, row)
        corner = place.from_owner(j, lax.dynamic_slice_in_dim(updated, local * block, block, 0))
        lower, inverse, pivot = kernels.diagonal(corner)
        rows = kernels.panel(steps, rows, updated, lower, inverse)
        kept = jnp.where(owned, inverse, lax.dynamic_index_in_dim(inverses, local, 0, keepdims=False))
        inverses = lax.dynamic_update_index_in_dim(inverses, kept, local, 0)
        return rows, inverses, jnp.where(smallest > 0, jnp.minimum(smallest, pivot), smallest)

    inverses = jnp.zeros((m // block, block, block), matrix.dtype)
    return lax.fori_loop(0, k // block, step, (matrix, inverses, jnp.asarray(jnp.inf, matrix.dtype)))


def prepare(matrix: jax.Array, diagonal: jax.Array, block: int) -> jax.Array:
    """Return a square matrix's lower triangle with another diagonal, grown to whole blocks.

    What it grows by is a diagonal that changes neither the factor nor the smallest pivot.
    """
    k, size = matrix.shape[0], matrix.shape[0] + -matrix.shape[0] % block
    diagonal = jnp.pad(diagonal, (0, size - k), constant_values=filler(jnp.max(diagonal)))
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    below = jnp.where(row > column, jnp.pad(matrix, (0, size - k)), 0)
    return jnp.where(row == column, diagonal[:, None], below)


def filler(largest: jax.Array) -> jax.Array:
    """Return a pivot that is never the smallest, given the largest entry of the diagonal."""
    return jnp.where(largest > 0, largest, 1)


def substitute(
    lower: jax.Array, inverses: jax.Array, targets: jax.Array, *, place: Place | None = None, stages: int = 2
) -> jax.Array:
    """Return this device's rows of `(L Lᵀ)⁻¹ B`, from its rows of L, of the inverses and of B.

    A loop has one shape, so it multiplies by zeros above the diagonal too; in s stages, by `1/s` of them.
    """
    place = place or Place()
    m, block = lower.shape[0], inverses.shape[1]
    stages = min(stages, m // block)
    cuts = list(pairwise(m // block * s // stages for s in range(stages + 1)))
    block_of = (jnp.arange(m) // block * place.size + place.number)[:, None]

    def own(rows: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = lax.dynamic_index_in_dim(inverses, j // place.size, 0, keepdims=False)
        return inverse, lax.dynamic_slice_in_dim(rows, (j // place.size) * block, block, 0)

    def put(rows: jax.Array, part: jax.Array, j: jax.Array) -> jax.Array:
        part = jnp.where(place.owns(j), part, own(rows, j)[1])
        return lax.dynamic_update_slice_in_dim(rows, part, (j // place.size) * block, 0)

    def below(j: jax.Array, first: int) -> jax.Array:
        """L's column block j under the diagonal, from local block `first` on."""
        column = lax.dynamic_slice(lower, (first * block, j * block), (m - first * block, block))
        return jnp.where(block_of[first * block :] > j, column, 0)

    def forward(first: int, j: jax.Array, rows: jax.Array) -> jax.Array:
        solved = place.from_owner(j, jnp.matmul(*own(rows, j), precision=HIGHEST))
        change = jnp.matmul(below(j, first), solved, precision=HIGHEST)
        return put(rows.at[first * block :].add(-change), solved, j)

    def backward(first: int, last: int, step: jax.Array, rows: jax.Array) -> jax.Array:
        j = last - 1 - step
        known = place.total(jnp.matmul(below(j, first).T, rows[first * block :], precision=HIGHEST))
        inverse, right = own(rows, j)
        return put(rows, jnp.matmul(inverse.T, right - known, precision=HIGHEST), j)

    rows = targets
    for first, last in cuts:
        rows = lax.fori_loop(first * place.size, last * place.size, partial(forward, first), rows)
    for first, last in reversed(cuts):
        body = partial(backward, first, last * place.size)
        rows = lax.fori_loop(0, (last - first) * place.size, body, rows)
    return rows
