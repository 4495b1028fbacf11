"""Every attributor that is compared: a new one is one line of `attributors`."""

from functools import partial

import jax
import numpy as np

from jattrib.attribution import magic as metagradients
from jattrib.metrics import bootstrap
from jattrib.models.outputs import Margin
from jattrib.recipes import comparison_influence, comparison_regressions, experiment, trak_stages
from jattrib.recipes.comparison_base import Attributor, Candidates, Config, Context
from jattrib.train import replay


def attributors(config: Config) -> tuple[Attributor, ...]:
    """Return every attributor that there is."""
    models = config.method.datamodels
    return (
        Attributor("random", "random scores", random),
        Attributor("similarity", "cosine of pixels", similarity),
        Attributor("gradient_dot", "gradient dot", comparison_influence.gradient_dot, runs=1),
        Attributor("gradient_cosine", "gradient cosine", comparison_influence.gradient_cosine, runs=1),
        Attributor("tracin", "TracIn", comparison_influence.tracin, runs=1),
        Attributor("ekfac", "EK-FAC", comparison_influence.ekfac, runs=1),
        Attributor("datainf", "DataInf", comparison_influence.datainf, runs=1),
        Attributor("logra", "LoGra", comparison_influence.logra, runs=1),
        Attributor("arnoldi", "Arnoldi", comparison_influence.arnoldi, runs=1),
        Attributor("cg", "CG", comparison_influence.conjugate_gradients, runs=1),
        Attributor("lissa", "LiSSA", comparison_influence.lissa, runs=1),
        *(
            Attributor(f"trak_{count}", f"TRAK, {count}", partial(trak, count), subset_models=count, features=count)
            for count in config.method.counts
        ),
        Attributor("difference", "difference of means", comparison_regressions.difference, subset_models=models),
        Attributor("lasso", "datamodels, LASSO", comparison_regressions.lasso, subset_models=models),
        Attributor("ridge", "datamodels, ridge", comparison_regressions.ridge, subset_models=models),
        Attributor(
            "guided",
            "datamodels, TRAK their prior",
            comparison_regressions.guided,
            subset_models=models,
            features=config.method.counts[-1],
        ),
        Attributor("magic", "MAGIC", magic, replays=True),
    )


def random(context: Context) -> Candidates:
    """Return independent normal numbers."""
    shape = len(context.task.train.labels), len(context.task.queries.labels)
    draw = bootstrap.generator(jax.random.fold_in(context.task.keys["statistics"], 1)).standard_normal(shape)
    return {0.0: draw}


def similarity(context: Context) -> Candidates:
    """Return the cosine of inputs, positive within a class and negative across."""
    return {0.0: experiment.similarity(context.task)}


def trak(count: int, context: Context) -> Candidates:
    """Return TRAK's scores from so many models on random subsets, by ridge."""
    return trak_stages.scores_by_damping(context.config, context.features[:count])


def magic(context: Context) -> Candidates:
    """Return the exact derivative of the one run with respect to its data weights; the run is part of the replay."""
    members, key = experiment.paired(context.config, context.task)
    run, inputs = replay.member(members, tuple(context.task.train), key[0])
    queries = jax.tree.map(np.asarray, tuple(context.task.queries))
    found, _ = metagradients.scores(
        partial(Margin, members.model.apply), run, inputs, queries, directory=context.folder / "magic",
        identity=context.task.identity,
    )  # fmt: skip
    return {0.0: np.asarray(found)}
