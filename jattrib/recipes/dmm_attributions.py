"""What the unlearning recipe's attributions predict that retraining without a forget set does to all logits.

Each gives the shift for several values of what it has to choose (a threshold, a damping): the recipe chooses, and finds
the multiplier, on the tuning oracles.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jattrib.attribution import datamodels, surrogate, trak
from jattrib.core import stream
from jattrib.core.types import Params, Projector
from jattrib.curvature import ekfac as factored
from jattrib.curvature import krylov, products, solve
from jattrib.models.outputs import Logits, Margin, draw_label, label_loss
from jattrib.projection import sketch
from jattrib.recipes.dmm_methods import GGN_PASSES
from jattrib.recipes.dmm_stages import Config, Setup, Trainings, member_keys
from jattrib.train import replay
from jattrib.unlearning import dmm
from jattrib.unlearning.dmm import Shift
from jattrib.unlearning.finetune import Models

REPLAY = 2.5
"""The derivative of a training along one direction, in trainings."""

Candidates = dict[float, Shift]
"""The predicted shift of all logits, by what is to be chosen."""


class Context(NamedTuple):
    """What attributions are given.

    Attributes:
        config: the whole config.
        setup: data, forget sets, keys.
        trainings: the trained models; of oracles only those that predictions may be made from.
        fitted: what has been fitted once for all forget sets.
    """

    config: Config
    setup: Setup
    trainings: Trainings
    fitted: dict[str, Any]


class Attribution(NamedTuple):
    """A prediction of what retraining does.

    Attributes:
        title: what a reader calls it.
        candidates: from the context and the name of a forget set.
        prepared: trainings before the forget set is known, for all of them together.
        own: trainings, and what costs as much, for each forget set.
    """

    title: str
    candidates: Callable[[Context, str], Candidates]
    prepared: float = 0.0
    own: float = 0.0


def attributions(config: Config) -> dict[str, Attribution]:
    """Return the config's attributions by their names."""
    method, alpha = config.method, config.evaluation.alpha
    halves = alpha * method.subset_models
    solves = method.influence_models * method.iterations * GGN_PASSES / config.training.epochs
    factors = 2 * method.influence_models / config.training.epochs
    replays, paired = REPLAY * method.replays, float(method.paired_models)
    known = {
        "difference": Attribution("datamodels, denoised", difference, halves),
        "lasso": Attribution("datamodels, LASSO", lasso, halves),
        "trak": Attribution("TRAK", trak_group, alpha * method.trak_models),
        "cg": Attribution("influence, CG", conjugate_gradients, 0, solves),
        "ekfac": Attribution("influence, EK-FAC", partial(ekfac, rest=False), factors),
        "ekfac_rest": Attribution("influence, EK-FAC of the rest", partial(ekfac, rest=True), 0, factors),
        "magic": Attribution("derivative of training", partial(magic, weight=1.0), 0, replays),
        "midpoint": Attribution("derivative at half weight", partial(magic, weight=0.5), 0, replays),
        "mean": Attribution(f"{method.mean_models} retrained models", mean_shift, 0, method.mean_models),
        "paired": Attribution(f"{method.paired_models} retrained pairs", paired_shift, 0, paired),
        "blend": Attribution("pairs and half weight", blend, 0, paired + replays),
    }
    return {name: known[name] for name in method.attributions}


def difference(context: Context, name: str) -> Candidates:
    """Return the denoised differences of subset models' means, summed over the forget set, by threshold."""
    found, shape = _difference(context, name), context.trainings.subsets.shape[1:]
    return {
        threshold: dmm.shift_of_scores(
            datamodels.denoise(found, threshold).reshape(-1, *shape), context.setup.problems[name].forget
        )
        for threshold in context.config.method.thresholds
    }  # fmt: skip


def _difference(context: Context, name: str) -> datamodels.Difference:
    masks, outputs = context.trainings.masks, context.trainings.subsets
    return datamodels.difference(masks[:, context.setup.problems[name].forget], outputs.reshape(len(outputs), -1))


