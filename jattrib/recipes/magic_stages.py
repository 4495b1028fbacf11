"""The stages of the MAGIC recipe: its config, the metagradient, its fidelity and its cost, descent on data weights."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Integer
from msgspec import Meta

from jattrib.attribution import magic
from jattrib.core import params, store
from jattrib.core.errors import InvalidInputError
from jattrib.metrics import lds, mislabelled
from jattrib.recipes import build, experiment
from jattrib.recipes import config as configs
from jattrib.recipes.experiment import FixedTruth, Task, Truth
from jattrib.train import ensemble, replay
from jattrib.train.loop import Plan
from jattrib.train.replay import Run

CALLS = 3
"""Timed runs of each side, the first of which compiles and does not count."""


class Method(configs.Room, frozen=True):
    """How to attribute, and on what the attributions are held.

    Attributes:
        fractions: parts of the training set that are left out, for the LDS of the one run.
        subsets: random subsets of each fraction.
        smoothness_fraction: the part whose removal measures metasmoothness.
        cost_queries: how many queries the cost is measured for.
    """

    fractions: Annotated[tuple[configs.Fraction, ...], Meta(min_length=1)] = (0.01, 0.05, 0.1, 0.5)
    subsets: Annotated[int, Meta(ge=3)] = 50
    smoothness_fraction: configs.Fraction = 0.05
    cost_queries: configs.Count = 64

    @property
    def parts(self) -> dict[str, float]:
        """The parts of the training set that are left out, by their keys."""
        named = {f"method.fractions[{number}]": part for number, part in enumerate(self.fractions)}
        return {**named, "method.smoothness_fraction": self.smoothness_fraction}


class Descent(configs.Room, frozen=True):
    """Metagradient descent on the weights of training images, some of whose labels are wrong.

    Wrong labels do no harm until they are learnt by heart, and training that learns by heart is too rough for its
    derivative to mean much.  So there are two: the recipe's own run, short and smooth, is differentiated, and a longer
    one, which wrong labels hurt, has the weights that were found.  Images no heavier than a cutoff are left out of it;
    the cutoff is the one with which most validation images are classified rightly.

    Attributes:
        flipped: the part of the labels that is made wrong, each to a random other class.
        heldout: whose test images validate and measure; those of the recipe's own data when left out.
        validation: test images that training is to be good for; accuracy is measured on the others.
        objective: of descent, on the validation images: their cross-entropy, or their margins, which need fewer.
        runs: short ones, from different seeds; their mean objective is descended.
        steps: of descent.
        rate: the root mean square of the change of the weights in a step.
        cutoffs: the ones to choose from; 0 leaves out nothing that has any weight.
        training: the longer one.
    """

    flipped: configs.Fraction = 0.2
    heldout: configs.Images | None = None
    validation: configs.Count = 500
    objective: Literal["loss", "margin"] = "margin"
    runs: configs.Count = 1
    steps: configs.Count = 6
    rate: configs.Positive = 0.15
    cutoffs: Annotated[tuple[configs.NonNegative, ...], Meta(min_length=1)] = (0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
    training: configs.Training = configs.Training(epochs=60, learning_rate=0.02, schedule="constant", peak=0.05)


class Config(experiment.ImageConfig, frozen=True, tag_field="recipe", tag="magic"):
    """MAGIC on an image classifier; `method` is how to attribute, `descent` what is done about wrong labels."""

    method: Method = Method()
    descent: Descent = Descent()

    @property
    def parts(self) -> dict[str, float]:
        """Also what the one run is repeated without, and the wrong labels."""
        return {**super().parts, **self.method.parts, "descent.flipped": self.descent.flipped}


class Found(NamedTuple):
    """The scores, and what is known of the run that they are of."""

    scores: Float[np.ndarray, "n q"]
    info: magic.Info


class Fidelity(NamedTuple):
    """What retrained models say of the scores.

    Attributes:
        fixed: the LDS of the one run at each fraction.
        similarity: that of the cosine of pixels.
        error: of predicted changes of outputs at each fraction, relative; 1 is that of predicting none.
        expected: the LDS against expected outputs of models of random subsets, over seeds.
        ceiling: what perfect scores would have there.
    """

    fixed: tuple[lds.LDS, ...]
    similarity: tuple[lds.LDS, ...]
    error: tuple[float, ...]
    expected: lds.LDS
    ceiling: lds.Ceiling


class Cost(NamedTuple):
    """Seconds of one training, and of a metagradient of so many queries."""

    training: float
    metagradient: float
    queries: int


class Descended(NamedTuple):
    """What descent on data weights did.

    Attributes:
        flipped: which labels are wrong.
        weights: those with the lowest objective in the short run.
        step: of descent at which they were reached.
        losses: the objective of the short run on the validation images, at each step, in nats.
        accuracies: of the long run on the other test images, on the weights of each step.
        cutoff: the chosen one.
        accuracy: of the long run there, on the weights that are above it.
        clean: the accuracy there when all labels are right.
        recall: how well low weights find the wrong labels.
    """

    flipped: Bool[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    step: int
    losses: Float[np.ndarray, " steps"]
    accuracies: Float[np.ndarray, " steps"]
    cutoff: float
    accuracy: float
    clean: float
    recall: mislabelled.Recall

    @property
    def recovered(self) -> float | None:
        """The part of the accuracy lost to wrong labels that descent brought back; None where none was lost."""
        lost = self.clean - self.accuracies[0]
        return float((self.accuracy - self.accuracies[0]) / lost) if lost > 0 else None


def check(config: Config) -> None:
    """Refuse numbers that there are not enough test images for, and test images of another kind.

    Raises:
        InvalidInputError: more are asked for than there are, or those that descent is held against do not fit.
    """
    train, test = build.load_data(config.data)
    check_cost(config.method, len(test.labels))
    held = test if config.descent.heldout is None else build.load_data(config.descent.heldout)[1]
    if held.inputs.shape[1:] != train.inputs.shape[1:] or held.labels.max() > train.labels.max():
        raise InvalidInputError(
            f"descent.heldout with images of {held.inputs.shape[1:]} and {held.labels.max() + 1} classes",
            expected=f"images of {train.inputs.shape[1:]} and {train.labels.max() + 1} classes, as in the training set",
            remedy="set descent.heldout.kind to the kind of data, as in descent.heldout.kind=digits",
        )
    _check_most("descent.validation", config.descent.validation, len(held.labels) - 1, len(held.labels))


def check_cost(method: Method, count: int) -> None:
    """Refuse to measure the cost for more queries than the `count` that there are.

    Raises:
        InvalidInputError: it is asked for.
    """
    _check_most("method.cost_queries", method.cost_queries, count, count)


def _check_most(name: str, value: int, most: int, there: int) -> None:
    if value > most:
        raise InvalidInputError(
            f"{name} = {value}", expected=f"at most {most}, with {there} test examples", remedy=f"lower {name}"
        )


def attribute(config: experiment.Config, task: Task, folder: Path, *, fraction: float) -> Found:
    """Return the scores of all queries, from one replay of the run of `experiment.paired`.

    Removing a `fraction` of the examples measures metasmoothness.
    """
    like = {"scores": np.zeros((len(task.train.labels), len(task.queries.labels)), np.float32)}
    like["values"] = like["scores"][0]
    if params.exists(folder / "scores"):
        arrays = params.load_params(folder / "scores", like, task.identity)
        told = store.read_json(folder / "info.json")
        return Found(arrays["scores"], magic.Info(arrays["values"], **{**told, "causes": tuple(told["causes"])}))
    members, key = experiment.paired(config, task)
    run, inputs = replay.member(members, tuple(task.train), key[0])
    scores, info = magic.scores(
        experiment.output(task), run, inputs, jax.tree.map(jnp.asarray, tuple(task.queries)),
        key=task.keys["statistics"], fraction=fraction, directory=folder / "replay",
        identity=task.identity,
    )  # fmt: skip
    store.write_json(folder / "info.json", {name: value for name, value in info._asdict().items() if name != "values"})
    params.save_params(folder / "scores", {"scores": np.asarray(scores), "values": info.values}, task.identity)
    return Found(np.asarray(scores), info)


def measure_cost(config: experiment.Config, task: Task, folder: Path, *, count: int, steps: int | None = None) -> Cost:
    """Return what a metagradient of `count` queries costs beside a training, compiled before; by turns, the medians.

    The run is cut to its first `steps`, if they are given: both sides are as many times longer as the whole is.
    """
    if not (folder / "measured.json").exists():
        _, test = build.load_data(config.data)
        queries = jnp.asarray(test.inputs[:count]), jnp.asarray(test.labels[:count])
        members, key = experiment.paired(config, task)
        run, inputs = replay.member(members, tuple(task.train), key[0])
        output = experiment.output(task)
        run = run._replace(order=jax.tree.map(lambda leaf: leaf[:steps], run.order))
        sides = {
            "training": lambda: replay.train(run, inputs),
            "metagradient": lambda: replay.metagradient(output, run, inputs, queries, progress=False)[:4],
        }
        taken = [{name: _seconds(side) for name, side in sides.items()} for _ in range(CALLS)][1:]
        measured = {name: float(np.median([each[name] for each in taken])) for name in sides}
        store.write_json(folder / "measured.json", {**measured, "queries": count})
    return Cost(**store.read_json(folder / "measured.json"))


def descend(config: Config, task: Task, folder: Path) -> Descended:
    """Flip labels, descend on the weights of the short run, and train the long one on what each step found."""
    settings, train, (_, test) = config.descent, task.train, build.load_data(config.descent.heldout or config.data)
    wrong, labels = flip(task, settings.flipped)
    held, other = (
        (jnp.asarray(test.inputs[part]), jnp.asarray(test.labels[part]))
        for part in (slice(settings.validation), slice(settings.validation, None))
    )
    members, key = experiment.paired(config, task)
    seeds = np.arange(settings.runs)
    keys = ensemble.member_keys(task.keys["counterfactual"], seeds, np.zeros_like(seeds))
    (noisy, inputs), *others = (replay.member(members, (train.inputs, labels), each) for each in keys)
    objective = magic.MeanLoss if settings.objective == "loss" else magic.MarginLoss
    found = magic.descend(
        partial(objective, members.model.apply), noisy, inputs, held,
        optimizer=optax.chain(optax.normalize_by_update_norm(), optax.scale(-settings.rate * len(labels) ** 0.5)),
        steps=settings.steps, others=others, directory=folder / "descent", identity=task.identity,
    )  # fmt: skip
    plan = Plan(settings.training.epochs, settings.training.batch_size, len(labels))
    members = members._replace(plan=plan, optimizer=build.optimizer(settings.training, plan.steps))
    long, inputs = replay.member(members, (train.inputs, labels), key[0])

    def accuracies(run: Run, weights: Float[np.ndarray | Array, " n"]) -> tuple[float, float]:
        """Return the accuracy of the long run on the validation images, and on the others."""
        trained, state = replay.train(run, inputs._replace(weights=jnp.asarray(weights)))
        shares = []
        for images, truth in (held, other):
            logits, _ = members.model.apply(trained, state, images, train=False)
            shares.append(float(np.mean(np.asarray(logits).argmax(axis=1) == np.asarray(truth))))
        return shares[0], shares[1]

    weights = np.asarray(found.weights)
    cut = {cutoff: accuracies(long, np.where(weights > cutoff, weights, 0)) for cutoff in settings.cutoffs}
    cutoff = max(cut, key=lambda each: cut[each][0])
    _, clean = accuracies(long._replace(data=(long.data[0], jnp.asarray(train.labels))), inputs.weights)
    recall = mislabelled.recall(-weights, wrong, key=task.keys["statistics"])
    return Descended(
        wrong, weights, found.step, found.values, np.array([accuracies(long, each)[1] for each in found.path]),
        cutoff, cut[cutoff][1], clean, recall,
    )  # fmt: skip


def flip(task: Task, fraction: float) -> tuple[Bool[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
    """Return which labels are wrong, a random `fraction` of them, and all labels, the wrong ones of other classes."""
    n, count = len(task.train.labels), len(task.classes)
    which, what = (jax.random.fold_in(task.keys["flipped"], number) for number in range(2))
    wrong = np.zeros(n, bool)
    wrong[np.asarray(jax.random.permutation(which, n))[: round(fraction * n)]] = True
    shift = np.asarray(jax.random.randint(what, (n,), 1, count))
    labels = np.where(wrong, (task.train.labels + shift) % count, task.train.labels)
    return wrong, labels.astype(task.train.labels.dtype)


def compare(config: Config, task: Task, found: Found, truths: tuple[FixedTruth, ...], expected: Truth) -> Fidelity:
    """Return how well the scores predict retrained models, in both protocols."""
    key, pixels = task.keys["statistics"], experiment.similarity(task)
    fixed, similarity, error = [], [], []
    for truth in truths:
        fixed.append(lds.lds_fixed(found.scores, truth.masks, truth.outputs, key=key))
        similarity.append(lds.lds_fixed(pixels, truth.masks, truth.outputs, key=key))
        change = truth.outputs.astype(np.float64) - truth.whole
        foretold = -(~truth.masks).astype(np.float64) @ found.scores
        error.append(float(np.linalg.norm(foretold - change) / np.linalg.norm(change)))
    return Fidelity(
        tuple(fixed), tuple(similarity), tuple(error),
        lds.lds_expected(found.scores, expected.masks, expected.outputs, key=key), lds.noise_ceiling(expected.outputs),
    )  # fmt: skip


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - begun
