"""The stages of the unlearning recipe: its config, the forget sets, and the models that all else is made from."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from msgspec import Meta

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError, check_choice
from jattrib.data.vision import Dataset
from jattrib.models.model import Apply
from jattrib.models.outputs import margin
from jattrib.recipes import config as configs
from jattrib.recipes import experiment, magic_stages, rundir
from jattrib.recipes.experiment import Task
from jattrib.train import ensemble
from jattrib.train.loop import Trained
from jattrib.unlearning import finetune
from jattrib.unlearning.finetune import Models, Problem

SETS = {"random": "random images", "coherent": "images that are alike", "mislabelled": "images with wrong labels"}
"""The forget sets, by the names in their figures."""

PARTS = ("forget", "retain", "validation")
"""The points at which margins are measured: those to forget, others that were trained on, and others that were not."""


BASELINES = (
    "nothing", "gradient_ascent", "retain_descent", "ascent_descent", "neggrad_plus", "random_labels", "salun", "scrub",
    "scrub_rewind", "ssd", "newton_step", "first_order", "short",
)  # fmt: skip
"""What attribution is held against (`dmm_methods`)."""

ATTRIBUTIONS = (
    "difference", "lasso", "trak", "cg", "ekfac", "ekfac_rest", "magic", "midpoint", "mean", "paired", "blend",
)  # fmt: skip
"""What predicts (`dmm_attributions`)."""


class Method(configs.Room, frozen=True):
    """How many models, what attributions are told, and how much may be tuned and spent.

    Attributes:
        models: full models that unlearn, N.
        oracles: models retrained without a forget set, that figures are measured against; nothing is chosen on them.
        retrained: others, which stand beside the methods: what is between them and the oracles is the floor.
        tuning_oracles: the first of those others, on which everything is chosen.
        subset_models: models on random subsets, of which attributions are.
        forget: images in the random and the coherent forget set; those with wrong labels are as many as there are.
        mislabelled: the part of the training set whose labels are wrong.
        retained: retained images at which margins are measured.
        tuned_models: full models that a trial fine-tunes.
        compute: the most that fine-tuning may take, as a part of one retraining.
        mean_models: retrained models whose mean shift is a prediction: those others that follow the tuning oracles.
        paired_models: retrained models that share seeds with full ones, whose mean difference is a prediction.
        thresholds: of the denoising, in standard errors, to choose from.
        held_out_fraction: the part of the subset models that chooses the LASSO's penalties.
        trak_models: subset models whose gradients TRAK takes.
        dim: features an example, of TRAK.
        dampings: of TRAK and EK-FAC to choose from, in units of the mean eigenvalue.
        ridges: of conjugate gradients to choose from, in the same units.
        influence_models: full models at which influence is taken.
        iterations: of conjugate gradients.
        replays: runs whose derivative is taken.
        forget_repeats: how often the fine-tuning set holds each image to forget.
        retain_ratio: how many retained images it holds for each of them, at most.
        baselines: which of them.
        attributions: which of them.
    """

    models: configs.Count = 100
    oracles: configs.Count = 100
    retrained: configs.Count = 100
    tuning_oracles: configs.Count = 20
    subset_models: configs.Count = 1000
    forget: configs.Count = 100
    mislabelled: configs.Fraction = 0.02
    retained: configs.Count = 1000
    tuned_models: configs.Count = 10
    compute: configs.Fraction = 0.1
    mean_models: configs.Count = 5
    paired_models: configs.Count = 2
    thresholds: Annotated[tuple[configs.NonNegative, ...], Meta(min_length=1)] = (2.0, 3.0, 3.5, 4.0, 5.0, 6.0)
    held_out_fraction: configs.Fraction = 0.1
    trak_models: configs.Count = 8
    dim: configs.Count = 1024
    dampings: Annotated[tuple[configs.Positive, ...], Meta(min_length=1)] = (0.01, 0.1, 0.3, 1.0)
    ridges: Annotated[tuple[configs.Positive, ...], Meta(min_length=1)] = (0.1, 1.0, 10.0, 100.0)
    influence_models: configs.Count = 2
    iterations: configs.Count = 10
    replays: configs.Count = 1
    forget_repeats: configs.Count = 5
    retain_ratio: configs.Count = 20
    baselines: tuple[str, ...] = BASELINES
    attributions: Annotated[tuple[str, ...], Meta(min_length=1)] = ATTRIBUTIONS


class Config(experiment.ImageConfig, frozen=True, tag_field="recipe", tag="dmm"):
    """Unlearning on an image classifier.

    Of `evaluation` the queries are the validation images, and `alpha` is that of the subset models.
    """

    method: Method = Method()


class Setup(NamedTuple):
    """What all stages share.

    Attributes:
        task: the training set, its wrong labels included, the validation images, how subset models are trained.
        members: how full models and oracles are trained: on all examples, what is left out weighing nothing.
        problems: the forget sets.
        retained: the retained images at which margins are measured, in no forget set.
        keys: one for each thing that is random.
    """

    task: Task
    members: ensemble.Ensemble
    problems: dict[str, Problem]
    retained: Int[np.ndarray, " r"]
    keys: dict[str, Key[Array, ""]]

    @property
    def inputs(self) -> Float[np.ndarray, "x ..."]:
        """All inputs whose logits are kept: the training set, then the validation images."""
        return np.concatenate([self.task.train.inputs, self.task.queries.inputs])

    @property
    def labels(self) -> Int[np.ndarray, " x"]:
        """Their labels, as they were trained on."""
        return np.concatenate([self.task.train.labels, self.task.queries.labels])

    def points(self, name: str) -> dict[str, Int[np.ndarray, " _"]]:
        """Return the places in `inputs` at which a forget set's margins are measured, by part."""
        n = len(self.task.train.labels)
        validation = n + np.arange(len(self.task.queries.labels))
        return dict(zip(PARTS, (self.problems[name].forget, self.retained, validation), strict=True))


