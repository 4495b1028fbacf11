"""Datamodel Matching (DMM): predict by attribution what retraining would output, then fine-tune to match it.

For an example x the target is, logit by logit, `t(x) = f(x; θ) + m · s(x)` with the shift `s(x) = −Σ_{i∈F} τ_i(x)`:
what leaving the forget set F out does, to first order, from scores τ of any attribution.  Functions `shift_*` give s.

Source: Georgiev et al. 2024, "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", algorithm 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch, Params
from jattrib.models.model import Apply
from jattrib.models.outputs import mean_loss
from jattrib.train import loop
from jattrib.unlearning import finetune
from jattrib.unlearning.finetune import DEFAULT, Models, Problem, Settings

FORGET_REPEATS = 5
"""How often an epoch sees each example of the forget set."""

RETAIN_RATIO = 20
"""Retained examples in the fine-tuning set, for each example to forget."""

Shift = Float[np.ndarray, "q c"]
"""By example and class, by how much retraining without F is predicted to change the logits."""


class Rows(NamedTuple):
    """The fine-tuning set S.

    Attributes:
        examples: the distinct examples of S, as indices into the training set: F first, then the retained ones.
        draws: S itself, as places in `examples`: F is there several times.
    """

    examples: Int[np.ndarray, " s"]
    draws: Int[np.ndarray, " m"]


class _Matching(NamedTuple):
    """`‖f(x; θ) − t(x)‖² / C` for rows (inputs) and own targets; hashable, so that it is compiled once a model."""

    apply: Apply

    def __call__(self, params: Params, state: Any, batch: Batch, /) -> tuple[Float[Array, "b *t"], Any]:
        inputs, targets = batch
        outputs, state = self.apply(params, state, inputs, train=True)
        return jnp.mean(jnp.square(outputs - targets), axis=-1), state


class _MatchingTokens(NamedTuple):
    """The mean of that over the tokens of a sequence; rows are inputs, and which of their tokens are no padding."""

    apply: Apply

    def __call__(self, params: Params, state: Any, batch: Batch, /) -> tuple[Float[Array, " b"], Any]:
        (inputs, kept), targets = batch
        errors, state = _Matching(self.apply)(params, state, (inputs, targets))
        count = jnp.maximum(kept.sum(axis=-1), 1).astype(errors.dtype)
        return jnp.where(kept, errors, 0).sum(axis=-1) / count, state


def rows(
    problem: Problem,
    key: Key[Array, ""],
    *,
    forget_repeats: int = FORGET_REPEATS,
    retain_ratio: float | int = RETAIN_RATIO,
) -> Rows:
    """Return the fine-tuning set `S = F (oversampled) ∪ a sample of R`, drawn once.

    Args:
        problem: what is to be forgotten.
        key: of the sample.
        forget_repeats: how often S holds each example of F.
        retain_ratio: retained examples for each of F; all of R if there are no more.
    """
    if forget_repeats < 1 or retain_ratio <= 0:
        raise InvalidInputError(
            f"forget_repeats = {forget_repeats}, retain_ratio = {retain_ratio}",
            expected="at least one repeat, and a positive ratio: without retained examples the model forgets them too",
            remedy=f"the defaults are {FORGET_REPEATS} and {RETAIN_RATIO}",
        )
    retain, forgotten = problem.retain, len(problem.forget)
    count = min(len(retain), max(1, round(retain_ratio * forgotten)))
    chosen = retain[np.sort(np.asarray(jax.random.permutation(key, len(retain)))[:count])]
    draws = np.concatenate([np.tile(np.arange(forgotten), forget_repeats), forgotten + np.arange(count)])
    return Rows(np.concatenate([problem.forget, chosen]), draws)


def match(
    problem: Problem,
    models: Models,
    chosen: Rows,
    targets: Float[Array | np.ndarray, "models s *t c"],
    keys: Key[Array, " orders"],
    *,
    settings: Settings = DEFAULT,
    mesh: jax.sharding.Mesh | None = None,
) -> Models:
    """Fine-tune every model on S towards its own targets, by the squared error of logits, padding's left out.

    Args:
        problem: what is to be forgotten.
        models: the trained models.
        chosen: S.
        targets: `t(x)` of each model, for the examples of S (`Rows.examples`).
        keys: of the orders: one for each model, or fewer, which as many consecutive models share (`finetune.Steps`).
        settings: epochs, batch size and rates.
        mesh: spreads the models over its first axis.

    Raises:
        InvalidInputError: targets are not as many as models, or not of S and of all logits; or the keys do not divide
            the models.
        DivergedError: a model's parameters are no longer finite.
    """
    shape = (models.size, len(chosen.examples), *finetune.output_shape(problem, models))
    if np.shape(targets) != shape:
        raise InvalidInputError(
            f"targets of shape {np.shape(targets)}",
            expected=f"targets for {shape[0]} models and {shape[1]} examples: an array of shape {shape}",
            remedy="compute the targets on `Rows.examples`, from the logits of these very models",
        )
    drawn = chosen.examples[chosen.draws]
    inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf)[drawn], problem.data[0])
    labels = np.asarray(problem.data[1])[drawn]
    own = jnp.asarray(targets)[:, chosen.draws]
    steps = finetune.shuffled(keys, len(chosen.draws), settings)
    loss, seen = _Matching(problem.apply), inputs
    if labels.ndim > 1:
        loss, seen = _MatchingTokens(problem.apply), (inputs, labels >= 0)
    return finetune.tune(loss, models, seen, own, steps, optimizer=settings.optimizer, mesh=mesh)


def datamodel_matching(
    problem: Problem,
    models: Models,
    shift: Callable[[Int[np.ndarray, " s"]], Shift],
    key: Key[Array, ""],
    *,
    multiplier: float | int = 1.0,
    settings: Settings = DEFAULT,
    forget_repeats: int = FORGET_REPEATS,
    retain_ratio: float | int = RETAIN_RATIO,
    orders: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Models:
    """Unlearn by Datamodel Matching, `t(x) = f(x; θ) + m s(x)`, from each model's own logits: they keep their variance.

    Args:
        problem: what is to be forgotten.
        models: the trained models.
        shift: from the indices of training examples to the predicted shift of their logits.
        key: of S and of the orders.
        multiplier: m, chosen on held-out models (`calibrate`).
        settings: epochs, batch size and rates.
        forget_repeats: how often S holds each example of F.
        retain_ratio: retained examples for each of F.
        orders: how many there are of S, each shared by as many models (`finetune.Steps`); one a model when left out.
        mesh: spreads the models over its first axis.
    """
    choice, order = jax.random.split(key)
    chosen = rows(problem, choice, forget_repeats=forget_repeats, retain_ratio=retain_ratio)
    targets = direct(_logits(problem, models, chosen), shift(chosen.examples), multiplier=multiplier)
    keys = jax.random.split(order, models.size if orders is None else orders)
    return match(problem, models, chosen, targets, keys, settings=settings, mesh=mesh)


def oracle_matching(
    problem: Problem,
    models: Models,
    oracles: Models,
    key: Key[Array, ""],
    *,
    settings: Settings = DEFAULT,
    forget_repeats: int = FORGET_REPEATS,
    retain_ratio: float | int = RETAIN_RATIO,
    orders: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Models:
    """Fine-tune each model towards the logits of one that was retrained without F: what perfect attribution would give.

    Model j is matched to oracle `j mod (number of oracles)`.

    Source: Georgiev et al. 2024, section 4.1.
    """
    choice, order = jax.random.split(key)
    chosen = rows(problem, choice, forget_repeats=forget_repeats, retain_ratio=retain_ratio)
    targets = _logits(problem, oracles, chosen)[np.arange(models.size) % oracles.size]
    keys = jax.random.split(order, models.size if orders is None else orders)
    return match(problem, models, chosen, targets, keys, settings=settings, mesh=mesh)


def _logits(problem: Problem, models: Models, chosen: Rows) -> Float[np.ndarray, "models s *t c"]:
    """Return the logits of the examples of S."""
    inputs = jax.tree.map(lambda leaf: np.asarray(leaf)[chosen.examples], problem.data[0])
    return finetune.logits(problem.apply, models, inputs)


def direct(
    own: Float[np.ndarray, "models q *t c"], shift: Float[np.ndarray, "..."], *, multiplier: float | int = 1.0
) -> Float[np.ndarray, "models q *t c"]:
    """Return `f(x; θ) + m s(x)`: the corrected logits themselves, with no weight changed (DM-direct)."""
    if own.shape[1:] != np.shape(shift):
        raise InvalidInputError(
            f"logits of shape {own.shape} and a shift of shape {np.shape(shift)}",
            expected="a shift for every example and class of the logits",
            remedy="predict the shift for the very examples whose logits are corrected",
        )
    return own + np.asarray(multiplier, own.dtype) * np.asarray(shift, own.dtype)


def calibrate(shift: Shift, measured: Shift) -> float:
    """Return the multiplier m that minimises `‖measured − m · shift‖²`, over examples and classes.

    A softmax does not see a logit that all classes share, so each example's mean over classes is taken off first.

    Args:
        shift: predicted.
        measured: mean logits of held-out retrained models less those of full models: never those that are reported on.

    Raises:
        InvalidInputError: the predicted shift is zero everywhere, the shifts are of different shapes, or one of them is
            not finite.
    """
    predicted, found = (np.asarray(each, np.float64) for each in (shift, measured))
    if predicted.shape != found.shape or not (np.isfinite(predicted).all() and np.isfinite(found).all()):
        raise InvalidInputError(
            f"shifts of shapes {predicted.shape} and {found.shape}, not finite at "
            f"{np.count_nonzero(~np.isfinite(predicted))} and {np.count_nonzero(~np.isfinite(found))} logits",
            expected="finite shifts of the same logits, by example and class",
            remedy="predict and measure at the same examples, with models that have not diverged",
        )
    predicted, found = (each - each.mean(axis=-1, keepdims=True) for each in (predicted, found))
    size = np.vdot(predicted, predicted)
    if not size > 0:
        raise InvalidInputError(
            "a predicted shift of zero everywhere",
            expected="a shift of some logit, to be scaled",
            remedy="lower the threshold of the denoising, or check the scores",
        )
    return float(np.vdot(predicted, found) / size)


def shift_of_scores(scores: Float[np.ndarray, "n q c"], forget: Int[np.ndarray, " f"]) -> Shift:
    """Return `s(x) = −Σ_{i∈F} τ_i(x)` of the scores of all sources, or of those of F alone, in F's order."""
    part = scores if len(scores) == len(forget) else scores[forget]
    return -np.asarray(part, np.float64).sum(axis=0)


