"""The comparison's attributors that take gradients at one run: influence functions with every curvature, and TracIn."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jattrib.attribution import features as kept
from jattrib.attribution import influence as influences
from jattrib.attribution import tracin as traces
from jattrib.attribution.influence import Precondition, Vectors
from jattrib.core import stream
from jattrib.core.types import OutputFn, Params, Source
from jattrib.curvature import arnoldi as subspaces
from jattrib.curvature import datainf as closed_form
from jattrib.curvature import ekfac as factored
from jattrib.curvature import krylov, products
from jattrib.grads import taps
from jattrib.models.outputs import Logits, Loss, Margin, draw_label, label_loss
from jattrib.projection import factored as factors
from jattrib.recipes import build, experiment
from jattrib.recipes.comparison_base import Candidates, OneRun
from jattrib.train import cuts, pullback, replay


class _One(NamedTuple):
    """The one run's model and data, and the queries' gradients there."""

    loss: Loss
    margin: OutputFn
    logits: Logits
    params: Params
    train: Source
    queries: Vectors


def _one(context: OneRun) -> _One:
    apply, (params, state) = context.task.members.model.apply, context.whole[:2]
    params = jax.tree.map(jnp.asarray, params)
    margin, queries = experiment.output(context.task)(state), stream.InMemory(tuple(context.task.queries))
    found = influences.gradients(margin, params, queries)
    return _One(
        Loss(apply, state), margin, Logits(apply, state), params, stream.InMemory(tuple(context.task.train)), found
    )


def _scores(one: _One, directions: Vectors) -> np.ndarray:
    return np.asarray(influences.scores(one.loss, one.params, one.train, directions, progress=False))


def gradient_dot(context: OneRun) -> Candidates:
    """Return minus the inner product of a loss' gradient with a margin's."""
    one = _one(context)
    return {0.0: influences.gradient_dot(one.loss, one.params, one.train, one.queries)}


def gradient_cosine(context: OneRun) -> Candidates:
    """Return minus the cosine of a loss' gradient with a margin's."""
    one = _one(context)
    return {0.0: influences.cosine(one.loss, one.params, one.train, one.queries)}


def ekfac(context: OneRun) -> Candidates:
    """Return influence with EK-FAC's inverse of the true Fisher matrix, by relative damping of each layer."""
    one = _one(context)
    key = jax.random.fold_in(context.task.keys["statistics"], 2)
    curvature = factored.fit(
        factored.true_fisher(one.logits, label_loss, draw_label, key=key), one.params, one.train, progress=False
    )
    return {
        damping: _scores(one, factored.inverse(curvature, relative_damping=damping)(one.queries))
        for damping in context.config.method.dampings if damping > 0
    }  # fmt: skip


def datainf(context: OneRun) -> Candidates:
    """Return influence with DataInf's mean of inverses, by relative damping of each layer."""
    one = _one(context)
    return {
        damping: _scores(
            one, closed_form.precondition(one.loss, one.params, one.train, one.queries, relative_damping=damping)
        )
        for damping in context.config.method.dampings if damping > 0
    }  # fmt: skip


def logra(context: OneRun) -> Candidates:
    """Return influence of factored projections with the inverse of their empirical Fisher matrix, by damping."""
    one = _one(context)
    layers = taps.find(one.loss, one.params, jax.tree.map(lambda leaf: leaf[0], one.train.take(np.zeros(1, int))))
    settings = {
        "projector": factors.projector(factors.plan(layers, rank=context.config.method.logra_rank)),
        "key": jax.random.fold_in(context.task.keys["projection"], 1 << 20),
    }
    train = kept.features(one.loss, one.params, one.train, **settings)
    source = stream.InMemory(tuple(context.task.queries))
    queries = jnp.asarray(np.asarray(kept.features(one.margin, one.params, source, **settings)))
    return {
        damping: kept.scores(train, kept.inverse(train, relative_damping=damping)(queries))
        for damping in context.config.method.dampings if damping > 0
    }  # fmt: skip


