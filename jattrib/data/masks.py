"""Which examples a model is trained on: seeded random subsets, and groups left out.

A mask is `Bool[n]`, true where the example is trained on.  A row of a mask array is one model.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer, UInt32

from jattrib.core.errors import InvalidInputError
from jattrib.core.sources import check_indices
from jattrib.core.types import Key

CHUNK_WORDS = 1 << 22


def subsets(key: Key, n: int, *, alpha: float, count: int) -> Bool[np.ndarray, "count n"]:
    """Draw `count` independent, uniformly random subsets of exactly `round(alpha * n)` of `n` examples.

    Row i depends on `(key, n, alpha, i)` alone, so a larger `count` keeps the earlier rows.

    Raises:
        InvalidInputError: a subset would be empty or everything, or `count` is not positive.
    """
    size = round(alpha * n) if np.isfinite(alpha) else 0
    if not 0 < size < n:
        raise InvalidInputError(
            f"subsets of {size} of {n} examples (alpha = {alpha})",
            expected="0 < round(alpha * n) < n: subsets that leave something out and something in",
            remedy="choose alpha between 0 and 1, such as .5, and enough examples",
        )
    if count < 1:
        raise InvalidInputError(f"count = {count}", expected="at least one mask", remedy="ask for one mask or more")
    return np.concatenate([_lowest(words, size) for words in _words(key, n, count)])


def _words(key: Key, n: int, count: int) -> Iterator[UInt32[np.ndarray, "chunk n"]]:
    """Yield the random words of the rows, in chunks of at most `CHUNK_WORDS` of them, or one row."""
    chunk = max(1, min(count, CHUNK_WORDS // n))
    for start in range(0, count, chunk):
        # The last chunk is drawn whole, lest it be compiled again.
        rows = jnp.arange(start, start + chunk, dtype=jnp.uint32)
        yield np.asarray(_draw(key, rows, n=n))[: count - start]


@partial(jax.jit, static_argnames="n")
def _draw(key: Key, rows: UInt32[Array, " chunk"], *, n: int) -> UInt32[Array, "chunk n"]:
    return jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), (n,), jnp.uint32))(rows)


def _lowest(words: UInt32[np.ndarray, "m n"], size: int) -> Bool[np.ndarray, "m n"]:
    """Mark the `size` lowest words of each row; of equal words the first count as lower, so that the size is exact."""
    n = words.shape[1]
    unique = (words.astype(np.uint64) << np.uint64(32)) | np.arange(n, dtype=np.uint64)
    return unique <= np.partition(unique, size - 1, axis=1)[:, size - 1 : size]


def leave_out(
    n: int, groups: Sequence[Integer[np.ndarray, " _"]] | Integer[np.ndarray, "m _"]
) -> Bool[np.ndarray, "m n"]:
    """Return one mask a group: everything but the examples at the group's indices.

    Raises:
        InvalidInputError: there is no group, a group is empty or everything, or an index is outside `[0, n)` or is no
            whole number.
    """
    if len(groups) == 0:
        raise InvalidInputError("no groups", expected="at least one", remedy="give the indices to leave out")
    masks = np.ones((len(groups), n), bool)
    for at, group in enumerate(groups):
        indices = np.asarray(group)
        check_indices(indices)
        indices = indices.astype(np.intp)
        if indices.size and (indices.min() < 0 or indices.max() >= n):
            raise InvalidInputError(
                f"indices from {indices.min()} to {indices.max()} in group {at}",
                expected=f"indices from 0 to {n - 1}",
                remedy="count examples from 0 in the training set that the masks are for",
            )
        masks[at, indices] = False
    return check(masks)


def check(masks: Bool[np.ndarray, "m n"]) -> Bool[np.ndarray, "m n"]:
    """Return `masks` if each leaves something in and something out.

    Raises:
        InvalidInputError: a mask keeps nothing (no model can be trained) or everything (it says nothing of any).
    """
    kept = np.asarray(masks.sum(1))
    n = masks.shape[1]
    for at in np.flatnonzero((kept == 0) | (kept == n))[:1]:
        what = "is empty: it keeps no example" if kept[at] == 0 else f"is all ones: it keeps all {n} examples"
        raise InvalidInputError(
            f"mask {at} of {len(masks)} {what}",
            expected="masks that leave something in and something out",
            remedy="draw masks with data.masks.subsets or leave_out, or drop that row",
        )
    return masks