class Retrained(NamedTuple):
    """Logits at all points of models retrained without one forget set.

    Attributes:
        oracles: of those that figures are measured against.
        others: of those that are measured beside the methods.
        tuning: of the first of them, on which everything is chosen.
        means: of those that follow, whose mean is a prediction.
        paired: of models that share their seeds with the first full ones.
    """

    oracles: Float[np.ndarray, "o x c"]
    others: Float[np.ndarray, "r x c"]
    tuning: Float[np.ndarray, "t x c"]
    means: Float[np.ndarray, "k x c"]
    paired: Float[np.ndarray, "p x c"]


class Trainings(NamedTuple):
    """All trained models.

    Attributes:
        models: the full models.
        full: their logits at all points.
        retrained: by forget set.
        masks: what the subset models were trained on.
        subsets: their logits at all points.
        checkpoints: the first of the subset models, whole.
    """

    models: Models
    full: Float[np.ndarray, "m x c"]
    retrained: dict[str, Retrained]
    masks: Bool[np.ndarray, "s n"]
    subsets: Float[np.ndarray, "s x c"]
    checkpoints: Models


KEYS = ("sets", "full", "oracles", "subsets", "tuning", "statistics", "attribution")


def check(config: Config) -> None:
    """Refuse numbers of models that do not fit each other, before anything is trained.

    Raises:
        InvalidInputError: more models are to be paired, tuned or differentiated than there are, too few for KLoM, or
            there is no such baseline or attribution.
    """
    method, most = config.method, config.method.models
    for key, known in (("baselines", BASELINES), ("attributions", ATTRIBUTIONS)):
        for number, name in enumerate(getattr(method, key)):
            check_choice(f"method.{key}[{number}]", name, known)
    for name in ("paired_models", "tuned_models", "influence_models"):
        if getattr(method, name) > most:
            raise InvalidInputError(
                f"method.{name} = {getattr(method, name)} of {most} models",
                expected="at most method.models", remedy="train more models, or use fewer",
            )  # fmt: skip
    if min(method.models, method.oracles, method.retrained) < 20 or min(method.tuned_models, method.tuning_oracles) < 8:
        raise InvalidInputError(
            f"method.models = {most}, method.oracles = {method.oracles}, method.retrained = {method.retrained}, "
            f"method.tuned_models = {method.tuned_models}, method.tuning_oracles = {method.tuning_oracles}",
            expected="20 models and oracles or more, for KLoM's 20 bins, and 8 or more to tune with, for its Gaussians",
            remedy="train more: 100, 100, 10 and 20 are the defaults",
        )
    if method.tuning_oracles + method.mean_models > method.retrained:
        raise InvalidInputError(
            f"method.tuning_oracles + method.mean_models = {method.tuning_oracles + method.mean_models}",
            expected=f"at most method.retrained = {method.retrained}", remedy="raise method.retrained",
        )  # fmt: skip
    if method.trak_models > method.subset_models:
        raise InvalidInputError(
            f"method.trak_models = {method.trak_models}",
            expected=f"at most method.subset_models = {method.subset_models}", remedy="lower it",
        )  # fmt: skip