def shift_of_means(oracles: Float[np.ndarray, "o q c"], full: Float[np.ndarray, "m q c"]) -> Shift:
    """Return the mean logits of a few models retrained without F, less those of full models: no attribution at all."""
    return np.asarray(oracles, np.float64).mean(axis=0) - np.asarray(full, np.float64).mean(axis=0)


def shift_of_masks(
    masks: Bool[np.ndarray, "m n"],
    outputs: Float[np.ndarray, "m q c"],
    forget: Int[np.ndarray, " f"],
    *,
    threshold: float | int = 0.0,
) -> Shift:
    """Return the shift from subset models: `−Σ_{i∈F}` of each example's in-minus-out difference, denoised.

    `d_i = mean(f | i in) − mean(f | i out)` is kept where it exceeds `threshold` of its standard errors,
    `√(v_in/m_in + v_out/m_out)`, and is zero elsewhere: the sum of |F| noisy differences would drown what they say.

    Args:
        masks: the subset of each model.
        outputs: its logits.
        forget: the examples to forget.
        threshold: in standard errors; chosen on held-out models.

    Raises:
        InvalidInputError: an example of F is in fewer than two subsets, or outside of fewer than two; masks and outputs
            are not of as many models; an output is not finite; or the threshold is NaN or below zero.

    Source: Ilyas et al. 2022, section 3 (difference of conditional means); Georgiev et al. 2024, appendix (denoising).
    """
    _check_subsets(masks, outputs, threshold)
    inside = np.asarray(masks[:, forget], np.float64)
    counts = inside.sum(axis=0)
    if counts.min() < 2 or (len(masks) - counts).min() < 2:
        at = int(np.argmin(np.minimum(counts, len(masks) - counts)))
        raise InvalidInputError(
            f"the example {forget[at]}, in {int(counts[at])} of {len(masks)} subsets",
            expected="two subsets or more with it, and two or more without",
            remedy="train more subset models, or draw subsets nearer to one half",
        )
    flat = np.asarray(outputs, np.float64).reshape(len(masks), -1)
    flat = flat - flat.mean(axis=0)
    shift = np.empty(flat.shape[1])
    for start in range(0, flat.shape[1], 4096):
        block = flat[:, start : start + 4096]
        parts = []
        for chosen, count in ((inside, counts), (1 - inside, len(masks) - counts)):
            mean = chosen.T @ block / count[:, None]
            square = chosen.T @ np.square(block) / count[:, None] - np.square(mean)
            parts.append((mean, np.maximum(square, 0) / (count[:, None] - 1)))
        difference = parts[0][0] - parts[1][0]
        error = np.sqrt(parts[0][1] + parts[1][1])
        shift[start : start + 4096] = -np.where(np.abs(difference) > threshold * error, difference, 0).sum(axis=0)
    return shift.reshape(outputs.shape[1:])


