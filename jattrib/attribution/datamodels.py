"""Datamodels: scores by regressing the outputs of many retrained models on what each was trained on.

With masks S[model, source] of random subsets and outputs y[model, query], a datamodel is the linear function

    y[m, q] ≈ intercept[q] + Σ_i S[m, i] score[i, q],

so a score is what the source's presence adds to the output, in the output's unit, averaged over the rest of the
training set: positive where it raises the output.  Three estimators, from the dearest in computing to the cheapest:
`estimate` by the LASSO or by ridge, and `difference`, the mean output with the source minus that without, with its
standard error, which `denoise` cuts.  All want many models; given another method's scores as a `prior`, ridge regresses
on those too and explains with sources of their own only what they leave, which few models suffice for.

Source: Ilyas et al. 2022 (datamodels, by the LASSO); Feldman and Zhang 2020 (the difference); the prior is ours.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from jattrib.attribution import surrogate
from jattrib.attribution.design import varies
from jattrib.core.errors import InvalidInputError, check_choice
from jattrib.core.types import Fold
from jattrib.metrics import lds
from jattrib.metrics.correlation import spearman


class Datamodel(NamedTuple):
    """Scores, and how well they predict.

    Attributes:
        scores: `[source, query]`, or `[source, query, class]` of logits, in the unit of the outputs.
        intercepts: the output that is predicted without any source.
        held_out: R² on rows that chose the penalty or, of ridge without any, on each row left out in turn: the part
            of the variance that is predicted; NaN where the output does not vary there, or nothing was held out.
        penalty: that was chosen: λ of the LASSO, or the damping of ridge.
        prior_weight: what the prior's scores were multiplied by; 0 without a prior.
    """

    scores: Float[np.ndarray, "n *q"]
    intercepts: Float[np.ndarray, "*q"]
    held_out: Float[np.ndarray, "*q"]
    penalty: Float[np.ndarray, "*q"]
    prior_weight: Float[np.ndarray, "*q"]


class Difference(NamedTuple):
    """The mean output of models with a source minus that of models without.

    Attributes:
        scores: the differences; 0 where all models have the source, or none.
        errors: their standard errors; infinite there.
    """

    scores: Float[np.ndarray, "n q"]
    errors: Float[np.ndarray, "n q"]


class Threshold(NamedTuple):
    """Where to cut: the candidates, the mean rank correlation of each on held-out models, and the best candidate."""

    thresholds: tuple[float, ...]
    held_out: tuple[float, ...]
    best: float


def estimate(
    masks: Bool[Array | np.ndarray, "m n"],
    outputs: Num[Array | np.ndarray, "m *q"],
    *,
    regression: Literal["lasso", "ridge"] = "lasso",
    held_out: Bool[np.ndarray, " m"] | None = None,
    prior: Num[Array | np.ndarray, "n *q"] | None = None,
    path: surrogate.Path | None = None,
    solver: surrogate.Solver | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Datamodel:
    """Return the datamodel of every query, its penalty chosen on models that were not fitted.

    Args:
        masks: what each model was trained on.
        outputs: of each model, at every query: margins, or logits with the classes as a further axis.
        regression: `lasso`: few sources a query.  `ridge`: all of them, each a little.
        held_out: the models that choose the penalty (`surrogate.hold_out`), needed by the LASSO; all models are then
            fitted.  Ridge without any leaves out each in turn.
        prior: other scores of the same sources and queries, for ridge; their scale does not matter.
        path: of the LASSO's penalties; ridge, whose dampings are `surrogate.ridge`'s own, has no use for it.
        solver: of the LASSO, likewise.
        mesh: spreads the LASSO's targets; ridge does not need it.
        progress: whether to show the LASSO's.

    Raises:
        InvalidInputError: shapes differ, an entry is not finite, the regression is neither, or the LASSO has no
            held-out models, or has a prior.
        DivergedError: as `surrogate.lasso` says.
    """
    check_choice("regression", regression, ("lasso", "ridge"))
    outputs = np.asarray(outputs)
    flat = outputs.reshape(len(outputs), -1)
    if regression == "lasso" and (held_out is None or prior is not None):
        raise InvalidInputError(
            "the LASSO without held-out models" if held_out is None else "the LASSO with a prior",
            expected="models to choose the penalty by, and no prior",
            remedy="pass held_out=surrogate.hold_out(key, len(masks))"
            if held_out is None
            else "use regression='ridge'",
        )
    if regression == "lasso":
        found, info = surrogate.lasso(
            masks, flat, held_out=held_out, path=path, solver=solver, mesh=mesh, progress=progress
        )
        errors, penalty, weight = (
            info.errors[info.chosen, np.arange(flat.shape[1])],
            info.penalties,
            np.zeros(flat.shape[1]),
        )
    else:
        given = None if prior is None else np.asarray(prior).reshape(len(prior), -1)
        found, info = surrogate.ridge(masks, flat, held_out=held_out, prior=given)
        errors, penalty, weight = info.errors.min(axis=0), info.dampings[info.chosen], info.prior_weights
    shape = outputs.shape[1:]
    return Datamodel(
        found.coefficients.reshape(-1, *shape), found.intercepts.reshape(shape),
        _explained(flat, errors, held_out).reshape(shape), penalty.reshape(shape), weight.reshape(shape),
    )  # fmt: skip


def _explained(outputs: np.ndarray, errors: np.ndarray, held_out: np.ndarray | None) -> np.ndarray:
    """Return `1 − error / variance`, the variance that of the same rows around the mean of those fitted."""
    values = np.asarray(outputs, np.float64)
    if held_out is None:
        count = len(values)
        variance = values.var(axis=0) * (count / (count - 1)) ** 2  # the mean, too, without the row itself
    else:
        variance = np.square(values[held_out] - values[~held_out].mean(axis=0)).mean(axis=0)
    variance = np.where(varies(values), variance, 0)
    return np.where(variance > 0, 1 - errors / np.where(variance > 0, variance, 1), np.nan)


def difference(
    masks: Bool[Array | np.ndarray, "m n"], outputs: Num[Array | np.ndarray, "m q"], *, chunk: int = 1024
) -> Difference:
    """Return the difference of means with and without each source, `mean(y | i ∈ S) − mean(y | i ∉ S)`.

    Its standard error is Welch's, `√(s²_in / m_in + s²_out / m_out)`.  For streams of models see `differences`.

    Args:
        masks: what each model was trained on.
        outputs: of each model, at every query.
        chunk: models at a time.

    Raises:
        InvalidInputError: masks and outputs are of different numbers of models, or an output is not finite.
    """
    from jattrib.core import stream

    masks, outputs = np.asarray(masks, bool), np.asarray(outputs)
    if len(masks) != len(outputs) or len(masks) < 2:
        raise InvalidInputError(
            f"{len(masks)} masks and outputs of {len(outputs)} models",
            expected="a mask a model, of two models or more",
            remedy="transpose outputs that are [query, model]",
        )
    bad = np.argwhere(~np.isfinite(outputs))
    if len(bad):
        raise InvalidInputError(
            f"model {bad[0, 0]} has an output of {outputs[tuple(bad[0])]} at query {bad[0, 1]}",
            expected="finite numbers",
            remedy="leave out models that diverged",
        )
    offset = np.asarray(outputs, np.float64).mean(axis=0)
    statistic = differences(masks.shape[1], offset)
    return stream.fold(statistic, stream.InMemory((masks, outputs)), chunk=min(chunk, len(masks)), progress=False)


def differences(sources: int, offset: Float[np.ndarray, " q"]) -> Fold:
    """Return `difference` as one pass over models: batches are pairs of masks and outputs.

    Args:
        sources: n.
        offset: about the mean of each output (of the first models, say), taken off before squares are summed, lest
            rounding drown their spread; the result does not depend on it otherwise.

    Raises:
        InvalidInputError: a batch is of other shapes, or the sum is not finite at the end, as of outputs that are not.
    """
    kind = jnp.result_type(float)
    shift = jnp.asarray(offset, kind)
    q = len(offset)

    def init() -> dict[str, Array]:
        zeros = {"sum": jnp.zeros(q, kind), "squares": jnp.zeros(q, kind), "models": jnp.zeros((), kind)}
        inside = {"sum_in": jnp.zeros((sources, q), kind), "squares_in": jnp.zeros((sources, q), kind)}
        return {**zeros, **inside, "models_in": jnp.zeros(sources, kind)}

    return Fold(init, jax.tree_util.Partial(_increment, shift), _difference)


def _increment(shift: Float[Array, " q"], batch: Any, valid: Bool[Array, " b"]) -> dict[str, Array]:
    masks, outputs = batch
    if len(masks) != len(outputs) or outputs.shape[1:] != shift.shape:
        raise InvalidInputError(
            f"masks of shape {masks.shape} and outputs of shape {outputs.shape}, with an offset of {shift.shape}",
            expected="masks [model, source] and outputs [model, query] of the same models, and an offset a query",
            remedy="transpose outputs that are [query, model], and average seeds",
        )
    present = masks.astype(shift.dtype) * valid[:, None].astype(shift.dtype)
    values = jnp.where(valid[:, None], outputs.astype(shift.dtype) - shift[None, :], 0)
    squares = jnp.square(values)
    return {
        "sum": values.sum(axis=0),
        "squares": squares.sum(axis=0),
        "models": valid.sum(dtype=shift.dtype),
        "sum_in": jnp.matmul(present.T, values, precision="highest"),
        "squares_in": jnp.matmul(present.T, squares, precision="highest"),
        "models_in": present.sum(axis=0),
    }


def _difference(state: dict[str, Array]) -> Difference:
    sums = {name: np.asarray(each, np.float64) for name, each in state.items()}
    finite = np.isfinite(sums["sum"]) & np.isfinite(sums["squares"])
    if not finite.all():
        raise InvalidInputError(
            f"outputs at query {int(finite.argmin())} that are not finite, or whose squares are not",
            expected="finite numbers, near the offset",
            remedy="leave out models that diverged, and pass the mean of the first models' outputs as the offset",
        )
    sides = []
    inside = sums["models_in"][:, None], sums["sum_in"], sums["squares_in"]
    outside = tuple(
        all_ - in_ for all_, in_ in zip((sums["models"], sums["sum"], sums["squares"]), inside, strict=True)
    )
    for count, total, squares in (inside, outside):
        mean = total / np.maximum(count, 1)
        variance = np.maximum(squares - count * np.square(mean), 0) / np.maximum(count - 1, 1)
        sides.append((mean, variance / np.maximum(count, 1), count))
    (mean_in, error_in, count_in), (mean_out, error_out, count_out) = sides
    measured = (count_in > 1) & (count_out > 1)
    scores = np.where(measured, mean_in - mean_out, 0)
    return Difference(scores, np.where(measured, np.sqrt(error_in + error_out), np.inf))


def denoise(found: Difference, threshold: float) -> Float[np.ndarray, "n q"]:
    """Return the scores that are more than `threshold` standard errors from 0; the others are 0.

    Raises:
        InvalidInputError: `threshold` is negative, or a score or an error is NaN.
    """
    if not threshold >= 0:
        raise InvalidInputError(
            f"threshold = {threshold:g}", expected="a number of standard errors, at least 0", remedy="0 keeps all"
        )
    undefined = np.isnan(found.scores) | np.isnan(found.errors)
    if undefined.any():
        raise InvalidInputError(
            f"{np.count_nonzero(undefined)} differences, or errors of them, that are NaN",
            expected="differences of finite outputs",
            remedy="leave out models that diverged",
        )
    measured = np.isfinite(found.errors)
    beyond = np.abs(found.scores) > threshold * np.where(measured, found.errors, 0)
    return np.where(measured & beyond, found.scores, 0)


def choose_threshold(
    found: Difference,
    masks: Bool[np.ndarray, "m n"],
    outputs: Num[np.ndarray, "m q"],
    *,
    thresholds: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0),
) -> Threshold:
    """Return the threshold whose scores rank held-out models best: one for all queries.

    A query of which a threshold leaves nothing counts as 0.

    Args:
        found: the differences, of other models.
        masks: what each held-out model was trained on.
        outputs: of each held-out model; averaged over seeds, if there are several.
        thresholds: to choose from, in standard errors.
    """
    measured = []
    for each in thresholds:
        correlation = spearman(lds.predict(denoise(found, each), masks), outputs, axis=0)
        measured.append(float(np.mean(np.where(correlation.constant, 0, correlation.values))))
    return Threshold(tuple(thresholds), tuple(measured), float(thresholds[int(np.argmax(measured))]))
