"""The stages of the influence recipe: its config, and how an attributor is measured."""

from typing import Annotated, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from msgspec import Meta

from jattrib.metrics.correlation import spearman
from jattrib.recipes import comparison_stages, experiment
from jattrib.recipes import config as configs
from jattrib.recipes.comparison_base import Attributor, Evaluation
from jattrib.recipes.comparison_stages import Measured, Truths
from jattrib.recipes.experiment import Task
from jattrib.train.loop import Trained


class Method(configs.Room, frozen=True):
    """What the curvatures are told.

    Attributes:
        dampings: to choose from, in units of the mean eigenvalue: of each layer for EK-FAC and DataInf, of the features
            for LoGra, of the whole curvature for CG and Arnoldi.
        curvature_examples: random training examples whose Gauss-Newton matrix CG takes.
        iterations: of conjugate gradients, at most.
        arnoldi_steps: products from which Arnoldi's eigenvectors are made; half as many are kept.
        logra_rank: features of either side of a layer in LoGra.
    """

    dampings: Annotated[tuple[configs.Positive, ...], Meta(min_length=1)] = (0.01, 0.1, 1.0, 10.0, 100.0)
    curvature_examples: configs.Count = 1000
    iterations: configs.Count = 15
    arnoldi_steps: configs.Count = 200
    logra_rank: configs.Count = 32

    @property
    def ridges(self) -> tuple[float, ...]:
        """Dampings of solvers that know the whole curvature alone."""
        return self.dampings


class Config(experiment.ImageConfig, frozen=True, tag_field="recipe", tag="influence"):
    """Influence functions on an image classifier; `method` is how curvatures are inverted."""

    method: Method = Method()
    evaluation: Evaluation = Evaluation()

    @property
    def parts(self) -> dict[str, float]:
        """Also what the one run is repeated without."""
        return {**super().parts, "evaluation.fixed_fraction": self.evaluation.fixed_fraction}


class Run(NamedTuple):
    """What attributors are given: config, task, and the one run on all examples."""

    config: Config
    task: Task
    whole: Trained


class Curve(NamedTuple):
    """An attributor that was measured.

    Attributes:
        found: on reported models, by the damping chosen on held-out ones.
        held_out: by damping, the LDS on held-out models of random halves.
        scores: those of the damping chosen there.
        seconds: what its scores for all dampings took, without compilation where that is not a small part.
    """

    found: Measured
    held_out: dict[float, float]
    scores: Float[np.ndarray, "n q"]
    seconds: float


def one(trained: Trained) -> Trained:
    """Return the only run of a stack."""
    return jax.tree.map(lambda leaf: leaf[0], trained)


def measure(run: Run, truths: Truths, method: Attributor) -> Curve:
    """Return an attributor's LDS in both protocols, and its LDS on held-out models at every damping."""
    candidates, seconds = comparison_stages.timed(method, run)
    found, _ = comparison_stages.measure(run.task, truths, method, candidates)
    held_out = truths.expected_held_out
    by_damping = comparison_stages.by_choice(candidates, held_out.masks, held_out.outputs.mean(axis=1))
    chosen = next(iter(candidates)) if found.expected_choice is None else found.expected_choice
    return Curve(found, by_damping, np.asarray(candidates[chosen]), seconds)


def agreement(curve: Curve, other: Curve) -> float:
    """Return the mean over queries of Spearman's ρ between the scores of two attributors."""
    return float(np.nanmean(spearman(curve.scores, other.scores).values))
