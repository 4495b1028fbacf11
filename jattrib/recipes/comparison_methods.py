"""What the comparison compares: a list of attributors, and what each of them is given.

An attributor sees the training set, the queries and trained models, never the retrained models that it is judged by.
Where it has something to choose, as a rule a damping, it returns scores for every choice: the recipe chooses on
held-out models, apart for each protocol.  A new attributor is one line of `attributors`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jattrib.metrics import bootstrap
from jattrib.recipes import config as configs
from jattrib.recipes import experiment, trak_stages
from jattrib.recipes.experiment import Task
from jattrib.recipes.trak_stages import Checkpoint
from jattrib.train.loop import Trained


class Method(trak_stages.Method, frozen=True):
    """What the attributors are told: TRAK's settings, and more.

    Attributes:
        checkpoints: models on random subsets that attributors may use.
        counts: with how many of them TRAK is measured.
        brittle: the attributors by whose ranking training images are removed until predictions flip.
    """

    checkpoints: configs.Count = 50
    dampings: tuple[configs.NonNegative, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    counts: tuple[configs.Count, ...] = (1, 10, 20, 50)
    brittle: tuple[str, ...] = ("trak_20", "gradient_cosine", "similarity", "random")


class Evaluation(experiment.Evaluation, frozen=True):
    """The ground truths of both protocols.

    Attributes:
        fixed_fraction: the part of the training set that is left out of the one run, seed and order fixed.
        fixed_subsets: random parts of that size whose models the fixed-seed LDS is measured on.
        fixed_held_out_subsets: further ones, for choices alone.
        counterfactual_queries: queries whose predictions are flipped, the first ones that are classified correctly.
        counterfactual_fraction: the largest part of the training set that is removed to flip one.
    """

    queries: configs.Count = 64
    fixed_fraction: configs.Fraction = 0.01
    fixed_subsets: configs.Count = 100
    fixed_held_out_subsets: configs.Count = 20
    counterfactual_queries: configs.Count = 10
    counterfactual_fraction: configs.Fraction = 0.2


class Config(trak_stages.Config, frozen=True, tag_field="recipe", tag="comparison"):
    """Every attributor on the same models and queries of an image classifier."""

    method: Method = Method()
    evaluation: Evaluation = Evaluation()


class Context(NamedTuple):
    """What attributors are given.

    Attributes:
        config: the whole config.
        task: the training set, the queries, how models are trained, keys.
        whole: the one run on all examples, whose repetitions without some are the fixed-seed truth.
        features: projected gradients at the models on random subsets.
        own: projected gradients at `whole`.
    """

    config: Config
    task: Task
    whole: Trained
    features: list[Checkpoint]
    own: Checkpoint


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
    """

    name: str
    title: str
    candidates: Callable[[Context], Candidates]
    subset_models: int = 0
    runs: int = 0
    features: int = 0


def attributors(config: Config) -> tuple[Attributor, ...]:
    """Return every attributor that there is, the cheapest first."""
    return (
        Attributor("random", "random scores", random),
        Attributor("similarity", "cosine of pixels", similarity),
        Attributor("gradient_dot", "gradient dot", gradient_dot, runs=1, features=1),
        Attributor("gradient_cosine", "gradient cosine", gradient_cosine, runs=1, features=1),
        *(
            Attributor(f"trak_{count}", f"TRAK, {count}", partial(trak, count), subset_models=count, features=count)
            for count in config.method.counts
        ),
    )


def random(context: Context) -> Candidates:
    """Return independent normal numbers."""
    shape = len(context.task.train.labels), len(context.task.queries.labels)
    draw = bootstrap.generator(jax.random.fold_in(context.task.keys["statistics"], 1)).standard_normal(shape)
    return {0.0: draw}


def similarity(context: Context) -> Candidates:
    """Return the cosine of inputs, positive within a class and negative across."""
    return {0.0: experiment.similarity(context.task)}


def gradient_dot(context: Context) -> Candidates:
    """Return `Q_i φ_i · φ_q`, minus the inner product of a loss' gradient with a margin's, projected, at one model."""
    train, queries = context.own
    return {0.0: train.weights[:, None] * (train.gradients @ queries.gradients.T)}


def gradient_cosine(context: Context) -> Candidates:
    """Return the cosine of a minus loss' gradient with a margin's, projected, at one model."""
    train, queries = (each.gradients / np.linalg.norm(each.gradients, axis=1, keepdims=True) for each in context.own)
    return {0.0: train @ queries.T}


def trak(count: int, context: Context) -> Candidates:
    """Return TRAK's scores from so many models on random subsets, by ridge."""
    return trak_stages.scores_by_damping(context.config, context.features[:count])
