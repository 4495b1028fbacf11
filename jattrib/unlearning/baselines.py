"""What people use for unlearning, with one signature: `unlearn(problem, models, keys, *, settings, ...) -> Models`.

Each is a choice of rows, losses and weights for `finetune.tune`; SSD and Newton's step change the weights at once.  In
all of them F is the forget set, R the rest, and `ℓ` the cross-entropy in nats.
"""

import warnings
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jattrib.core import sources, tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch, Params
from jattrib.curvature import ekfac, krylov, products
from jattrib.grads import taps
from jattrib.models.model import Apply
from jattrib.models.outputs import Logits, Loss, label_loss, mean_loss
from jattrib.unlearning import finetune
from jattrib.unlearning.finetune import DEFAULT, Models, Problem, Settings

UNSOLVED = 1e-2
"""The relative residual above which Newton's step is none: its solution has less than two digits."""


class UnsolvedWarning(UserWarning):
    """A system was left with a residual above `UNSOLVED`, so that what is made of its solution is not what it says."""


class _CrossEntropy(NamedTuple):
    apply: Apply

    def __call__(self, params: Params, state: Any, batch: Batch, /) -> tuple[Float[Array, " b"], Any]:
        (inputs, labels), _ = batch
        outputs, state = self.apply(params, state, inputs, train=True)
        return jax.vmap(mean_loss)(outputs, labels), state


class _Distillation(NamedTuple):
    """`a KL(teacher ‖ student) + b ℓ`, with a and b of each row; of a sequence, the mean without its padding."""

    apply: Apply

    def __call__(self, params: Params, state: Any, batch: Batch, /) -> tuple[Float[Array, " b"], Any]:
        (inputs, labels, towards, cross), teacher = batch
        outputs, state = self.apply(params, state, inputs, train=True)
        ours, theirs = jax.nn.log_softmax(outputs), jax.nn.log_softmax(teacher)
        divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
        if labels.ndim > 1:
            kept = labels >= 0
            divergence = jnp.where(kept, divergence, 0).sum(axis=-1) / jnp.maximum(kept.sum(axis=-1), 1).astype(
                divergence.dtype
            )
        return towards * divergence + cross * jax.vmap(mean_loss)(outputs, labels), state


def gradient_ascent(
    problem: Problem, models: Models, keys: Key[Array, " orders"], *, settings: Settings = DEFAULT
) -> Models:
    """Ascend `ℓ` on F.

    Source: Graves et al. 2021 and others; Georgiev et al. 2024, appendix (baselines).
    """
    rows, steps = _rows(problem, problem.forget), _pass(keys, problem.forget, settings, -1.0)
    return _descend(problem, models, rows, steps, settings)


def retain_descent(
    problem: Problem,
    models: Models,
    keys: Key[Array, " orders"],
    *,
    settings: Settings = DEFAULT,
    part: float = 1.0,
) -> Models:
    """Descend `ℓ` on R, or on a random part of it: fine-tuning, and forgetting by neglect."""
    chosen = _sample(keys[0], problem.retain, part)
    return _descend(problem, models, _rows(problem, chosen), _pass(keys, chosen, settings, 1.0), settings)


def ascent_descent(
    problem: Problem,
    models: Models,
    keys: Key[Array, " orders"],
    *,
    settings: Settings = DEFAULT,
    ascent: float = 0.1,
    part: float = 1.0,
) -> Models:
    """Descend `ℓ` on R and ascend it on F, `ascent` times as fast, in batches of both.

    Source: Georgiev et al. 2024, appendix (gradient descent-ascent).
    """
    chosen = _sample(keys[0], problem.retain, part)
    return _both(problem, models, keys, chosen, settings, weights=(1.0, -ascent), mixed=True)


def neggrad_plus(
    problem: Problem,
    models: Models,
    keys: Key[Array, " orders"],
    *,
    settings: Settings = DEFAULT,
    balance: float = 0.95,
    part: float = 1.0,
) -> Models:
    """Descend `β mean_R ℓ − (1 − β) mean_F ℓ`: a batch of each in every step.

    Source: Kurmanji et al. 2023, section 4 (NegGrad+).
    """
    chosen = _sample(keys[0], problem.retain, part)
    return _both(problem, models, keys, chosen, settings, weights=(balance, balance - 1), mixed=False)


def random_labels(
    problem: Problem,
    models: Models,
    keys: Key[Array, " orders"],
    *,
    settings: Settings = DEFAULT,
    part: float = 1.0,
) -> Models:
    """Descend `ℓ` on R, and on F with labels that are drawn among the wrong ones.

    Source: Golatkar et al. 2020, section 5 (random labels).
    """
    return _relabelled(problem, models, keys, settings, part, None)


