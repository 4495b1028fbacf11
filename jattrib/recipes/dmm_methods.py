"""The unlearning recipe's methods: what of each is tried, and what it costs.

All have `TRIALS` settings to choose from, the same models to try them on, and the same compute at most.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np

from jattrib.recipes import build
from jattrib.recipes.dmm_stages import Config, Setup, as_models
from jattrib.train import ensemble
from jattrib.unlearning import baselines, dmm
from jattrib.unlearning.dmm import Shift
from jattrib.unlearning.finetune import Models, Problem, Settings

BATCH = 100
"""Rows a step of fine-tuning."""

FORWARD = 1 / 3
"""A pass forward alone, in passes forward and backward."""

TRIALS = 12
"""Settings of each method that are tried for each forget set."""

RATES = (1e-6, 1e-5, 3e-5, 1e-4, 5e-4, 2e-3)
"""Learning rates that the baselines choose from: from where nothing happens to where models break."""

GGN_PASSES = 5 / 3
"""A product with the Gauss-Newton matrix in passes forward and backward: forward, its derivative, and backward."""

Trial = dict[str, Any]
"""Settings of a method, by name."""


class Unlearner(NamedTuple):
    """A method.

    Attributes:
        title: what a reader calls it.
        trials: settings to choose from.
        run: `(problem, models, keys, trial) -> models`.
        passes: from a trial, how many examples a model passes forward and backward.
    """

    title: str
    trials: tuple[Trial, ...]
    run: Callable[[Problem, Models, Any, Trial], Models]
    passes: Callable[[Trial], float]


def grid(**values: tuple[Any, ...]) -> tuple[Trial, ...]:
    """Return all combinations of settings.

    >>> grid(a=(1, 2), b=(3,))
    ({'a': 1, 'b': 3}, {'a': 2, 'b': 3})
    """
    found: list[Trial] = [{}]
    for key, options in values.items():
        found = [{**trial, key: option} for trial in found for option in options]
    return tuple(found)


def retraining(config: Config, setup: Setup) -> int:
    """Return how many examples one retraining passes."""
    return config.training.epochs * len(setup.task.train.labels)


def baseline_unlearners(config: Config, setup: Setup, name: str, rewind: float) -> dict[str, Unlearner]:
    """Return the config's baselines for one forget set; `rewind` is the error that SCRUB+R goes back to."""
    problem = setup.problems[name]
    forget, retain = len(problem.forget), len(problem.retain)
    budget = config.method.compute * retraining(config, setup)

    def some(trial: Trial) -> int:
        return round(trial.get("part", 1.0) * retain)

    def both(trial: Trial) -> int:
        return some(trial) + forget

    def side_by_side(trial: Trial) -> int:
        return some(trial) + min(forget, BATCH) * -(-some(trial) // BATCH)

    def tuned(title: str, run: Callable[..., Models], rows: Callable[[Trial], float], **trials: Any) -> Unlearner:
        return _tuned(title, run, rows, budget, grid(**trials))

    def taught(title: str, run: Callable[..., Models], **trials: Any) -> Unlearner:
        return _tuned(title, run, both, budget, grid(**trials), lambda trial: both(trial) * FORWARD)

    def once(title: str, run: Callable[..., Models], passes: float | int, **trials: Any) -> Unlearner:
        def unlearn(problem: Problem, models: Models, keys: Any, trial: Trial) -> Models:
            return run(problem, models, keys, **trial)

        return Unlearner(title, grid(**trials), unlearn, lambda trial: passes)

    newton = max(1, int((budget / retain - 1) / GGN_PASSES))
    known = {
        "nothing": once("doing nothing", baselines.nothing, 0),
        "gradient_ascent": tuned(
            "gradient ascent", baselines.gradient_ascent, lambda trial: forget, learning_rate=RATES, epochs=(5, 20)
        ),
        "retain_descent": tuned(
            "descent on the rest", baselines.retain_descent, some, learning_rate=RATES, part=(0.2, 1.0)
        ),
        "ascent_descent": tuned(
            "ascent and descent", baselines.ascent_descent, both, learning_rate=RATES, ascent=(0.1, 1.0)
        ),
        "neggrad_plus": tuned(
            "NegGrad+", baselines.neggrad_plus, side_by_side, learning_rate=RATES, balance=(0.95, 0.99), part=(0.4,)
        ),
        "random_labels": tuned(
            "random labels", baselines.random_labels, both, learning_rate=RATES, part=(0.2, 1.0)
        ),
        "salun": tuned("SalUn", baselines.salun, both, learning_rate=RATES, saliency=(0.3, 0.7)),
        "scrub": taught("SCRUB", baselines.scrub, learning_rate=RATES, ascents=(1, 3), part=(0.4,)),
        "scrub_rewind": taught(
            "SCRUB+R", partial(_rewound, rewind), learning_rate=RATES, ascents=(2, 6), part=(0.4,)
        ),
        "ssd": once(
            "SSD", baselines.ssd, forget + len(problem.data[1]), alpha=(2.0, 5.0, 10.0, 15.0, 25.0, 50.0),
            strength=(0.3, 1.0),
        ),
        "newton_step": once(
            "Newton step", partial(_cut_short, newton),
            (1 + newton * GGN_PASSES) * retain,
            damping=(1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 0.1, 0.2, 0.3, 1.0, 3.0, 10.0, 30.0),
        ),
        "first_order": once(
            "first-order step", baselines.first_order, forget,
            rate=(0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 10.0),
        ),
        "short": Unlearner(
            f"retraining with {config.method.compute:.0%}",
            grid(learning_rate=(0.01, 0.02, 0.05, 0.1, 0.2, 0.4), peak=(0.17, 0.5)),
            partial(_short, config, setup), lambda trial: _short_epochs(config) * len(problem.data[1]),
        ),
    }  # fmt: skip
    return {name: known[name] for name in config.method.baselines}


def matching(config: Config, setup: Setup, name: str, title: str, shift: Shift) -> Unlearner:
    """Return Datamodel Matching towards a predicted shift of all logits, whose multiplier is part of it."""
    problem, method = setup.problems[name], config.method
    forget, retain = len(problem.forget), len(problem.retain)

    def run(problem: Problem, models: Models, keys: Any, *, settings: Settings, ratio: int) -> Models:
        return dmm.datamodel_matching(
            problem, models, lambda at: shift[at], keys[0], settings=settings,
            forget_repeats=method.forget_repeats, retain_ratio=ratio,
        )  # fmt: skip

    def rows(trial: Trial) -> int:
        return method.forget_repeats * forget + min(trial["ratio"] * forget, retain)

    def targets(trial: Trial) -> float:
        return FORWARD * (forget + min(trial["ratio"] * forget, retain))

    budget = config.method.compute * retraining(config, setup)
    ratios = (max(1, method.retain_ratio // 2), method.retain_ratio)
    return _tuned(
        title, run, rows, budget, grid(learning_rate=(3e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3), ratio=ratios), targets
    )


def _tuned(
    title: str,
    run: Callable[..., Models],
    rows: Callable[[Trial], float],
    budget: float,
    trials: tuple[Trial, ...],
    before: Callable[[Trial], float] = lambda trial: 0.0,
) -> Unlearner:
    """Return a method that fine-tunes for as many epochs of a trial's rows as the budget has, or as the trial says.

    `before` is what it passes once, before any epoch.
    """

    def epochs(trial: Trial) -> int:
        most = max(1, int((budget - before(trial)) / rows(trial)))
        return min(most, trial.get("epochs", most))

    def unlearn(problem: Problem, models: Models, keys: Any, trial: Trial) -> Models:
        own = {key: value for key, value in trial.items() if key not in ("learning_rate", "epochs")}
        settings = Settings(epochs(trial), BATCH, trial["learning_rate"])
        return run(problem, models, keys, settings=settings, **own)

    return Unlearner(title, trials, unlearn, lambda trial: before(trial) + epochs(trial) * rows(trial))


def _cut_short(iterations: int, problem: Problem, models: Models, keys: Any, **settings: Any) -> Models:
    """Take Newton's step with as many iterations as the budget has: how far they get is part of the method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", baselines.UnsolvedWarning)
        return baselines.newton_step(problem, models, keys, iterations=iterations, chunk=2500, **settings)


def _rewound(rewind: float, problem: Problem, models: Models, keys: Any, **settings: Any) -> Models:
    return baselines.scrub(problem, models, keys, rewind=np.full(models.size, rewind), **settings)


def _short_epochs(config: Config) -> int:
    return max(1, int(config.method.compute * config.training.epochs))


def _short(config: Config, setup: Setup, problem: Problem, models: Models, keys: Any, trial: Trial) -> Models:
    """Train anew without the forget set, for a part of the epochs: no model is unlearned."""
    plan = setup.members.plan._replace(epochs=_short_epochs(config))
    training = msgspec.structs.replace(config.training, **trial)
    members = setup.members._replace(plan=plan, optimizer=build.optimizer(training, plan.steps))
    masks = np.ones((models.size, len(problem.data[1])), bool)
    masks[:, problem.forget] = False
    return as_models(ensemble.train(members, problem.data, masks, keys, label="retraining for a short while"))
