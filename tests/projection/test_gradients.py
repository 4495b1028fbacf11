import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.grads.per_example import values_and_per_example
from jattrib.projection import dense, sketch
from jattrib.projection.gradients import of_gradients, values_and_of_gradients


def output(params, example):
    """A small network whose first matrix is used twice and whose last bias not at all."""
    x, y = example
    for w in (*params["w"], params["w"][0]):
        x = jax.nn.gelu(x @ w) + params["scale"]
    return jnp.vdot(x, y)


def setting(layers=3, width=32, n=5):
    keys = jax.random.split(jax.random.key(0), layers + 2)
    weights = [jax.random.normal(k, (width, width)) / np.sqrt(width) for k in keys[:layers]]
    params = {"scale": jnp.float32(0.3), "unused": jnp.ones(7), "w": weights}
    return params, (jax.random.normal(keys[-2], (n, width)), jax.random.normal(keys[-1], (n, width)))


@pytest.mark.parametrize("room", [dense, sketch], ids=["dense", "sketch"])
def test_streaming_equals_projecting_the_gradients(room, key):
    params, batch = setting()
    projector = room.projector(256)
    state = projector.init(key, params)
    values, gradients = values_and_per_example(output, params, batch)
    expected = projector.apply(state, gradients)
    got = jax.jit(lambda p, b, s: values_and_of_gradients(output, p, b, projector=projector, state=s))(
        params, batch, state
    )
    np.testing.assert_allclose(got[0], values, rtol=1e-6)
    np.testing.assert_allclose(got[1], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        of_gradients(output, params, batch, projector=projector, state=state), expected, rtol=1e-4, atol=1e-5
    )


def with_none(params, example):
    return output(params, example) + jnp.sum(params["none"])


def test_a_leaf_without_an_entry_adds_nothing(key):
    params, batch = setting(layers=2)
    projector = sketch.projector(128)
    expected = of_gradients(output, params, batch, projector=projector, state=projector.init(key, params))
    params |= {"none": jnp.zeros((0, 3))}
    state = projector.init(key, params)
    got = of_gradients(with_none, params, batch, projector=projector, state=state)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_checkpoints_go_through_vmap(key):
    params, batch = setting(layers=2)
    projector = sketch.projector(128)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    states = jax.vmap(lambda key: projector.init(key, params))(jax.random.split(key))
    got = jax.vmap(lambda p, s: of_gradients(output, p, batch, projector=projector, state=s))(stacked, states)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], stacked)
        gradients = values_and_per_example(output, one, batch)[1]
        np.testing.assert_allclose(got[i], projector.apply(states[i], gradients), rtol=1e-4, atol=1e-4)


def test_the_matrix_of_gradients_never_exists(key):
    params, batch = setting(layers=8, width=128, n=64)
    projector = sketch.projector(512)
    state = projector.init(key, params)
    compiled = (
        jax.jit(lambda p, b, s: of_gradients(output, p, b, projector=projector, state=s))
        .lower(params, batch, state)
        .compile()
    )
    whole = 64 * 8 * 128 * 128 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * whole