def salun(
    problem: Problem,
    models: Models,
    keys: Key[Array, " orders"],
    *,
    settings: Settings = DEFAULT,
    saliency: float = 0.5,
    part: float = 1.0,
) -> Models:
    """Random relabelling that moves only the weights most salient to F: the part `saliency` of largest `|∇ mean_F ℓ|`.

    Source: Fan et al. 2024, section 4 (SalUn).
    """
    _check_part("saliency", saliency)
    gradients = _mean_gradients(problem.apply, models, _batch(problem, problem.forget))
    return _relabelled(problem, models, keys, settings, part, _largest(gradients, saliency))


def scrub(
    problem: Problem,
    models: Models,
    keys: Key[Array, " orders"],
    *,
    settings: Settings = DEFAULT,
    ascents: int = 2,
    forget_batch: int = 64,
    alpha: float = 1.0,
    gamma: float = 1.0,
    part: float = 1.0,
    rewind: Float[np.ndarray, "models"] | None = None,
) -> Models:
    """SCRUB: epochs that push the student from the teacher on F, between epochs that keep it near the teacher on R.

    The first `ascents` epochs begin with a pass over F that ascends `KL(teacher ‖ student)`; every epoch has a pass
    over R that descends `α KL(teacher ‖ student) + γ ℓ`.  The teacher is the trained model, and stays as it is; the
    student is what moves.  The optimiser starts anew with every epoch, at a rate that decays from epoch to epoch.  At
    the very first ascent the student is still its teacher and the divergence's gradient zero: that step moves nothing
    but for rounding, which Adam scales up to whole steps, and the first epoch's ascent begins with the second.

    Args:
        problem: what is to be forgotten.
        models: the trained models.
        keys: of the orders, one for each model or fewer (`finetune.Steps`).
        settings: epochs, batch size and rates.
        ascents: epochs that ascend on F.
        forget_batch: examples of F a step.
        alpha: weight of the divergence on R.
        gamma: weight of the cross-entropy on R.
        part: the part of R that is seen.
        rewind: SCRUB+R: for each model the error on F to rewind to, that of data like F which the model has not seen:
            of the models after each epoch, the one whose error on F is nearest is returned.

    Raises:
        InvalidInputError: there is no epoch, or `part` is no part.
        DivergedError: a model's parameters are no longer finite.

    Source: Kurmanji et al. 2023, algorithm 1, and section 4.1 (rewinding).
    """
    if settings.epochs < 1:
        raise InvalidInputError(
            f"epochs = {settings.epochs}", expected="at least one epoch", remedy="`nothing` leaves models as they are"
        )
    retain = _sample(keys[0], problem.retain, part)
    examples = np.concatenate([problem.forget, retain])
    forgotten = len(problem.forget)
    inputs, labels = _batch(problem, examples)
    of_forget = np.arange(len(examples)) < forgotten
    towards, cross = np.where(of_forget, -1.0, alpha), np.where(of_forget, 0.0, gamma)
    rows = (inputs, labels, towards.astype(np.float32), cross.astype(np.float32))
    teacher = finetune.logits(problem.apply, models, inputs)
    history, student = [], models
    for epoch in range(settings.epochs):
        once = settings._replace(epochs=1, learning_rate=settings.learning_rate * settings.decay**epoch)
        own_keys = jax.vmap(lambda key, epoch=epoch: jax.random.fold_in(key, epoch))(keys)
        steps = _offset(finetune.shuffled(own_keys, len(retain), once), forgotten)
        if epoch < ascents:
            away = finetune.shuffled(own_keys, forgotten, once._replace(batch_size=forget_batch))
            steps = finetune.then(away, steps)
        student = finetune.tune(
            _Distillation(problem.apply), student, rows, teacher, steps, optimizer=settings.optimizer
        )  # fmt: skip
        history.append(student)
    if rewind is None:
        return student
    errors = np.stack([_errors(problem, each) for each in history])
    best = np.abs(errors - np.asarray(rewind)).argmin(axis=0)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *history)
    return jax.tree.map(lambda leaf: leaf[best, np.arange(models.size)], stacked)


def ssd(
    problem: Problem, models: Models, keys: Key[Array, " orders"], *, alpha: float = 10.0, strength: float = 1.0
) -> Models:
    """Selective synaptic dampening: weights that matter more to F than to all data are scaled down, in one step.

    With I the mean squared gradient, a weight where `I_F > α I_D` is multiplied by `min(λ I_D / I_F, 1)`.

    Args:
        problem: what is to be forgotten.
        models: the trained models.
        keys: not used; the method is deterministic.
        alpha: α, how much more it has to matter.
        strength: λ.

    Raises:
        DivergedError: a model's parameters are not finite.

    Source: Foster et al. 2024, equations 3 and 4.
    """
    del keys
    of_forget = _mean_squares(problem.apply, models, _batch(problem, problem.forget))
    of_all = _mean_squares(problem.apply, models, problem.data)

    def dampen(weight: Array, forget: Array, everything: Array) -> Array:
        factor = jnp.minimum(strength * everything / jnp.where(forget > 0, forget, 1), 1)
        return jnp.where(forget > alpha * everything, weight * factor.astype(weight.dtype), weight)

    return finetune.checked(models._replace(params=jax.tree.map(dampen, models.params, of_forget, of_all)))


