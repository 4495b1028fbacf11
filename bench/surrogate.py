# pyright: reportMissingImports=false
"""The cost of sparse surrogates: the LASSO's path for many targets at once, beside celer and scikit-learn.

    jattrib bench surrogate --out bench/results/surrogate.jsonl

2,000 masks, random halves of 5,000 columns; 500 targets, each a linear function of a fifth of the columns with
heavy-tailed weights (Student's t of 2.2 degrees of freedom) and normal noise of the same variance; 50 penalties from
each target's own λ_max down to a twentieth of it, evenly spaced on a logarithmic scale.  Every side stops at a duality
gap of 1e-6 of the objective of zero weights.  Ours is in float32 and solves for all targets; the others are in float64
(celer has no other on these penalties) and solve a path a target, one process a core, for some of the targets: their
seconds are scaled to all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import harness
from jattrib.attribution import elastic_net, surrogate
from jattrib.core import mesh as meshes
from jattrib.data import masks as subset_masks

MASKS, COLUMNS, TARGETS = 2000, 5000, 500
PATH = surrogate.Path(ratio=0.05, count=50)
TOLERANCE = 1e-6
PEERS_TARGETS = 8
"""Targets of the sides that are scaled."""


def run() -> list[dict[str, Any]]:
    """Measure the LASSO's path."""
    harness.require("celer", "sklearn", "joblib")
    masks, outputs = problem()
    few = np.ascontiguousarray(outputs[:, :PEERS_TARGETS])

    counts: list[int] = []

    def ours() -> np.ndarray:
        solver = surrogate.Solver(TOLERANCE)
        _, info = surrogate.lasso(masks, outputs, path=PATH, solver=solver, progress=False)
        counts.append(int(info.products.sum()))
        return info.gap

    sides: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "celer": lambda: paths("celer", masks, few),
        "scikit-learn": lambda: paths("scikit-learn", masks, few),
    }
    timings = harness.compare(sides, calls=1)
    found, info = surrogate.lasso(masks, few, path=PATH, progress=False)
    each = counts[-1] / TARGETS / PATH.count
    share = counts[-1] * product_seconds(masks) / timings["ours"].median
    rows = []
    for name in ("celer", "scikit-learn"):
        theirs, gap = last(name, masks, few)
        apart = np.abs(found.coefficients - theirs).max() / np.abs(theirs).max()
        scale = TARGETS / PEERS_TARGETS
        rows.append(
            {
                "case": f"LASSO path, {MASKS:,} x {COLUMNS:,}, {TARGETS} targets, {PATH.count} penalties",
                "ours": timings["ours"].median,
                "other": timings[name].median * scale,
                "other_name": f"{name}, {meshes.cores()} processes",
                "ratio": timings["ours"].median / (timings[name].median * scale),
                "unit": "s",
                "device": harness.device(),
                "versions": harness.versions((name,)),
                "ours_first_s": timings["ours"].first,
                "other_first_s": timings[name].first,
                "gap": float(info.gap.max()),
                "other_gap": gap,
                "apart": float(apart),
                "products_share": share,
                "note": f"the other's seconds are those of {PEERS_TARGETS} targets times {scale:g}; penalties down to "
                f"{PATH.ratio:g} λ_max; gaps relative to the objective of zero weights, the largest at the last "
                "penalty; apart: the largest difference of its coefficients over the largest coefficient; "
                f"products_share: our {each:.1f} products with the design a penalty, timed by themselves, over our "
                "seconds; "
                f"columns in the last solutions: {(found.coefficients != 0).sum(axis=0).mean():.0f} on average",
            }
        )
    return rows


def problem() -> tuple[np.ndarray, np.ndarray]:
    """Draw masks and outputs."""
    masks = subset_masks.subsets(jax.random.key(0), COLUMNS, alpha=0.5, count=MASKS)
    rng = np.random.default_rng(0)
    weights = rng.standard_t(2.2, size=(COLUMNS, TARGETS)) * (rng.random((COLUMNS, TARGETS)) < 0.2)
    signal = masks.astype(np.float32) @ weights.astype(np.float32)
    return masks, signal / signal.std(axis=0) + rng.normal(size=signal.shape)


def standardized(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the design as the others get it, and the columns' scales."""
    columns = masks.astype(np.float64)
    scales = columns.std(axis=0)
    return np.asfortranarray((columns - columns.mean(axis=0)) / scales), scales


def paths(name: str, masks: np.ndarray, outputs: np.ndarray) -> Any:
    """Solve a path a target with one of the others, one process a core."""
    from joblib import Parallel, delayed

    design, _ = standardized(masks)
    work = (delayed(one)(name, design, outputs[:, target]) for target in range(outputs.shape[1]))
    return Parallel(n_jobs=meshes.cores(), max_nbytes=None)(work)  # celer takes no read-only memory


def one(name: str, design: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve one path; coefficients and gaps at the last penalty, the gap relative to the objective of zero weights."""
    target = outputs - outputs.mean()
    m, energy = len(target), 0.5 * target @ target
    alphas = np.abs(design.T @ target).max() / m * np.geomspace(1, PATH.ratio, PATH.count)
    if name == "celer":
        from celer import celer_path

        _, found, gaps = celer_path(design, target, "lasso", alphas=alphas, tol=TOLERANCE / 2)[:3]
        return found[:, -1], gaps * m / energy  # its tolerance is a part of ‖y‖², its objective is divided by m
    from sklearn.linear_model import lasso_path

    _, found, gaps = lasso_path(design, target, alphas=alphas, tol=TOLERANCE / 2, max_iter=100_000)
    return found[:, -1], gaps / energy


def last(name: str, masks: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, float]:
    """Return another's natural coefficients at the last penalty, and its largest gap there."""
    found = paths(name, masks, outputs)
    _, scales = standardized(masks)
    return np.stack([each for each, _ in found], axis=1) / scales[:, None], float(max(gaps[-1] for _, gaps in found))


def product_seconds(masks: np.ndarray) -> float:
    """Return the seconds that one target's product with the design takes, among as many as go in step on all cores."""
    columns, _ = standardized(masks)
    rows, together = jnp.asarray(columns, jnp.float32), elastic_net.TOGETHER * meshes.cores()
    design = elastic_net.Problem(rows, rows.T, None, rows[:0], jnp.ones(()), jnp.ones(COLUMNS))
    vectors = jnp.asarray(np.random.default_rng(1).normal(size=(COLUMNS, together)), jnp.float32)
    multiply = jax.jit(partial(elastic_net.product, design))
    return harness.compare({"product": lambda: multiply(vectors)})["product"].median / together


if __name__ == "__main__":
    harness.main(run, "surrogate")
