"""The stages of the comparison: what attributors are given, the truths, how each is measured and charged."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import msgspec
import numpy as np
from jaxtyping import Bool, Float

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.metrics import brittleness, lds
from jattrib.metrics.bootstrap import Interval
from jattrib.metrics.brittleness import Brittleness
from jattrib.metrics.correlation import spearman
from jattrib.recipes import experiment, rundir, trak_stages
from jattrib.recipes.comparison_base import Attributor, Candidates, Config, Context, Evaluation, OneRun
from jattrib.recipes.experiment import FixedTruth, Task, Truth
from jattrib.train import ensemble
from jattrib.train.loop import Trained

LONG = 10.0
"""Seconds from which an attributor is not called twice."""

TOLERANCE = 0.1
"""Brackets of flipping removals are closed to this part of them."""


class Truths(NamedTuple):
    """Retrained models: of both protocols, those that are reported on and those that choices are made on."""

    expected: Truth
    expected_held_out: Truth
    fixed: FixedTruth
    fixed_held_out: FixedTruth


class References(NamedTuple):
    """Between what an LDS lies: what perfect predictions would have of noisy outputs, and where chance ends."""

    ceiling: lds.Ceiling
    expected_chance: Interval
    fixed_chance: Interval


class Measured(NamedTuple):
    """What is reported of an attributor.

    Attributes:
        method: which one.
        expected: the LDS against expected outputs.
        fixed: the LDS against one run.
        expected_choice: what was chosen for the one, on held-out models; None where there was no choice.
        fixed_choice: what was chosen for the other.
        trainings: how many trainings it takes, a model on a part of the examples counting that part; of one that
            replays a training, what that takes in terms of the time of a training here.
        seconds: what it takes in all, training included.
    """

    method: Attributor
    expected: lds.LDS
    fixed: lds.LDS
    expected_choice: float | None
    fixed_choice: float | None
    trainings: float = 0.0
    seconds: float = 0.0


class Prices(NamedTuple):
    """Seconds of a model on a random subset, of a run on all examples, of the projected gradients at one model."""

    subset_model: float
    run: float
    features: float
    alpha: float


class Flips(NamedTuple):
    """Which queries' predictions were to be flipped, and by each ranking how many images that took."""

    queries: tuple[int, ...]
    limit: int
    found: dict[str, Brittleness]
    trained: int


def check(config: Config, methods: tuple[Attributor, ...]) -> None:
    """Refuse a config that asks for methods or models that there are not, before anything is trained.

    Raises:
        InvalidInputError: `method.counts` is above `method.checkpoints`, or `method.brittle` names no attributor.
    """
    if max(config.method.counts) > config.method.checkpoints:
        raise InvalidInputError(
            f"method.counts up to {max(config.method.counts)}",
            expected=f"at most method.checkpoints = {config.method.checkpoints}",
            remedy="train more checkpoints, or lower the counts",
        )
    names = [method.name for method in methods]
    for name in config.method.brittle:
        if name not in names:
            raise InvalidInputError(
                f"method.brittle with {name!r}", expected=f"some of {', '.join(names)}", remedy="name attributors"
            )


def prepare(config: Config, task: Task, directory: rundir.RunDir) -> Context:
    """Train the models that attributors use, and project the gradients at each."""
    with rundir.stage(directory, "checkpoints") as folder:
        masks = experiment.draw(config, task, "checkpoints", config.method.checkpoints)
        keys = experiment.member_keys(task, "checkpoints", config.method.checkpoints, seeds=1)
        trained = ensemble.train(
            task.members, tuple(task.train), masks, keys, directory=folder / "models", identity=task.identity,
            label="training checkpoints",
        )  # fmt: skip
    models = experiment.retrain(config, task, directory, "checkpoints", config.method.datamodels, seeds=1)
    whole = train_whole(config, task, directory)
    with rundir.stage(directory, "features") as folder:
        features = trak_stages.featurize(config, task, trained, folder)
    with rundir.stage(directory, "own_features") as folder:
        once = msgspec.structs.replace(config, method=msgspec.structs.replace(config.method, checkpoints=1))
        own = trak_stages.featurize(once, task, whole, folder)[0]
    whole = jax.tree.map(lambda leaf: leaf[0], whole)
    return Context(config, task, whole, features, own, models, directory.path / rundir.RESUME / "attributing")


def train_whole(config: experiment.Config, task: Task, directory: rundir.RunDir) -> Trained:
    """Train the one run on all examples, whose repetitions without some are the fixed-seed truth; a stack of one."""
    with rundir.stage(directory, "whole") as folder:
        members, key = experiment.paired(config, task)
        everything = np.ones((1, len(task.train.labels)), bool)
        return ensemble.train(
            members._replace(width=1), tuple(task.train), everything, key, directory=folder / "models",
            identity=task.identity, label="training on everything",
        )  # fmt: skip


def retrain(config: experiment.Config, task: Task, directory: rundir.RunDir, evaluation: Evaluation) -> Truths:
    """Ask the truth of both protocols, and that of held-out models."""

    def fixed(name: str, subsets: int) -> FixedTruth:
        fraction = evaluation.fixed_fraction
        return experiment.retrain_fixed(config, task, directory, fraction=fraction, subsets=subsets, name=name)

    return Truths(
        expected=experiment.retrain(config, task, directory, "subsets", evaluation.subsets),
        expected_held_out=experiment.retrain(config, task, directory, "held_out", evaluation.held_out_subsets),
        fixed=fixed("fixed", evaluation.fixed_subsets),
        fixed_held_out=fixed("fixed_held_out", evaluation.fixed_held_out_subsets),
    )