def newton_step(
    problem: Problem,
    models: Models,
    keys: Key[Array, " orders"],
    *,
    damping: float,
    iterations: int = 100,
    chunk: int = 512,
) -> Models:
    """One step of Newton's method on R: `θ − (G_R + λI)⁻¹ ∇L_R(θ)` with the Gauss-Newton matrix G of the mean loss.

    Where θ is a minimum on all data it is the influence of removing F, `θ + (G_R + λI)⁻¹ Σ_F ∇ℓ / |R|`.

    Args:
        problem: what is to be forgotten.
        models: the trained models.
        keys: not used; the method is deterministic.
        damping: λ, added to the mean curvature.
        iterations: of conjugate gradients.
        chunk: examples at a time.

    Raises:
        DivergedError: the matrix has a direction of negative curvature, or a model's parameters are not finite.

    Warns:
        UnsolvedWarning: the iterations leave a relative residual above `UNSOLVED`: it is a part of the step.

    Source: Guo et al. 2020, section 3 (certified removal); Golatkar et al. 2020.
    """
    del keys
    retain = _batch(problem, problem.retain)
    gradients = _mean_gradients(problem.apply, models, retain)
    source = sources.InMemory(retain)
    moved, infos = [], []
    for number in range(models.size):
        params, state = _one(models, number)
        operator = products.streamed(
            products.ggn(Logits(problem.apply, state), label_loss, params), source, chunk=chunk
        )  # fmt: skip
        one = jax.tree.map(lambda leaf, at=number: leaf[at : at + 1], gradients)
        step, info = krylov.conjugate_gradient(operator, one, damping=damping, iterations=iterations)
        infos.append(info)
        moved.append(jax.tree.map(lambda leaf, change: leaf - change[0], params, step))
    _warn_of_unsolved(infos, damping)
    return finetune.checked(models._replace(params=jax.tree.map(lambda *leaves: jnp.stack(leaves), *moved)))


def _warn_of_unsolved(infos: list[krylov.Info], damping: float) -> None:
    left = np.array([info.residual[0] for info in infos if info.residual[0] > UNSOLVED])
    if left.size:
        warnings.warn(
            f"Newton's step of {left.size} of {len(infos)} models is not solved: with damping {damping:g} a relative "
            f"residual of up to {left.max():.2g} is left after {max(info.iterations.max() for info in infos)} "
            "iterations; allow more of them, or give a larger damping",
            UnsolvedWarning,
            stacklevel=3,
        )


def first_order(problem: Problem, models: Models, keys: Key[Array, " orders"], *, rate: float) -> Models:
    """One step up the loss of F: `θ + η Σ_F ∇ℓ / n`.

    Raises:
        DivergedError: a model's parameters are not finite.

    Source: Warnecke et al. 2023, equation 7 (first-order update, for points that are removed).
    """
    del keys
    gradients = _mean_gradients(problem.apply, models, _batch(problem, problem.forget))
    size = rate * len(problem.forget) / len(problem.data[1])
    return finetune.checked(models._replace(params=tree.axpy(size, gradients, models.params)))


def nothing(problem: Problem, models: Models, keys: Key[Array, " orders"]) -> Models:
    """Return the models as they are: the floor of effort."""
    del problem, keys
    return models


def _batch(problem: Problem, indices: Int[np.ndarray, " m"]) -> Batch:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[indices], problem.data)


_rows = _batch


def _pass(keys: Any, indices: np.ndarray, settings: Settings, weight: float) -> finetune.Steps:
    return finetune.shuffled(keys, len(indices), settings, weights=np.full(len(indices), weight, np.float32))


def _descend(
    problem: Problem, models: Models, rows: Batch, steps: finetune.Steps, settings: Settings, movable: Any = None
) -> Models:
    return finetune.tune(
        _CrossEntropy(problem.apply), models, rows, (), steps, optimizer=settings.optimizer, movable=movable
    )  # fmt: skip