def _check_subsets(masks: Bool[np.ndarray, "m n"], outputs: Float[np.ndarray, "k q c"], threshold: float | int) -> None:
    if not threshold >= 0:
        raise InvalidInputError(
            f"threshold = {threshold}", expected="a number of standard errors, from 0 on", remedy="2 to 3 are usual"
        )
    if len(masks) != len(outputs):
        raise InvalidInputError(
            f"{len(masks)} masks and outputs of {len(outputs)} models",
            expected="a mask for each model",
            remedy="pass the masks that these very models were trained on",
        )
    bad = np.flatnonzero(~np.isfinite(np.asarray(outputs)).reshape(len(outputs), -1).all(axis=1))
    if bad.size:
        raise InvalidInputError(
            f"outputs of model {bad[0]} that are not finite (of {bad.size} of {len(outputs)} models)",
            expected="finite logits",
            remedy="leave out models that diverged, with their masks",
        )


def shift_of_influence(
    problem: Problem,
    params: Params,
    state: Any,
    inputs: Batch,
    precondition: Callable[[Params], Params],
) -> Shift:
    """Return the shift that influence predicts, `J(x) (C + λI)⁻¹ Σ_{i∈F} ∇ℓ_i / n`: one solve and one JVP.

    The mean loss without F is `(n L(θ) − Σ_F ℓ_i) / (n − |F|)`: its minimiser moves, to first order, by that.

    Args:
        problem: what is to be forgotten.
        params: of one model.
        state: of it.
        inputs: of the examples whose logits are predicted.
        precondition: `g ↦ (C + λI)⁻¹ g` with the curvature C of the mean loss over all n examples: conjugate gradients,
            EK-FAC, the explicit inverse.

    Source: Koh and Liang 2017, section 2, for a group; Georgiev et al. 2024, section 5.
    """
    forget = jax.tree.map(lambda leaf: jnp.asarray(leaf)[problem.forget], problem.data)
    gradient = _summed_gradient(problem.apply, params, state, forget)
    direction = tree.scale(1 / len(problem.data[1]), precondition(gradient))
    return shift_along(problem.apply, params, state, inputs, direction)


