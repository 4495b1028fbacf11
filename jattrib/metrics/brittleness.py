"""Brittleness: how few training examples have to go, in the order of a ranking, for a prediction to flip?

For each query the sources are ranked by score, the most helpful first, and the smallest k is sought by bisection such
that a model retrained without the first k has a margin of zero or less.  Whatever is reported was **retrained**: scores
only say in which order to remove.  A better ranking flips more predictions with fewer examples.

Source: Ilyas et al. 2022, section 4.2 (data support); Singla et al. 2023, section 3 (bisection).
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jattrib.core.errors import InvalidInputError

NOT_FLIPPED = -1
"""The size that stands for none: the prediction holds without all that may be removed."""


class Trial(NamedTuple):
    """One retrained model: of which query, what its removal's size was, and the query's margin after it."""

    query: int
    size: int
    margin: float


class Brittleness(NamedTuple):
    """How many of the most helpful sources have to be removed for each query's prediction to flip.

    Attributes:
        sizes: the smallest removal that flipped it when retrained; 0 if the full model is wrong already; −1
            (`NOT_FLIPPED`) if it holds without `limit` of them.
        holds: the largest removal below `sizes` after which it was seen to hold; 0 where that is the full model, −1
            where there is none.  The smallest flipping removal lies above it, if flipping is monotone in the size.
        limit: the most that may be removed.
        before: margins of the full model.
        trials: every retrained model, round by round.
        rounds: how often `retrain` was called.
    """

    sizes: Int[np.ndarray, " q"]
    holds: Int[np.ndarray, " q"]
    limit: int
    before: Float[np.ndarray, " q"]
    trials: tuple[Trial, ...]
    rounds: int


class Flipped(NamedTuple):
    """The part of queries that flip without at most so many sources, with its interval over queries."""

    fraction: Float[np.ndarray, " sizes"]
    low: Float[np.ndarray, " sizes"]
    high: Float[np.ndarray, " sizes"]


Retrain = Callable[[Bool[np.ndarray, "m n"]], Num[Array | np.ndarray, "m q"]]
"""From the masks of what models are trained on to the margins of all q queries after training."""


def brittleness(
    scores: Num[Array | np.ndarray, "n q"], retrain: Retrain, *, limit: int, tolerance: float = 0.0
) -> Brittleness:
    """Return the smallest removals, in the order of the scores, that flip the predictions: found by bisection.

    The first call of `retrain` has the full mask and one mask a query, without its `limit` most helpful sources; each
    later call has one mask for every query whose bracket is still open, so that a round is one ensemble.  There are at
    most `2 + log₂(limit)` rounds.

    Args:
        scores: the ranking; of equal scores the first source comes first.
        retrain: trains a model on each mask and returns its margins at all queries.  Models should be paired (one
            initialisation and order), or margins be means over seeds, lest noise flips predictions.
        limit: the most sources to remove.
        tolerance: a query is done when its bracket `(holds, sizes]` is no wider than this part of `sizes`, or than 1.

    Raises:
        InvalidInputError: `limit` is not from 1 to n − 1, `tolerance` is not from 0 to 1, a score is NaN, or `retrain`
            returned another shape or margins that are not finite.
    """
    n, count = scores.shape
    order = _order(scores, limit, tolerance)
    everyone = np.arange(count)
    full = np.ones((1, n), bool)
    margins = _call(retrain, np.concatenate([full, _kept(order, everyone, np.full(count, limit), n)]), count)
    before, last = margins[0], margins[1 + everyone, everyone]
    trials = [Trial(query, limit, float(last[query])) for query in range(count)]
    sizes = np.where(before <= 0, 0, np.where(last <= 0, limit, NOT_FLIPPED))
    holds = np.where(sizes == 0, -1, np.where(sizes == NOT_FLIPPED, limit, 0))
    rounds = 1
    while len(queries := np.flatnonzero((sizes > 0) & (sizes - holds > np.maximum(1, tolerance * sizes)))):
        middle = (holds[queries] + sizes[queries]) // 2
        margins = _call(retrain, _kept(order, queries, middle, n), count)
        own = margins[np.arange(len(queries)), queries]
        trials += [Trial(*each) for each in zip(queries.tolist(), middle.tolist(), own.tolist(), strict=True)]
        sizes[queries] = np.where(own <= 0, middle, sizes[queries])
        holds[queries] = np.where(own <= 0, holds[queries], middle)
        rounds += 1
    return Brittleness(sizes, holds, limit, before, tuple(trials), rounds)


def select(found: Brittleness, queries: Int[np.ndarray, " k"]) -> Brittleness:
    """Return what was found for some of the queries, which are counted anew in their trials.

    Several rankings of the same queries can be bisected at once as the columns of one array, and taken apart again.
    """
    place = {query: number for number, query in enumerate(queries.tolist())}
    return found._replace(
        sizes=found.sizes[queries],
        holds=found.holds[queries],
        before=found.before[queries],
        trials=tuple(trial._replace(query=place[trial.query]) for trial in found.trials if trial.query in place),
    )


def flipped(
    found: Brittleness, sizes: Int[np.ndarray, " sizes"], *, confidence: float = 0.95, correct_only: bool = True
) -> Flipped:
    """Return the part of queries that flip without at most so many of their most helpful sources.

    `F(k) = #{0 ≤ size ≤ k} / q`, with Wilson's score interval, which is for independent queries.  No query is censored
    below `limit`, so nothing has to be assumed of those that hold.

    Args:
        found: the removals.
        sizes: at which numbers of removed sources; none above `found.limit`.
        confidence: the coverage that is asked for.
        correct_only: leave out queries that the full model gets wrong.

    Raises:
        InvalidInputError: a size is above the limit, `confidence` is not between 0 and 1, or no query is left.

    Source: Wilson 1927 (the interval).
    """
    kept = found.sizes[found.sizes != 0] if correct_only else found.sizes
    if len(sizes) and sizes.max() > found.limit:
        raise InvalidInputError(
            f"a curve up to {sizes.max()} removed sources",
            expected=f"at most {found.limit}, which removals were limited to",
            remedy="lower the sizes, or raise `limit` of the search",
        )
    if not 0 < confidence < 1 or len(kept) == 0:
        raise InvalidInputError(
            f"confidence = {confidence} and {len(kept)} queries",
            expected="a confidence between 0 and 1, and a query that the full model gets right",
            remedy="0.95 is usual; choose queries that are classified correctly",
        )
    fraction = ((kept >= 0) & (kept <= np.asarray(sizes)[:, None])).mean(axis=1)
    count, z = len(kept), NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(fraction * (1 - fraction) / count + z**2 / (4 * count**2))
    return Flipped(fraction, np.maximum(middle - half, 0), np.minimum(middle + half, 1))


def _order(scores: Num[Array | np.ndarray, "n q"], limit: int, tolerance: float) -> Int[np.ndarray, "q limit"]:
    n = scores.shape[0]
    if not 1 <= limit < n or not 0 <= tolerance <= 1:
        raise InvalidInputError(
            f"limit = {limit} of {n} sources, tolerance = {tolerance}",
            expected=f"a limit from 1 to {n - 1}, and a tolerance from 0 to 1",
            remedy="a fifth of the training set is usual; a tolerance of 0 finds the exact size",
        )
    columns = np.asarray(scores, np.float64).T
    if np.isnan(columns).any():
        raise InvalidInputError("scores that are NaN", expected="numbers", remedy="look for a checkpoint that diverged")
    return np.argsort(-columns, axis=1, kind="stable")[:, :limit]


def _kept(
    order: Int[np.ndarray, "q limit"], queries: Int[np.ndarray, " m"], sizes: Int[np.ndarray, " m"], n: int
) -> Bool[np.ndarray, "m n"]:
    """Mark what is left for each query without the first so many of its order."""
    masks = np.ones((len(queries), n), bool)
    for mask, query, size in zip(masks, queries, sizes, strict=True):
        mask[order[query, :size]] = False
    return masks


def _call(retrain: Retrain, masks: Bool[np.ndarray, "m n"], queries: int) -> Float[np.ndarray, "m q"]:
    margins = np.asarray(retrain(masks), np.float64)
    if margins.shape != (len(masks), queries) or not np.isfinite(margins).all():
        bad = "" if np.isfinite(margins).all() else ", not all of them finite"
        raise InvalidInputError(
            f"`retrain` returned margins of shape {margins.shape}{bad}",
            expected=f"finite margins of {len(masks)} models at {queries} queries",
            remedy="return the margins of all queries for every mask, in the order of the masks",
        )
    return margins