def _both(
    problem: Problem,
    models: Models,
    keys: Any,
    retain: np.ndarray,
    settings: Settings,
    *,
    weights: tuple[float, float],
    mixed: bool,
) -> Models:
    """Descend on R and F with weights of their own: `mixed` in one pass, or a batch of each a step."""
    rows = _batch(problem, np.concatenate([retain, problem.forget]))
    counts = len(retain), len(problem.forget)
    of_rows = np.repeat(np.asarray(weights, np.float32), counts)
    if mixed:
        steps = finetune.shuffled(keys, sum(counts), settings, weights=of_rows)
    else:
        first = finetune.shuffled(keys, counts[0], settings, weights=of_rows[: counts[0]])
        second = _offset(finetune.shuffled(keys, counts[1], settings, weights=of_rows[counts[0] :]), counts[0])
        steps = finetune.beside(first, second)
    return _descend(problem, models, rows, steps, settings)


def _offset(steps: finetune.Steps, start: int) -> finetune.Steps:
    return steps._replace(order=steps.order._replace(indices=steps.order.indices + jnp.int32(start)))


def _relabelled(problem: Problem, models: Models, keys: Any, settings: Settings, part: float, movable: Any) -> Models:
    retain = _sample(keys[0], problem.retain, part)
    inputs, labels = _batch(problem, np.concatenate([problem.forget, retain]))
    count, classes = len(problem.forget), finetune.output_shape(problem, models)[-1]
    own = labels[:count]
    shifts = np.asarray(jax.random.randint(jax.random.fold_in(keys[0], 1), own.shape, 1, classes))
    wrong = np.where(own < 0, own, (own + shifts) % classes)  # padding stays padding
    labels = np.concatenate([wrong, labels[count:]]).astype(labels.dtype)
    steps = finetune.shuffled(keys, len(labels), settings)
    return _descend(problem, models, (inputs, labels), steps, settings, movable)


def _sample(key: Key[Array, ""], indices: np.ndarray, part: float) -> np.ndarray:
    _check_part("part", part)
    count = max(1, round(part * len(indices)))
    return (
        indices
        if count == len(indices)
        else indices[np.sort(np.asarray(jax.random.permutation(key, len(indices)))[:count])]
    )


def _check_part(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InvalidInputError(
            f"{name} = {value}", expected="a part: above 0, and 1 at most", remedy=f"set {name} between 0 and 1"
        )


def _errors(problem: Problem, models: Models) -> Float[np.ndarray, " models"]:
    """Return the part of F's labels, padding aside, that each model gets wrong."""
    inputs, labels = _batch(problem, problem.forget)
    wrong = finetune.logits(problem.apply, models, inputs).argmax(axis=-1) != labels
    return wrong[:, labels >= 0].mean(axis=-1)


def _largest(gradients: Params, part: float) -> Params:
    """Return 1 where a model's gradient is among the given part of largest absolute value, over all leaves, else 0."""

    def one(gradient: Params) -> Params:
        flat, unravel = tree.ravel(jax.tree.map(jnp.abs, gradient))
        count = max(1, round(part * flat.size))
        order = jnp.argsort(-flat)
        return unravel(jnp.zeros_like(flat).at[order[:count]].set(1))

    return jax.vmap(one)(gradients)


@partial(jax.jit, static_argnums=0)
def _mean_gradients(apply: Apply, models: Models, batch: Batch) -> Params:
    def one(params: Params, state: Any) -> Params:
        def loss(params: Params) -> Float[Array, ""]:
            return jnp.mean(jax.vmap(mean_loss)(apply(params, state, batch[0], train=False)[0], batch[1]))

        return jax.grad(loss)(params)

    return jax.vmap(one)(models.params, models.state)


def _mean_squares(apply: Apply, models: Models, batch: Batch) -> Params:
    """Return the mean over examples of each model's squared gradient: the diagonal of the empirical Fisher matrix.

    Of a layer, squares of outer products are outer products of squares: no gradient of an example is ever made.
    """
    source, squares = sources.InMemory(batch), []
    for number in range(models.size):
        params, state = _one(models, number)
        loss = ekfac.empirical_fisher(Loss(apply, state))
        layers = ekfac.find(loss, params, source)
        as_they_are = {layer.name: ekfac.Basis(None, jnp.zeros((1, 1))) for layer in layers.layers}
        found, plain = ekfac.eigenvalues(
            layers, ekfac.Bases(as_they_are, as_they_are, {}), loss, params, source, chunk=1024, progress=False
        )
        squares.append(taps.from_matrices(layers, found, plain, params))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *squares)


def _one(models: Models, number: int) -> tuple[Params, Any]:
    return jax.tree.map(lambda leaf: leaf[number], (models.params, models.state))


Method = Literal[
    "gradient_ascent", "retain_descent", "ascent_descent", "neggrad_plus", "random_labels", "salun", "scrub", "ssd",
    "newton_step", "first_order", "nothing",
]  # fmt: skip
"""The names of what is here."""
