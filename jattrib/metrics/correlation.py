"""Pearson's and Spearman's correlation of many pairs at once, in float64."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jattrib.core.errors import InvalidInputError


class Correlation(NamedTuple):
    """Correlations, and where there is none.

    Attributes:
        values: between −1 and 1; NaN where `constant`.
        constant: true where one of the two inputs does not vary, so that the correlation is not defined.
    """

    values: Float[np.ndarray, "*rest"]
    constant: Bool[np.ndarray, "*rest"]


def pearson(
    a: Num[Array | np.ndarray, "*shape"], b: Num[Array | np.ndarray, "*shape"], *, axis: int = 0
) -> Correlation:
    """Return `Σ(a − ā)(b − b̄) / √(Σ(a − ā)² Σ(b − b̄)²)` along an axis.

    Args:
        a: one side of the pairs.
        b: the other.
        axis: the pairs' axis; the others are correlated apart from one another.

    Raises:
        InvalidInputError: shapes differ, there are fewer than two pairs, or an entry is not finite.
    """
    return _correlate(*_pairs(a, b, axis))


def spearman(
    a: Num[Array | np.ndarray, "*shape"], b: Num[Array | np.ndarray, "*shape"], *, axis: int = 0
) -> Correlation:
    """Return Spearman's ρ along an axis: Pearson's correlation of ranks, ties sharing the mean of theirs.

    The arguments and errors are those of `pearson`.
    """
    return _correlate(*(_places(rows).ranks for rows in _pairs(a, b, axis)))


def midranks(a: Num[Array | np.ndarray, "*shape"], *, axis: int = 0) -> Float[np.ndarray, "*shape"]:
    """Return ranks from 1 along an axis; equal entries share the mean of their ranks.

    Raises:
        InvalidInputError: there are fewer than two entries, or one is not finite.
    """
    return np.moveaxis(_places(_rows(a, axis, "only")).ranks, -1, axis)


def resampled_spearman(
    a: Num[Array | np.ndarray, "m q"], b: Num[Array | np.ndarray, "m q"], counts: Int[np.ndarray, "r m"]
) -> Correlation:
    """Return Spearman's ρ of each column in each of r resamples of the rows, `[r, q]`.

    Row i stands `counts[j, i]` times in resample j.  The order of a column's entries is that of the whole sample,
    whatever the counts, so that it is sorted once: the rank of an entry in a resample is the count of the entries below
    it plus half that of its equals.

    Raises:
        InvalidInputError: shapes differ, there are fewer than two rows, or an entry is not finite.
    """
    places = [_places(rows) for rows in _pairs(a, b, 0)]
    values = np.empty((len(counts), len(places[0].order)))
    for number, count in enumerate(counts.astype(np.float64)):
        left, right = (_resampled_ranks(each, count) for each in places)
        weighted = left * count
        squares = np.einsum("qm,qm->q", weighted, left) * np.einsum("m,qm,qm->q", count, right, right)
        products = np.einsum("qm,qm->q", weighted, right)
        with np.errstate(invalid="ignore"):
            values[number] = products / np.sqrt(squares)
    return Correlation(np.clip(values, -1, 1), np.isnan(values))


def resampled_pearson(
    a: Num[Array | np.ndarray, "m q"], b: Num[Array | np.ndarray, "m q"], counts: Int[np.ndarray, "r m"]
) -> Correlation:
    """Return Pearson's correlation of each column in each of r resamples of the rows, `[r, q]`.

    Row i stands `counts[j, i]` times in resample j.

    Raises:
        InvalidInputError: shapes differ, there are fewer than two rows, or an entry is not finite.
    """
    left, right = (_unit(rows).T for rows in _pairs(a, b, 0))  # neither mean nor scale matters; sums are then of size 1
    weights = counts / counts.sum(axis=1, keepdims=True)
    means = [weights @ each for each in (left, right)]
    spreads = [weights @ np.square(each) - np.square(mean) for each, mean in zip((left, right), means, strict=True)]
    constant = np.any([_same_in_resample(each, counts) for each in (left, right)], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (weights @ (left * right) - means[0] * means[1]) / np.sqrt(np.maximum(spreads[0] * spreads[1], 0))
    return Correlation(np.where(constant, np.nan, np.clip(values, -1, 1)), constant)


def _same_in_resample(columns: Float[np.ndarray, "m q"], counts: Int[np.ndarray, "r m"]) -> Bool[np.ndarray, "r q"]:
    """Say where a resample holds a single value of a column, one resample at a time."""
    found = np.empty((len(counts), columns.shape[1]), bool)
    for row, count in zip(found, counts, strict=True):
        np.equal(columns[count > 0].max(axis=0), columns[count > 0].min(axis=0), out=row)
    return found


class _Places(NamedTuple):
    """Where the entries of each row stand among one another.

    Attributes:
        order: the permutation that sorts a row.
        below: how many entries are less than each.
        upto: how many are not greater.
    """

    order: Int[np.ndarray, "*rest m"]
    below: Int[np.ndarray, "*rest m"]
    upto: Int[np.ndarray, "*rest m"]

    @property
    def ranks(self) -> Float[np.ndarray, "*rest m"]:
        return (self.below + self.upto + 1) / 2


def _places(rows: Float[np.ndarray, "*rest m"]) -> _Places:
    length = rows.shape[-1]
    order = np.argsort(rows, axis=-1, kind="stable")
    ascending = np.take_along_axis(rows, order, axis=-1)
    differs = ascending[..., 1:] != ascending[..., :-1]
    edge = np.ones((*rows.shape[:-1], 1), bool)
    position = np.arange(length)
    first = np.maximum.accumulate(np.where(np.concatenate([edge, differs], -1), position, 0), axis=-1)
    ends = np.where(np.concatenate([differs, edge], -1), position + 1, length)
    last = np.minimum.accumulate(ends[..., ::-1], axis=-1)[..., ::-1]
    below, upto = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(below, order, first, axis=-1)
    np.put_along_axis(upto, order, last, axis=-1)
    return _Places(order, below, upto)


def _resampled_ranks(places: _Places, count: Float[np.ndarray, " m"]) -> Float[np.ndarray, "q m"]:
    """Return twice the ranks' distance from their mean, a whole number, in a resample."""
    rows, length = places.order.shape
    sums = np.zeros((rows, length + 1))
    np.cumsum(count[places.order], axis=1, out=sums[:, 1:])
    ranks = np.take_along_axis(sums, places.below, axis=1)
    ranks += np.take_along_axis(sums, places.upto, axis=1)
    ranks -= count.sum()
    return ranks


