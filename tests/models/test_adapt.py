from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jattrib.core.errors import InvalidInputError
from jattrib.models import adapt

X = jax.random.normal(jax.random.key(9), (6, 3))


def same(got, expected, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **({"rtol": 1e-6, "atol": 1e-6} | tolerance)), got, expected
    )


class Net(nnx.Module):
    """Layers in a list, batch statistics, and dropout with a generator of its own."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(5, momentum=0.75, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.dropout(jax.nn.relu(self.norm(self.layers[0](x)))))


def test_nnx_gives_plain_trees_and_the_modules_own_outputs(key):
    model = adapt.from_nnx(Net)
    params, state = model.init(key)
    module = Net(nnx.Rngs(key))
    assert sorted(params) == ["layers", "norm"]
    assert sorted(params["layers"]) == ["0", "1"]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((params, state)))
    np.testing.assert_array_equal(params["layers"]["1"]["kernel"], module.layers[1].kernel[...])

    module.eval()
    outputs, after = model.apply(params, state, X)
    same(outputs, module(X))
    same(model.apply(params, state, np.asarray(X))[0], outputs)
    assert after is state
    module.train()
    for _ in range(2):  # the second call needs the generator and the statistics that the first one left
        outputs, state = model.apply(params, state, X, train=True)
        same(outputs, module(X))
    same(state["norm"]["mean"], module.norm.mean[...])
    assert np.abs(state["norm"]["mean"]).min() > 1e-3
    same(state["norm"]["var"], module.norm.var[...])


def test_nnx_gradients_are_the_modules_own(key):
    model = adapt.from_nnx(Net)
    params, state = model.init(key)
    module = Net(nnx.Rngs(key))
    module.eval()
    expected = nnx.grad(lambda module: jnp.sum(module(X) ** 2))(module)
    got = jax.grad(lambda params: jnp.sum(model.apply(params, state, X)[0] ** 2))(params)
    np.testing.assert_allclose(got["layers"]["0"]["kernel"], expected["layers"][0]["kernel"][...], rtol=1e-5)
    np.testing.assert_allclose(got["norm"]["scale"], expected["norm"]["scale"][...], rtol=1e-5, atol=1e-6)


def test_nnx_trains_in_a_scan_inside_a_vmap_over_models_and_compiles_once(key):
    model = adapt.from_nnx(Net)
    stacked = jax.vmap(model.init)(jax.random.split(key, 3))
    traced = []

    @jax.jit
    def train(params, state):
        traced.append(1)

        def step(carry, _):
            params, state = carry

            def loss(params):
                outputs, after = model.apply(params, state, X, train=True)
                return jnp.mean(outputs**2), after

            grads, state = jax.grad(loss, has_aux=True)(params)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state), None

        return jax.lax.scan(step, (params, state), length=3)[0]

    def run(params, state):
        return jax.vmap(train)(params, state)

    together, states = run(*stacked)
    run(together, states)
    assert len(traced) == 1
    alone, _ = train(*jax.tree.map(lambda leaf: leaf[1], stacked))
    same(jax.tree.map(lambda leaf: leaf[1], together), alone, rtol=1e-4)


def test_nnx_takes_a_trained_module(key):
    module = Net(nnx.Rngs(4))
    module.norm.mean[...] = jnp.arange(5.0)
    module.eval()
    model = adapt.from_nnx(lambda rngs: module)
    params, state = model.init(key)
    same(model.apply(params, state, X)[0], module(X))
    np.testing.assert_array_equal(state["norm"]["mean"], jnp.arange(5.0))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.75)(linen.Dense(5)(x))
        return linen.Dense(2)(linen.Dropout(0.5, deterministic=not train)(x))


def test_linen_gives_the_modules_own_outputs_and_statistics(key):
    module = LinenNet()
    model = adapt.from_linen(module, X, train_argument="train", rngs=("dropout",))
    params, state = model.init(key)
    assert sorted(state) == ["batch_stats", "rngs"]
    variables = {"params": params, "batch_stats": state["batch_stats"]}
    outputs, after = model.apply(params, state, X)
    same(outputs, module.apply(variables, X, train=False))
    assert after is state

    outputs, after = model.apply(params, state, X, train=True)
    drawn, kept = jax.random.split(state["rngs"]["dropout"])
    own, updated = module.apply(variables, X, train=True, rngs={"dropout": drawn}, mutable=["batch_stats"])
    same(outputs, own)
    same(after["batch_stats"], updated["batch_stats"])
    assert jnp.array_equal(jax.random.key_data(after["rngs"]["dropout"]), jax.random.key_data(kept))
    again, _ = model.apply(params, after, X, train=True)
    assert not np.allclose(outputs, again)  # another dropout mask

    expected = jax.grad(lambda p: jnp.sum(module.apply({**variables, "params": p}, X, train=False) ** 2))(params)
    same(jax.grad(lambda p: jnp.sum(model.apply(p, state, X)[0] ** 2))(params), expected)


def test_linen_without_statistics_or_modes(key):
    module = linen.Dense(2)
    model = adapt.from_linen(module, X)
    params, state = model.init(key)
    assert state == {}
    for train in (False, True):
        outputs, after = model.apply(params, state, X, train=train)
        np.testing.assert_allclose(outputs, X @ params["kernel"] + params["bias"][None], rtol=1e-6, atol=1e-6)
        assert after == {}


def equinox_mlp(key):
    return eqx.nn.MLP(3, 2, 5, 2, key=key)  # its activations are functions among the leaves


def test_equinox_modules_are_called_example_by_example(key):
    module = equinox_mlp(jax.random.key(5))
    model = adapt.from_callable_tree(module)
    params, state = model.init(key)
    assert state == {}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    same(model.apply(params, state, X)[0], jax.vmap(module)(X))
    expected = eqx.filter_grad(lambda module: jnp.sum(jax.vmap(module)(X) ** 2))(module)
    got = jax.grad(lambda params: jnp.sum(model.apply(params, state, X)[0] ** 2))(params)
    np.testing.assert_allclose(got.layers[0].weight, expected.layers[0].weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.layers[2].bias, expected.layers[2].bias, rtol=1e-5)


def test_a_factory_makes_new_parameters_and_a_vmap_of_them(key):
    model = adapt.from_callable_tree(equinox_mlp(key), factory=equinox_mlp)
    keys = jax.random.split(key, 3)
    params, _ = jax.vmap(model.init)(keys)
    together = jax.vmap(lambda params: model.apply(params, {}, X)[0])(params)
    for one, key in zip(together, keys, strict=True):
        same(one, jax.vmap(equinox_mlp(key))(X))


def test_a_factory_of_another_structure_is_refused(key):
    model = adapt.from_callable_tree(equinox_mlp(key), factory=lambda key: eqx.nn.Linear(3, 2, key=key))
    with pytest.raises(InvalidInputError, match=r"a factory whose module has 2 leaves\n  expected: \d+, as the module"):
        model.init(key)


@jax.tree_util.register_dataclass
@dataclass
class Table:
    """A pytree that takes a batch and has an integer array, which is no parameter."""

    weight: jax.Array
    order: jax.Array

    def __call__(self, x):
        return (x @ self.weight)[:, self.order]


def test_a_batched_module_keeps_its_integers_out_of_the_parameters(key):
    module = Table(jnp.arange(6.0).reshape(3, 2), jnp.array([1, 0]))
    model = adapt.from_callable_tree(module, batched=True)
    params, state = model.init(key)
    assert len(jax.tree.leaves(params)) == 1
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    np.testing.assert_allclose(model.apply(doubled, state, X)[0], 2 * (X @ module.weight)[:, ::-1], rtol=1e-6)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(InvalidInputError, match=r"a function with no floating-point array among its 1 leaves"):
        adapt.from_callable_tree(lambda x: x)


def test_plain_functions_keep_their_state_empty(key):
    model = adapt.from_function(lambda key: jax.random.normal(key, (3, 2)), lambda params, x: x @ params)
    params, state = model.init(key)
    np.testing.assert_array_equal(params, jax.random.normal(key, (3, 2)))
    outputs, after = model.apply(params, state, X, train=True)
    np.testing.assert_array_equal(outputs, X @ params)
    assert state == after == {}
