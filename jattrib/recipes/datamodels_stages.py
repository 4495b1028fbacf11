"""The stages of the datamodels recipe: its config, the models, the scores of every method at every number of models."""

from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float
from msgspec import Meta

from jattrib.attribution import datamodels, surrogate
from jattrib.core import params, tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.progress import track
from jattrib.metrics import lds
from jattrib.metrics.bootstrap import Interval
from jattrib.recipes import config as configs
from jattrib.recipes import experiment, rundir, trak_stages
from jattrib.recipes.experiment import Task, Truth
from jattrib.train import ensemble

METHODS = {
    "lasso": "LASSO",
    "ridge": "ridge",
    "difference": "difference of means",
    "trak": "TRAK",
    "guided": "ridge, TRAK its prior",
}
"""The methods' names, by those of their figures."""


class Method(trak_stages.Method, frozen=True):
    """How to attribute; what TRAK knows besides is its own (`checkpoints` are the most that it uses).

    Attributes:
        models: numbers of models at which every method is measured, ascending.
        checkpoints_of: how many of them TRAK takes gradients of, for each number of models.
        held_out_fraction: the part of the models that chooses the LASSO's penalty and the difference's threshold.
        path_ratio: the LASSO's last penalty, as a part of the one at which all is zero.
        path_count: its penalties.
        patience: after how many penalties without a smaller held-out error a query's path ends.
    """

    checkpoints: configs.Count = 50
    models: Annotated[tuple[configs.Count, ...], Meta(min_length=1)] = (100, 300, 1000, 3000)
    checkpoints_of: Annotated[tuple[configs.Count, ...], Meta(min_length=1)] = (10, 20, 50, 50)
    held_out_fraction: configs.Fraction = 0.1
    path_ratio: configs.Fraction = 0.05
    path_count: configs.Count = 50
    patience: configs.Count = 5


class Config(trak_stages.Config, frozen=True, tag_field="recipe", tag="datamodels"):
    """Datamodels on an image classifier; `method` is how to attribute."""

    method: Method = Method()


class Scored(NamedTuple):
    """Every method's scores at one number of models.

    Attributes:
        scores: by method.
        damping: TRAK's ridge, chosen on the models whose gradients it does not use.
        threshold: the difference's, in standard errors.
        sources: how many the LASSO uses for a query, on average.
        prior_weight: the part of the combination's predicted spread that is TRAK's, on average over queries.
    """

    scores: dict[str, Float[np.ndarray, "n q"]]
    damping: float
    threshold: float
    sources: float
    prior_weight: float


class Found(NamedTuple):
    """What the retrained models say.

    Attributes:
        scored: at each number of models.
        measured: the LDS of each method at each number of models.
        gains: by how much the combination's LDS exceeds that of another method, at each number of models.
        ceiling: the LDS that perfect scores would have.
        random: that of random scores.
        similarity: that of the cosine of pixels.
    """

    scored: tuple[Scored, ...]
    measured: dict[str, tuple[lds.LDS, ...]]
    gains: dict[str, tuple[Interval, ...]]
    ceiling: lds.Ceiling
    random: Interval
    similarity: lds.LDS


def check(config: Config) -> None:
    """Refuse numbers of models and checkpoints that do not fit each other, before anything is trained.

    Raises:
        InvalidInputError: they are not as many, do not ascend, more checkpoints are asked for than there are, or too
            few models are held out to choose on, or left to fit.
    """
    method = config.method
    pairs = list(zip(method.models, method.checkpoints_of, strict=False))
    good = len(method.models) == len(method.checkpoints_of) and list(method.models) == sorted(set(method.models))
    if not good or any(count > min(models - 2, method.checkpoints) for models, count in pairs) or method.models[0] < 10:
        raise InvalidInputError(
            f"method.models = {list(method.models)}, method.checkpoints_of = {list(method.checkpoints_of)}, "
            f"method.checkpoints = {method.checkpoints}",
            expected="ascending numbers of models, 10 or more, and for each a number of checkpoints among them, "
            "at most method.checkpoints and two fewer than the models",
            remedy="give as many checkpoints_of as models, for example models=[100, 300] and checkpoints_of=[10, 20]",
        )
    least, held_out = method.models[0], round(method.held_out_fraction * method.models[0])
    if not 2 <= held_out <= least - 2:
        raise InvalidInputError(
            f"method.held_out_fraction = {method.held_out_fraction:g} of {least} models, which is {held_out}",
            expected="two models or more to choose on, and two or more to fit",
            remedy=f"set it between {2 / least:.2g} and {1 - 2 / least:.2g}, or train more models",
        )


def featurize(config: Config, task: Task, directory: rundir.RunDir) -> list[trak_stages.Checkpoint]:
    """Train the first models once more, whole, and return their gradients' features: TRAK's checkpoints."""
    count = config.method.checkpoints
    with rundir.stage(directory, "checkpoints") as folder:
        trained = ensemble.train(
            task.members, tuple(task.train), experiment.draw(config, task, "checkpoints", count),
            experiment.member_keys(task, "checkpoints", count, seeds=1), directory=folder / "models",
            identity=task.identity, label="training checkpoints",
        )  # fmt: skip
    with rundir.stage(directory, "features") as folder:
        return trak_stages.featurize(config, task, trained, folder)


