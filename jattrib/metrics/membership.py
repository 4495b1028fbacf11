"""Attacks on unlearning: can it be told from a margin whether a model has unlearned a point or never saw it?

* `ulira`: the likelihood-ratio attacker who knows both laws as Gaussians; .5 is ideal, 1 the worst.
* `epsilon`: the differential-privacy style ε of the NeurIPS 2023 unlearning challenge, and its forgetting quality.

Source: Hayes et al. 2024, "Inexact unlearning needs more careful evaluations" (U-LiRA); Triantafillou et al. 2024, "Are
we making progress in unlearning?" (ε).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Key, Num

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import bootstrap
from jattrib.metrics.bootstrap import Interval

FEWEST = 4
"""Models on either side: each of two halves needs two, for a variance."""

BIN_WIDTH, BINS = 0.5, 13
"""The challenge's bins of ε: of half a nat, the last one open."""


class Attack(NamedTuple):
    """How often the likelihood-ratio attacker is right.

    Attributes:
        accuracy: mean over points of the balanced accuracy, with its interval over models and points.
        per_point: the balanced accuracy at each point.
    """

    accuracy: Interval
    per_point: Float[np.ndarray, " x"]


class Privacy(NamedTuple):
    """The challenge's figures.

    Attributes:
        epsilon: of each point, the largest over attacks; infinite where one of them never errs.
        quality: the mean over points of `2 / 2^n`, n the number of ε's bin from 1 on: 1 is ideal.
    """

    epsilon: Float[np.ndarray, " x"]
    quality: float


