"""Per-example gradients, against one `grad` an example and against the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core import mesh as meshes
from jattrib.core.errors import InvalidInputError
from jattrib.core.stream import InMemory
from jattrib.curvature import diagonal
from jattrib.grads.per_example import at_once, per_example, values_and_per_example
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Margin


def test_logistic_regression_has_the_gradient_of_the_textbook(x64):
    """For f = ln(p_y / (1 − p_y)): ∇_W f = x ⊗ (e_y − softmax over the other classes)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), rng.integers(0, 3, 7)
    model = mlp(4, (), 3)
    params, state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0)))
    gradients = per_example(Margin(model.apply, state), params, (jnp.asarray(x), jnp.asarray(y)))
    layer = params["layers"]["0"]
    logits = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    others = np.where(np.eye(3)[y] == 1, 0, np.exp(logits))
    direction = np.eye(3)[y] - others / others.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(gradients["layers"]["0"]["bias"], direction, rtol=1e-11, atol=1e-13)
    outer = x[:, :, None] * direction[:, None, :]
    np.testing.assert_allclose(gradients["layers"]["0"]["kernel"], outer, rtol=1e-11, atol=1e-13)


def test_each_row_is_the_gradient_of_its_example_alone():
    rng = np.random.default_rng(1)
    batch = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32), jnp.asarray(rng.integers(0, 3, 5))
    model = mlp(6, (8,), 3, activation="gelu")
    params, state = model.init(jax.random.key(2))
    output = Margin(model.apply, state)
    values, gradients = values_and_per_example(output, params, batch)
    for row in range(5):
        example = jax.tree.map(lambda leaf, i=row: leaf[i], batch)
        value, alone = jax.value_and_grad(output)(params, example)
        np.testing.assert_allclose(values[row], value, rtol=1e-5)
        jax.tree.map(lambda g, h, i=row: np.testing.assert_allclose(g[i], h, rtol=1e-4, atol=1e-6), gradients, alone)


@pytest.mark.parametrize("count", [3, np.int32(3), jnp.ones(2, jnp.uint8), np.ones(2, bool)], ids=repr)
def test_a_leaf_that_is_no_floating_number_is_refused_by_name(count):
    params, batch = {"kernel": jnp.ones(4), "layer": {"count": count}}, (np.ones((6, 4), np.float32),)

    def output(params, example):
        return jnp.tanh(example[0] @ params["kernel"])

    for make in (
        lambda: per_example(output, params, batch),
        lambda: values_and_per_example(output, params, batch),
        lambda: diagonal.fisher(output, params, InMemory(batch), progress=False),
    ):
        with pytest.raises(InvalidInputError, match=r"leaf 'layer/count' is not floating\n.*\n.*close over the others"):
            make()


def test_as_many_at_once_as_the_memory_suits(monkeypatch):
    def shapes(numbers, dtype=jnp.float32):
        return {"kernel": jax.ShapeDtypeStruct((numbers,), dtype)}

    fitting = [at_once(shapes(numbers)) for numbers in (1, 784 * 64, 784 * 256, 10**9)]
    assert fitting == [256, 64, 16, 8]  # 16 MiB: of 13 and 16 MiB in powers of two
    assert at_once(shapes(784 * 64, jnp.bfloat16)) == 128
    assert at_once(shapes(784 * 64), mesh=meshes.data_mesh()) == 64 * jax.device_count()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert [at_once(shapes(numbers)) for numbers in (784 * 64, 2**27, 10**10)] == [256, 8, 1]  # 4 GiB
