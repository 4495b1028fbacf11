"""A function of rows on a TPU: blocks of rows stream through vector memory, where everything between stays."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jattrib_kernels.backend import ceil_to, in_32_bits, output

ROWS = 8
"""Rows of a block: those of a register."""

MEMORY = 48 * 2**20
"""Bytes of vector memory that a block may take; the smallest chip that is supported has 64 MiB."""

BETWEEN = 24
"""Arrays as wide as the widest for which there must be room beside what is read and written."""


def block_bytes(shared: Sequence[Any], by_row: Sequence[Any]) -> int:
    """Return what a block takes: two of everything that is read or written, since the next is fetched meanwhile.

    Args:
        shared: what all rows share.
        by_row: arguments and results; of a vector a block has a number for each of its rows.
    """
    numbers = [leaf.shape[0] if leaf.ndim else 1 for leaf in shared]
    numbers += [leaf.shape[1] if leaf.ndim == 2 else 1 for leaf in by_row]
    widths = [ceil_to(number, 128) for number in numbers]
    return 4 * ROWS * (2 * sum(widths) + BETWEEN * max(widths))


def by_rows(function: Callable[..., Any], shared: Any, state: Any, rows: Any, *, interpret: bool = False) -> Any:
    """Return `function(shared, state, rows)`; see `api.by_rows`.

    Args:
        function: its result, or the first of several, is like `state`.
        shared: vectors and scalars, float32 or int32.
        state: matrices and vectors of as many rows, float32 or int32; results take its place.
        rows: likewise, to be read alone.
        interpret: run Pallas' interpreter.
    """
    given, structure = jax.tree.flatten((shared, state, rows))
    common, kept = len(jax.tree.leaves(shared)), len(jax.tree.leaves(state))
    made, made_structure = jax.tree.flatten(jax.eval_shape(function, shared, state, rows))
    count = given[-1].shape[0]
    block = min(ROWS, count)

    def kernel(*refs):
        values = [
            _narrow(ref, leaf, whole=at < common)
            for at, (ref, leaf) in enumerate(zip(refs[: len(given)], given, strict=True))
        ]
        found = jax.tree.leaves(function(*jax.tree.unflatten(structure, values)))
        for ref, value in zip(refs[len(given) :], found, strict=True):
            ref[...] = value.reshape(ref.shape)

    def whole(leaf):
        return pl.BlockSpec(leaf.shape, lambda i: (0, 0))

    def split(leaf):
        return pl.BlockSpec((block, leaf.shape[1]), lambda i: (i, 0))

    inputs = [leaf.reshape(1, -1) if at < common else leaf.reshape(count, -1) for at, leaf in enumerate(given)]
    outputs = [output((count, leaf.shape[1] if leaf.ndim == 2 else 1), leaf.dtype, *inputs) for leaf in made]
    call = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, block),),
        in_specs=[(whole if at < common else split)(leaf) for at, leaf in enumerate(inputs)],
        out_specs=[split(leaf) for leaf in outputs],
        out_shape=outputs,
        input_output_aliases={common + at: at for at in range(kept)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=MEMORY + 2**20),
        interpret=interpret,
        name="by_rows",
    )
    found = in_32_bits(call)(*inputs)
    return jax.tree.unflatten(
        made_structure, [value.reshape(leaf.shape) for value, leaf in zip(found, made, strict=True)]
    )


def _narrow(ref: Any, leaf: jax.Array, *, whole: bool) -> jax.Array:
    """Return a block as the function sees it: numbers of rows, which are columns of width 1 here, as vectors."""
    if whole:
        return ref[0, :] if leaf.ndim else ref[0, 0]
    return ref[...] if leaf.ndim == 2 else ref[...].reshape(ref.shape[0])