def ulira(
    unlearned: Num[Array | np.ndarray, "n x"],
    oracles: Num[Array | np.ndarray, "m x"],
    *,
    key: Key[Array, ""],
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Attack:
    """Return the balanced accuracy of the attacker who decides by the ratio of two fitted Gaussians.

    At each point, models are split into even and odd ones: the Gaussians are fitted to one half and attack the other,
    and the other way round.  No margin is judged by laws that it was fitted to, so laws that are the same score .5 in
    expectation, whatever the number of models.  A tie counts half.  The interval is for these attackers: models and
    points are resampled, laws are not fitted anew.  A point that is alone is not resampled.

    Args:
        unlearned: the margins of models that were trained on the points and then unlearned them.
        oracles: those of models that never saw the points.
        key: fixes the resamples.
        resamples: how many.
        confidence: the coverage that is asked for.

    Raises:
        InvalidInputError: points differ, a margin is not finite, or there are fewer than four models on a side.

    Source: Hayes et al. 2024, section 4, with the two halves in place of a pool of shadow models.
    """
    p, q = _check(unlearned, oracles)
    right_p, right_q = np.empty(p.shape), np.empty(q.shape)
    for half in (0, 1):
        ratio = _log_ratio(p[half::2], q[half::2])
        right_p[1 - half :: 2] = _positive(ratio(p[1 - half :: 2]))
        right_q[1 - half :: 2] = _positive(-ratio(q[1 - half :: 2]))
    per_point = (right_p.mean(axis=0) + right_q.mean(axis=0)) / 2
    random = bootstrap.generator(key)
    drawn = [bootstrap.counts(random, units, resamples=resamples) for units in (len(p), len(q))]
    if p.shape[1] > 1:
        drawn.append(bootstrap.counts(random, p.shape[1], resamples=resamples))
    else:
        drawn.append(np.ones((resamples, 1), np.int64))
    rows = drawn[0] @ right_p / len(p) + drawn[1] @ right_q / len(q)
    draws = np.einsum("rx,rx->r", rows, drawn[2]) / (2 * p.shape[1])
    return Attack(bootstrap.percentile(float(per_point.mean()), draws, confidence=confidence), per_point)


def epsilon(
    unlearned: Num[Array | np.ndarray, "n x"],
    oracles: Num[Array | np.ndarray, "m x"],
    *,
    delta: float = 1e-5,
    thresholds: int = 64,
) -> Privacy:
    """Return the challenge's ε of each point, and the forgetting quality.

    `ε = max over attacks of max(ln((1 − δ − FPR) / FNR), ln((1 − δ − FNR) / FPR))`, at least 0.  An attack calls a
    margin unlearned if it lies in an interval between two thresholds, open or closed to one side by infinity, or if it
    lies outside of it.  One that never errs makes ε infinite; of one that errs on one side alone too few models are
    known to say how rarely, and it is left out.

    Args:
        unlearned: the margins (or any scalar output) of models that unlearned the points.
        oracles: those of models that never saw them.
        delta: δ.
        thresholds: how many, at quantiles of both samples pooled; all midpoints between margins if these are fewer.
            Whether an attack never errs is decided on all of them.

    Raises:
        InvalidInputError: points differ, a margin is not finite, there are fewer than four models on a side, or `delta`
            or `thresholds` make no sense.

    Source: Triantafillou et al. 2024, section 3 and appendix A.  Their intervals are of one width a point.
    """
    p, q = _check(unlearned, oracles)
    if not 0 <= delta < 1 or thresholds < 1:
        raise InvalidInputError(
            f"delta = {delta}, thresholds = {thresholds}",
            expected="a delta from 0 to below 1, and at least one threshold",
            remedy="1e-5 and 64 are usual",
        )
    found = np.array([_epsilon(a, b, delta, thresholds) for a, b in zip(p.T, q.T, strict=True)])
    bins = 1 + np.minimum(found, (BINS - 1) * BIN_WIDTH) // BIN_WIDTH
    return Privacy(found, float(np.mean(2 / 2**bins)))


def _epsilon(p: Float[np.ndarray, " n"], q: Float[np.ndarray, " m"], delta: float, thresholds: int) -> float:
    if _separate(p, q) or _separate(q, p):  # whatever the thresholds: quantiles may step over what lies between
        return float("inf")
    edges, rates = _thresholds(np.concatenate([p, q]), thresholds), []
    for each in (p, q):
        below = np.searchsorted(np.sort(each), edges)
        inside = np.subtract.outer(below, below)[np.tril_indices(len(edges), -1)]  # whole numbers: 0 is 0
        rates.append(np.concatenate([inside, len(each) - inside]) / len(each))
    wrong = np.stack([rates[1], 1 - rates[0]])  # false positives: of Q; false negatives: of P
    wrong = wrong[:, (wrong > 0).all(axis=0)]
    right = np.maximum(1 - delta - wrong, np.finfo(np.float64).tiny)  # an attack that is always wrong says nothing
    return float(np.log(right / wrong[::-1]).max(initial=0.0))


def _separate(inner: Float[np.ndarray, " n"], outer: Float[np.ndarray, " m"]) -> bool:
    """Return whether an interval holds all of one sample and none of the other."""
    return not ((outer >= inner.min()) & (outer <= inner.max())).any()


def _thresholds(pooled: Float[np.ndarray, " k"], most: int) -> Float[np.ndarray, " t"]:
    """Return thresholds between different margins, and infinity on either side."""
    values = np.unique(pooled)
    between = (values[1:] + values[:-1]) / 2
    if len(between) > most:
        between = np.unique(np.quantile(between, (np.arange(most) + 0.5) / most))
    return np.concatenate([[-np.inf], between, [np.inf]])


def _log_ratio(
    p: Float[np.ndarray, "n x"], q: Float[np.ndarray, "m x"]
) -> Callable[[Float[np.ndarray, "k x"]], Float[np.ndarray, "k x"]]:
    """Return the function from margins to `ln N(·; p) − ln N(·; q)`."""
    (p_mean, p_spread), (q_mean, q_spread) = ((each.mean(axis=0), each.var(axis=0, ddof=1)) for each in (p, q))
    least = 1e-12 * np.concatenate([p, q]).var(axis=0) + np.finfo(np.float64).tiny  # of margins that are all the same
    p_spread, q_spread = np.maximum(p_spread, least), np.maximum(q_spread, least)

    def ratio(margins: Float[np.ndarray, "k x"]) -> Float[np.ndarray, "k x"]:
        far = np.square(margins - q_mean) / q_spread - np.square(margins - p_mean) / p_spread
        return (far + np.log(q_spread / p_spread)) / 2

    return ratio


def _positive(values: Float[np.ndarray, "k x"]) -> Float[np.ndarray, "k x"]:
    return np.where(values == 0, 0.5, values > 0)


def _check(
    unlearned: Num[Array | np.ndarray, "n x"], oracles: Num[Array | np.ndarray, "m x"]
) -> tuple[Float[np.ndarray, "n x"], Float[np.ndarray, "m x"]]:
    p, q = (np.asarray(each, np.float64) for each in (unlearned, oracles))
    if p.ndim != 2 or p.shape[1:] != q.shape[1:] or p.shape[1] == 0:
        raise InvalidInputError(
            f"margins of shapes {p.shape} and {q.shape}",
            expected="margins [model, point] at the same points",
            remedy="transpose one of them, or evaluate both sets of models on the same examples",
        )
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        raise InvalidInputError(
            "margins that are not finite", expected="finite numbers", remedy="clip them, or look for diverged models"
        )
    if min(len(p), len(q)) < FEWEST:
        raise InvalidInputError(
            f"{len(p)} unlearned models and {len(q)} oracles",
            expected=f"at least {FEWEST} of each: half of them teach the attacker, half are attacked",
            remedy="train more models; 100 are usual",
        )
    return p, q
