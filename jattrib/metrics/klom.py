"""KLoM, the KL divergence of margins: can unlearned models be told from models retrained without the forget set?

For each point, P is the law of its margin over N unlearned models and Q over M retrained ones (oracles): the divergence
KL(P‖Q), in nats, then its mean and upper percentiles over points.  0 is ideal, but samples never reach it: `floor` is
what identical laws score, and belongs beside every figure.

Source: Georgiev et al. 2024, section 2.2 and appendix A.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from jattrib.core.errors import InvalidInputError, check_choice
from jattrib.metrics import bootstrap
from jattrib.metrics.bootstrap import Interval

CLIP = 100.0
"""Margins are cut off at plus and minus this many nats."""

LEAST = 1e-5
"""The least mass of an oracles' bin; a margin that no oracle has costs `ln(1e5) = 11.51` nats, the most there is."""

FEWEST = 8
"""The fewest models that a Gaussian is fitted to: of fewer, a resample's variance may vanish."""

CELLS_AT_ONCE = 1 << 21

Form = Literal["binned", "gaussian"]
"""How laws are estimated: by histograms on common bins, as published, or by their first two moments."""


class Klom(NamedTuple):
    """The divergence at each point, and over points.

    Attributes:
        per_point: KL(P‖Q) of each point, in nats.
        mean: over points, with its interval over models.
        percentiles: over points, by the percentage, likewise.
    """

    per_point: Float[np.ndarray, " x"]
    mean: Interval
    percentiles: dict[int, Interval]


class Floor(NamedTuple):
    """What laws that are the same score: the mean and percentiles over points."""

    mean: float
    percentiles: dict[int, float]


def klom(
    unlearned: Num[Array | np.ndarray, "n x"],
    oracles: Num[Array | np.ndarray, "m x"],
    *,
    key: Key[Array, ""],
    form: Form = "binned",
    percentiles: Sequence[int] = (95, 99),
    bins: int = 20,
    resamples: int = 200,
    confidence: float = 0.95,
) -> Klom:
    """Return KL(P‖Q) of the margins of unlearned models and of oracles at each point, and its summary.

    Intervals are bootstraps over unlearned models and oracles, drawn apart, on the bins of the whole sample.  A
    resample is noisier than the sample, which raises a divergence, so they are centred; of histograms they are wider
    than need be (up to twice where points are independent), since a bin of one model is empty in a third of resamples.

    Args:
        unlearned: the margins of each unlearned model at each point: clipped to ±100, so they may be infinite.
        oracles: those of each retrained model.
        key: fixes the resamples.
        form: `binned`, which is the published metric, or `gaussian`.
        percentiles: which percentages to report beside the mean.
        bins: of the histograms.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: points differ, a margin is NaN, there are fewer models than bins or fewer points than a
            percentile needs; there is no such form; or, of the Gaussian form, the margins of a point do not vary,
            or not in more than 5% of resamples.
    """
    p, q = _check(unlearned, oracles, _fewest(form, bins))
    _check_points(p.shape[1], percentiles)
    per_point = _binned(p, q, bins) if form == "binned" else _gaussian(p, q)
    draws = _resampled(p, q, key, form, bins, resamples)
    _check_defined(draws, np.arange(p.shape[1]))

    def interval(value: float, each: Float[np.ndarray, " r"]) -> Interval:
        return bootstrap.percentile(value, each, confidence=confidence, centred=True)

    return Klom(
        per_point,
        interval(float(per_point.mean()), draws.mean(axis=1)),
        {
            part: interval(float(np.percentile(per_point, part)), np.percentile(draws, part, axis=1))
            for part in percentiles
        },
    )


