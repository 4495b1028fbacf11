"""Features from factors are those of the gradients under explicit matrices, on both sides, and unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.attribution import trak
from jattrib.core.errors import InvalidInputError
from jattrib.core.stream import InMemory
from jattrib.grads import taps
from jattrib.grads.per_example import per_example
from jattrib.models import gpt
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Loss, Margin
from jattrib.projection import factored, gradients

N, T = 3, 6
WORDS = factored.State(jnp.zeros(2, jnp.uint32), {})
CONFIG = gpt.Config("gpt2", vocabulary=11, context=T, width=8, layers=2, heads=2, hidden=12)


@pytest.fixture(scope="module")
def setting():
    model = gpt.decoder(CONFIG)
    shapes, state = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape), shapes)
    batch = tuple(rng.integers(0, 11, (N, T)) for _ in range(2))
    output = Loss(model.apply, state)
    return output, params, batch


def found(setting):
    output, params, batch = setting
    return taps.find(output, params, jax.tree.map(lambda leaf: leaf[0], batch))


def explicit(plan, state, tree_):
    """`φ_l = (P_i ⊗ P_o)ᵀ vec G`, by Kronecker products and float64 matrices, from whole gradients."""
    pairs, (whole, plain) = factored.matrices(plan, state), taps.matrices(plan.found, tree_)
    rows = []
    for layer, _, _ in plan.layers:
        left, right = (np.asarray(each, np.float64) for each in pairs[layer.name])
        grams = np.asarray(whole[layer.name]).reshape(N, layer.stack, -1)
        rows += [
            np.stack([grams[:, j] @ np.kron(left[j], right[j]) for j in range(layer.stack)], axis=1).reshape(N, -1)
        ]
    for leaf, k in plan.plain:
        assert k == plain[leaf.path][0].size  # small enough to be kept as it is
        rows.append(np.asarray(plain[leaf.path]).reshape(N, -1))
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize("sides", ["signs", pytest.param("mask", marks=pytest.mark.slow)])
def test_features_are_those_of_the_gradients_under_kronecker_products(sides, setting, x64):
    output, params, batch = setting
    plan = factored.plan(found(setting), rank=(7, 9), sides=sides)
    projector = factored.projector(plan)
    state = projector.init(jax.random.key(1), params)

    @jax.jit
    def run(params, batch, state):
        whole = per_example(output, params, batch)
        direct = gradients.of_gradients(output, params, batch, projector=projector, state=state)
        return whole, direct, projector.apply(state, whole)

    whole, direct, applied = run(params, batch, state)
    wanted = explicit(plan, state, whole)
    assert direct.shape == (N, projector.dim) == wanted.shape
    np.testing.assert_allclose(direct, wanted, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(applied, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_positions_sum_to_the_example(setting, x64):
    """In every layer, the tied embeddings among them, which have two products a token."""
    output, params, batch = setting
    layers = found(setting)
    plan = factored.plan(layers, rank=3, select=[layer.name for layer in layers.layers], sketch=32)
    projector = factored.projector(plan)
    state = projector.init(jax.random.key(1), params)
    by_token, whole = jax.jit(
        lambda params, batch: (
            factored.token_features(plan, state, output, params, batch),
            gradients.of_gradients(output, params, batch, projector=projector, state=state),
        )
    )(params, batch)
    assert by_token.shape == (N, T, 32)
    np.testing.assert_allclose(by_token.sum(axis=1), whole, rtol=1e-9, atol=1e-9)
    assert np.abs(by_token[:, 0]).max() > 0


def test_bases_take_the_place_of_random_matrices(setting, x64):
    output, params, batch = setting
    layers = found(setting)
    name = "layers/attention/out/kernel"
    plan = factored.plan(layers, rank=(4, 5), select=[name])
    projector = factored.projector(plan)
    layer = plan.layers[0][0]
    rng = np.random.default_rng(2)
    q = [jnp.asarray(np.linalg.qr(rng.standard_normal((2, size, size)))[0]) for size in (layer.inputs, layer.outputs)]
    bases = {name: (q[0][:, :, :4], q[1][:, :, :5])}
    state = factored.from_bases(plan, projector.init(jax.random.key(1), params), bases)

    @jax.jit
    def run(params, batch):
        features = projector.direct(state, output, params, batch)[1]
        return features.reshape(N, 2, 4, 5), taps.matrices(layers, per_example(output, params, batch))[0][name]

    got, whole = run(params, batch)
    np.testing.assert_allclose(got, np.einsum("nlio,lik,lom->nlkm", whole, *bases[name]), rtol=1e-9, atol=1e-10)
    with pytest.raises(InvalidInputError, match="bases of the shapes"):
        factored.from_bases(plan, state, {name: (q[0], q[1])})
    with pytest.raises(InvalidInputError, match="bases for 'norm/scale'"):
        factored.from_bases(plan, state, {"norm/scale": bases[name]})


@pytest.mark.parametrize(("sides", "sketch"), [("signs", None), ("mask", None), ("signs", 256)])
def test_inner_products_are_unbiased(sides, sketch, x64):
    """Over 400 keys, of the features of one layer's gradients, whose inner products are known."""

    def output(params, example):
        return jnp.sum(jnp.tanh(example @ params["w"]))

    rng = np.random.default_rng(0)
    params, batch = {"w": rng.standard_normal((12, 10)) / 3}, rng.standard_normal((N, 4, 12))
    layers = taps.find(output, params, batch[0])
    projector = factored.projector(factored.plan(layers, rank=(6, 5), sides=sides, sketch=sketch))
    g = np.asarray(per_example(output, params, batch)["w"]).reshape(N, -1)

    @jax.jit
    def products(keys):
        def one(key):
            features = projector.direct(projector.init(key, params), output, params, batch)[1]
            return features @ features.T

        return jax.lax.map(one, keys)

    got = np.asarray(products(jax.random.split(jax.random.key(0), 400)))
    error = got.std(axis=0) / np.sqrt(400)
    assert (np.abs(got.mean(axis=0) - g @ g.T) < 4.5 * error).all()
    assert (error < 0.1 * np.abs(np.diag(g @ g.T)).max()).all()