def train(config: Config, task: Task, directory: rundir.RunDir) -> Truth:
    """Train all the models, the checkpoints first among them, one seed a subset, and return the queries' margins."""
    count = config.method.models[-1]
    masks = experiment.draw(config, task, "checkpoints", count)
    with rundir.stage(directory, "models") as folder:
        outputs = ensemble.collect(
            experiment.query_margins(task), task.members, tuple(task.train), masks,
            experiment.member_keys(task, "checkpoints", count, seeds=1), directory=folder / "margins",
            identity={**task.identity, "queries": tree.digest(task.queries)}, label="training models",
        )  # fmt: skip
    return Truth(masks, outputs[:, None])


def attribute(
    config: Config, task: Task, features: list[trak_stages.Checkpoint], models: Truth, truth: Truth, folder: Path
) -> Found:
    """Score by every method at every number of models, and measure all of them on the same retrained models."""
    key, actual, method = task.keys["statistics"], truth.outputs.mean(axis=1), config.method
    scored = []
    with track(len(method.models), "regressing") as advance:
        for count, checkpoints in zip(method.models, method.checkpoints_of, strict=True):
            some = Truth(models.masks[:count], models.outputs[:count])
            scored.append(_kept(config, task, features[:checkpoints], some, folder / f"models_{count}"))
            advance(1)
    predicted = [{name: lds.predict(each.scores[name], truth.masks) for name in METHODS} for each in scored]
    measured = {name: tuple(lds.lds(each[name], actual, key=key) for each in predicted) for name in METHODS}
    gains = {
        name: tuple(lds.difference(each["guided"], each[name], actual, key=key) for each in predicted)
        for name in METHODS
        if name != "guided"
    }
    return Found(
        scored=tuple(scored),
        measured=measured,
        gains=gains,
        ceiling=lds.noise_ceiling(truth.outputs),
        random=lds.random_baseline(truth.masks, actual, key=key),
        similarity=lds.lds_expected(experiment.similarity(task), truth.masks, truth.outputs, key=key),
    )


def _kept(config: Config, task: Task, features: list[trak_stages.Checkpoint], models: Truth, folder: Path) -> Scored:
    """Return the scores at one number of models: those that an interrupted run left, or new ones."""
    shape = (len(task.train.labels), len(task.queries.labels))
    like = Scored(dict.fromkeys(METHODS, np.zeros(shape, np.float32)), *np.zeros(4))._asdict()
    like = jax.tree.map(np.asarray, like)
    identity = {**task.identity, "margins": tree.digest(models.outputs), "checkpoints": len(features),
                "method": tree.digest(np.frombuffer(repr(config.method).encode(), np.uint8))}  # fmt: skip
    if not params.exists(folder):
        found = score(config, task, features, models)
        params.save_params(folder, jax.tree.map(np.asarray, found._asdict()), identity)
    saved = jax.tree.map(np.asarray, params.load_params(folder, like, identity))
    return Scored(saved.pop("scores"), **{name: float(each) for name, each in saved.items()})


def score(config: Config, task: Task, features: list[trak_stages.Checkpoint], models: Truth) -> Scored:
    """Return every method's scores from the same models; what is to be chosen is chosen on some of them.

    TRAK's ridge is chosen on the models whose gradients it does not use, the LASSO's penalty and the difference's
    threshold on a held-out part, the other ridges by leaving out each model in turn.
    """
    method, outputs = config.method, models.outputs[:, 0]
    others = Truth(models.masks[len(features) :], models.outputs[len(features) :])
    candidates = trak_stages.scores_by_damping(config, features)
    damping = trak_stages.choose_damping(config, features, others).best
    trak = candidates[damping]
    held_out = surrogate.hold_out(task.keys["held_out"], len(outputs), fraction=method.held_out_fraction)
    lasso = datamodels.estimate(
        models.masks, outputs, held_out=held_out, path=surrogate.Path(method.path_ratio, method.path_count),
        solver=surrogate.Solver(patience=method.patience), progress=False,
    )  # fmt: skip
    ridge = datamodels.estimate(models.masks, outputs, regression="ridge")
    guided = datamodels.estimate(models.masks, outputs, regression="ridge", prior=trak)
    threshold = datamodels.choose_threshold(
        datamodels.difference(models.masks[~held_out], outputs[~held_out]), models.masks[held_out], outputs[held_out]
    ).best
    difference = datamodels.denoise(datamodels.difference(models.masks, outputs), threshold)
    scores = {"lasso": lasso.scores, "ridge": ridge.scores, "difference": difference, "trak": trak,
              "guided": guided.scores}  # fmt: skip
    return Scored(
        scores={name: np.asarray(each, np.float32) for name, each in scores.items()},
        damping=float(damping),
        threshold=threshold,
        sources=float((lasso.scores != 0).sum(axis=0).mean()),
        prior_weight=_share(models.masks, trak, guided),
    )


def _share(masks: Bool[np.ndarray, "m n"], prior: Float[np.ndarray, "n q"], guided: datamodels.Datamodel) -> float:
    """Return the mean over queries of the prior's spread over that of the prior and what was added to it."""
    part = lds.predict(prior, masks) * guided.prior_weight
    added = lds.predict(guided.scores, masks) - part
    spreads = [each.std(axis=0) for each in (part, added)]
    return float(np.mean(spreads[0] / np.maximum(spreads[0] + spreads[1], np.finfo(np.float64).tiny)))