def average(
    unlearned: Num[Array | np.ndarray, "n x"],
    oracles: Num[Array | np.ndarray, "m x"],
    parts: Sequence[Int[np.ndarray, " _"]],
    *,
    key: Key[Array, ""],
    percentile: int = 95,
    form: Form = "binned",
    bins: int = 20,
    resamples: int = 200,
    confidence: float = 0.95,
) -> Interval:
    """Return the mean over parts of the points of each part's percentile of KL(P‖Q): one figure for F, R and others.

    The interval is that of `klom`, of all parts together: they share the models.

    Args:
        unlearned: as in `klom`.
        oracles: as in `klom`.
        parts: the points of each part.
        key: fixes the resamples.
        percentile: of each part.
        form: as in `klom`.
        bins: of the histograms.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: as in `klom`, where a part has too few points.

    Source: Georgiev et al. 2024, section 5 (the average of 95th percentiles over forget, retain and validation set).
    """
    p, q = _check(unlearned, oracles, _fewest(form, bins))
    for part in parts:
        _check_points(len(part), [percentile])
    per_point = _binned(p, q, bins) if form == "binned" else _gaussian(p, q)
    draws = _resampled(p, q, key, form, bins, resamples)
    _check_defined(draws, np.unique(np.concatenate(parts)))
    value = np.mean([np.percentile(per_point[part], percentile) for part in parts])
    spread = np.mean([np.percentile(draws[:, part], percentile, axis=1) for part in parts], axis=0)
    return bootstrap.percentile(float(value), spread, confidence=confidence, centred=True)


def _resampled(
    p: Float[np.ndarray, "n x"], q: Float[np.ndarray, "m x"], key: Key[Array, ""], form: Form, bins: int, resamples: int
) -> Float[np.ndarray, "r x"]:
    """Return the divergence at each point in each resample of the models of either side; NaN where it is undefined."""
    random = bootstrap.generator(key)
    drawn = [bootstrap.counts(random, len(each), resamples=resamples) for each in (p, q)]
    found, width = [], max(1, CELLS_AT_ONCE // (resamples * bins))
    for start in range(0, p.shape[1], width):
        left, right = (each[:, start : start + width] for each in (p, q))
        if form == "binned":
            found.append(_resampled_binned(left, right, drawn[0], drawn[1], bins))
        else:
            found.append(_gaussian(left, right, drawn[0], drawn[1]))
    return np.concatenate(found, axis=1)


def binned(
    unlearned: Num[Array | np.ndarray, "n x"], oracles: Num[Array | np.ndarray, "m x"], *, bins: int = 20
) -> Float[np.ndarray, " x"]:
    """Return `Σ_b p_b ln(p_b / max(q_b, 1e-5))` of each point, of histograms p and q.

    Margins are clipped to ±100; bins are equal parts of the range of both samples together, the greatest margin falling
    into the last.  Where all margins are equal the divergence is 0.

    Raises:
        InvalidInputError: points differ, a margin is NaN, or there are fewer models than bins.

    Source: Georgiev et al. 2024, appendix A.  Public versions lose the greatest margin, which lies on the last edge.
    """
    return _binned(*_check(unlearned, oracles, bins), bins)


def gaussian(
    unlearned: Num[Array | np.ndarray, "n x"], oracles: Num[Array | np.ndarray, "m x"]
) -> Float[np.ndarray, " x"]:
    """Return `ln(s_q / s_p) + (s_p² + Δ²) / 2 s_q² − ½` of each point: the divergence of fitted Gaussians.

    Variances are those of the samples, with n − 1; margins are clipped to ±100.

    Raises:
        InvalidInputError: points differ, a margin is NaN, there are fewer than eight models, or the margins of a point
            do not vary over models.
    """
    return _gaussian(*_check(unlearned, oracles, FEWEST))


def floor(
    models: int,
    oracles: int,
    *,
    key: Key[Array, ""],
    points: int = 2000,
    form: Form = "binned",
    percentiles: Sequence[int] = (95, 99),
    bins: int = 20,
) -> Floor:
    """Return what KLoM scores when both laws are one Gaussian: the bias of this many models, by simulation.

    Neither form sees the location or scale of a margin, so one law stands for all.  Where there are oracles enough,
    `klom` of two sets of them, as large as the sets that are compared, is the floor of the margins' own laws.

    Args:
        models: how many unlearned models there are, N.
        oracles: how many retrained ones, M.
        key: fixes the samples.
        points: how many are simulated, independent of one another.
        form: as in `klom`.
        percentiles: as in `klom`.
        bins: as in `klom`.

    Raises:
        InvalidInputError: as in `klom`.
    """
    random = bootstrap.generator(key)
    p, q = (random.standard_normal((count, points)) for count in (models, oracles))
    p, q = _check(p, q, _fewest(form, bins))
    _check_points(points, percentiles)
    found = _binned(p, q, bins) if form == "binned" else _gaussian(p, q)
    return Floor(float(found.mean()), {part: float(np.percentile(found, part)) for part in percentiles})


def _bin_numbers(
    p: Float[np.ndarray, "n x"], q: Float[np.ndarray, "m x"], bins: int
) -> tuple[Int[np.ndarray, "n x"], Int[np.ndarray, "m x"]]:
    """Return each margin's bin: how many inner edges are not above it, so that the greatest falls into the last."""
    low, high = (np.minimum(p.min(0), q.min(0)), np.maximum(p.max(0), q.max(0)))
    numbers = tuple(np.zeros(each.shape, np.int64) for each in (p, q))
    for inner in range(1, bins):
        edge = low + (high - low) * (inner / bins)
        for number, margins in zip(numbers, (p, q), strict=True):
            number += (margins >= edge) & (high > low)
    return numbers[0], numbers[1]


def _masses(
    numbers: Int[np.ndarray, "n x"], bins: int, counts: Num[np.ndarray, "r n"]
) -> Float[np.ndarray, "r x bins"]:
    """Return the histograms in each resample: one product of counts and indicators."""
    marks = (numbers[..., None] == np.arange(bins)).reshape(len(numbers), -1).astype(np.float32)
    sums = counts.astype(np.float32) @ marks  # whole numbers, so exact
    return sums.reshape(len(counts), -1, bins) / counts.sum(axis=1, dtype=np.float64)[:, None, None]


def _divergence(p: Float[np.ndarray, "*rest bins"], q: Float[np.ndarray, "*rest bins"]) -> Float[np.ndarray, "*rest"]:
    return np.sum(p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, np.maximum(q, LEAST), 1)), axis=-1)