def prepare(config: Config, directory: rundir.RunDir) -> Setup:
    """Load the data, make some labels wrong, and draw the forget sets."""
    task = experiment.prepare(config, directory)
    root = jax.random.fold_in(jax.random.key(config.seed), 1 << 16)
    keys = {name: jax.random.fold_in(root, number) for number, name in enumerate(KEYS)}
    wrong, labels = magic_stages.flip(task, config.method.mislabelled)
    task = task._replace(train=Dataset(task.train.inputs, labels))
    members, _ = experiment.paired(config, task)
    sets = draw_sets(config, task, wrong, keys["sets"])
    others = np.setdiff1d(np.arange(len(labels)), np.concatenate(list(sets.values())))
    count = config.method.retained
    if count > len(others):
        raise InvalidInputError(
            f"method.retained = {count}", expected=f"at most the {len(others)} images that are in no forget set",
            remedy="lower it",
        )  # fmt: skip
    order = np.asarray(jax.random.permutation(jax.random.fold_in(keys["sets"], 2), len(others)))
    apply, data = task.members.model.apply, (task.train.inputs, labels)
    problems = {name: finetune.problem(apply, data, forget) for name, forget in sets.items()}
    return Setup(task, members, problems, np.sort(others[order[:count]]), keys)


def draw_sets(
    config: Config, task: Task, wrong: Bool[np.ndarray, " n"], key: Key[Array, ""]
) -> dict[str, Int[np.ndarray, " f"]]:
    """Return the forget sets: a random image and those nearest to it in its class, random others, the wrong labels."""
    count, clean = config.method.forget, np.flatnonzero(~wrong)
    order = clean[np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(clean)))]
    anchor = order[0]
    alike = clean[task.train.labels[clean] == task.train.labels[anchor]]
    flat = task.train.inputs.reshape(len(task.train.labels), -1)
    distances = np.linalg.norm(flat[alike] - flat[anchor], axis=1)
    coherent = alike[np.argsort(distances, kind="stable")[:count]]
    random = order[~np.isin(order, coherent)][:count]
    if len(coherent) < count or len(random) < count or not wrong.any():
        raise InvalidInputError(
            f"forget sets of {len(random)}, {len(coherent)} and {int(wrong.sum())} images",
            expected=f"{count} random images, {count} of one class, and some with wrong labels",
            remedy="lower method.forget, raise method.mislabelled, or read more data",
        )
    return {"random": np.sort(random), "coherent": np.sort(coherent), "mislabelled": np.flatnonzero(wrong)}


