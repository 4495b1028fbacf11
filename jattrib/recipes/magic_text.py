"""MAGIC on a small language model of a real text: which passages taught it to expect another passage?

The recipe trains a decoder on passages, differentiates the log-likelihoods of other passages with respect to the weight
of every training passage, and asks that very run without a random part of them.
"""

from typing import Annotated

import numpy as np
from jaxtyping import Float, Int
from msgspec import Meta

from jattrib.metrics import lds
from jattrib.recipes import build, experiment, magic_stages, magic_text_report, rundir
from jattrib.recipes import config as configs
from jattrib.recipes.magic_text_report import Fidelity, Results


class Method(magic_stages.Method, frozen=True):
    """How to attribute, and on what the attributions are held, passages for images.

    Attributes:
        cost_steps: steps of the run that the cost is measured on.
    """

    fractions: Annotated[tuple[configs.Fraction, ...], Meta(min_length=1)] = (0.01,)
    subsets: Annotated[int, Meta(ge=3)] = 40
    smoothness_fraction: configs.Fraction = 0.01
    cost_steps: configs.Count = 4


class Config(experiment.Config, frozen=True, tag_field="recipe", tag="magic_text"):
    """MAGIC on a text; `method` is how to attribute.  Of `evaluation` only the number of queries is used."""

    data: configs.Text
    model: configs.Gpt
    training: configs.AdamTraining
    method: Method = Method()

    @property
    def parts(self) -> dict[str, float]:
        """Also what the one run is repeated without."""
        return {**super().parts, **self.method.parts}


def run(config: Config, directory: rundir.RunDir) -> None:
    """Differentiate, verify, measure the cost, and write pictures, report and summary."""
    task = experiment.prepare(config, directory)
    magic_stages.check_cost(config.method, len(build.load_data(config.data)[1].labels))
    with rundir.stage(directory, "metagradient") as folder:
        found = magic_stages.attribute(config, task, folder, fraction=config.method.smoothness_fraction)
    truths = tuple(
        experiment.retrain_fixed(config, task, directory, fraction=fraction, subsets=config.method.subsets)
        for fraction in config.method.fractions
    )
    with rundir.stage(directory, "cost") as folder:
        cost = magic_stages.measure_cost(
            config, task, folder, count=config.method.cost_queries, steps=config.method.cost_steps
        )
    fidelity = tuple(compare(task, found, truth) for truth in truths)
    magic_text_report.write(directory, Results(config, task, found, truths, fidelity, cost))


def compare(task: experiment.Task, found: magic_stages.Found, truth: experiment.FixedTruth) -> Fidelity:
    """Return how well scores, and shared trigrams, predict the run without random passages."""
    key = task.keys["statistics"]
    change = truth.outputs.astype(np.float64) - truth.whole
    foretold = -(~truth.masks).astype(np.float64) @ found.scores
    similar = similarity(task.train.labels, task.queries.labels)
    return Fidelity(
        lds.lds_fixed(found.scores, truth.masks, truth.outputs, key=key),
        lds.lds_fixed(similar, truth.masks, truth.outputs, key=key),
        float(np.linalg.norm(foretold - change) / np.linalg.norm(change)),
    )


def similarity(train: Int[np.ndarray, "n t"], queries: Int[np.ndarray, "q t"]) -> Float[np.ndarray, "n q"]:
    """Return the cosine of the counts of characters three in a row: the cheapest attribution of text there is."""
    base = int(max(train.max(), queries.max())) + 2
    grams = [(each[:, :-2] + 1) * base**2 + (each[:, 1:-1] + 1) * base + each[:, 2:] + 1 for each in (train, queries)]
    known = np.unique(np.concatenate([each.ravel() for each in grams]))
    counts = []
    for each, labels in zip(grams, (train, queries), strict=True):
        found = np.zeros((len(each), len(known)), np.float32)
        rows = np.broadcast_to(np.arange(len(each))[:, None], each.shape)
        np.add.at(found, (rows, np.searchsorted(known, each)), labels[:, 2:] >= 0)
        counts.append(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12))
    return counts[0] @ counts[1].T
