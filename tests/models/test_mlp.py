import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.models.mlp import mlp


def relu(z):
    return np.maximum(z, 0)


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


@pytest.mark.parametrize(("activation", "function"), [("relu", relu), ("gelu", gelu)])
def test_forward_pass_against_numpy_in_double_precision(x64, key, activation, function):
    model = mlp(12, (7, 5), 3, activation=activation)
    params, state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(key))
    assert state == {}
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # biases that matter
    x = np.random.default_rng(0).normal(size=(4, 2, 3, 2))
    hidden = x.reshape(4, 12)
    for i in range(3):
        layer = params["layers"][str(i)]
        hidden = hidden @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        hidden = function(hidden) if i < 2 else hidden
    logits, _ = model.apply(params, state, jnp.asarray(x))
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, hidden, rtol=1e-12, atol=1e-12)


def test_parameters_are_float32_of_lecuns_scale_and_depend_on_the_key(key):
    model = mlp(400, (300,), 10)
    params, _ = model.init(key)
    kernel = params["layers"]["0"]["kernel"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(kernel.std(), 400**-0.5, rtol=0.02)
    assert not params["layers"]["0"]["bias"].any()
    np.testing.assert_array_equal(model.init(key)[0]["layers"]["0"]["kernel"], kernel)
    assert not np.allclose(model.init(jax.random.key(1))[0]["layers"]["0"]["kernel"], kernel)


def test_an_ensemble_is_batched_products_and_nothing_dearer(key):
    model = mlp(12, (7,), 3)
    stacked, _ = jax.vmap(model.init)(jax.random.split(key, 5))
    x = jnp.ones((4, 12))
    forward = jax.vmap(lambda params: model.apply(params, {}, x, train=True)[0])
    text = str(jax.make_jaxpr(forward)(stacked))
    assert text.count("dot_general[") == 2
    assert not any(op in text for op in ("gather", "scatter", "while", "cond"))
    alone = model.apply(jax.tree.map(lambda leaf: leaf[3], stacked), {}, x)[0]
    np.testing.assert_allclose(forward(stacked)[3], alone, rtol=1e-5, atol=1e-6)


def test_without_widths_it_is_logistic_regression(key):
    model = mlp(4, (), 2)
    params, state = model.init(key)
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(model.apply(params, state, x)[0], x @ params["layers"]["0"]["kernel"], rtol=1e-5)


def test_unsound_sizes_and_activations_are_refused():
    with pytest.raises(InvalidInputError, match=r"layers \(4, 0, 2\), activation 'relu'"):
        mlp(4, (0,), 2)
    with pytest.raises(InvalidInputError, match=r"activation 'tanh'\n  expected: .*relu, gelu"):
        mlp(4, (3,), 2, activation="tanh")
