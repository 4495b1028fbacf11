"""The design of a regression: masks in standardised columns, and back to natural units."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from jattrib.core.errors import InvalidInputError

Masks = Num[Array | np.ndarray, "m n"] | Bool[Array | np.ndarray, "m n"]
Outputs = Num[Array | np.ndarray, "m t"]
HeldOut = Bool[np.ndarray, " m"]
Weights = Num[np.ndarray, " m"]


class Design(NamedTuple):
    """Rows in standardised columns, multiplied by the roots of their weights, and how they were made.

    `rows` are fitted, `others` held out; `scales` are 1 without standardisation, and infinite where a column is
    constant, whose coefficient is 0.
    """

    rows: Float[Array, "m n"]
    others: Float[Array, "h n"]
    means: Float[np.ndarray, " n"]
    scales: Float[np.ndarray, " n"]
    kept: HeldOut
    weights: Float[np.ndarray, " m"]


def make_design(masks: np.ndarray, kept: HeldOut, weights: Weights | None, *, standardize: bool) -> Design:
    """Return masks with columns centred, and scaled, by the rows that are fitted."""
    relative = np.ones(len(masks)) if weights is None else np.asarray(weights, np.float64)
    relative = relative * (kept.sum() / relative[kept].sum())
    part = relative[kept] / kept.sum()
    values = np.asarray(masks, np.float64)
    means = part @ values[kept]
    moved = values - means
    variances = part @ np.square(moved[kept])
    moves = varies(np.asarray(masks)[kept & (relative > 0)])
    moves &= variances > 1e-26 * np.maximum(np.square(means), np.finfo(np.float64).tiny)
    scales = np.where(moves, np.sqrt(variances) if standardize else 1.0, np.inf)
    rows = (moved / scales * np.sqrt(relative)[:, None]).astype(jnp.result_type(float))
    return Design(jnp.asarray(rows[kept]), jnp.asarray(rows[~kept]), means, scales, kept, relative)


def centred(design: Design, outputs: np.ndarray) -> tuple[Float[Array, "t m"], Float[np.ndarray, " t"]]:
    """Return the fitted rows' outputs, centred and weighted as they are, and the means.

    A target that does not vary is 0, and not the rounding of its mean.
    """
    weights = design.weights[design.kept]
    values = np.asarray(outputs[design.kept], np.float64)
    means = weights @ values / len(weights)
    moved = np.where(varies(values[weights > 0]), values - means, 0)
    return jnp.asarray((moved * np.sqrt(weights)[:, None]).T, design.rows.dtype), means


def varies(values: Num[np.ndarray, "m c"] | Bool[np.ndarray, "m c"]) -> Bool[np.ndarray, " c"]:
    """Return which columns vary by more than the mean of equal numbers may differ from them, by rounding."""
    low, high = _ends(values)
    rounding = len(values) * np.finfo(np.float64).eps
    return high - low > rounding * np.maximum(np.abs(low), np.abs(high))


def _ends(values: np.ndarray) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    return np.asarray(values.min(axis=0), np.float64), np.asarray(values.max(axis=0), np.float64)


def powers(sizes: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Return a power of two near each number, by which to divide loses nothing; 1 for 0."""
    exponents = np.clip(np.frexp(sizes)[1], -1000, 1000)
    return np.where(sizes > 0, np.ldexp(1.0, exponents), 1.0)


def units(outputs: np.ndarray) -> Float[np.ndarray, " t"]:
    """Return the units that targets are fitted in, powers of two near their spreads: no square over- or underflows.

    Raises:
        InvalidInputError: a target is so large, or varies so little, that its coefficients would not be finite, or 0.
    """
    low, high = _ends(outputs)
    spread, largest = np.where(varies(outputs), high - low, 0), np.maximum(np.abs(low), np.abs(high))
    kind = np.finfo(jnp.result_type(float))
    bad = (spread > 0) & (spread < float(kind.tiny) / float(kind.eps)) | (largest > float(kind.max) * float(kind.eps))
    if bad.any():
        target = int(bad.argmax())
        raise InvalidInputError(
            f"target {target}, whose outputs are from {low[target]:.3g} to {high[target]:.3g}",
            expected=f"a spread and values that {kind.dtype} holds, with room for its precision",
            remedy="choose another unit for the outputs, or compute in float64 (`jax.enable_x64`)",
        )
    return powers(spread)


def natural(
    design: Design,
    solution: Float[np.ndarray, "t n"],
    means: Float[np.ndarray, " t"],
    units: Float[np.ndarray, " t"],
) -> tuple[Float[np.ndarray, "n t"], Float[np.ndarray, " t"]]:
    """Return the coefficients and intercepts, in the units of masks and outputs, of weights of standardised columns.

    Weights and means are of targets divided by `units`.
    """
    coefficients = np.asarray(solution, np.float64) / design.scales * units[:, None]
    intercepts = means * units - coefficients @ design.means
    return coefficients.T.astype(solution.dtype), intercepts.astype(solution.dtype)


def checked(
    masks: Masks, outputs: Outputs, held_out: HeldOut | None, weights: Weights | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return masks and outputs as NumPy arrays.

    Raises:
        InvalidInputError: shapes differ, there is no column, an entry is not finite, there are no rows to fit or to
            choose by, or weights are no weights.
    """
    masks, outputs = np.asarray(masks), np.asarray(outputs)
    if masks.ndim != 2 or not masks.shape[1] or outputs.ndim != 2:
        raise InvalidInputError(
            f"masks of shape {masks.shape} and outputs of shape {outputs.shape}",
            expected="masks [model, source], of one source or more, and outputs [model, target]",
            remedy="give outputs of one target as a column: `outputs[:, None]`",
        )
    kept = np.ones(len(masks), bool) if held_out is None else ~np.asarray(held_out)
    if len(masks) != len(outputs) or len(kept) != len(masks) or kept.sum() < 2 or not outputs.shape[1]:
        raise InvalidInputError(
            f"masks of {masks.shape}, outputs of {outputs.shape}, {int(kept.sum())} of {len(kept)} rows to fit",
            expected="a row a model in both, at least two of them fitted, and a column a target",
            remedy="transpose outputs that are [target, model]; hold out fewer rows",
        )
    if held_out is not None and kept.all():
        raise InvalidInputError(
            "held_out without a row", expected="some rows to choose by", remedy="pass `hold_out(key, rows)`, or None"
        )
    for name, each in (("masks", masks), ("outputs", outputs)):
        if not np.isfinite(each).all():
            raise InvalidInputError(
                f"{np.count_nonzero(~np.isfinite(each))} entries of the {name} that are not finite",
                expected="finite numbers",
                remedy="leave out models that diverged",
            )
    if weights is not None:
        weights = np.asarray(weights)
        bad = weights.shape != (len(masks),) or not np.isfinite(weights).all() or weights.min() < 0
        if bad or not all(weights[part].sum() > 0 for part in (kept, ~kept) if part.any()):
            raise InvalidInputError(
                f"weights of shape {weights.shape} for {len(masks)} rows",
                expected="a number a row, finite, not negative, not all of them 0",
                remedy="pass one weight a row of the masks",
            )
    return masks, outputs
