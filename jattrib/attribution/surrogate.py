"""Sparse linear surrogates: from masks and the outputs under them to weights, for thousands of targets at once.

What a mask turns off may be training examples (datamodels), components of a model (COAR) or spans of context
(ContextCite): the regression is the same, `output ≈ intercept + Σ_i mask[i] · coefficient[i]`.

Columns are standardised inside; coefficients, intercepts and errors are in the units of the masks and outputs.  All
targets share the design, so that nearly all of the time goes into matrix products.  The penalty, a target its own, is
the one of the least squared error on rows that were held out.  Computing is in float32, or in float64 where JAX has it
switched on (`jax.enable_x64`).

    scores = lasso(masks, outputs, held_out=surrogate.hold_out(key, len(masks)))[0].coefficients
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, Num

from jattrib.attribution import elastic_net, kernel_ridge
from jattrib.attribution.design import (
    Design,
    HeldOut,
    Masks,
    Outputs,
    Weights,
    centred,
    checked,
    make_design,
    natural,
    powers,
    units,
)
from jattrib.core import mesh as meshes
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.core.progress import track

CHUNK = 512
"""Targets at a time, on each device."""

GRAM_BYTES = 2**30
"""A larger Gram matrix is not kept: products are with the rows, one after the other."""


class Path(NamedTuple):
    """The penalties λ that each target visits, from its own λ_max, at which all is zero, downwards.

    Attributes:
        ratio: the last as a part of λ_max.
        count: how many, evenly spaced on a logarithmic scale; of 1 it is the last.
        l1_ratio: ρ; 1 is the LASSO.
        lambdas: the penalties themselves, the same for all targets, in place of `ratio` and `count`.
    """

    ratio: float = 0.05
    count: int = 50  # pyright: ignore[reportIncompatibleMethodOverride]
    l1_ratio: float = 1.0
    lambdas: Sequence[float] | Float[np.ndarray, " k"] = ()


class Solver(NamedTuple):
    """How precisely to solve, and when to stop looking.

    Attributes:
        tolerance: the duality gap at which a target goes on, divided by the objective of zero weights.
        patience: a target ends when its held-out error has not improved for so many penalties; 0: at the last.
        refit: whether to fit all rows, the held-out ones too, at the penalty that was chosen.
        standardize: whether the penalty is on weights of columns of unit variance; else of columns as they are.
    """

    tolerance: float = 1e-6
    patience: int = 0
    refit: bool = True
    standardize: bool = True


class Surrogate(NamedTuple):
    """Linear models of outputs, one a target: `intercept + Σ_i mask[i] · coefficient[i]`, in natural units."""

    coefficients: Float[np.ndarray, "n t"]
    intercepts: Float[np.ndarray, " t"]


class Info(NamedTuple):
    """How the penalised fits went.

    Attributes:
        chosen: the place on the path of each target's penalty.
        penalties: that penalty λ, in the objective's units.
        gap: the duality gap of the coefficients returned, divided by the objective of zero weights, `½ ‖y − ȳ‖²`; 0
            where no column, or no output that chose λ, varies on the rows fitted: λ is then 0, and so are the weights.
        lambdas: the penalties.
        gaps: the gap at each, on the rows fitted; NaN where a target did not go so far.
        products: how many products with the masks each target took to get there.
        errors: the mean squared error on held-out rows at each, weighted as the rows are; NaN where there are none.
        path: coefficients at every penalty, where they were asked for.
    """

    chosen: Int[np.ndarray, " t"]
    penalties: Float[np.ndarray, " t"]
    gap: Float[np.ndarray, " t"]
    lambdas: Float[np.ndarray, "k t"]
    gaps: Float[np.ndarray, "k t"]
    products: Int[np.ndarray, " t"]
    errors: Float[np.ndarray, "k t"]
    path: Float[np.ndarray, "k n t"] | None = None


class RidgeInfo(NamedTuple):
    """How the ridge was chosen.

    Attributes:
        chosen: which damping, for each target.
        errors: the mean squared error of each damping on rows that were not fitted.
        dampings: what there was to choose from.
        prior_weights: γ, what the prior was multiplied by.
    """

    chosen: Int[np.ndarray, " t"]
    errors: Float[np.ndarray, "k t"]
    dampings: Float[np.ndarray, " k"]
    prior_weights: Float[np.ndarray, " t"]


def predict(surrogate: Surrogate, masks: Masks) -> Float[np.ndarray, "m t"]:
    """Return `intercept + Σ_i mask[i] · coefficient[i]`, in float64."""
    return np.asarray(masks, np.float64) @ np.asarray(surrogate.coefficients, np.float64) + surrogate.intercepts


def hold_out(key: Key[Array, ""], rows: int, *, fraction: float = 0.1) -> HeldOut:
    """Return which rows to hold out: a random part of them, one row at least.

    Raises:
        InvalidInputError: there are fewer than two rows, or `fraction` is not between 0 and 1.
    """
    if rows < 2 or not 0 < fraction < 1:
        raise InvalidInputError(
            f"{fraction:g} of {rows} rows held out", expected="a part between 0 and 1 of two rows or more",
            remedy="hold out a tenth, as is usual, of more rows",
        )  # fmt: skip
    count = min(max(1, round(fraction * rows)), rows - 1)
    return np.asarray(jax.random.permutation(key, rows) < count)


def lasso(
    masks: Masks,
    outputs: Outputs,
    *,
    held_out: HeldOut | None = None,
    weights: Weights | None = None,
    path: Path | None = None,
    solver: Solver | None = None,
    keep_path: bool = False,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> tuple[Surrogate, Info]:
    """Return the elastic net of every target, by default the LASSO, at the penalty that predicts best.

    For each target it minimises, with s the weights made to sum to the number of rows,

        1/(2m) Σ_i s_i (y_i − b − x_iᵀw)² + λ (ρ ‖w‖₁ + ½ (1 − ρ) ‖w‖²),

    over the weights w of standardised columns and b, which has no penalty.

    Args:
        masks: X, a row a model; any numbers will do.
        outputs: y, a column a target.
        held_out: the rows that choose λ (`hold_out`) and are not fitted meanwhile; without any, λ is the path's last.
        weights: of the rows, not negative.
        path: the penalties, and ρ.
        solver: the precision, and the end of the path.
        keep_path: whether `Info` has the coefficients at every penalty.
        mesh: spreads targets over its first axis.
        progress: whether to show it.

    Returns:
        The surrogate, and `Info` with the duality gap that was reached.

    Raises:
        InvalidInputError: shapes differ, an entry is not finite, a target too large or small for the precision,
            or rows, path or precision will not do.
        DivergedError: a gap stays above the tolerance: rounding is in the way.

    Source: Ilyas et al. 2022, section 2 and appendix B.  Unlike `fast_l1`, λ_max is that of the standardised columns,
    coefficients are natural, and what is reached is known.
    """
    path, solver = path or Path(), solver or Solver()
    path = path._replace(lambdas=tuple(path.lambdas))
    masks, outputs = checked(masks, outputs, held_out, weights)
    _check_settings(path, solver)
    kept = np.ones(len(outputs), bool) if held_out is None else ~held_out
    design = make_design(masks, kept, weights, standardize=solver.standardize)
    parts = _fit(design, outputs, path, solver, None, keep_path=keep_path, mesh=mesh, label="fitting", show=progress)
    found = parts
    if held_out is not None and solver.refit:
        whole = make_design(masks, np.ones(len(outputs), bool), weights, standardize=solver.standardize)
        restart = _Restart(parts.penalties, parts.coefficients)
        found = _fit(
            whole, outputs, path, solver, restart, keep_path=False, mesh=mesh, label="refitting", show=progress
        )
    gap = found.gaps[found.chosen, np.arange(len(found.chosen))]
    if not (gap <= solver.tolerance).all():
        worst = int(np.argmax(np.nan_to_num(gap, nan=np.inf)))
        raise DivergedError(
            f"the fit of target {worst} has a duality gap of {gap[worst]:.3g} where {solver.tolerance:g} was asked for",
            expected="a gap that falls below the tolerance",
            remedy="ask for a larger tolerance or a larger last penalty (`Path.ratio`), or compute in float64",
        )
    return found.surrogate, Info(
        parts.chosen, parts.penalties, gap, parts.lambdas, parts.gaps, parts.products, parts.errors, parts.path
    )


def ridge(
    masks: Masks,
    outputs: Outputs,
    *,
    dampings: Sequence[float] = tuple(np.geomspace(1e-3, 1e3, 25).tolist()),
    held_out: HeldOut | None = None,
    weights: Weights | None = None,
    prior: Num[Array | np.ndarray, "n t"] | None = None,
    standardize: bool = True,
) -> tuple[Surrogate, RidgeInfo]:
    """Return the ridge regression of every target at the damping that predicts best.

    For each target it minimises `1/m Σ_i s_i (y_i − b − x_iᵀ(γ p + w))² + δ ‖w‖²` over b, γ and standardised columns'
    weights w, s as in `lasso`; the coefficients are `γ p + w`.  γ, the multiple of the prior p, has no penalty: where
    the prior is worth nothing it becomes small, where it explains all w does.  One eigendecomposition of m × m numbers
    serves all targets and dampings.

    Args:
        masks: X, a row a model.
        outputs: y, a column a target.
        dampings: δ, in units of the mean eigenvalue of the rows' kernel `XXᵀ/m`.
        held_out: rows that choose δ; all are then fitted.  Without any, each row is left out in turn, in closed form.
        weights: of the rows, not negative.
        prior: p, coefficients that another method gives; their scale does not matter.  None: γ is 0.
        standardize: whether the penalty is on weights of columns of unit variance.

    Raises:
        InvalidInputError: shapes differ, an entry is not finite, a target too large or small for the precision,
            or a damping is not positive.

    Source: Hoerl and Kennard 1970; Allen 1974 (leaving out one row in closed form); with a prior it is generalised
    least squares with the kernel as the covariance.
    """
    values = np.asarray(dampings, np.float64)
    masks, outputs = checked(masks, outputs, held_out, weights)
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise InvalidInputError(
            f"dampings {values.tolist()}", expected="one positive number or more",
            remedy="use `least_squares` for no damping, or give some, such as 0.1",
        )  # fmt: skip
    if prior is not None and (prior.shape != (masks.shape[1], outputs.shape[1]) or not np.isfinite(prior).all()):
        raise InvalidInputError(
            f"a prior of {prior.shape} for {masks.shape[1]} columns and {outputs.shape[1]} targets",
            expected="a finite coefficient for each column and target",
            remedy="pass scores [source, query] of these sources and queries",
        )
    prior = np.zeros((masks.shape[1], outputs.shape[1])) if prior is None else np.asarray(prior, np.float64)
    every = np.ones(len(outputs), bool)
    kept = every if held_out is None else ~held_out
    sizes, prior_sizes = units(outputs), powers(np.abs(prior).max(axis=0))
    scaled = outputs / sizes, prior / prior_sizes
    kernel = kernel_ridge.decomposed(make_design(masks, kept, weights, standardize=standardize), *scaled)
    ridges = jnp.asarray(values, kernel.spectrum.dtype)
    errors = np.asarray(jax.lax.map(lambda each: kernel_ridge.errors(kernel, each), ridges))
    chosen = np.argmin(errors, axis=0)
    if held_out is not None:
        kernel = kernel_ridge.decomposed(make_design(masks, every, weights, standardize=standardize), *scaled)
    solution, multiple = kernel_ridge.solve(kernel, jnp.asarray(values[chosen], kernel.spectrum.dtype))
    multiples = np.asarray(multiple, np.float64) / kernel.norms * (sizes / prior_sizes)
    own = Surrogate(*natural(kernel.design, np.asarray(solution), kernel.means, sizes))
    added = np.where(np.isfinite(kernel.design.scales)[:, None], prior, 0) * multiples
    intercepts = own.intercepts - kernel.design.means @ added
    kind = own.coefficients.dtype
    found = Surrogate((own.coefficients + added).astype(kind), intercepts.astype(kind))
    return found, RidgeInfo(chosen, errors * np.square(sizes), values, multiples)


def least_squares(masks: Masks, outputs: Outputs, *, weights: Weights | None = None) -> Surrogate:
    """Return the (weighted) least-squares surrogate: of all that fit equally well, the one of least norm.

    Args:
        masks: X, a row a model.
        outputs: y, a column a target.
        weights: of the rows, not negative.

    Raises:
        InvalidInputError: shapes differ, an entry is not finite, or a target too large or small for the precision.
    """
    masks, outputs = checked(masks, outputs, None, weights)
    design = make_design(masks, np.ones(len(outputs), bool), weights, standardize=False)
    sizes = units(outputs)
    targets, means = centred(design, outputs / sizes)
    solution = jnp.linalg.lstsq(design.rows, targets.T)[0]
    return Surrogate(*natural(design, np.asarray(solution).T, means, sizes))


class _Restart(NamedTuple):
    """Where to fit again: at which penalties, from which coefficients; those in units of each target's own."""

    penalties: Float[np.ndarray, " t"]
    coefficients: Float[np.ndarray, "t n"]