def shift_along(apply: Apply, params: Params, state: Any, inputs: Batch, direction: Params) -> Shift:
    """Return the derivative of all logits along a direction of the parameters, `J(x) d`: one JVP."""
    return np.asarray(_directional(apply, params, state, jax.tree.map(jnp.asarray, inputs), direction), np.float64)


@partial(jax.jit, static_argnums=0)
def _summed_gradient(apply: Apply, params: Params, state: Any, batch: Batch) -> Params:
    def total(params: Params) -> Float[Array, ""]:
        outputs, _ = apply(params, state, batch[0], train=False)
        return jax.vmap(mean_loss)(outputs, batch[1]).sum()

    return jax.grad(total)(params)


@partial(jax.jit, static_argnums=0)
def _directional(apply: Apply, params: Params, state: Any, inputs: Batch, direction: Params) -> Float[Array, "q c"]:
    return jax.jvp(lambda params: apply(params, state, inputs, train=False)[0], (params,), (direction,))[1]


def shift_of_training(
    problem: Problem,
    loss: loop.LossFn,
    optimizer: Any,
    initial: tuple[Params, Any],
    order: loop.Schedule,
    inputs: Batch,
    *,
    weight: float | int = 1.0,
) -> Shift:
    """Return the shift by the derivative of training itself, `−Σ_{i∈F} ∂f(x; θ_T(w)) / ∂w_i`: one JVP.

    It is MAGIC's group derivative, forward: about two trainings, whatever the number of outputs.  At weights of one it
    is the first-order effect; at half the weight on F, in the middle of the way to removal, it is right to second order
    (the midpoint rule), and knows that what is alike stands in for one another.

    Args:
        problem: what is to be forgotten.
        loss: of the run.
        optimizer: of the run.
        initial: parameters and model state that it starts from.
        order: its schedule, over all n examples.
        inputs: of the examples whose logits are predicted.
        weight: of the examples of F, where the derivative is taken; all others weigh 1.

    Source: Ilyas and Engstrom 2025, section 3, whose derivative is in reverse; the midpoint is ours.
    """
    n = len(problem.data[1])
    data = jax.tree.map(jnp.asarray, problem.data)
    removed = jnp.zeros(n, jnp.float32).at[problem.forget].set(-1.0)

    def outputs(weights: Float[Array, " n"]) -> Float[Array, "q c"]:
        trained = loop.train(loss, optimizer, initial, data, order, weights=weights)
        return problem.apply(trained.params, trained.state, inputs, train=False)[0]

    inputs = jax.tree.map(jnp.asarray, inputs)
    weights = jnp.ones(n, jnp.float32).at[problem.forget].set(weight)
    return np.asarray(jax.jit(lambda w, v: jax.jvp(outputs, (w,), (v,))[1])(weights, removed), np.float64)
