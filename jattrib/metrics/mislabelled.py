"""Recall of planted mislabelled examples: does a score per example put the wrong labels first?

Any score serves of which high means suspect: self-influence (the diagonal of train-on-train scores), or minus the mean
score on validation queries.  Ties are counted as if their order were drawn at random, in expectation where that has a
closed form: examples of one score are never told apart by their place in the array.

Source: Koh and Liang 2017, section 5.4; Pruthi et al. 2020, section 4.1 (self-influence).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import bootstrap
from jattrib.metrics.bootstrap import Interval

RESAMPLES_AT_ONCE = 50


class Recall(NamedTuple):
    """How well scores find planted examples.

    Attributes:
        auc: the probability that a planted example scores above a clean one, ties counting half; .5 is chance.
        average_precision: mean over planted examples of the precision among those that score no lower; chance is
            `base_rate`.
        inspected: parts of the examples that are looked at, the most suspect first.
        recall: the part of the planted ones that are then found, expected over the order of ties; chance is
            `inspected`.
        base_rate: the part of the examples that are planted.
    """

    auc: Interval
    average_precision: Interval
    inspected: Float[np.ndarray, " f"]
    recall: Float[np.ndarray, " f"]
    base_rate: float


def recall(
    suspicion: Num[Array | np.ndarray, " n"],
    planted: Bool[Array | np.ndarray, " n"],
    *,
    key: Key[Array, ""],
    inspected: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Recall:
    """Return how well scores find the planted examples; with bootstrap intervals.

    Planted and clean examples are resampled apart, each as many as there are.

    Args:
        suspicion: a score an example; high is suspect.
        planted: which examples are.
        key: fixes the resamples.
        inspected: at which parts of the examples the recall is read.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: lengths differ, a score is NaN, fewer than two examples are planted or clean, or a part is
            not from 0 to 1.
    """
    scores, planted = _check(suspicion, planted)
    parts = np.asarray(inspected, np.float64)
    if not ((parts >= 0) & (parts <= 1)).all():
        raise InvalidInputError(
            f"inspected = {tuple(inspected)}", expected="parts from 0 to 1", remedy="pass 0.1 for a tenth"
        )
    groups = _groups(scores)
    settings = {"key": key, "resamples": resamples, "confidence": confidence}

    def both(found: Int[np.ndarray, "r planted"], clean: Int[np.ndarray, "r clean"]) -> Float[np.ndarray, "2 r"]:
        counts = np.empty((len(found), len(scores)), np.int64)
        counts[:, planted], counts[:, ~planted] = found, clean
        blocks = range(0, len(counts), RESAMPLES_AT_ONCE)
        parts = [_auc_and_precision(groups, planted, counts[start : start + RESAMPLES_AT_ONCE]) for start in blocks]
        return np.concatenate(parts, axis=1)

    units = (int(planted.sum()), int((~planted).sum()))
    auc, precision = (
        bootstrap.two_way(lambda *counts, row=row: both(*counts)[row], units, **settings) for row in (0, 1)
    )
    return Recall(auc, precision, parts, _recall_at(groups, planted, parts), float(planted.mean()))


class _Groups(NamedTuple):
    """Examples by score, highest first: the permutation, and for each group of equal scores where it ends."""

    order: Int[np.ndarray, " n"]
    ends: Int[np.ndarray, " g"]


def _groups(scores: Float[np.ndarray, " n"]) -> _Groups:
    order = np.argsort(-scores, kind="stable")
    descending = scores[order]
    return _Groups(order, np.append(np.flatnonzero(descending[1:] != descending[:-1]) + 1, len(scores)))


def _cumulative(groups: _Groups, counts: Num[np.ndarray, "r n"]) -> Float[np.ndarray, "r edges"]:
    """Return the counts summed up to the end of each group, from zero on."""
    sums = np.cumsum(counts[:, groups.order], axis=1, dtype=np.float64)[:, groups.ends - 1]
    return np.concatenate([np.zeros((len(counts), 1)), sums], axis=1)


def _auc_and_precision(
    groups: _Groups, planted: Bool[np.ndarray, " n"], counts: Int[np.ndarray, "r n"]
) -> Float[np.ndarray, "2 r"]:
    hits, misses = (_cumulative(groups, counts * which) for which in (planted, ~planted))
    gained = np.diff(hits, axis=1)
    beaten = misses[:, -1:] - (misses[:, 1:] + misses[:, :-1]) / 2  # clean examples below, and half of those beside
    looked = hits[:, 1:] + misses[:, 1:]
    precision = hits[:, 1:] / np.maximum(looked, 1)
    auc = np.sum(gained * beaten, axis=1) / (hits[:, -1] * misses[:, -1])
    return np.stack([auc, np.sum(gained * precision, axis=1) / hits[:, -1]])


def _recall_at(
    groups: _Groups, planted: Bool[np.ndarray, " n"], parts: Float[np.ndarray, " f"]
) -> Float[np.ndarray, " f"]:
    """Return the recall at parts of the examples: on a line within a group of equal scores."""
    hits = _cumulative(groups, planted[None].astype(np.int64))[0]
    return np.interp(parts * len(planted), np.append(0, groups.ends), hits) / hits[-1]


def _check(
    suspicion: Num[Array | np.ndarray, " n"], planted: Bool[Array | np.ndarray, " m"]
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    scores, marks = np.asarray(suspicion, np.float64), np.asarray(planted, bool)
    if scores.shape != marks.shape or np.isnan(scores).any():
        raise InvalidInputError(
            f"scores of shape {scores.shape}, {np.count_nonzero(np.isnan(scores))} of them NaN, and marks of shape "
            f"{marks.shape}",
            expected="one number and one mark an example",
            remedy="reduce scores [source, query] to one a source: their diagonal, or minus their mean over queries",
        )
    if min(marks.sum(), (~marks).sum()) < 2:
        raise InvalidInputError(
            f"{marks.sum()} planted examples of {len(marks)}",
            expected="at least two planted examples and two clean ones",
            remedy="plant more wrong labels; a fifth is usual",
        )
    return scores, marks
