"""The stages of the influence recipe on a text: its config, attributors, their LDS, scores by character."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from msgspec import Meta

from jattrib.attribution import features as kept
from jattrib.attribution import influence as influences
from jattrib.attribution.influence import Top, Vectors
from jattrib.core import store, stream
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Example, Key, OutputFn, Params, Projector, Source
from jattrib.curvature import ekfac as factored_curvature
from jattrib.grads import taps
from jattrib.metrics import lds
from jattrib.models.outputs import Logits, Loss, draw_label, mean_loss, token_losses
from jattrib.projection import factored
from jattrib.recipes import comparison_stages, experiment, magic_text
from jattrib.recipes import config as configs
from jattrib.recipes.comparison_base import Candidates
from jattrib.recipes.experiment import FixedTruth, Task
from jattrib.train.loop import Trained

SHOWN = 6
"""Queries whose attributions are shown."""

NEIGHBOURS = 3
"""Training passages shown on either side."""


class Method(configs.Room, frozen=True):
    """How to attribute.

    Attributes:
        rank: features of either side of a matrix in LoGra.
        dampings: to choose from, in units of the mean eigenvalue: of each layer for EK-FAC, of the features for LoGra.
        chunk: passages differentiated at once.
        fraction: the part of the training passages that the run is repeated without.
        subsets: random parts of that size whose runs the LDS is measured on.
        held_out_subsets: further ones, for the choice of the damping alone.
    """

    rank: configs.Count = 8
    dampings: Annotated[tuple[configs.Positive, ...], Meta(min_length=1)] = (0.01, 0.1, 1.0, 10.0)
    chunk: configs.Count = 64
    fraction: configs.Fraction = 0.01
    subsets: Annotated[int, Meta(ge=3)] = 40
    held_out_subsets: Annotated[int, Meta(ge=2)] = 12


class Config(experiment.Config, frozen=True, tag_field="recipe", tag="influence_text"):
    """Influence functions on a text; `method` is how to attribute.

    Of `evaluation` the numbers of queries and what is said of counterfactuals are used.
    """

    data: configs.Text
    model: configs.Gpt
    training: configs.AdamTraining
    method: Method = Method()

    @property
    def parts(self) -> dict[str, float]:
        """Also what the one run is repeated without."""
        return {**super().parts, "method.fraction": self.method.fraction}


class Setting(NamedTuple):
    """The one run's model and data.

    Attributes:
        loss: of a passage, the mean over its characters.
        output: minus that.
        logits: of a passage.
        params: the trained ones.
        train: the training passages.
        queries: the passages that are attributed.
        gradients: of the queries' outputs.
        values: the queries' outputs.
    """

    loss: Loss
    output: OutputFn
    logits: Logits
    params: Params
    train: Source
    queries: Source
    gradients: Vectors
    values: Float[np.ndarray, " q"]


class Measured(NamedTuple):
    """An attributor, held against the run without random passages.

    Attributes:
        name: in the summary's keys.
        title: what a reader calls it.
        found: its LDS.
        damping: chosen on held-out models; None where there was no choice.
        scores: of that damping.
        directions: the preconditioned gradients of the queries, of a method that has them.
    """

    name: str
    title: str
    found: lds.LDS
    damping: float | None
    scores: Float[np.ndarray, "n q"]
    directions: Vectors | None = None


class Attributed(NamedTuple):
    """Scores by damping, and what they were made from, where that is of use later."""

    scores: Candidates
    directions: dict[float, Vectors] | None = None


class Tokens(NamedTuple):
    """The passages of highest and lowest score of the queries that are shown, and the scores of their characters."""

    helpful: Top
    harmful: Top
    of_helpful: Float[np.ndarray, "q k t"]
    of_harmful: Float[np.ndarray, "q k t"]


def check(config: Config) -> None:
    """Refuse more counterfactual queries or fewer passages than there are, before anything is trained.

    Raises:
        InvalidInputError: `evaluation.counterfactual_queries` is below two or above `evaluation.queries`.
    """
    count, most = config.evaluation.counterfactual_queries, config.evaluation.queries
    if not 2 <= count <= most:
        raise InvalidInputError(
            f"evaluation.counterfactual_queries = {count}",
            expected=f"from 2 to evaluation.queries = {most}",
            remedy="change one of them",
        )


def setting(config: Config, task: Task, whole: Trained) -> Setting:
    """Return the one run's functions and data, and the gradients of the queries' outputs."""
    apply, state = task.members.model.apply, whole.state
    params, output = jax.tree.map(jnp.asarray, whole.params), experiment.output(task)(state)
    train, queries = stream.InMemory(tuple(task.train)), stream.InMemory(tuple(task.queries))
    values = jax.jit(jax.vmap(output, in_axes=(None, 0)))(params, jax.tree.map(jnp.asarray, tuple(task.queries)))
    found = influences.gradients(output, params, queries, chunk=config.method.chunk)
    return Setting(Loss(apply, state), output, Logits(apply, state), params, train, queries, found, np.asarray(values))


def ekfac(config: Config, task: Task, here: Setting, folder: Path) -> Attributed:
    """Return influence with EK-FAC's inverse, by relative damping of each layer.

    The Fisher matrix of `Σ_t ℓ_t / √T` is the Gauss-Newton matrix of the mean loss, so that scores have its scale.
    """
    del folder
    fisher = factored_curvature.true_fisher(here.logits, _rooted, draw_label, key=_key(task, 0))
    curvature = factored_curvature.fit(fisher, here.params, here.train, chunk=config.method.chunk, progress=False)
    directions = {
        damping: factored_curvature.inverse(curvature, relative_damping=damping)(here.gradients)
        for damping in config.method.dampings
    }
    scores = {
        damping: influences.scores(here.loss, here.params, here.train, each, chunk=config.method.chunk, progress=False)
        for damping, each in directions.items()
    }
    return Attributed(scores, directions)


def logra(config: Config, task: Task, here: Setting, folder: Path) -> Attributed:
    """Return influence of factored projections of the linear layers, whose features are kept on disk, by damping."""
    row = jax.tree.map(lambda leaf: leaf[0], here.train.take(np.zeros(1, int)))
    plan = factored.plan(taps.find(here.loss, here.params, row), rank=config.method.rank, select=["layers/*/kernel"])
    projector, key = factored.projector(plan), _key(task, 1)
    rows = _store(projector, here, key, folder)
    settings: dict[str, Any] = {"projector": projector, "key": key, "chunk": config.method.chunk}
    train = kept.features(here.loss, here.params, here.train, into=rows, **settings)
    asked = jnp.asarray(np.asarray(kept.features(here.output, here.params, here.queries, **settings)))
    return Attributed({
        damping: kept.scores(train, kept.inverse(train, relative_damping=damping)(asked))
        for damping in config.method.dampings
    })  # fmt: skip


def gradient_dot(config: Config, task: Task, here: Setting, folder: Path) -> Attributed:
    """Return minus the inner product of a passage's gradient with a query's."""
    del task, folder
    found = influences.gradient_dot(here.loss, here.params, here.train, here.gradients, chunk=config.method.chunk)
    return Attributed({0.0: found})


def trigrams(config: Config, task: Task, here: Setting, folder: Path) -> Attributed:
    """Return the cosine of the counts of characters three in a row."""
    del config, here, folder
    return Attributed({0.0: magic_text.similarity(task.train.labels, task.queries.labels)})


METHODS: dict[str, tuple[str, Callable[[Config, Task, Setting, Path], Attributed]]] = {
    "ekfac": ("EK-FAC", ekfac),
    "logra": ("LoGra", logra),
    "gradient_dot": ("gradient dot", gradient_dot),
    "similarity": ("shared trigrams", trigrams),
}
"""By the name in the summary's keys; passages are shown, and left out, by the first."""


