"""Every influence of a model whose parameters are in half precision, beside the same model in single."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.attribution import features, influence, tracin, trak
from jattrib.core.stream import InMemory
from jattrib.curvature import datainf, diagonal, ekfac, krylov, products
from jattrib.models import gpt
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Logits, Loss, label_loss
from jattrib.projection import sketch

COUNT, SEED = 40, 1


def gradient_dot(loss, outputs, params, source, queries):
    return queries


def factored(loss, outputs, params, source, queries):
    fisher = ekfac.empirical_fisher(loss)  # labels that are drawn from rounded logits are others
    return ekfac.inverse(ekfac.fit(fisher, params, source, progress=False))(queries)


def diagonally(loss, outputs, params, source, queries):
    return diagonal.inverse(diagonal.fisher(loss, params, source, progress=False))(queries)


def closed_form(loss, outputs, params, source, queries):
    return datainf.precondition(loss, params, source, queries)


def iteratively(loss, outputs, params, source, queries):
    operator = products.streamed(products.ggn(outputs, label_loss, params), source)
    return krylov.conjugate_gradient(operator, queries, damping=0.05)[0]


def classifier():
    rng = np.random.default_rng(SEED)
    return mlp(6, (8,), 3), (rng.normal(size=(COUNT, 6)).astype(np.float32), rng.integers(0, 3, COUNT).astype(np.int32))


def transformer():
    tokens = np.random.default_rng(SEED).integers(0, 31, (COUNT, 9)).astype(np.int32)
    return gpt.decoder(gpt.Config("llama", 31, 8, 16, 1, 2)), (tokens[:, :-1], tokens[:, 1:])


MODELS = [classifier, pytest.param(transformer, marks=pytest.mark.slow)]


def problem(made, dtype):
    """Both models are the same: their parameters are numbers that half precision can hold."""
    model, batch = made()
    params, state = model.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(dtype), params)
    if made is classifier:
        batch = batch[0].astype(dtype), batch[1]
    return Loss(model.apply, state), Logits(model.apply, state), params, InMemory(batch)


@pytest.mark.parametrize("made", MODELS)
@pytest.mark.parametrize("method", [gradient_dot, factored, diagonally, closed_form, iteratively])
def test_scores_are_those_of_single_precision(method, made):
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        loss, outputs, params, source = problem(made, dtype)
        queries = influence.gradients(loss, params, InMemory(source.take(np.arange(3))))
        solved = method(loss, outputs, params, source, queries)
        assert {leaf.dtype for leaf in jax.tree.leaves(solved)} == {jnp.dtype(dtype)}
        found.append(influence.scores(loss, params, source, solved, progress=False))
    single, half = (np.asarray(each, np.float64) for each in found)
    assert np.linalg.norm(half - single) < 0.03 * np.linalg.norm(single)


def test_cosines_and_scores_of_checkpoints_are_summed_in_single():
    """Of the very gradients, in half precision, that the parameters have."""
    loss, _, params, source = problem(classifier, jnp.bfloat16)
    queries = InMemory(source.take(np.arange(3)))
    found = influence.gradients(loss, params, queries)
    rows, asked = (
        np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(each)], axis=1)
        for each in (influence.gradients(loss, params, source), found)
    )
    products = -rows @ asked.T
    lengths = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(asked, axis=1)
    np.testing.assert_allclose(influence.cosine(loss, params, source, found), products / lengths, atol=1e-5)
    traced = tracin.scores(loss, loss, [tracin.Checkpoint(params, 0.3)], source, queries, progress=False)
    np.testing.assert_allclose(traced, 0.3 * products / COUNT, atol=1e-3 * np.abs(products).max() / COUNT)
    assert traced.dtype == np.float32


@pytest.mark.parametrize("made", MODELS)
def test_projected_gradients_are_those_of_single_precision(made):
    projector, key, found = sketch.projector(64), jax.random.key(3), []
    for dtype in (jnp.float32, jnp.bfloat16):
        loss, _, params, source = problem(made, dtype)
        rows = trak.features(loss, params, source, projector=projector, key=key, progress=False).gradients
        streamed = features.features(loss, params, source, projector=projector, key=key)
        assert rows.dtype == streamed.dtype == np.float32
        np.testing.assert_allclose(streamed, rows, rtol=1e-3, atol=1e-2 * np.abs(rows).max())
        found.append(rows)
    assert np.linalg.norm(found[1] - found[0]) < 0.03 * np.linalg.norm(found[0])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_the_curvature_of_features_in_half_precision_is_summed_in_single(dtype):
    """Of 8,000 squares of about 9 the sum is beyond float16, and a bfloat16 has 8 bits of it."""
    rng = np.random.default_rng(0)
    rows, asked = (3 * rng.normal(size=(8000, 16))).astype(dtype), rng.normal(size=(3, 16)).astype(np.float32)
    exact = rows.astype(np.float64)
    gram = exact.T @ exact / 8000
    wanted = np.linalg.solve(gram + 0.1 * np.trace(gram) / 16 * np.eye(16), asked.T.astype(np.float64)).T
    np.testing.assert_allclose(features.inverse(rows)(jnp.asarray(asked)), wanted, atol=1e-5 * np.abs(wanted).max())