class _Parts(NamedTuple):
    """What `_fit` found, targets of all chunks together."""

    surrogate: Surrogate
    coefficients: Float[np.ndarray, "t n"]
    chosen: Int[np.ndarray, " t"]
    penalties: Float[np.ndarray, " t"]
    lambdas: Float[np.ndarray, "k t"]
    gaps: Float[np.ndarray, "k t"]
    products: Int[np.ndarray, " t"]
    errors: Float[np.ndarray, "k t"]
    path: Float[np.ndarray, "k n t"] | None


def _fit(
    design: Design, outputs: np.ndarray, path: Path, solver: Solver, restart: _Restart | None, *,
    keep_path: bool, mesh: Mesh | None, label: str, show: bool,
) -> _Parts:  # fmt: skip
    """Solve for all targets, a chunk at a time, in units of their own."""
    count, sizes = len(design.rows), units(outputs)
    rule = elastic_net.Rule(solver.tolerance, 0 if restart is not None else solver.patience, keep_path)
    problem = meshes.replicate(_problem(design), mesh)
    others = np.sqrt(design.weights[~design.kept])[:, None]
    t, size = (
        outputs.shape[1],
        meshes.padded_size(min(CHUNK * meshes.width(mesh), outputs.shape[1]), meshes.width(mesh)),
    )
    found, lambdas, averages = [], [], []
    k = (len(path.lambdas) or path.count) if restart is None else 1
    with track(t * k, label, progress=show) as advance:
        report = _capped(advance, t * k)  # targets that fill up a chunk or a core's share are counted, too
        for start in range(0, t, size):
            at = np.minimum(np.arange(start, start + size), t - 1)
            scaled = outputs[:, at] / sizes[at]
            targets, means = centred(design, scaled)
            held_out = (scaled[~design.kept] - means) * others
            correlation = jnp.matmul(targets, design.rows, precision="highest")
            if restart is None:
                steps = _steps(np.asarray(correlation) / count, path, sizes[at])
            else:
                steps = (restart.penalties / sizes)[at][:, None]
            targets, correlation = (jnp.where(steps[:, :1] == 0, 0, each) for each in (targets, correlation))
            begin = jnp.zeros_like(correlation) if restart is None else jnp.asarray(restart.coefficients[at])
            energy = jnp.sum(targets * targets, axis=1)
            kind = targets.dtype
            batch = elastic_net.Targets(
                targets, correlation, energy, jnp.asarray(held_out.T, kind),
                jnp.asarray(count * path.l1_ratio * steps, kind),
                jnp.asarray(count * (1 - path.l1_ratio) * (steps * sizes[at][:, None]), kind), begin,
            )  # fmt: skip
            batch = meshes.place_rows(jax.tree.map(np.asarray, batch), mesh, size)
            solution = elastic_net.descend(problem, batch, rule, mesh=mesh, report=report)
            last = min(size, t - start)
            found.append(jax.tree.map(lambda leaf, last=last: meshes.fetch(leaf)[:last], solution))
            lambdas.append(steps[:last])
            averages.append(means[:last])
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
    steps, means = np.concatenate(lambdas) * sizes[:, None], np.concatenate(averages)
    coefficients = np.where(np.isfinite(design.scales), 1 / design.scales, 0)
    return _Parts(
        surrogate=Surrogate(*natural(design, whole.weights, means, sizes)),
        coefficients=whole.weights,
        chosen=whole.chosen,
        penalties=steps[np.arange(t), whole.chosen],
        lambdas=steps.T,
        gaps=whole.gaps.T,
        products=whole.products,
        errors=(whole.errors / np.sum(design.weights[~design.kept])).T * np.square(sizes)
        if len(others)
        else np.full_like(steps.T, np.nan),
        path=np.moveaxis(whole.path, 0, 2) * (coefficients[:, None] * sizes) if keep_path else None,
    )


