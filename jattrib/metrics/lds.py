"""The linear datamodeling score (LDS): do attributions predict what retraining on a random subset does?

With scores τ[source, query] and masks S[model, source], the prediction is the group's total,
`g[m, q] = Σ_i S[m, i] τ[i, q]`, and the LDS is the mean over queries of Spearman's ρ, over models, between g and the
outputs of models that were trained on the subsets.  Two protocols, which measure different things and are never
compared with one another:

* `lds_expected`: random halves, outputs averaged over several seeds a subset: the expected output of training;
* `lds_fixed`: a few per cent left out, seed and order fixed: what this one training run would have done.

Source: Park et al. 2023, definition 2.3 and section 4.1; Ilyas and Engstrom 2025 for the fixed seed.  Those report
standard errors over queries alone, which are too small, since all queries share the models.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import bootstrap
from jattrib.metrics.bootstrap import Interval
from jattrib.metrics.correlation import midranks, resampled_spearman, spearman

QUERIES_AT_ONCE = 1024


class LDS(NamedTuple):
    """A linear datamodeling score.

    Attributes:
        mean: over the queries that have one.
        low: lower end of the interval over queries and models.
        high: upper end.
        per_query: Spearman's ρ of each query; NaN where prediction or output is the same for all models.
        constant_queries: which queries those are; the mean is not over them.
    """

    mean: float
    low: float
    high: float
    per_query: Float[np.ndarray, " q"]
    constant_queries: Int[np.ndarray, " c"]


class Ceiling(NamedTuple):
    """The LDS that perfect predictions of the expected output would have, with outputs that are noisy means over seeds.

    Attributes:
        value: `√(s c / (1 + (s − 1) c))` for s seeds; 0 if c is negative.
        correlation: c, Spearman's ρ between two seeds, mean over pairs of seeds and queries.
        constant_queries: queries whose outputs are the same for all models at some seed; c is not over them.
    """

    value: float
    correlation: float
    constant_queries: Int[np.ndarray, " c"]


class Null(NamedTuple):
    """What the LDS is when predictions belong to other models than the outputs.

    Attributes:
        mean: over permutations; about 0.
        std: their standard deviation: the LDS's own, were there nothing to find.
        low: lower end of the central 95%.
        high: upper end.
        p_value: how often a permutation reaches the measured LDS, itself counted: `(1 + #) / (1 + permutations)`.
    """

    mean: float
    std: float
    low: float
    high: float
    p_value: float


def predict(scores: Num[Array | np.ndarray, "n q"], masks: Bool[Array | np.ndarray, "m n"]) -> Float[np.ndarray, "m q"]:
    """Return `Σ_i S[m, i] τ[i, q]`, the outputs that the scores predict but for a constant, in float64.

    Sums are exact but for one last rounding, so that subsets with the same scores have the same prediction, in whatever
    order these stand.  Where all of a query's predictions differ by no more than rounding they are made equal: their
    order would be chance.

    Raises:
        InvalidInputError: scores and masks are of different numbers of sources.
    """
    if scores.shape[0] != masks.shape[1]:
        raise InvalidInputError(
            f"scores of {scores.shape[0]} sources and masks of {masks.shape[1]}",
            expected="scores [source, query] and masks [model, source] of the same sources",
            remedy="transpose one of them, or draw the masks for this training set",
        )
    weights = np.asarray(masks, np.float64)
    predicted = np.empty((masks.shape[0], scores.shape[1]))
    for start in range(0, scores.shape[1], QUERIES_AT_ONCE):
        block = np.asarray(scores[:, start : start + QUERIES_AT_ONCE], np.float64)
        totals = _exact_product(weights, block)
        rounding = np.finfo(np.float64).eps * np.sqrt(len(block)) * np.abs(block).sum(axis=0)
        predicted[:, start : start + QUERIES_AT_ONCE] = np.where(np.ptp(totals, axis=0) <= rounding, totals[0], totals)
    return predicted


def _exact_product(weights: Float[np.ndarray, "m n"], block: Float[np.ndarray, "n q"]) -> Float[np.ndarray, "m q"]:
    """Return `weights @ block` of weights that are 0 or 1, rounded once.

    Scores are cut in two: multiples of a unit of which no partial sum has more than 2**53, and what is left, in the
    same way of a smaller unit.  Sums of either are exact; what then remains is below 2**-100 of the sum of all.
    """
    with np.errstate(invalid="ignore"):  # of scores that are not finite, which have no sum and no rest
        high = _multiples(block)
        low = _multiples(block - high)
    return weights @ high + weights @ low if low.any() else weights @ high


def _multiples(block: Float[np.ndarray, "n q"]) -> Float[np.ndarray, "n q"]:
    """Return the nearest multiples of a power of two, that for which the absolute values sum to at most 2**52."""
    total = np.abs(block).sum(axis=0)
    exponent = np.where(np.isfinite(total), np.frexp(total)[1], 1024)
    unit = np.ldexp(1.0, np.maximum(exponent - 52, -1074))
    return np.rint(block / unit) * unit


def lds(
    predicted: Num[Array | np.ndarray, "m q"],
    actual: Num[Array | np.ndarray, "m q"],
    *,
    key: Key[Array, ""],
    resamples: int = 1000,
    confidence: float = 0.95,
) -> LDS:
    """Return the mean over queries of Spearman's ρ between predicted and actual outputs over models.

    The interval is a percentile bootstrap over queries and models jointly.  A resample holds fewer distinct models,
    which lowers rank correlations a little, so the interval is centred: it is for the LDS expected with this many
    models.  In simulations of 20 to 100 models it covered that in 93 to 99% of trials.

    Args:
        predicted: what scores predict (`predict`), or any other prediction.
        actual: the outputs of the retrained models.
        key: fixes the resamples.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: shapes differ, there are fewer than two models, an entry is not finite, or fewer than two
            queries have outputs and predictions that vary.
    """
    per_query, constant = spearman(predicted, actual, axis=0)
    check_two_vary(constant)
    varying = np.flatnonzero(~constant)
    left, right = (np.asarray(each)[:, varying] for each in (predicted, actual))

    def statistic(models: Int[np.ndarray, "r m"], queries: Int[np.ndarray, "r q"]) -> Float[np.ndarray, " r"]:
        return _weighted_mean(resampled_spearman(left, right, models).values, queries)

    interval = bootstrap.two_way(
        statistic, (len(left), len(varying)), key=key, resamples=resamples, confidence=confidence, centred=True
    )
    return LDS(*interval, per_query=per_query, constant_queries=np.flatnonzero(constant))


def difference(
    predicted: Num[Array | np.ndarray, "m q"],
    other: Num[Array | np.ndarray, "m q"],
    actual: Num[Array | np.ndarray, "m q"],
    *,
    key: Key[Array, ""],
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Return by how much the LDS of one prediction exceeds that of another, over the queries at which both have one.

    Both are measured on the same models and queries, whose luck they share: this interval says which is better where
    the intervals of the two overlap.

    Args:
        predicted: one prediction.
        other: the other.
        actual: the outputs of the retrained models.
        key: fixes the resamples.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: as in `lds`.
    """
    constant = spearman(predicted, actual, axis=0).constant | spearman(other, actual, axis=0).constant
    check_two_vary(constant)
    one, two, right = (np.asarray(each)[:, ~constant] for each in (predicted, other, actual))

    def statistic(models: Int[np.ndarray, "r m"], queries: Int[np.ndarray, "r q"]) -> Float[np.ndarray, " r"]:
        values = [resampled_spearman(left, right, models).values for left in (one, two)]
        return _weighted_mean(values[0] - values[1], queries)

    units = (right.shape[0], right.shape[1])
    return bootstrap.two_way(statistic, units, key=key, resamples=resamples, confidence=confidence, centred=True)


