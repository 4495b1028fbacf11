"""How the unlearning recipe chooses and measures: tuned on the tuning oracles, frozen, then unlearned with all models.

What is chosen of an attribution, a threshold or a damping and its multiplier, is chosen on them as well.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jattrib.core import params, tree
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.core.progress import track
from jattrib.metrics import klom
from jattrib.recipes import config as configs
from jattrib.recipes import rundir
from jattrib.recipes.dmm_attributions import Attribution, Candidates, Context, attributions
from jattrib.recipes.dmm_methods import Unlearner, baseline_unlearners, matching, retraining
from jattrib.recipes.dmm_stages import SETS, Config, Setup, Trainings, first, margins, member_keys
from jattrib.unlearning import dmm, finetune
from jattrib.unlearning.dmm import Shift
from jattrib.unlearning.finetune import Models

MOST = float(np.log(1 / klom.LEAST))
"""What a point can cost at most, in nats: as in the published metric."""


class Predicted(NamedTuple):
    """An attribution's prediction for a forget set, chosen and scaled.

    Attributes:
        shift: of all logits, the multipliers included.
        choice: the threshold or damping.
        multipliers: by which the attribution's own shift is multiplied at the forgotten examples, and at all others.
    """

    shift: Float[np.ndarray, "x c"]
    choice: float
    multipliers: tuple[float, ...]


class Unlearned(NamedTuple):
    """What a method left.

    Attributes:
        title: the method, for readers.
        margins: of every model at the forget set's points.
        compute: a model's, as a part of one retraining; for attributions, what the forget set takes is included.
        prepared: trainings before the forget set is known.
        trial: which trial was chosen; −1 where there was nothing to choose.
        values: what each trial scored on the tuning oracles.
    """

    title: str
    margins: Float[np.ndarray, "m x"]
    compute: float
    prepared: float = 0.0
    trial: int = -1
    values: tuple[float, ...] = ()


class Results(NamedTuple):
    """All there is for one forget set.

    Attributes:
        full: margins of the full models at the points.
        oracles: margins of the evaluation oracles.
        parts: the points' places by part.
        predicted: by attribution.
        unlearned: by method: baselines, `direct_…` and `dmm_…` of every attribution.
    """

    full: Float[np.ndarray, "m x"]
    oracles: Float[np.ndarray, "o x"]
    parts: dict[str, np.ndarray]
    predicted: dict[str, Predicted]
    unlearned: dict[str, Unlearned]


def score(
    unlearned: Float[np.ndarray, "m x"], oracles: Float[np.ndarray, "o x"], parts: Mapping[str, np.ndarray]
) -> float:
    """Return the mean over parts of the 95th percentile of Gaussian KLoM, each point cut off at 11.51 nats.

    Of Gaussians, since the models that choices are made on are too few for histograms.
    """
    found = gaussian(unlearned, oracles)
    return float(np.mean([np.percentile(found[at], 95) for at in parts.values()]))


def gaussian(unlearned: Float[np.ndarray, "m x"], oracles: Float[np.ndarray, "o x"]) -> Float[np.ndarray, " x"]:
    """Return Gaussian KLoM at each point, cut off at 11.51 nats: those too where all unlearned margins are clipped."""
    vary = np.ptp(np.clip(unlearned, -klom.CLIP, klom.CLIP), axis=0) > 0
    found = np.full(unlearned.shape[1], MOST)
    if vary.any():
        found[vary] = np.minimum(klom.gaussian(unlearned[:, vary], oracles[:, vary]), MOST)
    return found


class _Points(NamedTuple):
    """The points of a forget set: their places among all points, and among themselves by part."""

    places: np.ndarray
    parts: dict[str, np.ndarray]


def _points(setup: Setup, name: str) -> _Points:
    by_part = setup.points(name)
    ends = np.cumsum([len(each) for each in by_part.values()])
    own = dict(zip(by_part, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
    return _Points(np.concatenate(list(by_part.values())), own)


def run(config: Config, setup: Setup, trainings: Trainings, directory: rundir.RunDir) -> dict[str, Results]:
    """Predict, tune, unlearn and return what is to be measured, for every forget set."""
    context, found = Context(config, setup, trainings, {}), {}
    for name in SETS:
        points = _points(setup, name)
        with rundir.stage(directory, f"predict_{name}") as folder:
            predicted = _predict_all(context, name, points, folder)
        with rundir.stage(directory, f"unlearn_{name}") as folder:
            unlearned = _unlearn_all(context, name, points, predicted, folder)
        full, oracles = (margins_of(setup, name, each) for each in (trainings.full, trainings.retrained[name].oracles))
        found[name] = Results(full, oracles, points.parts, predicted, unlearned)
    return found


def margins_of(setup: Setup, name: str, logits: Float[np.ndarray, "m x c"]) -> Float[np.ndarray, "m p"]:
    """Return the margins at a forget set's points, from logits at all points."""
    places = _points(setup, name).places
    return margins(logits[:, places], setup.labels[places])


