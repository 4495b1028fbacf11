"""What recipes on classifiers share: a task, ground truth by retraining, counterfactuals.

A recipe's config extends `Config`; every function here takes one, and stages of the same name are the same for all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Key, Num
from msgspec import Meta

from jattrib.core import store, tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import OutputFn
from jattrib.data import masks as subset_masks
from jattrib.data.vision import Dataset, check
from jattrib.metrics import counterfactual
from jattrib.models.model import Apply
from jattrib.models.outputs import LogLikelihood, Margin, margin, mean_loss
from jattrib.recipes import build, rundir
from jattrib.recipes import config as configs
from jattrib.train import ensemble
from jattrib.train.loop import Plan, Trained


class Evaluation(configs.Room, frozen=True):
    """The ground truth that attributions are held against.

    Attributes:
        alpha: the part of the training set in a random subset.
        queries: test images that are attributed.
        subsets: random subsets whose models the LDS is measured on.
        seeds: models a subset, whose outputs are averaged.
        held_out_subsets: further subsets, for the choice of the ridge alone.
        counterfactual_queries: queries for which the training set is stripped of what helped most.
        counterfactual_fraction: the part of the training set that is then left out.
    """

    alpha: configs.Fraction = 0.5
    queries: Annotated[int, Meta(ge=2)] = 200
    subsets: Annotated[int, Meta(ge=3)] = 100
    seeds: Annotated[int, Meta(ge=2)] = 2
    held_out_subsets: Annotated[int, Meta(ge=2)] = 20
    counterfactual_queries: Annotated[int, Meta(ge=2)] = 50
    counterfactual_fraction: configs.Fraction = 0.1


class Config(configs.Room, frozen=True):
    """What every recipe on a classifier is told.

    Attributes:
        data: where examples come from.
        model: what is trained.
        training: how.
        evaluation: what attributions are held against.
        strategy: how a device trains the models of a chunk (`train.ensemble.Strategy`); `auto`: the fastest of a short
            measurement.  Figures agree between strategies to rounding, within one to the bit.
        width: models in a chunk.
        seed: of everything random.
    """

    data: configs.Data
    model: configs.Model
    training: configs.Training
    evaluation: Evaluation = Evaluation()
    strategy: Literal["auto", ensemble.Strategy] = "auto"
    width: configs.Count = 16
    seed: int = 0

    @property
    def parts(self) -> dict[str, float]:
        """The parts of the training set that are left out or made wrong, by their keys; each is an example or more."""
        return {"evaluation.counterfactual_fraction": self.evaluation.counterfactual_fraction}


class ImageConfig(Config, frozen=True):
    """What every recipe on an image classifier is told: its report shows the images."""

    data: configs.Images


class Task(NamedTuple):
    """What the stages share.

    Attributes:
        train: the training set.
        queries: the test images that are attributed.
        query_indices: their places in the test set.
        classes: the classes' names.
        members: how a model is trained.
        measured: seconds a model of each strategy, from which the strategy was chosen.
        keys: one for each thing that is random.
        identity: what every store of the run depends on beside data, masks and keys.
    """

    train: Dataset
    queries: Dataset
    query_indices: Integer[np.ndarray, " q"]
    classes: tuple[str, ...]
    members: ensemble.Ensemble
    measured: dict[str, float]
    keys: dict[str, Key[Array, ""]]
    identity: dict[str, Any]


class Truth(NamedTuple):
    """Models retrained on random subsets: the masks, and the margins of the queries."""

    masks: Bool[np.ndarray, "m n"]
    outputs: Float[np.ndarray, "m s q"]


class FixedTruth(NamedTuple):
    """One training run repeated without random examples: initialisation and order are the same in all of them.

    Attributes:
        masks: what each model was trained on.
        outputs: the margins of the queries.
        whole: the margins of the model of all examples.
    """

    masks: Bool[np.ndarray, "m n"]
    outputs: Float[np.ndarray, "m q"]
    whole: Float[np.ndarray, " q"]


class LeftOut(NamedTuple):
    """What leaving training images out did to the queries' margins.

    Attributes:
        images: how many were left out.
        queries: for how many queries.
        effect: without the most helpful images, without random ones, and the difference.
    """

    images: int
    queries: int
    effect: counterfactual.Effect


KEYS = (
    "queries", "projection", "checkpoints", "held_out", "subsets", "counterfactual", "statistics", "fixed",
    "fixed_held_out", "flipped",
)  # fmt: skip


def prepare(config: Config, directory: rundir.RunDir) -> Task:
    """Load the data, build the model, draw the queries, and measure how an ensemble is best trained here."""
    root = jax.random.key(config.seed)
    keys = {name: jax.random.fold_in(root, number) for number, name in enumerate(KEYS)}
    train, test = build.load_data(config.data)
    sequences = train.labels.ndim == 2  # of tokens, which come out of one alphabet
    count = build.classes(train, test) if sequences else build.classes(train)
    if not sequences:
        check(test, name="test set", classes=count)
    if config.evaluation.queries > len(test.labels):
        raise InvalidInputError(
            f"evaluation.queries = {config.evaluation.queries}",
            expected=f"at most the {len(test.labels)} test images that there are",
            remedy="lower evaluation.queries, or read more test data",
        )
    chosen = np.sort(np.asarray(jax.random.permutation(keys["queries"], len(test.labels)))[: config.evaluation.queries])
    n = len(train.labels)
    _check_parts(config.parts, n)
    plan = Plan(config.training.epochs, config.training.batch_size, round(config.evaluation.alpha * n))
    model = build.build_model(config.model, train.inputs.shape[1:], count)
    members = ensemble.Ensemble(model, build.optimizer(config.training, plan.steps), plan, width=config.width)
    settings = configs.plain(config)
    task = Task(
        train=train,
        queries=Dataset(test.inputs[chosen], test.labels[chosen]),
        query_indices=chosen,
        classes=build.class_names(config.data, count),
        members=members,
        measured={},
        keys=keys,
        identity={name: settings[name] for name in ("model", "training")},
    )
    if config.strategy != "auto":
        return task._replace(members=members._replace(strategy=config.strategy))
    with rundir.stage(directory, "strategy") as folder:
        if not (folder / "measured.json").exists():
            masks = draw(config, task, "checkpoints", config.width)
            measured = ensemble.choose(members, tuple(train), masks, member_keys(task, "checkpoints", config.width, 1))
            store.write_json(folder / "measured.json", measured)
        measured = store.read_json(folder / "measured.json")
    return task._replace(members=members._replace(strategy=min(measured, key=measured.get)), measured=measured)


def _check_parts(parts: dict[str, float], n: int) -> None:
    for name, part in parts.items():
        if not 0 < round(part * n) < n:
            raise InvalidInputError(
                f"{name} = {part} of {n} training examples",
                expected="a part of one example or more, and not of all",
                remedy=f"set it between {1 / n:.2g} and {1 - 1 / n:.4g}",
            )


def draw(config: Config, task: Task, name: str, count: int) -> Bool[np.ndarray, "m n"]:
    """Draw `count` random subsets of the training set."""
    key = jax.random.fold_in(task.keys[name], 0)
    return subset_masks.subsets(key, len(task.train.labels), alpha=config.evaluation.alpha, count=count)


def member_keys(task: Task, name: str, subsets: int, seeds: int) -> Key[Array, " m"]:
    """Return a key for every seed of every subset, seeds of one subset side by side."""
    numbers, seed = np.repeat(np.arange(subsets), seeds), np.tile(np.arange(seeds), subsets)
    return ensemble.member_keys(jax.random.fold_in(task.keys[name], 1), numbers, seed)


def retrain(
    config: Config, task: Task, directory: rundir.RunDir, name: str, subsets: int, *, seeds: int | None = None
) -> Truth:
    """Train models on random subsets of their own and return the queries' margins.

    There are as many seeds a subset as the evaluation says, unless they are given.
    """
    seeds = seeds or config.evaluation.seeds
    masks = draw(config, task, name, subsets)
    with rundir.stage(directory, name) as folder:
        outputs = ensemble.collect(
            query_margins(task), task.members, tuple(task.train), np.repeat(masks, seeds, axis=0),
            member_keys(task, name, subsets, seeds), directory=folder / "margins",
            identity={**task.identity, "queries": tree.digest(task.queries)},
            label=f"retraining, {name.replace('_', ' ')}",
        )  # fmt: skip
    return Truth(masks, outputs.reshape(subsets, seeds, -1))


def retrain_fixed(
    config: Config, task: Task, directory: rundir.RunDir, *, fraction: float, subsets: int, name: str = "fixed"
) -> FixedTruth:
    """Repeat one training run without a random `fraction` of the examples, as many times as `subsets` says.

    The run is that of `paired`.  Subsets depend on `name`, a key of the task: `fixed` for what is reported,
    `fixed_held_out` for choices.
    """
    masks = subset_masks.subsets(
        jax.random.fold_in(task.keys[name], 0), len(task.train.labels), alpha=1 - fraction, count=subsets
    )
    members, key = paired(config, task)
    every = np.concatenate([np.ones((1, masks.shape[1]), bool), masks])
    with rundir.stage(directory, fixed_stage(name, fraction)) as folder:
        outputs = ensemble.collect(
            query_margins(task), members, tuple(task.train), every, key[np.zeros(len(every), int)],
            directory=folder / "margins", identity={**task.identity, "queries": tree.digest(task.queries)},
            label=f"retraining without {fraction:.1%}",
        )  # fmt: skip
    return FixedTruth(masks, outputs[1:], outputs[0])


def fixed_stage(name: str, fraction: float) -> str:
    """Return what the stage of `retrain_fixed` is called."""
    return f"{name}_{fraction:g}".replace(".", "_")


def paired(config: Config, task: Task) -> tuple[ensemble.Ensemble, Key[Array, " 1"]]:
    """Return how models of all examples are trained, what is left out weighing nothing, and the key of one such run."""
    plan = task.members.plan._replace(size=len(task.train.labels))
    optimizer = build.optimizer(config.training, plan.steps)
    members = task.members._replace(plan=plan, optimizer=optimizer, removal="zero_weight")
    return members, ensemble.member_keys(task.keys["counterfactual"], np.zeros(1, int), np.zeros(1, int))


def output(task: Task) -> Callable[[Any], OutputFn]:
    """Return, from a model's state, the output function: the margin, or a sequence's log-likelihood a token."""
    return partial(Margin if task.train.labels.ndim == 1 else LogLikelihood, task.members.model.apply)


def query_margins(task: Task) -> jax.tree_util.Partial:
    """Return the function from a trained model to the margins of the queries; of sequences, their log-likelihoods."""
    return jax.tree_util.Partial(
        _margins, task.members.model.apply, jnp.asarray(task.queries.inputs), jnp.asarray(task.queries.labels)
    )


def _margins(apply: Apply, inputs: Num[Array, "q ..."], labels: Array, trained: Trained) -> Float[Array, " q"]:
    logits, _ = apply(trained.params, trained.state, inputs, train=False)
    return jax.vmap(margin)(logits, labels) if labels.ndim == 1 else -jax.vmap(mean_loss)(logits, labels)


def similarity(task: Task) -> Float[np.ndarray, "n q"]:
    """Return the cosine of inputs, positive within a class and negative across: the cheapest attribution there is."""
    train, queries = (each.inputs.reshape(len(each.inputs), -1) for each in (task.train, task.queries))
    tiny = np.finfo(np.float32).tiny  # of an image of zeros, which is like no other
    train, queries = (each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), tiny) for each in (train, queries))
    same = task.train.labels[:, None] == task.queries.labels[None, :]
    return (train @ queries.T) * np.where(same, np.float32(1), np.float32(-1))


@contextmanager
def naming(title: str) -> Iterator[None]:
    """Say of what is refused within that it is of the attributor called `title`: a run has many."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{title}: {error.got}", expected=error.expected, remedy=error.remedy) from error


def leave_out(config: Config, task: Task, scores: Float[np.ndarray, "n q"], folder: Path) -> LeftOut:
    """Retrain without the images that helped each query most, and without as many random ones.

    All these models share their initialisation and their order: they differ in what was left out alone.
    """
    n, count = len(task.train.labels), min(config.evaluation.counterfactual_queries, scores.shape[1])
    dropped = round(config.evaluation.counterfactual_fraction * n)
    helpful = counterfactual.most_helpful(scores[:, :count], dropped)
    random = counterfactual.random_removal(task.keys["counterfactual"], n, k=dropped, count=count)
    masks = ~np.concatenate([np.zeros((1, n), bool), helpful, random])
    members, key = paired(config, task)
    outputs = ensemble.collect(
        query_margins(task), members, tuple(task.train), masks, key[np.zeros(len(masks), int)],
        directory=folder / "margins", identity={**task.identity, "queries": tree.digest(task.queries)},
        label="retraining without the most helpful",
    )[:, :count]  # fmt: skip
    own = np.arange(count)
    before, after, control = outputs[0], outputs[1 + own, own], outputs[1 + count + own, own]
    effect = counterfactual.effect(before, after, control, key=task.keys["statistics"])
    return LeftOut(dropped, count, effect)