def lasso(context: Context, name: str) -> Candidates:
    """Return the LASSO's coefficients of the forget set's columns, summed; its penalty is chosen for each logit.

    Other columns are independent of these, so leaving them out leaves noise but no bias.
    """
    forget, outputs = context.setup.problems[name].forget, context.trainings.subsets
    held_out = surrogate.hold_out(
        context.setup.keys["attribution"], len(outputs), fraction=context.config.method.held_out_fraction
    )
    found = datamodels.estimate(
        context.trainings.masks[:, forget], outputs, held_out=held_out, path=surrogate.Path(0.2, 8),
        solver=surrogate.Solver(tolerance=1e-3, patience=2), progress=False,
    )  # fmt: skip
    return {0.0: dmm.shift_of_scores(found.scores, forget)}


def trak_group(context: Context, name: str) -> Candidates:
    """Return TRAK's prediction for a group, by damping: one solve and one JVP a checkpoint.

    With features `φ = Pᵀ∇f`, the group's total is `φ(x)ᵀ v` with `v = K⁻¹ Σ_F Q_i φ_i`, which is the derivative of the
    logits along `P v`: no query has features of its own.
    """
    method, setup = context.config.method, context.setup
    models, problem, total = context.trainings.checkpoints, setup.problems[name], {}
    source = stream.InMemory(tuple(setup.task.train))
    projection = sketch.projector(method.dim)
    for number in range(models.size):
        params, state = _one(models, number)
        key = jax.random.fold_in(setup.keys["attribution"], number)
        train = context.fitted.get(f"trak_{number}")
        if train is None:
            output = Margin(problem.apply, state)
            train = trak.features(output, params, source, projector=projection, key=key, progress=False)
            train = context.fitted[f"trak_{number}"] = trak.Features(*map(np.asarray, train))
        gram, unit = trak.mean_gram(train.gradients), trak.mean_eigenvalue(train.gradients)
        group = train.weights[problem.forget] @ train.gradients[problem.forget] / len(train.weights)
        for damping in method.dampings:
            solution, _ = solve.solve(gram, jnp.asarray(group)[:, None], damping=damping * unit)
            direction = _lift(projection, key, params, solution[:, 0])
            shift = dmm.shift_along(problem.apply, params, state, setup.inputs, direction)
            total[damping] = total.get(damping, 0) - shift / models.size
    return total


def _lift(projection: Projector, key: Any, params: Params, vector: Float[Array, " k"]) -> Params:
    """Return `P v`: the projection is linear, and its transpose is its derivative backwards."""
    state = projection.init(key, params)
    _, transpose = jax.vjp(lambda rows: projection.apply(state, rows), _row(params))
    (found,) = transpose(vector[None])
    return jax.tree.map(lambda leaf: leaf[0], found)


def conjugate_gradients(context: Context, name: str) -> Candidates:
    """Return what influence predicts with the Gauss-Newton matrix and conjugate gradients, by relative damping."""
    method, key = context.config.method, context.setup.keys["attribution"]
    source, apply = stream.InMemory(tuple(context.setup.task.train)), context.setup.task.members.model.apply

    def inverses(number: int, params: Params, state: Any) -> dict[float, Callable[[Params], Params]]:
        operator = products.streamed(products.ggn(Logits(apply, state), label_loss, params), source, chunk=1000)
        unit = context.fitted.get(f"eigenvalue_{number}")
        if unit is None:
            unit = products.mean_eigenvalue(operator, params, key=key, samples=4)
            context.fitted[f"eigenvalue_{number}"] = unit

        def solved(ridge: float, gradient: Params) -> Params:
            found, _ = krylov.conjugate_gradient(
                operator, _row(gradient), damping=ridge * unit, iterations=method.iterations
            )  # fmt: skip
            return jax.tree.map(lambda leaf: leaf[0], found)

        return {ridge: partial(solved, ridge) for ridge in method.ridges}

    return _influence(context, name, inverses)