def _predict_all(context: Context, name: str, points: _Points, folder: Path) -> dict[str, Predicted]:
    found, all_ = {}, attributions(context.config)
    with track(len(all_), f"predicting what forgetting {SETS[name]} does") as advance:
        for key, attribution in all_.items():
            found[key] = _predict(context, name, points, attribution, folder / key)
            advance(1)
    return found


def _predict(context: Context, name: str, points: _Points, attribution: Attribution, folder: Path) -> Predicted:
    """Return what an attribution predicts, or what an interrupted run left."""
    like = {"shift": np.zeros(context.trainings.full.shape[1:], np.float32), "choice": np.zeros(3)}
    identity = _identity(context, name, "compute")
    if not params.exists(folder):
        chosen = choose(context, name, points, attribution.candidates(context, name))
        values = {"shift": chosen.shift.astype(np.float32), "choice": np.array([chosen.choice, *chosen.multipliers])}
        params.save_params(folder, values, identity)
    saved = params.load_params(folder, like, identity)
    choice, *multipliers = saved["choice"].tolist()
    return Predicted(saved["shift"], choice, tuple(multipliers))


def choose(context: Context, name: str, points: _Points, candidates: Candidates) -> Predicted:
    """Return the candidate whose corrected logits are nearest to the tuning oracles, with its multipliers.

    There is one for the forgotten examples and one for all others: each is 1, or fits the tuning oracles' mean shift.
    """
    setup, places = context.setup, points.places
    full, tuning = context.trainings.full[:, places], context.trainings.retrained[name].tuning[:, places]
    measured = tuning.mean(axis=0, dtype=np.float64) - full.mean(axis=0, dtype=np.float64)
    some, labels = full[: context.config.method.tuned_models], setup.labels[places]
    oracles = margins(tuning, labels)
    best: tuple[float, Predicted] | None = None
    every = np.arange(len(places))
    forgotten = np.isin(every, points.parts["forget"])
    for choice, shift in candidates.items():
        found = shift[places]
        scales = [_scales(found[at], measured[at]) for at in (forgotten, ~forgotten)]
        for pair in itertools.product(*scales):
            corrected = dmm.direct(some, found * np.where(forgotten, *pair)[:, None])
            value = score(margins(corrected, labels), oracles, points.parts)
            if np.any(found) and (best is None or value < best[0]):
                best = value, Predicted(_scaled(context, name, shift, pair), choice, pair)
    if best is None:
        raise InvalidInputError(
            f"predictions of {name} that are zero at every point",
            expected="a shift of some logit",
            remedy="lower method.thresholds, or train more subset models",
        )
    return best[1]


def _scales(shift: Float[np.ndarray, "x c"], measured: Float[np.ndarray, "x c"]) -> tuple[float, ...]:
    return (1.0, dmm.calibrate(shift, measured)) if np.any(shift) else (1.0,)


def _scaled(context: Context, name: str, shift: Shift, pair: tuple[float, ...]) -> Shift:
    forget = np.isin(np.arange(len(shift)), context.setup.problems[name].forget)
    return shift * np.where(forget, *pair)[:, None]


