"""The comparison's attributors that regress the margins of many models on what each was trained on."""

import jax
import numpy as np
from jaxtyping import Bool, Float

from jattrib.attribution import datamodels, surrogate
from jattrib.recipes import trak_stages
from jattrib.recipes.comparison_base import Candidates, Context


def difference(context: Context) -> Candidates:
    """Return the mean margin of models with a source minus that without, by the threshold below which it is zero."""
    masks, outputs = _regressed(context)
    found = datamodels.difference(masks, outputs)
    return {threshold: datamodels.denoise(found, threshold) for threshold in context.config.method.thresholds}


def lasso(context: Context) -> Candidates:
    """Return the LASSO's datamodels, their penalties chosen on a part of the models that they regress."""
    masks, outputs = _regressed(context)
    key, part = context.task.keys["statistics"], context.config.method.held_out_fraction
    held_out = surrogate.hold_out(jax.random.fold_in(key, 6), len(masks), fraction=part)
    solver = surrogate.Solver(tolerance=1e-3, patience=3)  # a smaller gap moves the held-out R² by less than .001
    return {0.0: datamodels.estimate(masks, outputs, held_out=held_out, solver=solver, progress=False).scores}


def ridge(context: Context) -> Candidates:
    """Return ridge regression's datamodels, their damping chosen by leaving out each model in turn."""
    masks, outputs = _regressed(context)
    return {0.0: datamodels.estimate(masks, outputs, regression="ridge").scores}


def guided(context: Context) -> Candidates:
    """Return ridge regression's datamodels of what TRAK's scores leave, by TRAK's ridge."""
    masks, outputs = _regressed(context)
    priors = trak_stages.scores_by_damping(context.config, context.features[: context.config.method.counts[-1]])
    return {
        damping: datamodels.estimate(masks, outputs, regression="ridge", prior=prior).scores
        for damping, prior in priors.items()
    }


def _regressed(context: Context) -> tuple[Bool[np.ndarray, "m n"], Float[np.ndarray, "m q"]]:
    return context.subset_models.masks, context.subset_models.outputs[:, 0]
