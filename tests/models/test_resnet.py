import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.models.resnet import resnet9

WIDTH, SIDE, EPSILON = 4, 13, 1e-5


def convolve(x, kernel, stride, padding):
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel)


def batch_norm(x, scale, bias, statistics):
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if statistics is None else (statistics["mean"], statistics["var"])
    return (x - mean) / np.sqrt(var + EPSILON) * scale + bias


def group_norm(x, scale, bias, _):
    size = min(x.shape[-1], 16)
    groups = x.reshape(len(x), -1, x.shape[-1] // size, size)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    return ((groups - mean) / np.sqrt(var + EPSILON)).reshape(x.shape) * scale + bias


def oracle(params, state, x, norm):
    """The network in plain numpy; batch statistics of the batch itself where `state` is None."""

    def block(x, *path, stride=1, padding=1):
        p, s = params, state
        for name in path:
            p, s = p[name], None if s is None else s[name]
        x = convolve(x, p["conv"]["kernel"], stride, padding)
        return np.maximum(norm(x, p["norm"]["scale"], p["norm"]["bias"], None if s is None else s["norm"]), 0)

    x = block(block(x, "stem"), "down", stride=2, padding=2)
    x = x + block(block(x, "middle", "first"), "middle", "second")
    x = block(x, "widen")
    side = x.shape[1] // 2
    x = x[:, : 2 * side, : 2 * side].reshape(len(x), side, 2, side, 2, -1).max((2, 4))
    x = x + block(block(x, "deep", "first"), "deep", "second")
    return 0.2 * block(x, "narrow", padding=0).max((1, 2)) @ params["head"]["kernel"]


def drawn(model):
    """Return parameters and state in double precision, positive where they are scales and variances."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        kernel = path[-1].key == "kernel"
        return rng.normal(size=leaf.shape) / leaf.size**0.25 if kernel else rng.uniform(0.2, 1.5, leaf.shape)

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


IMAGES = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 2))


@pytest.mark.parametrize("train", [False, True])
def test_batch_normalised_against_numpy_in_double_precision(x64, train):
    model = resnet9((SIDE, SIDE, 2), 5, width=WIDTH)
    params, state = drawn(model)
    logits, after = jax.jit(model.apply, static_argnames="train")(params, state, IMAGES, train=train)
    np.testing.assert_allclose(
        logits, oracle(params, None if train else state, IMAGES, batch_norm), rtol=1e-8, atol=1e-9
    )
    stem = convolve(IMAGES, params["stem"]["conv"]["kernel"], 1, 1)
    old, new = state["stem"]["norm"], after["stem"]["norm"]
    kept = 0.9 if train else 1.0
    np.testing.assert_allclose(new["mean"], kept * old["mean"] + (1 - kept) * stem.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(new["var"], kept * old["var"] + (1 - kept) * stem.var((0, 1, 2)), rtol=1e-9)


def test_group_normalised_against_numpy_in_double_precision(x64):
    model = resnet9((SIDE, SIDE, 2), 5, width=16, normalisation="group")
    params, state = drawn(model)
    assert state == {}
    logits, _ = jax.jit(model.apply)(params, state, IMAGES)
    np.testing.assert_allclose(logits, oracle(params, None, IMAGES, group_norm), rtol=1e-8, atol=1e-9)


def test_the_published_size():
    params, state = jax.eval_shape(resnet9((32, 32, 3), 10).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2_274_880
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2688
    assert {leaf.dtype for leaf in jax.tree.leaves((params, state))} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_initial_scales_are_hes_and_differ_by_model(key):
    model = resnet9((32, 32, 3), 10, width=16)
    params, state = jax.vmap(model.init)(jax.random.split(key, 2))
    kernel = params["deep"]["second"]["conv"]["kernel"]
    np.testing.assert_allclose(kernel.std((1, 2, 3, 4)), (2 / (9 * 64)) ** 0.5, rtol=0.02)
    assert not np.allclose(kernel[0], kernel[1])
    assert np.all(params["stem"]["norm"]["scale"] == 1)
    assert np.all(state["stem"]["norm"]["var"] == 1)


def test_models_vmap_with_statistics_of_their_own():
    model = resnet9((12, 12, 1), 2, width=2)
    one = jax.tree.map(lambda leaf: leaf.astype(np.float32), drawn(model))
    params, state = jax.tree.map(lambda leaf: np.stack([leaf, 0.7 * leaf]), one)
    x = np.random.default_rng(2).normal(size=(4, 12, 12, 1)).astype(np.float32)
    step = jax.jit(lambda params, state: model.apply(params, state, x, train=True))
    logits, states = jax.jit(jax.vmap(step))(params, state)
    for i in range(2):
        own_params, own_state, own = jax.tree.map(operator.itemgetter(i), (params, state, states))
        alone, after = step(own_params, own_state)
        np.testing.assert_allclose(logits[i], alone, rtol=1e-4, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), own, after)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((8, 8, 1), {}, "images of 8 by 8 pixels\n  expected: at least 12 by 12"),
        ((28, 28), {}, r"shape=\(28, 28\)"),
        ((28, 28, 1), {"width": 0}, "width=0"),
        ((28, 28, 1), {"normalisation": "layer"}, "normalisation='layer'\n  expected: .* among batch, group"),
    ],
)
def test_unsound_arguments_are_refused(shape, options, message):
    with pytest.raises(InvalidInputError, match=message):
        resnet9(shape, 10, **options)