def train(config: Config, setup: Setup, directory: rundir.RunDir) -> Trainings:
    """Train every model that there is: full ones, those without each forget set, those on random subsets."""
    task, method, data = setup.task, config.method, tuple(setup.task.train)
    everything = np.ones((method.models, len(task.train.labels)), bool)
    own = member_keys(setup.keys["full"], method.models)
    with rundir.stage(directory, "full") as folder:
        trained = ensemble.train(
            setup.members, data, everything, own, directory=folder / "models", identity=task.identity,
            label="training models",
        )  # fmt: skip
    models = as_models(trained)
    full = finetune.logits(task.members.model.apply, models, setup.inputs)
    retrained = {name: _retrain(config, setup, directory, name) for name in SETS}
    masks = experiment.draw(config, task, "checkpoints", method.subset_models)
    keys = member_keys(setup.keys["subsets"], len(masks))
    with rundir.stage(directory, "subsets") as folder:
        subsets = ensemble.collect(
            all_logits(setup), task.members, data, masks, keys, directory=folder / "logits", identity=identity(setup),
            label="training on random subsets",
        )  # fmt: skip
    with rundir.stage(directory, "checkpoints") as folder:
        checkpoints = ensemble.train(
            task.members, data, masks[: method.trak_models], keys[: method.trak_models], directory=folder / "models",
            identity=task.identity, label="training checkpoints",
        )  # fmt: skip
    return Trainings(models, full, retrained, masks, subsets, as_models(checkpoints))


def _retrain(config: Config, setup: Setup, directory: rundir.RunDir, name: str) -> Retrained:
    """Train all models without one forget set: those to measure with, to choose on, to predict by."""
    method = config.method
    key = jax.random.fold_in(setup.keys["oracles"], list(SETS).index(name))
    keys = member_keys(key, method.oracles + method.retrained)
    paired = member_keys(setup.keys["full"], method.paired_models)
    mask = np.ones(len(setup.task.train.labels), bool)
    mask[setup.problems[name].forget] = False
    found = []
    for stage, each in ((f"oracles_{name}", keys), (f"paired_{name}", paired)):
        with rundir.stage(directory, stage) as folder:
            found.append(
                ensemble.collect(
                    all_logits(setup), setup.members, tuple(setup.task.train), np.tile(mask, (len(each), 1)), each,
                    directory=folder / "logits", identity=identity(setup), label=f"retraining without {SETS[name]}",
                )
            )  # fmt: skip
    oracles, others = np.split(found[0], [method.oracles])
    tuning, means, _ = np.split(others, np.cumsum([method.tuning_oracles, method.mean_models]))
    return Retrained(oracles, others, tuning, means, found[1])


def member_keys(key: Key[Array, ""], count: int) -> Key[Array, " m"]:
    """Return the keys of so many models."""
    return ensemble.member_keys(key, np.arange(count), np.zeros(count, int))


def identity(setup: Setup) -> dict[str, Any]:
    """Return what logits depend on beside data, masks and keys."""
    return {**setup.task.identity, "queries": tree.digest(setup.task.queries)}


def as_models(trained: Trained) -> Models:
    """Return trained models as what unlearning takes."""
    return jax.tree.map(jnp.asarray, Models(trained.params, trained.state))


def first(models: Models, count: int) -> Models:
    """Return the first models."""
    return jax.tree.map(lambda leaf: leaf[:count], models)


def all_logits(setup: Setup) -> jax.tree_util.Partial:
    """Return the function from a trained model to its logits at all points."""
    return jax.tree_util.Partial(_logits, setup.task.members.model.apply, jnp.asarray(setup.inputs))


def _logits(apply: Apply, inputs: Float[Array, "x ..."], trained: Trained) -> Float[Array, "x c"]:
    return apply(trained.params, trained.state, inputs, train=False)[0]


def margins(
    logits: Float[Array | np.ndarray, "m x c"], labels: Int[Array | np.ndarray, " x"]
) -> Float[np.ndarray, "m x"]:
    """Return the margins of every model's logits."""
    return np.asarray(_margins(jnp.asarray(logits), jnp.asarray(labels)))


@jax.jit
def _margins(logits: Float[Array, "m x c"], labels: Int[Array, " x"]) -> Float[Array, "m x"]:
    return jax.vmap(jax.vmap(margin), (0, None))(logits, labels)