def lds_expected(
    scores: Num[Array | np.ndarray, "n q"],
    masks: Bool[Array | np.ndarray, "m n"],
    outputs: Num[Array | np.ndarray, "m s q"],
    *,
    key: Key[Array, ""],
    resamples: int = 1000,
    confidence: float = 0.95,
) -> LDS:
    """Return the LDS against expected outputs: random halves (α = .5), outputs averaged over s seeds a subset.

    It cannot exceed `noise_ceiling(outputs)` but by chance.

    Args:
        scores: the attributions.
        masks: the subset of each model.
        outputs: of every seed of every subset, at every query.
        key: fixes the resamples of the interval.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: as `predict` and `lds` say.

    Source: Park et al. 2023, section 4.1.
    """
    averaged = np.asarray(outputs, np.float64).mean(axis=1)
    return lds(predict(scores, masks), averaged, key=key, resamples=resamples, confidence=confidence)


def lds_fixed(
    scores: Num[Array | np.ndarray, "n q"],
    masks: Bool[Array | np.ndarray, "m n"],
    outputs: Num[Array | np.ndarray, "m q"],
    *,
    key: Key[Array, ""],
    resamples: int = 1000,
    confidence: float = 0.95,
) -> LDS:
    """Return the LDS of one training run: a few per cent left out, seed and order as in the full run.

    There is no noise to average out, so its ceiling is 1.  The models should be paired (`train.ensemble` with
    `removal="zero_weight"` and one key).

    Args:
        scores: the attributions.
        masks: what each model was trained on.
        outputs: of each model, at every query.
        key: fixes the resamples of the interval.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: as `predict` and `lds` say.

    Source: Ilyas and Engstrom 2025, section 4.
    """
    return lds(predict(scores, masks), outputs, key=key, resamples=resamples, confidence=confidence)


