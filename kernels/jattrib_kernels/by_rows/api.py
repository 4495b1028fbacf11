"""The door: checks, the choice of a backend, and what a block of rows must fit into."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jattrib_kernels.backend import Backend, refuse, resolve
from jattrib_kernels.by_rows import pallas_tpu

__all__ = ["by_rows"]

TYPES = (jnp.float32, jnp.int32)
"""Of the arrays that the kernel has."""


def by_rows(
    function: Callable[..., Any],
    shared: Any,
    state: Any,
    rows: Any,
    *,
    whole: Callable[..., Any] | None = None,
    backend: Backend = "auto",
) -> Any:
    """Return `function(shared, state, rows)`, each row of whose results depends on the same row of its arguments alone.

    Where a function sums over its rows again and again, and uses the sums, XLA passes over all arrays once for every
    sum.  Here a block of rows is read once, everything is computed in vector memory, and results are written once, a
    new state in the memory of the old one.  It pays on a TPU; elsewhere the function is called as it is.

    Args:
        function: of pytrees like the three, of any number of rows; its result, or the first of several, is a pytree
            like `state`.  In the kernel it sees float32 and int32 arrays of one or two axes, and must not index rows or
            sort; the last block is filled up with rows of anything.
        shared: vectors and numbers that all rows share.
        state: matrices `(n, width)` and vectors `(n,)`.
        rows: likewise, to be read alone.
        whole: another function with the same results, for all rows at once, to be called where there is no kernel.
        backend: which implementation runs; `auto` is the kernel on a TPU, for arrays that it has and blocks that fit,
            and the function itself elsewhere; one asked for by name never falls back to another.

    Raises:
        ValueError: a kernel was asked for by name and does not have the arrays, there is none for that hardware, or the
            backend is not known.
    """
    chosen = resolve(backend)
    is_ours = chosen in ("pallas_tpu", "interpret")
    obstacle = _obstacle(function, shared, state, rows) if is_ours else None
    if backend == "auto" and (obstacle or not is_ours):
        chosen = "reference"
    if chosen == "reference":
        return (whole or function)(shared, state, rows)
    if chosen == "pallas_gpu":
        raise refuse(
            "backend 'pallas_gpu' was asked for",
            expected="a backend that this operation has",
            remedy="use backend='reference': there is no such kernel for a GPU, whose caches do as well",
        )
    if obstacle:
        raise refuse(
            f"backend {backend!r} was asked for {obstacle}",
            expected=f"float32 and int32 arrays of {pallas_tpu.ROWS} rows in {pallas_tpu.MEMORY // 2**20} MiB",
            remedy="use backend='reference'",
        )
    return pallas_tpu.by_rows(function, shared, state, rows, interpret=chosen == "interpret")


def _obstacle(function: Callable[..., Any], shared: Any, state: Any, rows: Any) -> str | None:
    """Return what the kernel does not have, if anything."""
    common, by_row = jax.tree.leaves(shared), jax.tree.leaves((state, rows))
    if wrong := {str(leaf.dtype) for leaf in (*common, *by_row) if leaf.dtype not in TYPES}:
        return f"arrays of {', '.join(sorted(wrong))}"
    made = jax.tree.leaves(jax.eval_shape(function, shared, state, rows))
    size = pallas_tpu.block_bytes(common, [*by_row, *made])
    if size > pallas_tpu.MEMORY:
        return f"blocks of {size / 2**20:.0f} MiB"
    return None
