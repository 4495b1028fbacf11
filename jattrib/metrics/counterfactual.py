"""Counterfactual checks: leave out what a query's attributions point at, retrain, and see what the query does.

The masks here say what is **removed**; a training mask is their negation.  Retraining is `train.ensemble`'s part.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Key, Num

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import bootstrap
from jattrib.metrics.bootstrap import Interval


class Effect(NamedTuple):
    """How much a query's output falls when training examples are left out, mean over queries.

    Attributes:
        removed: fall without the examples that the attributions point at, `before − after`.
        random: fall without as many random ones, `before − after_random`.
        difference: of the two, `after_random − after`; positive if the attributions point at what mattered.
        fraction: the part of queries at which it is positive.
    """

    removed: Interval
    random: Interval
    difference: Interval
    fraction: float


def most_helpful(scores: Num[Array | np.ndarray, "n q"], k: int) -> Bool[np.ndarray, "q n"]:
    """Mark the k sources of highest score of each query: those whose removal should lower its output the most.

    Of equal scores the first source comes first.  For the most harmful ones, pass `-scores`.

    Raises:
        InvalidInputError: k is not from 1 to n − 1, or a score is NaN.
    """
    _check_count(k, scores.shape[0])
    columns = np.asarray(scores, np.float64).T
    if np.isnan(columns).any():
        raise InvalidInputError("scores that are NaN", expected="numbers", remedy="look for a checkpoint that diverged")
    chosen = np.argsort(-columns, axis=1, kind="stable")[:, :k]
    removed = np.zeros(columns.shape, bool)
    np.put_along_axis(removed, chosen, True, axis=1)
    return removed


def random_removal(key: Key[Array, ""], n: int, *, k: int, count: int) -> Bool[np.ndarray, "count n"]:
    """Mark k random sources of n, for each of `count` queries: the baseline of the same size.

    Raises:
        InvalidInputError: k is not from 1 to n − 1.
    """
    _check_count(k, n)
    removed = np.tile(np.arange(n) < k, (count, 1))
    return bootstrap.generator(key).permuted(removed, axis=1)


def effect(
    before: Num[Array | np.ndarray, " q"],
    after: Num[Array | np.ndarray, " q"],
    after_random: Num[Array | np.ndarray, " q"],
    *,
    key: Key[Array, ""],
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Effect:
    """Return how much outputs fall without what the attributions point at, and without as many random examples.

    Query by query the outputs are paired, so the intervals are over queries, of differences.

    Args:
        before: each query's output, trained on everything.
        after: without what the attributions of that query point at.
        after_random: without as many random examples.
        key: fixes the resamples.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: there are fewer than two queries, the numbers of queries differ, or an output is not finite.
    """
    lengths = {each.shape for each in (before, after, after_random)}
    if len(lengths) != 1:
        raise InvalidInputError(
            f"outputs of shapes {', '.join(str(tuple(each)) for each in sorted(lengths))}",
            expected="one output a query, of the same queries each time",
            remedy="pick from each retrained model the output of the query that it was retrained for",
        )
    start, without, control = (np.asarray(each, np.float64) for each in (before, after, after_random))

    def interval(values: Float[np.ndarray, " q"]) -> Interval:
        return bootstrap.mean(values, key=key, resamples=resamples, confidence=confidence)

    difference = control - without
    return Effect(
        removed=interval(start - without),
        random=interval(start - control),
        difference=interval(difference),
        fraction=float(np.mean(difference > 0)),
    )


def _check_count(k: int, n: int) -> None:
    if not 1 <= k < n:
        raise InvalidInputError(
            f"{k} of {n} examples to remove",
            expected=f"from 1 to {n - 1}: something to remove and something to train on",
            remedy="a tenth of the training set is usual",
        )
