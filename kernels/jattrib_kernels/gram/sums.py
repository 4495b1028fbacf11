"""Sums that are kept as two numbers, and a form of them that plain addition adds exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sum(NamedTuple):
    """An unevaluated sum `high + low` of two arrays of one shape, `low` being what `high` cannot hold."""

    high: jax.Array
    low: jax.Array


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `(s, e)` with `s = fl(a + b)` and `s + e = a + b` exactly.

    Source: Knuth 1969, "The art of computer programming", vol. 2, 4.2.2, theorem B.
    """
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def add(total: Sum, term: jax.Array) -> Sum:
    """Add a term to a sum, keeping what rounding would lose."""
    high, error = two_sum(total.high, term)
    return Sum(high, total.low + error)


def value(total: Sum) -> jax.Array:
    """Return `high + low`, rounded once."""
    return total.high + total.low


def on_grid(total: Sum, bound: jax.Array | float) -> Sum:
    """Write a sum anew so that plain addition of several such sums, part by part, is nearly exact.

    `high` becomes a multiple of `g = 2^(⌈log₂ bound⌉ − 22)` (float32): multiples of g below `2²⁴ g` are added without
    rounding, in any order, and what is rounded in `low` is of the size of `ε g`.  So this is the form in which
    increments go to `psum`, or to a fold whose state is a sum.  A bound that is too small costs accuracy, no more.

    Args:
        total: a sum.
        bound: of the absolute entries of what they add up to: for `ΦᵀΦ`, the largest entry of its diagonal.

    Source: Rump, Ogita and Oishi 2008, "Accurate floating-point summation part I", section 3 (extraction of vectors).
    """
    dtype = total.high.dtype
    bound = jnp.maximum(jnp.asarray(bound, dtype), jnp.finfo(dtype).tiny)
    exponent = jnp.frexp(bound)[1]  # bound ≤ 2^exponent
    large = jnp.ldexp(jnp.asarray(1.5, dtype), exponent + 1)
    high = (total.high + large) - large
    return Sum(high, (total.high - high) + total.low)
