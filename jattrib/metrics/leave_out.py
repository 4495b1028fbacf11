"""Leave-one-out and leave-k-out tests: do scores say what retraining without a few examples does?

With scores τ[source, query] and what is removed, R[model, source], the predicted effect is minus the group's total,
`g[m, q] = −Σ_i R[m, i] τ[i, q]`, and the measured one is the mean over seeds of `after − before`, each seed's models
being **paired**: alike but for what was removed (`train.ensemble` with `removal="zero_weight"`).  Unlike the LDS, which
only ranks, these tests see the scale: `slope` is 1 for scores in the output's own units.

Source: Koh and Liang 2017, section 4.1 (leave one out); Bae et al. 2022 for why seeds are paired and averaged.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num

from jattrib.core.errors import InvalidInputError, check_choice
from jattrib.metrics import bootstrap, lds
from jattrib.metrics.bootstrap import Interval
from jattrib.metrics.correlation import Correlation, pearson, resampled_pearson, resampled_spearman, spearman

Measure = Literal["spearman", "pearson"]
"""Which correlation: of ranks, or of the values."""

CELLS_AT_ONCE = 1 << 22


class Agreement(NamedTuple):
    """How predicted effects agree with measured ones.

    Attributes:
        per_query: mean over queries of the correlation over models, with its interval over queries and models.
        pooled: the correlation over all pairs of a model and a query: whether effects are told apart across queries.
        slope: `Σ g e / Σ g²` over all pairs, of measured effects e on predicted ones g: 1 where the scale is right,
            above it where scores are too small.
        correlations: of each query; NaN where the prediction or the effect is the same for all models.
        constant_queries: which queries those are; `per_query` is not over them.
    """

    per_query: Interval
    pooled: Interval
    slope: Interval
    correlations: Float[np.ndarray, " q"]
    constant_queries: Int[np.ndarray, " c"]


def effects(
    before: Num[Array | np.ndarray, "s q"], after: Num[Array | np.ndarray, "m s q"]
) -> Float[np.ndarray, "m s q"]:
    """Return `after − before`, seed by seed, in float64: what each removal did to each query.

    `lds.noise_ceiling` of it says how well any prediction can do.

    Raises:
        InvalidInputError: seeds or queries differ.
    """
    if before.shape != after.shape[1:]:
        raise InvalidInputError(
            f"outputs [seed, query] of shape {tuple(before.shape)} before and [model, seed, query] of shape "
            f"{tuple(after.shape)} after",
            expected="the same seeds and queries before and after",
            remedy="train the full models with the keys of the others, one a seed",
        )
    return np.asarray(after, np.float64) - np.asarray(before, np.float64)


def predict(
    scores: Num[Array | np.ndarray, "n q"], removed: Bool[Array | np.ndarray, "m n"]
) -> Float[np.ndarray, "m q"]:
    """Return `−Σ_i R[m, i] τ[i, q]`, the effects of removals that the scores predict, in float64.

    Raises:
        InvalidInputError: scores and removals are of different numbers of sources, or a model has nothing removed.
    """
    counts = np.asarray(removed).sum(axis=1)
    if not counts.all():
        raise InvalidInputError(
            f"model {int(counts.argmin())}, from which nothing is removed",
            expected="removals [model, source], true at one source or more of each model",
            remedy="pass the negation of training masks, without the full model",
        )
    return -lds.predict(scores, removed)


def agreement(
    scores: Num[Array | np.ndarray, "n q"],
    removed: Bool[Array | np.ndarray, "m n"],
    measured: Num[Array | np.ndarray, "m s q"],
    *,
    key: Key[Array, ""],
    measure: Measure = "spearman",
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Agreement:
    """Return how the scores' predictions agree with the measured effects of removals.

    Intervals are percentile bootstraps over models and queries jointly, those of rank correlations centred (`lds.lds`
    says why).

    Args:
        scores: the attributions.
        removed: what each model was trained without: one source (leave one out) or k.
        measured: the paired effects of every removal and seed (`effects`); their mean over seeds is held against.
        key: fixes the resamples.
        measure: Spearman's or Pearson's correlation, per query and pooled.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: there is no such measure, shapes differ, there are fewer than two models, an entry is not
            finite, nothing is removed from a model, or fewer than two queries have effects and predictions that vary.
    """
    check_choice("measure", measure, _MEASURES)
    predicted, actual = predict(scores, removed), np.asarray(measured, np.float64).mean(axis=1)
    per_query, constant = _MEASURES[measure][0](predicted, actual)
    if constant.all():
        raise InvalidInputError(
            f"predictions or effects that are the same for all models, at each of {len(constant)} queries",
            expected="at least one query where both vary from model to model",
            remedy="check that the models were trained without different examples and that the scores are not zero",
        )
    lds.check_two_vary(constant)
    varying = ~constant
    resampled, settings = _MEASURES[measure][1], {"key": key, "resamples": resamples, "confidence": confidence}

    def mean(models: Int[np.ndarray, "r m"], queries: Int[np.ndarray, "r k"]) -> Float[np.ndarray, " r"]:
        found = resampled(predicted[:, varying], actual[:, varying], models).values
        weights = np.where(np.isnan(found), 0, queries)
        with np.errstate(invalid="ignore"):
            return np.einsum("rq,rq->r", np.nan_to_num(found), weights) / weights.sum(axis=1)

    def pooled(models: Int[np.ndarray, "r m"], queries: Int[np.ndarray, "r q"]) -> Float[np.ndarray, " r"]:
        return _over_cells(resampled, predicted, actual, models, queries)

    def slope(models: Int[np.ndarray, "r m"], queries: Int[np.ndarray, "r q"]) -> Float[np.ndarray, " r"]:
        products, squares = (
            np.einsum("rq,rq->r", models @ each, queries) for each in (predicted * actual, np.square(predicted))
        )
        return products / np.where(squares == 0, np.nan, squares)

    models, centred = len(predicted), measure == "spearman"
    return Agreement(
        per_query=bootstrap.two_way(mean, (models, int(varying.sum())), centred=centred, **settings),
        pooled=bootstrap.two_way(pooled, (models, len(constant)), centred=centred, **settings),
        slope=bootstrap.two_way(slope, (models, len(constant)), **settings),
        correlations=per_query,
        constant_queries=np.flatnonzero(constant),
    )


_MEASURES = {"spearman": (spearman, resampled_spearman), "pearson": (pearson, resampled_pearson)}


def _over_cells(
    resampled: Callable[..., Correlation],
    predicted: Float[np.ndarray, "m q"],
    actual: Float[np.ndarray, "m q"],
    models: Int[np.ndarray, "r m"],
    queries: Int[np.ndarray, "r q"],
) -> Float[np.ndarray, " r"]:
    """Return the correlation over all cells of the table in each resample, a few resamples at a time."""
    left, right = predicted.reshape(-1, 1), actual.reshape(-1, 1)
    found, block = [], max(1, CELLS_AT_ONCE // len(left))
    for start in range(0, len(models), block):
        rows, columns = models[start : start + block], queries[start : start + block]
        cells = np.einsum("rm,rq->rmq", rows, columns).reshape(len(rows), -1)
        found.append(resampled(left, right, cells).values[:, 0])
    return np.concatenate(found)