def references(task: Task, truths: Truths) -> References:
    """Return the noise ceiling, and the LDS of random scores in both protocols."""
    key, (masks, outputs) = task.keys["statistics"], truths.expected
    return References(
        lds.noise_ceiling(outputs),
        lds.random_baseline(masks, outputs.mean(axis=1), key=key),
        lds.random_baseline(truths.fixed.masks, truths.fixed.outputs, key=key),
    )


def timed(method: Attributor, context: OneRun) -> tuple[Candidates, float]:
    """Return an attributor's scores and its seconds.

    They are those of a second call, unless the first was so long that compilation is a small part of it.
    """
    begun = time.monotonic()
    candidates = method.candidates(context)
    spent = time.monotonic() - begun
    if spent < LONG:
        begun = time.monotonic()
        method.candidates(context)
        spent = time.monotonic() - begun
    return candidates, spent


def measure(
    task: Task, truths: Truths, method: Attributor, candidates: Candidates
) -> tuple[Measured, Float[np.ndarray, "n q"]]:
    """Choose among the candidates on held-out models and measure the choice; return it for the one run, too."""
    key = task.keys["statistics"]
    held_out = truths.expected_held_out
    expected = _choose(candidates, held_out.masks, held_out.outputs.mean(axis=1))
    fixed = _choose(candidates, truths.fixed_held_out.masks, truths.fixed_held_out.outputs)
    with experiment.naming(method.title):
        found = Measured(
            method=method,
            expected=lds.lds_expected(candidates[expected], truths.expected.masks, truths.expected.outputs, key=key),
            fixed=lds.lds_fixed(candidates[fixed], truths.fixed.masks, truths.fixed.outputs, key=key),
            expected_choice=expected if len(candidates) > 1 else None,
            fixed_choice=fixed if len(candidates) > 1 else None,
        )
    return found, candidates[fixed]


def prices(config: Config, directory: rundir.RunDir) -> Prices:
    """Return what models and gradients took in this run, by the stages that made them."""
    seconds, method = rundir.seconds(directory), config.method
    fixed = seconds[experiment.fixed_stage("fixed", config.evaluation.fixed_fraction)]
    return Prices(
        seconds["checkpoints"] / (method.checkpoints + method.datamodels),
        fixed / (1 + config.evaluation.fixed_subsets),
        seconds["features"] / method.checkpoints,
        config.evaluation.alpha,
    )


def charge(found: Measured, price: Prices, spent: float) -> Measured:
    """Add an attributor's cost: its share of what is trained and featurized for all, and what it spent itself."""
    method = found.method
    trained = method.subset_models * price.subset_model + method.runs * price.run
    return found._replace(
        trainings=method.subset_models * price.alpha + method.runs + method.replays * spent / price.run,
        seconds=trained + method.features * price.features + spent,
    )


def flip(
    config: Config, task: Task, truths: Truths, rankings: Mapping[str, Float[np.ndarray, "n q"]], folder: Path
) -> Flips:
    """Remove training images in the order of each ranking until predictions of the one run flip.

    All rankings and queries are bisected together: a round is one ensemble.
    """
    right = np.flatnonzero(truths.fixed.whole > 0)[: config.evaluation.counterfactual_queries]
    names, n = config.method.brittle, len(task.train.labels)
    if len(right) == 0:
        raise InvalidInputError(
            "no query that the model of all examples classifies correctly",
            expected="a model that is right now and then",
            remedy="train longer, or ask for more queries",
        )
    members, key = experiment.paired(config, task)
    limit = max(1, round(config.evaluation.counterfactual_fraction * n))
    rounds = iter(range(n))

    def retrained(masks: Bool[np.ndarray, "m n"]) -> Float[np.ndarray, "m k"]:
        number = next(rounds)
        outputs = ensemble.collect(
            experiment.query_margins(task), members, tuple(task.train), masks, key[np.zeros(len(masks), int)],
            directory=folder / f"round_{number}", identity={**task.identity, "queries": tree.digest(task.queries)},
            label=f"flipping predictions, round {number + 1}",
        )  # fmt: skip
        return np.tile(outputs[:, right], len(names))

    scores = np.concatenate([rankings[name][:, right] for name in names], axis=1)
    both = brittleness.brittleness(scores, retrained, limit=limit, tolerance=TOLERANCE)
    found = {
        name: brittleness.select(both, np.arange(number * len(right), (number + 1) * len(right)))
        for number, name in enumerate(names)
    }
    return Flips(tuple(right.tolist()), limit, found, 1 + len(both.trials))


def _choose(candidates: Candidates, masks: Bool[np.ndarray, "m n"], actual: Float[np.ndarray, "m q"]) -> float:
    """Return the candidate of highest LDS on held-out models."""
    if len(candidates) == 1:
        return next(iter(candidates))
    found = by_choice(candidates, masks, actual)
    return max(found, key=lambda choice: found[choice])


def by_choice(
    candidates: Candidates, masks: Bool[np.ndarray, "m n"], actual: Float[np.ndarray, "m q"]
) -> dict[float, float]:
    """Return the LDS of each candidate on models that choices are made on.

    A query of which it predicts nothing counts as 0; a candidate that predicts nothing at all has −1, the least.
    """
    found = {choice: spearman(lds.predict(scores, masks), actual) for choice, scores in candidates.items()}
    return {
        choice: -1.0 if each.constant.all() else float(np.mean(np.where(each.constant, 0, each.values)))
        for choice, each in found.items()
    }
