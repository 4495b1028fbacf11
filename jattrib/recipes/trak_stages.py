"""The stages of the TRAK recipe: its config, featurizing, choosing the ridge, attributing."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from msgspec import Meta

from jattrib.attribution import trak
from jattrib.core import store, stream, tree
from jattrib.core.progress import track
from jattrib.core.types import Projector
from jattrib.metrics import lds
from jattrib.metrics.bootstrap import Interval
from jattrib.metrics.correlation import spearman
from jattrib.models.outputs import Margin
from jattrib.projection import dense, sketch
from jattrib.recipes import config as configs
from jattrib.recipes import experiment
from jattrib.recipes.experiment import Task, Truth
from jattrib.train.loop import Trained


class Method(configs.Room, frozen=True):
    """How to attribute.

    Attributes:
        checkpoints: models whose gradients are used, each trained on a random subset of its own.
        dim: features an example, k.
        projection: the random projection of the gradients.
        combination: how checkpoints are combined (`attribution.trak.Combination`).
        dampings: ridges to choose from, in units of the mean eigenvalue, by the LDS on held-out models.
        chunk: examples differentiated at once; when left out, as many as suit the machine.
        keep_features: whether the features stay on disk when the run is done (4·k bytes an example and checkpoint).
    """

    checkpoints: configs.Count = 20
    dim: configs.Count = 1024
    projection: Literal["sketch", "dense"] = "sketch"
    combination: trak.Combination = "product_of_means"
    dampings: Annotated[tuple[configs.NonNegative, ...], Meta(min_length=1)] = (0.03, 0.1, 0.3, 1.0)
    chunk: configs.Count | None = None
    keep_features: bool = False


class Config(experiment.ImageConfig, frozen=True, tag_field="recipe", tag="trak"):
    """TRAK on an image classifier; `method` is how to attribute."""

    method: Method = Method()


class Checkpoint(NamedTuple):
    """The features of one checkpoint."""

    train: trak.Features
    queries: trak.Features


class Choice(NamedTuple):
    """The ridge: the LDS of each candidate on the held-out models, and the best candidate."""

    dampings: tuple[float, ...]
    held_out: tuple[float, ...]
    best: float


class Found(NamedTuple):
    """The attributions and what the retrained models say of them.

    Attributes:
        scores: of all checkpoints.
        counts: numbers of checkpoints.
        by_checkpoints: the LDS at each of them.
        random: the LDS of random scores.
        similarity: the LDS of the cosine of pixels, positive within a class and negative across.
        null: the LDS when models are permuted: where chance ends.
        ceiling: the LDS that perfect scores would have, from the correlation between seeds.
    """

    scores: Float[np.ndarray, "n q"]
    counts: tuple[int, ...]
    by_checkpoints: tuple[lds.LDS, ...]
    random: Interval
    similarity: lds.LDS
    null: lds.Null
    ceiling: lds.Ceiling


def projector(config: Config) -> Projector:
    """Return the projector that the config asks for."""
    return {"sketch": sketch.projector, "dense": dense.projector}[config.method.projection](config.method.dim)


def check_projection(config: Config, task: Task) -> None:
    """Refuse a projection that does not fit the model, before anything is trained.

    Raises:
        InvalidInputError: its dimension is larger than the number of parameters.
    """
    params, _ = jax.eval_shape(task.members.model.init, task.keys["projection"])
    projector(config).init(task.keys["projection"], params)


def featurize(config: Config, task: Task, trained: Trained, folder: Path) -> list[Checkpoint]:
    """Return the projected gradients of training examples and queries at every checkpoint."""
    method, found = config.method, []
    projection = projector(config)
    sources = {"train": stream.InMemory(tuple(task.train)), "queries": stream.InMemory(tuple(task.queries))}
    digests = {name: tree.digest(source.batch) for name, source in sources.items()}
    total = method.checkpoints * sum(len(source) for source in sources.values())
    with track(total, "featurizing") as advance:
        for number in range(method.checkpoints):
            params, state = jax.tree.map(lambda leaf, number=number: leaf[number], (trained.params, trained.state))
            output = Margin(task.members.model.apply, state)
            key = jax.random.fold_in(task.keys["projection"], number)
            both = []
            for name, source in sources.items():
                identity = {
                    "checkpoint": tree.digest((params, state)), "data": digests[name], "key": tree.digest(key),
                    "projection": method.projection,
                }  # fmt: skip
                rows = store.Rows.create_or_open(
                    folder / f"{name}_{number:04d}", arrays=trak.layout(projection), length=len(source), chunk=1024,
                    identity=identity,
                )  # fmt: skip
                both.append(
                    trak.features(
                        output, params, source, projector=projection, key=key, chunk=method.chunk, into=rows,
                        progress=False,
                    )
                )  # fmt: skip
                advance(len(source))
            found.append(Checkpoint(*both))
    return found


def choose_damping(config: Config, features: list[Checkpoint], held_out: Truth) -> Choice:
    """Return the ridge whose scores rank the held-out models best."""
    measured = []
    for scores in scores_by_damping(config, features).values():
        predicted, actual = lds.predict(scores, held_out.masks), held_out.outputs.mean(axis=1)
        measured.append(float(np.nanmean(spearman(predicted, actual).values)))
    dampings = config.method.dampings
    return Choice(dampings, tuple(measured), dampings[int(np.argmax(measured))])


def scores_by_damping(config: Config, features: list[Checkpoint]) -> dict[float, Float[np.ndarray, "n q"]]:
    """Return the scores of all the checkpoints together for each of the config's ridges."""
    method = config.method
    totals: dict[float, trak.Total] = {}
    with track(len(features), "choosing the ridge") as advance:
        for checkpoint in features:
            gram = trak.mean_gram(checkpoint.train.gradients)
            unit = trak.mean_eigenvalue(checkpoint.train.gradients)
            for damping in method.dampings:
                part = trak.products(checkpoint.train, checkpoint.queries.gradients, damping=damping * unit, gram=gram)
                totals[damping] = trak.add(totals.get(damping), part)
            advance(1)
    return {damping: np.asarray(trak.mean(total, combination=method.combination)) for damping, total in totals.items()}