def _capped(advance: Callable[[int], None], left: int) -> Callable[[int], None]:
    """Return a function that advances as another does, up to what is left."""

    def up_to(count: int) -> None:
        nonlocal left
        count = min(count, left)
        left -= count
        advance(count)

    return up_to


def _problem(design: Design) -> elastic_net.Problem:
    m, n = design.rows.shape
    return _prepare(design.rows, design.others, keep=n <= 2 * m and n * n * design.rows.itemsize <= GRAM_BYTES)


@partial(jax.jit, static_argnames="keep")
def _prepare(rows: Float[Array, "m n"], others: Float[Array, "h n"], *, keep: bool) -> elastic_net.Problem:
    gram = jnp.matmul(rows.T, rows, precision="highest") if keep else None
    columns = rows.T if not keep and jax.default_backend() == "cpu" else None
    energies = jnp.sum(jnp.square(rows), axis=0)
    return elastic_net.Problem(rows, columns, gram, others, elastic_net.lipschitz(rows), energies)


def _steps(
    correlation: Float[np.ndarray, "t n"], path: Path, sizes: Float[np.ndarray, " t"]
) -> Float[np.ndarray, "t k"]:
    """Return every target's penalties λ, in units of their own."""
    if path.lambdas:
        return np.sort(np.asarray(path.lambdas, np.float64))[::-1] / sizes[:, None]
    largest = np.abs(correlation).max(axis=1).astype(np.float64) / path.l1_ratio
    parts = np.geomspace(1, path.ratio, path.count) if path.count > 1 else np.array([path.ratio])
    return largest[:, None] * parts


def _check_settings(path: Path, solver: Solver) -> None:
    good = 0 < path.ratio <= 1 and path.count >= 1 and 0 < path.l1_ratio <= 1
    good = good and all(np.isfinite(each) and each > 0 for each in path.lambdas)
    if not good or solver.tolerance <= 0 or solver.patience < 0:
        raise InvalidInputError(
            f"{path}, {solver}",
            expected="0 < ratio <= 1, count >= 1, 0 < l1_ratio <= 1, positive lambdas and tolerance",
            remedy="use `ridge` for l1_ratio = 0, and `least_squares` for no penalty",
        )
