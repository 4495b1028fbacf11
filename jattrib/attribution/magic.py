"""MAGIC: attribution by the exact derivative of one training run with respect to its data weights.

Source: Ilyas and Engstrom 2025, "MAGIC: Near-optimal data attribution for deep learning"; Engstrom et al. 2025,
"Optimizing ML training with metagradient descent".
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from jattrib.attribution import smoothness
from jattrib.core import params, store, tree
from jattrib.core.errors import DivergedError, InvalidInputError, check_choice
from jattrib.core.progress import track
from jattrib.core.types import Batch, Params
from jattrib.models.model import Apply
from jattrib.models.outputs import cross_entropy, margin
from jattrib.train import replay
from jattrib.train.replay import Inputs, Run

SMOOTH = 0.9
"""Below this metasmoothness `scores` warns."""

ACCURATE = 0.5
"""Above this relative error of the predicted outputs `scores` warns."""


Parametrisation = Literal["clip", "softplus"]
"""How weights are kept from becoming negative: cut off at zero, or `w = ln(1 + e^u)`."""


class RoughTrainingWarning(UserWarning):
    """Training is not smooth enough for its derivative to say what happens when weights change."""


class Info(NamedTuple):
    """What is known about the scores beside them.

    Attributes:
        values: the outputs after training at the given weights.
        metasmoothness: along the removal of a few random examples (`smoothness.metasmoothness`); NaN without a key.
        error: of the scores' prediction of that removal, relative, over queries; NaN without a key.
        growth: how many times longer the derivative is on the way back than at the end; the median over queries.
        causes: what may make training rough, where it was found to be.
    """

    values: Float[np.ndarray, " q"]
    metasmoothness: float
    error: float
    growth: float
    causes: tuple[str, ...]


def scores(
    output: replay.Output,
    run: Run,
    inputs: Inputs,
    queries: Batch,
    *,
    key: Key[Array, ""] | None = None,
    fraction: float = 0.05,
    **settings: Any,
) -> tuple[Float[Array, "n q"], Info]:
    """Return `∂f(θ_T(w); z_j) / ∂w_i`, the scores `[source, query]`, and how far to trust them.

    They are positive where more weight on the source raises the query's output.  Their scale is the change of the
    output when the source's weight goes from 0 to 1, to first order, for this very run: its initial parameters, its
    order, its batches.  Removing a set changes the output by minus the sum of its scores.

    Args:
        output: from the model's state to the output function, such as `functools.partial(Margin, model.apply)`.
        run: the training run.
        inputs: what it starts from; its weights are usually one each.
        queries: examples, arrays with leading axis q.
        key: draws the examples whose removal tests smoothness, by two more runs; None does not test.
        fraction: how many of the examples of a weight that is not zero those are.
        settings: those of `replay.metagradient`: segments, blocks, checkpoints, directory, mesh.

    Raises:
        InvalidInputError: weights are not one an example, the fraction is not between 0 and 1, or as
            `replay.metagradient` says.
        DivergedError: an output or a derivative is not finite.
        StoreError: as `replay.metagradient` says.

    Warns:
        RoughTrainingWarning: training is too rough for its derivative to mean anything; the warning names the causes.

    Source: Ilyas and Engstrom 2025, section 3.  The reference replays the run once a query.
    """
    if jnp.ndim(inputs.weights) != 1:
        raise InvalidInputError(
            f"weights of shape {jnp.shape(inputs.weights)}",
            expected="one weight an example",
            remedy="pass jnp.ones(n); for single draws call train.replay.metagradient itself",
        )
    direction = None if key is None else smoothness.removal(jnp.asarray(inputs.weights), fraction, key)
    found = replay.metagradient(output, run, inputs, queries, **settings)
    line, causes = smoothness.Probe(float("nan"), float("nan")), ()
    if direction is not None:
        line = smoothness.probe(output, run, inputs, queries, found, direction)
        if not (line.metasmoothness >= SMOOTH and line.error <= ACCURATE):  # NaN, too: a run on the line diverged
            causes = smoothness.causes(run, inputs, found)
            _warn(line, fraction, causes)
    info = Info(np.asarray(found.values), *line, smoothness.growth(found), causes)
    return found.weights, info


def _warn(line: smoothness.Probe, fraction: float, causes: tuple[str, ...]) -> None:
    told = "".join(f"\n  - {cause}" for cause in causes) or "\n  - none was found; try fewer steps or larger batches"
    warnings.warn(
        f"training is not smooth enough for its derivative to mean much: removing {fraction:.1%} of the examples has a "
        f"metasmoothness of {line.metasmoothness:.2f} (at least {SMOOTH} is good), and the scores predict its effect "
        f"with a relative error of {line.error:.2f} (at most {ACCURATE})\n  likely causes:{told}",
        RoughTrainingWarning,
        stacklevel=3,
    )


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["apply"])
@dataclass(frozen=True)
class MeanLoss:
    """The output function `(params, (x, y)) -> mean cross-entropy` in nats of a whole set, in evaluation mode."""

    apply: Apply
    state: Any

    def __call__(self, params: Params, batch: Batch, /) -> Float[Array, ""]:
        """Return the mean loss on a batch."""
        x, y = batch
        logits, _ = self.apply(params, self.state, x, train=False)
        return jax.vmap(cross_entropy)(logits, y).mean()


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["apply"])
@dataclass(frozen=True)
class MarginLoss:
    """The output function `(params, (x, y)) -> −mean log(p_y / (1 − p_y))` in nats of a set, in evaluation mode.

    Cross-entropy looks at the examples that are still wrong, few and peculiar; this counts all of them nearly alike.
    To find wrong labels by its metagradient fewer validation examples are enough.
    """

    apply: Apply
    state: Any

    def __call__(self, params: Params, batch: Batch, /) -> Float[Array, ""]:
        """Return minus the mean margin on a batch."""
        x, y = batch
        logits, _ = self.apply(params, self.state, x, train=False)
        return -jax.vmap(margin)(logits, y).mean()


class Descent(NamedTuple):
    """What descending on data weights found.

    Attributes:
        weights: those of the step at which `monitored`, or `values` if there is no monitor, was lowest.
        values: the objective at each step's weights, the initial ones first.
        monitored: the objective on the monitor, likewise.
        step: of `weights`, counted from 0.
        path: the weights at each step.
    """

    weights: Float[Array, " n"]
    values: Float[np.ndarray, " steps"]
    monitored: Float[np.ndarray, " steps"] | None
    step: int
    path: Float[np.ndarray, "steps n"]


def descend(
    output: replay.Output,
    run: Run,
    inputs: Inputs,
    heldout: Batch,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    parametrisation: Parametrisation = "clip",
    others: Sequence[tuple[Run, Inputs]] = (),
    monitor: Batch | None = None,
    directory: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Descent:
    """Descend an objective of the trained model on the data weights, by metagradients; weights stay at least zero.

    `u ← u − update(∂f(θ_T(w(u)); heldout) / ∂u)`, with w = u, cut off at zero after each step, or w = ln(1 + e^u).

    A step costs a replay with one query, for each run.  The derivative by a single weight is of the order of 1/n, so
    plain gradient descent needs a rate of that many; `optax.sign_sgd(0.2)` and `optax.adam(0.1)` do not care, and
    `optax.normalize_by_update_norm` before `optax.scale(-rate * n**0.5)` keeps which weights matter more.

    Args:
        output: from the model's state to the objective, such as `functools.partial(MeanLoss, model.apply)`.
        run: the training run.
        inputs: what it starts from, the first weights (one an example) among them.
        heldout: what the objective takes: validation examples.
        optimizer: of the weights; an optax transformation.
        steps: how many.
        parametrisation: see above; `softplus` begins at `ln(e^w − 1)`, so weights must be positive.
        others: more runs on the same examples, from other seeds: the objective is the mean over all runs, which has
            less of what is peculiar to one.  Their own weights are not looked at.
        monitor: other examples, whose objective chooses among the steps' weights: those of `heldout` are soon fitted.
        directory: keeps every step; a killed descent that is called again goes on from there, to the same bits.
        identity: what else the run depends on, to refuse a directory of another.
        progress: whether to show it.
        settings: those of `replay.metagradient`.

    Raises:
        InvalidInputError: weights are not one an example, are negative, or are zero where `softplus` is asked for.
        DivergedError: the objective, on the monitor too, or its derivative is not finite.
        StoreError: `directory` cannot be written, belongs to another descent, or is damaged.

    Source: Engstrom et al. 2025, section 4 (metagradient descent), whose steps are signs, on a random part of the data.
    """
    raw = _raw(jnp.asarray(inputs.weights), parametrisation)
    empty = np.full(steps + 1, np.nan)
    path = np.zeros((steps + 1, *raw.shape), raw.dtype)
    state = _Step(np.int32(0), raw, optimizer.init(raw), path, empty, empty.copy())
    if directory is not None:
        parts = {"data": run.data, "order": run.order, "inputs": inputs, "heldout": heldout, "monitor": monitor}
        parts |= {f"run {at}": (each.data, each.order, start) for at, (each, start) in enumerate(others, 2)}
        digests = {name: tree.digest(part) for name, part in parts.items()}
        identity = store.identified({**digests, "steps": steps, "parametrisation": parametrisation}, identity)
        state = params.load_params(directory, state, identity) if params.exists(directory) else state
    runs = [(run, inputs), *others]
    queries = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], heldout)
    objective = jax.jit(lambda end, batch: output(end[1])(end[0], batch))
    with track(steps + 1, "descending", progress=progress) as report:
        report(int(state.number))
        for number in range(int(state.number), steps + 1):
            weights = _weights(state.raw, parametrisation)
            value, watched, gradient = 0.0, 0.0, jnp.zeros_like(weights)
            for each, start in runs:
                found = replay.metagradient(
                    output, each, start._replace(weights=weights), queries, progress=False, **settings
                )
                value += float(found.values[0]) / len(runs)
                gradient += found.weights[:, 0] / len(runs)
                if monitor is not None:
                    watched += float(objective(found.trained, monitor)) / len(runs)
            state.values[number], state.path[number] = value, weights
            if monitor is not None:
                _check_monitored(watched, number)
                state.monitored[number] = watched
            raw, moments = _update(optimizer, state, gradient, parametrisation)
            state = state._replace(number=np.int32(number + 1), moments=moments, raw=raw)
            if directory is not None:
                params.save_params(directory, state, identity)
            report(1)
    watched = state.values if monitor is None else state.monitored
    best = int(np.argmin(watched))
    monitored = None if monitor is None else state.monitored
    return Descent(jnp.asarray(state.path[best]), state.values, monitored, best, state.path)


class _Step(NamedTuple):
    number: Any
    raw: Any
    moments: optax.OptState
    path: Any
    values: Any
    monitored: Any


def _check_monitored(value: float, step: int) -> None:
    if not np.isfinite(value):
        raise DivergedError(
            f"the objective on the monitor is {value} at the weights of step {step}",
            expected="finite values, among which the lowest is chosen",
            remedy="lower the rate of the descent or of training, or check the monitor for extreme values",
        )


def _update(
    optimizer: optax.GradientTransformation,
    state: _Step,
    gradient: Float[Array, " n"],
    parametrisation: Parametrisation,
) -> tuple[Float[Array, " n"], optax.OptState]:
    if parametrisation == "softplus":
        gradient = gradient * jax.nn.sigmoid(state.raw)
    with jax.numpy_dtype_promotion("standard"):  # optax raises decay rates to the power of an integer count
        updates, moments = optimizer.update(gradient, state.moments, state.raw)
    raw = state.raw + jnp.asarray(updates, state.raw.dtype)
    return (jnp.maximum(raw, 0) if parametrisation == "clip" else raw), moments


def _weights(raw: Float[Array, " n"], parametrisation: Parametrisation) -> Float[Array, " n"]:
    return raw if parametrisation == "clip" else jax.nn.softplus(raw)


def _raw(weights: Float[Array, "..."], parametrisation: Parametrisation) -> Float[Array, " n"]:
    check_choice("parametrisation", parametrisation, get_args(Parametrisation))
    lowest = weights.min() if weights.ndim == 1 else jnp.asarray(jnp.nan)
    if not (lowest >= 0 if parametrisation == "clip" else lowest > 0):
        raise InvalidInputError(
            f"weights of shape {weights.shape} from {lowest:.3g}, with parametrisation {parametrisation!r}",
            expected="one an example, at least zero; above zero for 'softplus'",
            remedy="begin at jnp.ones(n)",
        )
    return weights if parametrisation == "clip" else weights + jnp.log(-jnp.expm1(-weights))