def noise_ceiling(outputs: Num[Array | np.ndarray, "m s q"]) -> Ceiling:
    """Return the LDS of perfect predictions, `√(s c / (1 + (s − 1) c))`: the reliability of a mean over s seeds.

    Raises:
        InvalidInputError: there is no axis of seeds, there are fewer than two seeds or models, an output is not finite,
            or no query varies.

    Source: Spearman 1910 and Brown 1910 (reliability), whose root bounds a correlation; √(2c/(1+c)) for two seeds.
    """
    if np.ndim(outputs) != 3:
        raise InvalidInputError(
            f"outputs of the shape {list(np.shape(outputs))}",
            expected="three axes, [model, seed, query]",
            remedy="of one query, pass `outputs[:, :, None]`; outputs of one seed show no noise: train a second",
        )
    seeds = outputs.shape[1]
    if seeds < 2:
        raise InvalidInputError(
            f"outputs of {seeds} seed a subset",
            expected="two seeds or more, whose correlation shows the noise",
            remedy="retrain each subset with at least two seeds",
        )
    pairs = [spearman(outputs[:, a], outputs[:, b], axis=0) for a, b in combinations(range(seeds), 2)]
    constant = np.any([pair.constant for pair in pairs], axis=0)
    _check_some_vary(constant)
    correlation = float(np.mean([pair.values[~constant] for pair in pairs]))
    reliability = seeds * correlation / (1 + (seeds - 1) * correlation) if correlation > 0 else 0.0
    return Ceiling(float(np.sqrt(reliability)), correlation, np.flatnonzero(constant))


def random_baseline(
    masks: Bool[Array | np.ndarray, "m n"],
    actual: Num[Array | np.ndarray, "m q"],
    *,
    key: Key[Array, ""],
    draws: int = 100,
    confidence: float = 0.95,
) -> Interval:
    """Return the LDS of random scores, independent normal numbers: its mean, and the range of its central part.

    The predictions of such scores are normal with covariance `S Sᵀ`, and are drawn from it; scores are never made.

    Args:
        masks: the subset of each model.
        actual: the outputs of the retrained models.
        key: fixes the scores.
        draws: how many times they are drawn.
        confidence: how much of the draws the range holds.

    Raises:
        InvalidInputError: shapes differ, an output is not finite, no query varies, or there is no draw.
    """
    if len(masks) != len(actual) or draws < 1:
        raise InvalidInputError(
            f"{draws} draws for masks of {len(masks)} models and outputs of {len(actual)}",
            expected="one draw or more, and a mask a model",
            remedy="pass the masks of the models whose outputs these are; 100 draws are usual",
        )
    constant = spearman(actual, actual, axis=0).constant
    _check_some_vary(constant)
    ranks = _standard_ranks(actual, ~constant)
    values = np.asarray(masks, np.float64)
    spectrum, vectors = np.linalg.eigh(values @ values.T)
    factor = vectors * np.sqrt(np.maximum(spectrum, 0))
    random, found = bootstrap.generator(key), np.empty(draws)
    for number in range(draws):
        predicted = factor @ random.standard_normal(ranks.shape)
        found[number] = np.vdot(_standard_ranks(predicted), ranks) / ranks.shape[1]
    return bootstrap.percentile(float(found.mean()), found, confidence=confidence)