def test_the_matrices_depend_on_the_name_alone(setting):
    _, params, _ = setting
    layers, key = found(setting), jax.random.key(3)
    some, every = factored.plan(layers, rank=4, select=["layers/mlp/up/kernel"]), factored.plan(layers, rank=4)
    a, b = (factored.matrices(plan, factored.projector(plan).init(key, params)) for plan in (some, every))
    np.testing.assert_array_equal(a["layers/mlp/up/kernel"][0], b["layers/mlp/up/kernel"][0])
    left = np.asarray(b["layers/mlp/up/kernel"][0]) * 2
    assert set(np.unique(left)) == {-1.0, 1.0}
    assert (left[0] != left[1]).any()  # another matrix for each layer of the stack
    assert (np.asarray(b["layers/mlp/up/kernel"][1])[:, :8] != np.asarray(b["layers/attention/out/kernel"][1])).any()


def test_trak_takes_it_like_any_projector():
    model = mlp(6, (8,), 3)
    params, state = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    data = rng.standard_normal((10, 6)).astype(np.float32), rng.integers(0, 3, 10)
    output = Margin(model.apply, state)
    layers = taps.find(output, params, jax.tree.map(lambda leaf: leaf[0], data))
    projector = factored.projector(factored.plan(layers, rank=3))
    features = trak.features(output, params, InMemory(data), projector=projector, key=jax.random.key(1), chunk=4,
                             progress=False)  # fmt: skip
    state = projector.init(jax.random.key(1), params)
    expected = jax.jit(lambda data: projector.apply(state, per_example(output, params, data)))(data)
    np.testing.assert_allclose(features.gradients, expected, rtol=1e-4, atol=1e-5)
    assert factored.projector(factored.plan(layers, rank=3)) is projector


def test_large_plain_leaves_are_projected_to_a_matrix_of_features():
    def output(params, example):
        return jnp.sum(jnp.tanh(example @ params["w"] + params["table"]))

    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((4, 5)), "table": rng.standard_normal((6, 5))}
    params, batch = jax.tree.map(np.float32, params), rng.standard_normal((N, 6, 4)).astype(np.float32)
    plan = factored.plan(taps.find(output, params, batch[0]), rank=3)
    assert [(leaf.path, k) for leaf, k in plan.plain] == [("table", 9)]
    projector = factored.projector(plan)
    state = projector.init(jax.random.key(0), params)
    direct = jax.jit(lambda params, batch: projector.direct(state, output, params, batch)[1])
    apply = jax.jit(lambda params, batch: projector.apply(state, per_example(output, params, batch)))
    got = direct(params, batch)
    assert got.shape == (N, 9 + 9)
    np.testing.assert_allclose(got, apply(params, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layers, s: factored.plan(layers, rank=0), "dim = 0"),
        (lambda layers, s: factored.plan(layers, sketch=0), "dim = 0"),
        (lambda layers, s: factored.plan(layers, select=["kernel"]), "'kernel', which matches no layer"),
        (lambda layers, s: factored.plan(layers, select=[]), "which chooses no layer"),
        (lambda layers, s: factored.plan(layers, sides="masks"), r"sides = 'masks'[\s\S]*'mask'"),
        (
            lambda layers, s: factored.projector(factored.plan(layers)).init(jax.random.key(0), {"w": s[1]}),
            "parameters without 'embedding/positions'",
        ),
        (
            lambda layers, s: factored.token_features(factored.plan(layers), WORDS, *s),
            "features by position of 'embedding/positions'",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message, setting, shapes_unchecked):
    with pytest.raises(InvalidInputError, match=message):
        call(found(setting), setting)