def _correlate(a: Float[np.ndarray, "*rest m"], b: Float[np.ndarray, "*rest m"]) -> Correlation:
    constant = (a.max(-1) == a.min(-1)) | (b.max(-1) == b.min(-1))
    values = np.einsum("...m,...m->...", _unit(a), _unit(b))
    return Correlation(np.where(constant, np.nan, np.clip(values, -1, 1)), np.asarray(constant))


def _unit(rows: Float[np.ndarray, "*rest m"]) -> Float[np.ndarray, "*rest m"]:
    """Return rows of mean 0 and length 1; rows of no length as zeros.  No square can overflow or vanish on the way."""
    rows = rows / _nonzero(np.abs(rows).max(-1, keepdims=True))
    rows = rows - rows.mean(-1, keepdims=True)
    rows = rows / _nonzero(np.abs(rows).max(-1, keepdims=True))
    return rows / _nonzero(np.sqrt(np.square(rows).sum(-1, keepdims=True)))


def _nonzero(size: Float[np.ndarray, "*rest 1"]) -> Float[np.ndarray, "*rest 1"]:
    return np.where(size == 0, 1, size)


def _pairs(
    a: Num[Array | np.ndarray, "*shape"], b: Num[Array | np.ndarray, "*shape"], axis: int
) -> tuple[Float[np.ndarray, "*rest m"], Float[np.ndarray, "*rest m"]]:
    if a.shape != b.shape:
        raise InvalidInputError(
            f"arrays of shapes {tuple(a.shape)} and {tuple(b.shape)}",
            expected="two arrays of one shape",
            remedy="check that both are [model, query], and of the same models and queries",
        )
    return _rows(a, axis, "first"), _rows(b, axis, "second")


def _rows(a: Num[Array | np.ndarray, "*shape"], axis: int, name: str) -> Float[np.ndarray, "*rest m"]:
    """Return the array in float64 with the pairs' axis last."""
    if a.ndim == 0 or not -a.ndim <= axis < a.ndim or a.shape[axis] < 2:
        raise InvalidInputError(
            f"the {name} array of shape {tuple(a.shape)}, to be correlated along axis {axis}",
            expected="an axis of two entries or more",
            remedy="give more than one model or example, and check which axis they are on",
        )
    rows = np.ascontiguousarray(np.moveaxis(np.asarray(a, np.float64), axis, -1))
    finite = np.isfinite(rows)
    if not finite.all():
        raise InvalidInputError(
            f"the {name} array holds {np.size(finite) - np.count_nonzero(finite)} entries that are not finite",
            expected="finite numbers",
            remedy="look for models that diverged, or margins that were computed from probabilities",
        )
    return rows