def measure(
    task: Task, name: str, title: str, found: Attributed, *, held_out: FixedTruth, truth: FixedTruth
) -> Measured:
    """Choose the damping on held-out models, and measure the choice on others."""
    by_damping = comparison_stages.by_choice(found.scores, held_out.masks, held_out.outputs)
    best = max(by_damping, key=lambda damping: by_damping[damping])
    scores = np.asarray(found.scores[best])
    measured = lds.lds_fixed(scores, truth.masks, truth.outputs, key=task.keys["statistics"])
    directions = None if found.directions is None else found.directions[best]
    return Measured(name, title, measured, best if len(by_damping) > 1 else None, scores, directions)


def by_token(here: Setting, measured: Measured) -> Tokens:
    """Return the passages of the most extreme scores of the first queries, and their characters' parts of the scores.

    The parts are those of `measured`, which must have directions; they add up to the passage's score.
    """
    assert measured.directions is not None
    count, n = min(SHOWN, measured.scores.shape[1]), len(here.train)
    k = min(NEIGHBOURS, n)
    ends = [
        influences.best([(0, measured.scores[:, :count])], k=k, count=n, harmful=harmful) for harmful in (False, True)
    ]
    losses, parts = jax.tree_util.Partial(_losses, here.logits), []
    for end in ends:
        some = stream.Subset(here.train, end.indices.ravel())
        shown = jax.tree.map(lambda leaf: leaf[:count], measured.directions)
        found = influences.token_scores(losses, here.params, some, shown) * (len(some) / n)  # of n passages in all
        found = np.moveaxis(found.reshape(count, k, -1, count), 3, 0)
        parts.append(found[np.arange(count), np.arange(count)])
    return Tokens(ends[0], ends[1], parts[0], parts[1])


def _store(projector: Projector, here: Setting, key: Key, folder: Path) -> store.Rows:
    identity = kept.identity(here.params, projector=projector, key=key)
    return store.Rows.create_or_open(
        folder / "features", arrays=kept.layout(projector), length=len(here.train), chunk=256, identity=identity
    )


def _rooted(logits: Float[Array, "t c"], example: Example) -> Float[Array, ""]:
    """Return `Σ_t ℓ_t / √T`."""
    labels = jnp.asarray(example[1])
    count = jnp.maximum((labels >= 0).sum(), 1).astype(logits.dtype)
    return mean_loss(logits, labels) * jnp.sqrt(count)


def _losses(logits: Logits, params: Params, example: Example) -> Float[Array, " t"]:
    """Return each character's part of the mean loss."""
    labels = jnp.asarray(example[1])
    losses = token_losses(logits(params, example), labels)
    return losses / jnp.maximum((labels >= 0).sum(), 1).astype(losses.dtype)


def _key(task: Task, number: int) -> Key:
    return jax.random.fold_in(task.keys["projection"], number)
