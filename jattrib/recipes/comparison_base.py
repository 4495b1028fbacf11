"""What the comparison is told, what an attributor is, and what each of them is given.

An attributor sees the training set, the queries and trained models, never the retrained models that it is judged by.
Where it has something to choose, as a rule a damping, it returns scores for every choice: the recipe chooses on
held-out models, apart for each protocol.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from msgspec import Meta

from jattrib.recipes import config as configs
from jattrib.recipes import experiment, trak_stages
from jattrib.recipes.experiment import Task, Truth
from jattrib.recipes.trak_stages import Checkpoint
from jattrib.train.loop import Trained


class Method(trak_stages.Method, frozen=True):
    """What the attributors are told: TRAK's settings, and more.

    Attributes:
        checkpoints: models on random subsets that attributors may use.
        counts: with how many of them TRAK is measured.
        datamodels: how many models on random subsets the datamodels regress.
        thresholds: of the difference of means, in standard errors, to choose from.
        held_out_fraction: the part of these models that chooses the LASSO's penalties.
        logra_rank: features of either side of a layer in LoGra.
        ridges: dampings of iterative curvature solvers, in units of the mean eigenvalue of the whole curvature.
        curvature_examples: random training examples whose curvature the iterative solvers take.
        iterations: of conjugate gradients, at most.
        lissa_steps: terms of LiSSA's series, each of a random batch.
        arnoldi_steps: products from which Arnoldi's eigenvectors are made; half as many are kept.
        tracin_checkpoints: places along the one run at which TracIn takes gradients.
        brittle: the attributors by whose ranking training images are removed until predictions flip.
    """

    checkpoints: configs.Count = 50
    dampings: tuple[configs.NonNegative, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    counts: tuple[configs.Count, ...] = (1, 10, 20, 50)
    datamodels: configs.Count = 1000
    thresholds: tuple[configs.NonNegative, ...] = (0.0, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0)
    held_out_fraction: configs.Fraction = 0.1
    logra_rank: configs.Count = 32
    ridges: tuple[configs.Positive, ...] = (0.1, 1.0, 10.0, 100.0)
    curvature_examples: configs.Count = 1000
    iterations: configs.Count = 15
    lissa_steps: configs.Count = 100
    arnoldi_steps: configs.Count = 200
    tracin_checkpoints: configs.Count = 6
    brittle: tuple[str, ...] = ("trak_20", "magic", "similarity", "random")


class Evaluation(experiment.Evaluation, frozen=True):
    """The ground truths of both protocols.

    Attributes:
        fixed_fraction: the part of the training set that is left out of the one run, seed and order fixed.
        fixed_subsets: random parts of that size whose models the fixed-seed LDS is measured on.
        fixed_held_out_subsets: further ones, for choices alone.
        counterfactual_queries: queries whose predictions are flipped, the first ones that are classified correctly.
        counterfactual_fraction: the largest part of the training set that is removed to flip one.
    """

    queries: Annotated[int, Meta(ge=2)] = 64
    fixed_fraction: configs.Fraction = 0.01
    fixed_subsets: Annotated[int, Meta(ge=3)] = 100
    fixed_held_out_subsets: Annotated[int, Meta(ge=2)] = 20
    counterfactual_queries: configs.Count = 10
    counterfactual_fraction: configs.Fraction = 0.2


class Config(trak_stages.Config, frozen=True, tag_field="recipe", tag="comparison"):
    """Every attributor on the same models and queries of an image classifier."""

    method: Method = Method()
    evaluation: Evaluation = Evaluation()

    @property
    def parts(self) -> dict[str, float]:
        """Also what the one run is repeated without."""
        return {**super().parts, "evaluation.fixed_fraction": self.evaluation.fixed_fraction}


@runtime_checkable
class OneRun(Protocol):
    """What attributors are given that take gradients at the one run: a part of a `Context`, of any recipe's config."""

    @property
    def config(self) -> Any:
        """The whole config; its `method` has the attributor's settings."""
        ...

    @property
    def task(self) -> Task:
        """The training set, the queries, how models are trained, keys."""
        ...

    @property
    def whole(self) -> Trained:
        """The one run on all examples."""
        ...


class Context(NamedTuple):
    """What attributors are given.

    Attributes:
        config: the whole config.
        task: the training set, the queries, how models are trained, keys.
        whole: the one run on all examples, whose repetitions without some are the fixed-seed truth.
        features: projected gradients at the models on random subsets.
        own: projected gradients at `whole`.
        subset_models: the margins of models on random subsets, the checkpoints first among them.
        folder: where a method may keep what it needs to resume.
    """

    config: Config
    task: Task
    whole: Trained
    features: list[Checkpoint]
    own: Checkpoint
    subset_models: Truth
    folder: Path


Candidates = dict[float, Float[np.ndarray, "n q"]]
"""Scores [source, query] by what is to be chosen, as a rule a damping; one of them where there is no choice."""


class Attributor(NamedTuple):
    """A method and what it needs.

    Attributes:
        name: its name in the summary's keys.
        title: what a reader calls it.
        candidates: from the context to its scores.
        subset_models: how many models on random subsets it needs trained.
        runs: how many models on all examples.
        features: at how many models it needs the projected gradients.
        replays: whether it is a training itself: what it spends then counts as trainings.
    """

    name: str
    title: str
    candidates: Callable[[Any], Candidates]
    subset_models: int = 0
    runs: int = 0
    features: int = 0
    replays: bool = False