def arnoldi(context: OneRun) -> Candidates:
    """Return influence in the space of the Gauss-Newton matrix's largest eigenvectors, by damping."""
    one, steps = _one(context), context.config.method.arnoldi_steps
    operator = products.streamed(products.ggn(one.logits, label_loss, one.params), one.train)
    key = jax.random.fold_in(context.task.keys["statistics"], 3)
    space = subspaces.arnoldi(operator, one.params, key=key, steps=steps, rank=max(1, steps // 2))
    mean = products.mean_eigenvalue(operator, one.params, key=key)
    return {
        ridge: _scores(one, subspaces.inverse(space, damping=ridge * mean)(one.queries))
        for ridge in context.config.method.ridges
    }


def conjugate_gradients(context: OneRun) -> Candidates:
    """Return influence with the Gauss-Newton matrix of some examples, solved by conjugate gradients, by damping."""
    one, method = _one(context), context.config.method
    operator, mean = _sampled_operator(context, one)
    return _by_ridge(
        context, one,
        lambda ridge: krylov.conjugate_gradient(
            operator, one.queries, damping=ridge * mean, iterations=method.iterations
        )[0],
    )  # fmt: skip


def lissa(context: OneRun) -> Candidates:
    """Return influence with the Gauss-Newton matrix of random batches, by LiSSA's series, by damping."""
    one, method = _one(context), context.config.method
    _, mean = _sampled_operator(context, one)
    operator = products.sampled(products.ggn(one.logits, label_loss, one.params), one.train)
    key = jax.random.fold_in(context.task.keys["statistics"], 5)
    return _by_ridge(
        context, one,
        lambda ridge: krylov.lissa(operator, one.queries, key=key, damping=ridge * mean, steps=method.lissa_steps)[0],
    )  # fmt: skip


def _by_ridge(context: OneRun, one: _One, solve: Callable[[float], Vectors]) -> Candidates:
    return {ridge: _scores(one, solve(ridge)) for ridge in context.config.method.ridges}


def _sampled_operator(context: OneRun, one: _One) -> tuple[Precondition, float]:
    """Return the product with the Gauss-Newton matrix of some training examples, and its mean eigenvalue."""
    key = jax.random.fold_in(context.task.keys["statistics"], 4)
    count = min(context.config.method.curvature_examples, len(one.train))
    chosen = np.asarray(jax.random.permutation(key, len(one.train)))[:count]
    operator = products.streamed(
        products.ggn(one.logits, label_loss, one.params), stream.Subset(one.train, np.sort(chosen)), chunk=100
    )
    return operator, products.mean_eigenvalue(operator, one.params, key=key)


def tracin(context: OneRun) -> Candidates:
    """Return TracIn's sum over places along the one run, each of which stands for the steps around it."""
    config, task = context.config, context.task
    members, key = experiment.paired(config, task)
    run, inputs = replay.member(members, tuple(task.train), key[0])
    steps, count = run.order.indices.shape[0], config.method.tracin_checkpoints
    rates = np.asarray(jax.vmap(build.learning_rate(config.training, steps))(jnp.arange(steps)))
    ends = np.unique(np.linspace(0, steps, count + 1).round().astype(int))
    program, rows = pullback.Program(run.loss, run.optimizer), cuts.rows(run.order, inputs.weights)
    carry = pullback.begin(program, inputs.params, inputs.state, inputs.hyper)
    places, at = [], 0
    for start, stop in pairwise(ends.tolist()):
        middle = (start + stop) // 2
        part = jax.tree.map(lambda leaf, first=at, last=middle: leaf[first:last], rows)
        carry = pullback.advance(program, run.data, inputs.hyper, carry, part)
        rate = float(rates[start:stop].sum())
        places.append(traces.Checkpoint(carry[0], rate, traces.sgd(config.training.momentum)))
        at = middle
    apply, state = task.members.model.apply, context.whole.state
    found = traces.scores(
        Loss(apply, state), Margin(apply, state), places, stream.InMemory(tuple(task.train)),
        stream.InMemory(tuple(task.queries)), progress=False,
    )  # fmt: skip
    return {0.0: found}