def _resampled_binned(
    p: Float[np.ndarray, "n x"],
    q: Float[np.ndarray, "m x"],
    p_counts: Int[np.ndarray, "r n"],
    q_counts: Int[np.ndarray, "r m"],
    bins: int,
) -> Float[np.ndarray, "r x"]:
    numbers = _bin_numbers(p, q, bins)
    return _divergence(_masses(numbers[0], bins, p_counts), _masses(numbers[1], bins, q_counts))


def _binned(p: Float[np.ndarray, "n x"], q: Float[np.ndarray, "m x"], bins: int) -> Float[np.ndarray, " x"]:
    once = [np.ones((1, len(each)), np.int64) for each in (p, q)]
    width = max(1, CELLS_AT_ONCE // (len(p) + len(q)) // bins)
    blocks = [slice(start, start + width) for start in range(0, p.shape[1], width)]
    return np.concatenate([_resampled_binned(p[:, at], q[:, at], once[0], once[1], bins)[0] for at in blocks])


def _gaussian(
    p: Float[np.ndarray, "n x"],
    q: Float[np.ndarray, "m x"],
    p_counts: Int[np.ndarray, "r n"] | None = None,
    q_counts: Int[np.ndarray, "r m"] | None = None,
) -> Float[np.ndarray, "*r x"]:
    """Return the plug-in divergence, of the samples or of each resample."""
    for name, each in (("unlearned models", p), ("oracles", q)):
        still = each.max(axis=0) == each.min(axis=0)
        if still.any():
            at = int(still.argmax())
            raise InvalidInputError(
                f"the margin {each[0, at]:.3g} of all {len(each)} {name} at point {at}",
                expected="margins that vary from model to model, from which a Gaussian can be fitted",
                remedy='use form="binned", or leave out points whose margins are all clipped',
            )
    (p_mean, p_spread), (q_mean, q_spread) = _moments(p, p_counts), _moments(q, q_counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = p_spread / q_spread
        return (ratio + np.square(p_mean - q_mean) / q_spread - 1 - np.log(ratio)) / 2


def _moments(
    margins: Float[np.ndarray, "n x"], counts: Int[np.ndarray, "r n"] | None
) -> tuple[Float[np.ndarray, "*r x"], Float[np.ndarray, "*r x"]]:
    if counts is None:
        return margins.mean(axis=0), margins.var(axis=0, ddof=1)
    count, centre = len(margins), margins.mean(axis=0)
    moved = margins - centre
    mean = counts @ moved / count
    spread = counts @ np.square(moved) / count - np.square(mean)
    rounding = 8 * np.finfo(np.float64).eps * np.square(moved).sum(axis=0)
    spread = np.where(spread > rounding, spread, np.nan)  # of a resample whose margins are all the same
    return centre + mean, spread * (count / (count - 1))


def _check_defined(draws: Float[np.ndarray, "r x"], points: Int[np.ndarray, " _"]) -> None:
    """Refuse points whose margins do not vary in too many resamples of models: no Gaussian is fitted to them."""
    undefined = np.isnan(draws[:, points])
    if undefined.any(axis=1).mean() > bootstrap.UNDEFINED:
        counts = undefined.sum(axis=0)
        raise InvalidInputError(
            f"margins that are all the same in {counts.max()} of {len(draws)} resamples of models, at point "
            f"{points[counts.argmax()]} (and in some at {np.count_nonzero(counts)} points)",
            expected=f"margins that vary, at every point, in {1 - bootstrap.UNDEFINED:.0%} of resamples",
            remedy='use form="binned", train more models, or leave out points whose margins are nearly all clipped',
        )


def _fewest(form: str, bins: int) -> int:
    """Return how many models a form needs."""
    check_choice("form", form, get_args(Form))
    return bins if form == "binned" else FEWEST


def _check(
    unlearned: Num[Array | np.ndarray, "n x"], oracles: Num[Array | np.ndarray, "m x"], least: int
) -> tuple[Float[np.ndarray, "n x"], Float[np.ndarray, "m x"]]:
    p, q = (np.asarray(each, np.float64) for each in (unlearned, oracles))
    if p.shape[1:] != q.shape[1:] or p.ndim != 2 or p.shape[1] == 0:
        raise InvalidInputError(
            f"margins of shapes {p.shape} and {q.shape}",
            expected="margins [model, point] at the same points, of as many models as you like on either side",
            remedy="transpose one of them, or evaluate both sets of models on the same examples",
        )
    if np.isnan(p).any() or np.isnan(q).any():
        raise InvalidInputError(
            f"{np.count_nonzero(np.isnan(p))} NaN among the unlearned models' margins, "
            f"{np.count_nonzero(np.isnan(q))} among the oracles'",
            expected="numbers, or infinities, which are clipped",
            remedy="look for models that diverged, and compute margins from logits",
        )
    if min(len(p), len(q)) < least or least < 2:
        raise InvalidInputError(
            f"{len(p)} unlearned models and {len(q)} oracles, where {least} are needed",
            expected=f"two bins or more and a model a bin, lest laws that are the same seem apart; {FEWEST} models for "
            "Gaussians",
            remedy='train more models (100 are usual), ask for fewer bins, or use form="gaussian"',
        )
    return np.clip(p, -CLIP, CLIP), np.clip(q, -CLIP, CLIP)


def _check_points(points: int, percentiles: Sequence[int]) -> None:
    for part in percentiles:
        if not 0 < part < 100:
            raise InvalidInputError(f"percentile {part}", expected="a percentage", remedy="95 and 99 are usual")
        if points * (100 - part) < 100:
            raise InvalidInputError(
                f"percentile {part} of {points} points",
                expected=f"at least {-(-100 // (100 - part))} points, lest it be the greatest of them",
                remedy="measure at more points, or ask for a lower percentile",
            )