def permutation_null(
    predicted: Num[Array | np.ndarray, "m q"],
    actual: Num[Array | np.ndarray, "m q"],
    *,
    key: Key[Array, ""],
    permutations: int = 1000,
) -> Null:
    """Return the distribution of the LDS when models are permuted, all queries alike.

    Queries share models, so their correlations go up and down together: the spread of the mean is larger than that of
    one correlation divided by √q, and this is how large.  Every permutation sums m entries of one m by m matrix.

    Args:
        predicted: what scores predict.
        actual: the outputs of the retrained models.
        key: fixes the permutations.
        permutations: how many.

    Raises:
        InvalidInputError: shapes differ, there are fewer than two models, an entry is not finite, no query varies, or
            there is no permutation.
    """
    if permutations < 1:
        raise InvalidInputError(
            f"{permutations} permutations", expected="one or more", remedy="1,000 permutations are usual"
        )
    constant = spearman(predicted, actual, axis=0).constant
    _check_some_vary(constant)
    left, right = (_standard_ranks(each, ~constant) for each in (predicted, actual))
    together = left @ right.T / left.shape[1]
    models = len(together)
    drawn = bootstrap.generator(key).permuted(np.tile(np.arange(models), (permutations, 1)), axis=1)
    found = together[drawn, np.arange(models)].sum(axis=1)
    measured = np.trace(together)
    low, high = np.quantile(found, [0.025, 0.975])
    reached = np.count_nonzero(found >= measured - 1e-12)
    p_value = (1 + reached) / (1 + permutations)
    return Null(float(found.mean()), float(found.std()), float(low), float(high), float(p_value))


def check_two_vary(constant: Bool[np.ndarray, " q"]) -> None:
    """Refuse what has no interval over queries, as fewer than two vary.

    Raises:
        InvalidInputError: it is so.
    """
    _check_some_vary(constant)
    if np.count_nonzero(~constant) < 2:
        raise InvalidInputError(
            f"1 of {len(constant)} queries at which both predictions and outputs vary from model to model",
            expected="two such queries or more, to resample for the interval",
            remedy="measure on more queries, or use `correlation.spearman`, which has no interval",
        )


def _weighted_mean(values: Float[np.ndarray, "r q"], counts: Int[np.ndarray, "r q"]) -> Float[np.ndarray, " r"]:
    """Return the mean of defined values; NaN where none is, as can happen in a resample of very few models."""
    defined = np.where(np.isnan(values), 0, counts)
    total = defined.sum(axis=1)
    sums = np.einsum("rq,rq->r", np.nan_to_num(values), defined)
    return np.where(total > 0, sums / np.maximum(total, 1), np.nan)


def _standard_ranks(
    values: Num[Array | np.ndarray, "m q"], keep: Bool[np.ndarray, " q"] | slice = slice(None)
) -> Float[np.ndarray, "m k"]:
    ranks = midranks(values, axis=0)[:, keep]
    ranks = ranks - ranks.mean(axis=0)
    return ranks / np.sqrt(np.square(ranks).sum(axis=0))


def _check_some_vary(constant: Bool[np.ndarray, " q"]) -> None:
    if constant.all():
        raise InvalidInputError(
            f"predictions or outputs that are the same for all models, at each of {len(constant)} queries",
            expected="at least one query where both vary from model to model",
            remedy="check that the models were trained on different subsets and that the scores are not zero",
        )