def ekfac(context: Context, name: str, *, rest: bool) -> Candidates:
    """Return what influence predicts with EK-FAC, by relative damping.

    With the curvature of all examples the factors serve all forget sets.  With that of the `rest`, the step is Newton's
    towards the minimum without the forget set, and knows that in its directions little else curves.
    """
    method, setup = context.config.method, context.setup
    train, apply = stream.InMemory(tuple(setup.task.train)), setup.task.members.model.apply
    source = stream.Subset(train, setup.problems[name].retain) if rest else train

    def inverses(number: int, params: Params, state: Any) -> dict[float, Callable[[Params], Params]]:
        place = f"ekfac_{name if rest else 'all'}_{number}"
        factors = context.fitted.get(place)
        if factors is None:
            fisher = factored.true_fisher(
                Logits(apply, state), label_loss, draw_label, key=setup.keys["attribution"]
            )  # fmt: skip
            factors = context.fitted[place] = factored.fit(fisher, params, source, progress=False)

        def solved(damping: float, gradient: Params) -> Params:
            found = factored.inverse(factors, relative_damping=damping)(_row(gradient))
            return jax.tree.map(lambda leaf: leaf[0], found)

        return {damping: partial(solved, damping) for damping in method.dampings}

    return _influence(context, name, inverses)


def _influence(
    context: Context,
    name: str,
    inverses: Callable[[int, Params, Any], dict[float, Callable[[Params], Params]]],
) -> Candidates:
    """Return the mean over a few full models of what influence predicts, by damping."""
    count, problem, total = context.config.method.influence_models, context.setup.problems[name], {}
    for number in range(count):
        params, state = _one(context.trainings.models, number)
        for damping, inverse in inverses(number, params, state).items():
            shift = dmm.shift_of_influence(problem, params, state, context.setup.inputs, inverse)
            total[damping] = total.get(damping, 0) + shift / count
    return total


def magic(context: Context, name: str, *, weight: float) -> Candidates:
    """Return the mean over a few full models' own runs of the derivative of training along the removal."""
    place = f"training_{name}_{weight:g}"
    if place not in context.fitted:
        setup, count = context.setup, context.config.method.replays
        keys, total = member_keys(setup.keys["full"], count), 0
        for number in range(count):
            run, inputs = replay.member(setup.members, tuple(setup.task.train), keys[number])
            total = total + dmm.shift_of_training(
                setup.problems[name], run.loss, setup.members.optimizer, (inputs.params, inputs.state), run.order,
                setup.inputs, weight=weight,
            )  # fmt: skip
        context.fitted[place] = total / count
    return {0.0: context.fitted[place]}


def mean_shift(context: Context, name: str) -> Candidates:
    """Return the mean of a few retrained models less that of the full ones."""
    return {0.0: dmm.shift_of_means(context.trainings.retrained[name].means, context.trainings.full)}


def paired_shift(context: Context, name: str) -> Candidates:
    """Return the mean over a few retrained models of the difference to the full model of the same seed and order."""
    paired = context.trainings.retrained[name].paired
    return {0.0: dmm.shift_of_means(paired, context.trainings.full[: len(paired)])}


def blend(context: Context, name: str) -> Candidates:
    """Return the paired difference at the forgotten examples and, elsewhere, its mean with the midpoint derivative's.

    Retraining is exact where effects are large; where they are small its chaos is noise, which a derivative has not.
    The candidates are weights of the pairs elsewhere.
    """
    (pairs,) = paired_shift(context, name).values()
    (smooth,) = magic(context, name, weight=0.5).values()
    found = {}
    for weight in (0.0, 0.25, 0.5, 0.75):
        found[weight] = weight * pairs + (1 - weight) * smooth
        found[weight][context.setup.problems[name].forget] = pairs[context.setup.problems[name].forget]
    return found


def _one(models: Models, number: int) -> tuple[Params, Any]:
    return jax.tree.map(lambda leaf: leaf[number], (models.params, models.state))


def _row(gradient: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf[None], gradient)