def attribute(config: Config, task: Task, features: list[Checkpoint], choice: Choice, truth: Truth) -> Found:
    """Return the scores, and their LDS at several numbers of checkpoints beside what it is to be compared with."""
    counts, measured, total, scores = checkpoint_counts(len(features)), [], None, np.zeros((0, 0), np.float32)
    key, actual = task.keys["statistics"], truth.outputs.mean(axis=1)
    with track(len(features), "attributing") as advance:
        for number, checkpoint in enumerate(features, 1):
            damping = choice.best * trak.mean_eigenvalue(checkpoint.train.gradients)
            total = trak.add(total, trak.products(checkpoint.train, checkpoint.queries.gradients, damping=damping))
            if number in counts:
                scores = np.asarray(trak.mean(total, combination=config.method.combination))
                measured.append(lds.lds_expected(scores, truth.masks, truth.outputs, key=key))
            advance(1)
    return Found(
        scores=scores,
        counts=counts,
        by_checkpoints=tuple(measured),
        random=lds.random_baseline(truth.masks, actual, key=key),
        similarity=lds.lds_expected(experiment.similarity(task), truth.masks, truth.outputs, key=key),
        null=lds.permutation_null(lds.predict(scores, truth.masks), actual, key=key),
        ceiling=lds.noise_ceiling(truth.outputs),
    )


def checkpoint_counts(most: int) -> tuple[int, ...]:
    """Return the numbers of checkpoints at which the LDS is measured: 1, 2, 5, 10, 20, 50, ... and all.

    >>> checkpoint_counts(30)
    (1, 2, 5, 10, 20, 30)
    """
    steps = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
    return (*(step for step in steps if step < most), most)
