"""The specification, in plain `jax.numpy` and LAPACK: Cholesky, two triangular solves."""

import jax
import jax.numpy as jnp
from jax import lax

from jattrib_kernels.kernel_inverse.blocked import HIGHEST, Kernels


def cholesky(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `(L, d)`: the lower factor of `A = L Lᵀ` and its smallest pivot `d = min_j L_jj²`.

    Only A's lower triangle is read.  Where A is not positive definite the factor is NaN and d, at most zero, is the
    first pivot that elimination finds not to be positive.
    """
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    smallest = jnp.min(jnp.square(jnp.diagonal(factor)))
    return factor, jnp.where(jnp.isfinite(smallest), smallest, _first_failing(matrix, jnp.isfinite(smallest)))


def substitute(factor: jax.Array, targets: jax.Array) -> jax.Array:
    """Return `(L Lᵀ)⁻¹ B` for `(k, q)` targets."""
    forward = lax.linalg.triangular_solve(factor, targets, left_side=True, lower=True)
    return lax.linalg.triangular_solve(factor, forward, left_side=True, lower=True, transpose_a=True)


def kernels(block: int) -> Kernels:
    """Return the steps of blocked elimination, for rows that are spread over devices."""

    def eliminated(steps: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(x.shape[1])[None, :] < steps[0] * block, x, 0)

    def update(steps: jax.Array, rows: jax.Array, row: jax.Array) -> jax.Array:
        column = lax.dynamic_slice_in_dim(rows, steps[0] * block, block, 1)
        return column - jnp.matmul(eliminated(steps, rows), eliminated(steps, row).T, precision=HIGHEST)

    def diagonal(corner: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        lower, smallest = cholesky(jnp.tril(corner) + jnp.tril(corner, -1).T)
        eye = jnp.eye(block, dtype=corner.dtype)
        return lower, lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True), smallest

    def panel(steps: jax.Array, rows: jax.Array, updated: jax.Array, lower: jax.Array, inverse: jax.Array) -> jax.Array:
        block_of = (jnp.arange(rows.shape[0]) // block)[:, None]
        product = jnp.matmul(updated, inverse.T, precision=HIGHEST)
        own = jnp.tile(lower, (rows.shape[0] // block, 1))
        before = lax.dynamic_slice_in_dim(rows, steps[0] * block, block, 1)
        column = jnp.where(block_of >= steps[1], jnp.where(block_of == steps[2], own, product), before)
        return lax.dynamic_update_slice_in_dim(rows, column, steps[0] * block, 1)

    return Kernels(block, update, diagonal, panel)


def _first_failing(matrix: jax.Array, succeeded: jax.Array) -> jax.Array:
    """Find by bisection the first leading minor that is not positive definite; return its last pivot.

    No step is taken where the factorisation has succeeded, under `vmap` too.
    """
    k = matrix.shape[0]
    eye = jnp.eye(k, dtype=matrix.dtype)

    def leading(size: jax.Array) -> jax.Array:
        inside = jnp.arange(k) < size
        return lax.linalg.cholesky(jnp.where(inside[:, None] & inside[None, :], matrix, eye), symmetrize_input=False)

    def next_pivot(size: jax.Array, factor: jax.Array) -> jax.Array:
        column = jnp.where(jnp.arange(k) < size, matrix[size], 0)
        solved = lax.linalg.triangular_solve(factor, column[:, None], left_side=True, lower=True)
        return matrix[size, size] - jnp.sum(jnp.square(solved))

    def halve(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, pivot = state  # the leading minor of size low is positive definite, that of size high is not
        middle = (low + high) // 2
        factor = leading(middle)
        definite = jnp.isfinite(factor[-1, -1])
        pivot = jnp.where(definite, next_pivot(middle, factor), pivot)
        return jnp.where(definite, middle, low), jnp.where(definite, high, middle), pivot

    high = jnp.where(succeeded, 1, k)
    start = (jnp.zeros_like(high), high, matrix[0, 0])
    return jnp.minimum(lax.while_loop(lambda state: state[1] - state[0] > 1, halve, start)[2], 0)
