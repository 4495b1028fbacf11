import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError

PARAMS = {"layers": [{"kernel": np.ones((2, 3)), "bias": np.zeros(3)}, {"kernel": np.full((3, 1), 2.0)}], "scale": 3.0}


class Pair(NamedTuple):
    first: object
    second: object


def random_pair(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 2), "b": [(), (4,)], "c": Pair((0, 2), (1,))}
    draw = functools.partial(jax.tree.map, lambda s: rng.normal(size=s), is_leaf=lambda s: type(s) is tuple)
    return draw(shapes), draw(shapes)


def flat(x):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)])


@given(seed=st.integers(0, 2**32 - 1), factor=st.integers(-1000, 1000).map(lambda n: n / 100))
@settings(max_examples=20, deadline=None)
def test_algebra_is_that_of_the_flat_vectors(seed, factor):
    with jax.enable_x64(True):
        x, y = random_pair(seed)
        np.testing.assert_allclose(tree.dot(x, y), flat(x) @ flat(y), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(flat(tree.axpy(factor, x, y)), factor * flat(x) + flat(y), rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(flat(tree.scale(factor, x)), factor * flat(x))
        assert tree.size(x) == flat(x).size == 12
        vector, unravel = tree.ravel(x)
        np.testing.assert_array_equal(vector, flat(x))
        jax.tree.map(np.testing.assert_array_equal, unravel(vector), x)
        assert not flat(tree.zeros_like(x)).any()
        assert tree.dot(x, y).dtype == np.float64


def test_half_precision_is_summed_in_single():
    ones = {"w": jnp.ones(5000, jnp.bfloat16), "b": jnp.ones(1, jnp.bfloat16)}
    total = tree.dot(ones, ones)
    assert total.dtype == jnp.float32
    assert float(total) == 5001.0  # in bfloat16, 256 + 1 is 256
    assert tree.dot({"w": ones["w"], "b": jnp.ones(3)}, {"w": ones["w"], "b": jnp.ones(3)}) == 5003.0
    assert tree.axpy(2.0, ones, ones)["w"].dtype == jnp.bfloat16


def test_dot_of_nothing_is_zero():
    assert float(tree.dot({}, {})) == 0.0


@pytest.mark.parametrize(
    ("left", "right", "match"),
    [
        ({"a": np.ones(2)}, {"b": np.ones(2)}, "trees of the structures"),
        ({"a": {"b": np.ones(2)}}, {"a": {"b": np.ones((2, 1))}}, r"'a/b' of shapes \(2,\) and \(2, 1\)"),
    ],
)
def test_unlike_trees_are_refused(left, right, match):
    for operation in (tree.dot, functools.partial(tree.axpy, 1.0)):
        with pytest.raises(InvalidInputError, match=match):
            operation(left, right)


def test_paths_are_readable_and_in_leaf_order():
    assert tree.paths(PARAMS) == ["layers/0/bias", "layers/0/kernel", "layers/1/kernel", "scale"]
    assert tree.paths(Pair((1, 2), {"x": 3})) == ["first/0", "first/1", "second/x"]
    assert tree.paths(1.0) == ["value"]
    assert tree.paths({}) == []


def test_names_go_there_and_back():
    named = tree.to_names(PARAMS)
    assert jax.tree.structure(tree.from_names(PARAMS, named)) == jax.tree.structure(PARAMS)
    doubled = tree.from_names(PARAMS, {name: 2 * leaf for name, leaf in reversed(named.items())})
    np.testing.assert_array_equal(flat(doubled), 2 * flat(PARAMS))
    with pytest.raises(InvalidInputError, match="'scale' is missing"):
        tree.from_names(PARAMS, {name: leaf for name, leaf in named.items() if name != "scale"})
    with pytest.raises(InvalidInputError, match="'extra' is not expected"):
        tree.from_names(PARAMS, {**named, "extra": 1.0})
    with pytest.raises(InvalidInputError, match=r"more than one leaf with the path 'a/b'"):
        tree.to_names({"a/b": 1.0, "a": {"b": 2.0}})


def test_select_takes_by_path_and_merge_puts_back():
    chosen, merge = tree.select(PARAMS, "*/kernel")
    assert list(chosen) == ["layers/0/kernel", "layers/1/kernel"]
    whole = jax.jit(lambda merge, chosen: merge(tree.scale(10.0, chosen)))(merge, chosen)
    np.testing.assert_array_equal(whole["layers"][0]["kernel"], np.full((2, 3), 10.0))
    np.testing.assert_array_equal(whole["layers"][1]["kernel"], np.full((3, 1), 20.0))
    np.testing.assert_array_equal(whole["layers"][0]["bias"], np.zeros(3))
    assert float(whole["scale"]) == 3.0
    assert list(tree.select(PARAMS, "layers/0", "scale")[0]) == ["layers/0/bias", "layers/0/kernel", "scale"]
    with pytest.raises(InvalidInputError, match=r"'layers/7', which matches no leaf(.|\n)*layers/0/bias"):
        tree.select(PARAMS, "scale", "layers/7")


def test_a_path_selects_its_own_leaf_whatever_is_in_it():
    chosen, merge = tree.select({"a[0]": {"w": 1.0}, "a0": {"w": 2.0}, "b": 3.0}, "a[0]")
    assert chosen == {"a[0]/w": 1.0, "a0/w": 2.0}
    assert merge({name: -value for name, value in chosen.items()}) == {"a[0]": {"w": -1.0}, "a0": {"w": -2.0}, "b": 3.0}


def test_gradients_flow_through_merge():
    chosen, merge = tree.select({"a": jnp.ones(2), "b": jnp.full(2, 3.0)}, "a")
    gradient = jax.grad(lambda chosen: tree.dot(merge(chosen), merge(chosen)))(chosen)
    assert list(gradient) == ["a"]
    np.testing.assert_array_equal(gradient["a"], [2.0, 2.0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    slope: jax.Array

    def __call__(self, x):
        return self.slope * x

    def twice(self, x):
        return 2.0 * self.slope * x


def scaled(slope, x):
    return slope * x


def make_callables(slope):
    module = eqx.nn.MLP("scalar", "scalar", 1, 0, use_bias=False, use_final_bias=False, key=jax.random.key(0))
    module = eqx.tree_at(lambda m: m.layers[0].weight, module, slope[None, None])
    return {
        "dataclass": Affine(slope),
        "partial": functools.partial(scaled, slope),
        "jax partial": jax.tree_util.Partial(scaled, slope),
        "method": Affine(slope).twice,
        "module with functions among its leaves": module,
    }


@pytest.mark.parametrize("kind", list(make_callables(jnp.ones(()))))
def test_new_arrays_in_a_callable_do_not_compile_again(kind):
    traces = []

    @jax.jit
    def call(function, x):
        traces.append(kind)
        return function(x)

    factor = 2.0 if kind == "method" else 1.0
    for slope in (1.0, 5.0):
        function = tree.callable_tree(make_callables(jnp.asarray(slope))[kind])
        assert float(call(function, jnp.asarray(3.0))) == factor * slope * 3.0
    assert traces == [kind]


def test_a_plain_function_is_static():
    function = tree.callable_tree(jnp.sin)
    assert jax.tree.leaves(function) == []
    assert float(jax.jit(lambda f, x: f(x))(function, 1.0)) == pytest.approx(np.sin(1.0), rel=1e-6)


def test_digest_sees_every_part():
    base = {"a": np.arange(4, dtype=np.float32), "b": [np.zeros((2, 2), np.float32)]}
    others = [
        {"a": np.arange(4, dtype=np.float32).view(np.int32), "b": [np.zeros((2, 2), np.float32)]},  # the same bytes
        {"a": np.arange(4, dtype=np.float32).reshape(2, 2), "b": [np.zeros((2, 2), np.float32)]},
        {"c": np.arange(4, dtype=np.float32), "b": [np.zeros((2, 2), np.float32)]},
        {"a": np.array([0, 1, 2, np.nextafter(np.float32(3), 4)], np.float32), "b": [np.zeros((2, 2), np.float32)]},
        {"a": np.arange(4, dtype=np.float32), "b": []},
    ]
    found = {tree.digest(each) for each in [base, *others]}
    assert len(found) == 6
    assert tree.digest(jax.tree.map(jnp.asarray, base)) == tree.digest(base)
    assert tree.digest({**base, "a": np.arange(8, dtype=np.float32)[::2] / 2}) == tree.digest(base)
    keys = [{"k": jax.random.key(seed, impl=impl)} for seed in (0, 1) for impl in ("threefry2x32", "rbg")]
    assert len({tree.digest(each) for each in keys}) == 4


def test_digest_is_the_same_in_another_process():
    code = "import numpy as np; from jattrib.core import tree; print(tree.digest({'a': np.arange(3), 'b': np.ones(2)}))"
    root = Path(__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert other.stdout.strip() == tree.digest({"a": np.arange(3), "b": np.ones(2)})
