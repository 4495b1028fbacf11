"""What the unlearning recipe measures: KLoM and U-LiRA of every method, and how well each attribution predicts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jattrib.metrics import bootstrap, klom, membership
from jattrib.metrics.bootstrap import Interval
from jattrib.metrics.correlation import spearman
from jattrib.recipes import dmm_tuning
from jattrib.recipes.dmm_tuning import Results
from jattrib.unlearning import ridge

RESAMPLES = 200
"""Of models, for an interval."""


class Measured(NamedTuple):
    """A method's figures for a forget set.

    Attributes:
        klom: mean over parts of the 95th percentile of KLoM, in nats.
        parts: each part's.
        gaussian: the same mean, of Gaussians, each point cut off at 11.51 nats: less biased.
        attack: balanced accuracy of U-LiRA on the forget set.
    """

    klom: Interval
    parts: dict[str, float]
    gaussian: float
    attack: float


class Measures(NamedTuple):
    """The figures of a forget set.

    Attributes:
        methods: by method.
        floor: other retrained models against the oracles.
        effects: the group LDS of each attribution: mean over parts of Spearman's ρ, over points, between the predicted
            and the measured change of the mean margin.
        ceiling: the group LDS of the other retrained models' own mean.
        bias: what identical Gaussians score with as many models, by simulation.
    """

    methods: dict[str, Measured]
    floor: Measured
    effects: dict[str, Interval]
    ceiling: Interval
    bias: float


def measure(results: Results, others: Float[np.ndarray, "r x"], key: Key[Array, ""]) -> Measures:
    """Return the figures of one forget set; `others` are margins of retrained models that are not its oracles."""
    parts, oracles = results.parts, results.oracles
    effects = {
        name: effect(results.full, oracles, results.unlearned[f"direct_{name}"].margins, parts, key)
        for name in results.predicted
    }
    return Measures(
        {name: _measured(each.margins, oracles, parts, key) for name, each in results.unlearned.items()},
        _measured(others, oracles, parts, key),
        effects,
        effect(results.full, oracles, others, parts, key),
        klom.floor(len(results.full), len(oracles), key=key, percentiles=(95,)).percentiles[95],
    )


def _measured(
    margins: Float[np.ndarray, "m x"],
    oracles: Float[np.ndarray, "o x"],
    parts: dict[str, np.ndarray],
    key: Key[Array, ""],
) -> Measured:
    binned, gaussian = klom.binned(margins, oracles), dmm_tuning.gaussian(margins, oracles)
    forget = parts["forget"]
    attack = membership.ulira(margins[:, forget], oracles[:, forget], key=key, resamples=2)
    return Measured(
        klom.average(margins, oracles, list(parts.values()), key=key, resamples=RESAMPLES),
        {name: float(np.percentile(binned[at], 95)) for name, at in parts.items()},
        float(np.mean([np.percentile(gaussian[at], 95) for at in parts.values()])),
        attack.accuracy.value,
    )


def effect(
    full: Float[np.ndarray, "m x"],
    oracles: Float[np.ndarray, "o x"],
    predicted: Float[np.ndarray, "k x"],
    parts: dict[str, np.ndarray],
    key: Key[Array, ""],
) -> Interval:
    """Return the group LDS of margins that are predicted, from what models are before: its interval is over models.

    Full models and oracles are resampled; the prediction, which is made of them or of others, is held.
    """
    random = bootstrap.generator(key)
    drawn = [bootstrap.counts(random, len(each), resamples=RESAMPLES) for each in (full, oracles)]
    drawn = [np.concatenate([np.ones((1, count.shape[1]), int), count]) for count in drawn]
    before, after = (
        count @ np.asarray(each, np.float64) / len(each) for count, each in zip(drawn, (full, oracles), strict=True)
    )
    change = predicted.mean(axis=0, dtype=np.float64) - full.mean(axis=0, dtype=np.float64)
    actual = (after - before).T
    foretold = np.broadcast_to(change[:, None], actual.shape)
    values = np.mean(
        [np.nan_to_num(spearman(foretold[at], actual[at]).values) for at in parts.values()], axis=0
    )  # a prediction of no change anywhere in a part ranks nothing: 0
    return bootstrap.percentile(float(values[0]), values[1:], confidence=0.95, centred=True)


RIDGE_STEPS = 3000
"""Gradient steps of the convex comparison."""


def ridge_paths(key: Key[Array, ""]) -> dict[str, Float[np.ndarray, " steps"]]:
    """Return the relative distance to the retrained solution of ridge regression, by algorithm, after every step.

    The forget set spans directions in which the other rows hardly vary, as rare examples do; every algorithm has its
    best constant rate, but for ascent, which has none.  In float64.

    Source: Georgiev et al. 2024, section 4.2.
    """
    random = bootstrap.generator(key)
    n, p, forgotten, rare = 400, 40, 20, 10
    x = random.standard_normal((n, p))
    x[forgotten:, :rare] *= 0.05
    y = x @ random.standard_normal(p) + 0.5 * random.standard_normal(n)
    forget = (np.arange(n) < forgotten).astype(float)
    with jax.enable_x64(True):
        problem = ridge.Ridge(jnp.asarray(x), jnp.asarray(y), jnp.asarray(forget), 0.01)
        full, goal = ridge.fit(problem, jnp.ones(n)), ridge.retrained(problem)
        weights = jnp.where(problem.forget == 1, 5.0, (jnp.arange(n) < forgotten * 11).astype(float))
        matching = ridge.oracle_matching(problem, weights)
        algorithms = {
            "oracle matching": (matching, ridge.best_rate(matching)),
            "descent on the rest": (ridge.retain_descent(problem), ridge.best_rate(ridge.retain_descent(problem))),
            "ascent and descent": (ridge.ascent_descent(problem, 1e-3), ridge.best_rate(ridge.retain_descent(problem))),
            "gradient ascent": (ridge.gradient_ascent(problem), 1e-4),
        }
        return {
            name: np.asarray(ridge.distances(ridge.path(iteration, full, rate=rate, steps=RIDGE_STEPS), goal))
            for name, (iteration, rate) in algorithms.items()
        }