def _unlearn_all(
    context: Context, name: str, points: _Points, predicted: dict[str, Predicted], folder: Path
) -> dict[str, Unlearned]:
    config, setup, trainings = context.config, context.setup, context.trainings
    known, total = attributions(config), retraining(config, setup)
    methods = baseline_unlearners(config, setup, name, _rewind(context, name))
    labels, found = setup.labels[points.places], {}
    matchers = {
        f"dmm_{key}": matching(config, setup, name, f"DMM, {known[key].title}", each.shift)
        for key, each in predicted.items()
    }
    with track(len(methods) + len(matchers), f"forgetting {SETS[name]}") as advance:
        for key, method in (methods | matchers).items():
            found[key] = _unlearn(context, name, points, method, folder / key, total)
            advance(1)
    for key, each in predicted.items():
        own: dict[str, Any] = {"prepared": known[key].prepared}
        corrected = dmm.direct(trainings.full[:, points.places], each.shift[points.places])
        title = f"DM-direct, {known[key].title}"
        found[f"direct_{key}"] = Unlearned(title, margins(corrected, labels), known[key].own, **own)
        tuned = found[f"dmm_{key}"]
        found[f"dmm_{key}"] = tuned._replace(compute=tuned.compute + known[key].own, **own)
    return found


def _unlearn(context: Context, name: str, points: _Points, method: Unlearner, folder: Path, total: int) -> Unlearned:
    """Choose a method's settings and unlearn with all models, or return what an interrupted run left."""
    count = len(method.trials)
    shape = (context.trainings.models.size, len(points.places))
    like = {"margins": np.zeros(shape, np.float32), "trial": np.zeros((), np.int64), "values": np.zeros(count)}
    identity = {**_identity(context, name), "trials": list(method.trials)}
    if not params.exists(folder):
        params.save_params(folder, _tune(context, name, points, method), identity)
    saved = params.load_params(folder, like, identity)
    trial = int(saved["trial"])
    compute = method.passes(method.trials[trial]) / total
    return Unlearned(method.title, saved["margins"], compute, 0.0, trial, tuple(saved["values"].tolist()))


def _tune(context: Context, name: str, points: _Points, method: Unlearner) -> dict[str, np.ndarray]:
    setup, trainings, values, trials = context.setup, context.trainings, [], list(method.trials)
    problem, labels = setup.problems[name], setup.labels[points.places]
    oracles = margins(trainings.retrained[name].tuning[:, points.places], labels)
    inputs = setup.inputs[points.places]

    def margins_after(models: Models, trial: dict) -> np.ndarray:
        keys = member_keys(setup.keys["tuning"], models.size)
        found = margins(finetune.logits(problem.apply, method.run(problem, models, keys, trial), inputs), labels)
        if not np.isfinite(found).all():
            raise DivergedError(
                f"{method.title}: margins that are not finite", expected="finite ones", remedy="lower its learning rate"
            )
        return found

    if len(trials) > 1:
        some = first(trainings.models, context.config.method.tuned_models)
        for trial in trials:
            try:
                values.append(score(margins_after(some, trial), oracles, points.parts))
            except DivergedError:  # a setting that is too bold: no worse can be scored
                values.append(MOST)
    else:
        values = [0.0]
    for best in np.argsort(values, kind="stable").tolist():
        try:
            after = margins_after(trainings.models, trials[best])
        except DivergedError:  # of a model that no trial saw: the next best setting
            continue
        return {"margins": after, "trial": np.asarray(best), "values": np.asarray(values)}
    raise DivergedError(
        f"{method.title}: models that diverge at every setting",
        expected="one at least at which all stay finite", remedy="add a smaller learning rate to its trials",
    )  # fmt: skip


def _rewind(context: Context, name: str) -> float:
    """Return the error at the forget set of subset models that were trained without the example: SCRUB's reference."""
    forget, trainings = context.setup.problems[name].forget, context.trainings
    wrong = trainings.subsets[:, forget].argmax(axis=-1) != context.setup.labels[forget]
    return float(wrong[~trainings.masks[:, forget]].mean())


def _identity(context: Context, name: str, *others: str) -> dict[str, Any]:
    """Return what a result depends on: the method's room but for which others there are, and what is named here."""
    setup = context.setup
    room = configs.plain(context.config.method)
    used = {key: value for key, value in room.items() if key not in ("baselines", "attributions", *others)}
    return {**setup.task.identity, "forget": tree.digest(setup.problems[name].forget), "seed": context.config.seed,
            "method": used}  # fmt: skip
