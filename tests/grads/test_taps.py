"""Factors give back the gradients of JAX, in every nesting; and what has no factors says so."""

from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.grads import taps
from jattrib.grads.per_example import values_and_per_example
from jattrib.models.adapt import from_nnx
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Loss, Margin
from jattrib.models.resnet import resnet9

B, T, D = 3, 5, 4


class Case(NamedTuple):
    """An output, its parameters' shapes, the examples' shapes, and the kinds of each leaf's uses ('' is plain)."""

    output: object
    params: dict
    kinds: dict
    example: tuple = ((T, D),)
    stack: dict = MappingProxyType({})
    tolerance: float = 1e-10


@pytest.fixture(autouse=True)
def _as_users_write():
    """A bias is added to rows."""
    with jax.numpy_rank_promotion("allow"):
        yield


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape)


def is_shape(x):
    return isinstance(x, tuple) and all(isinstance(each, int) for each in x)


def settings(case):
    """Random parameters and batch; integers, below 7, stand where the example's shape begins with None."""
    shapes, structure = jax.tree.flatten(case.params, is_leaf=is_shape)
    params = structure.unflatten([normal(i, shape) for i, shape in enumerate(shapes)])
    batch = tuple(
        np.random.default_rng(99).integers(0, 7, (B, *shape[1:]), np.int32)
        if shape[:1] == (None,)
        else normal(50 + i, (B, *shape))
        for i, shape in enumerate(case.example)
    )
    return params, batch


def total(y):
    """A scalar that tells every entry from every other."""
    return jnp.sum(jnp.sin(y) * jnp.arange(1, y.size + 1, dtype=y.dtype).reshape(y.shape))


# Outputs, one a construction.


def two_layers(params, example):
    h = jax.nn.gelu(example[0] @ params["w"] + params["b"])
    return total(h @ params["v"] + params["c"])


def nested_jit(params, example):
    return total(jax.jit(lambda w, x: jnp.tanh(jax.jit(jnp.matmul)(x, w)))(params["w"], example[0]))


def transposed_cast(params, example):
    w = params["w"].astype(jnp.float32).T.reshape(2, 2, -1).transpose(2, 0, 1).reshape(-1, 4)
    return total(example[0] @ (-0.5 * w).T.astype(jnp.float64))


def heads(params, example):
    q = jnp.einsum("td,dhk->htk", example[0], params["q"]) + params["b"][:, None, :]
    return total(jnp.einsum("htk,hkd->td", q, params["o"]))


def per_head(params, example):
    return total(jnp.einsum("thd,hdk->thk", example[0].reshape(T, 2, 2), params["w"]))


def slices(params, example):
    a, b = jnp.split(params["w"], 2, axis=1)
    return total((example[0] @ a) * (example[0] @ b) + example[0] @ params["v"][:, 1:4] @ params["u"])


def scanned(params, example):
    def body(h, layer):
        return jnp.tanh(h @ layer["w"] + layer["b"]) * layer["g"], None

    return total(lax.scan(body, example[0], params)[0])


def scanned_reverse_outputs(params, example):
    def body(h, w):
        h = jnp.tanh(h @ w)
        return h, h.sum(axis=0)

    return total(lax.scan(body, example[0], params["w"], reverse=True)[1])


def recurrent(params, example):
    def body(h, x):
        h = jnp.tanh(h @ params["w"] + x @ params["u"] + params["b"])
        return h, h

    return total(lax.scan(body, jnp.zeros(D, jnp.float64), example[0])[1])


def states_before(params, example):
    """Outputs are the states before each step, so that the last step's own gradient starts from nothing."""

    def body(h, x):
        return jnp.tanh(h @ params["w"] + x @ params["u"] + params["b"]), h

    return total(lax.scan(body, jnp.zeros(D, jnp.float64), example[0])[1])


def scan_in_scan(params, example):
    def inner(h, w):
        return jnp.tanh(h @ w @ params["shared"]), None

    def body(h, ws):
        return lax.scan(jax.checkpoint(inner), h, ws)[0], None

    return total(lax.scan(body, example[0], params["w"])[0])


def rematerialised(params, example):
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    def block(h, w):
        return jnp.tanh(h @ w)

    return total(block(block(example[0], params["w"]), params["v"]))


@jax.custom_vjp
def clipped(x, w):
    return x @ w


clipped.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (2 * g @ res[1].T, res[0].T @ jnp.clip(g, -0.5, 0.5)))


def custom_vjp(params, example):
    return total(clipped(example[0], params["w"]) @ params["v"])


@jax.custom_jvp
def doubled(x, w):
    return x @ w


@doubled.defjvp
def doubled_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + 3 * jnp.tanh(x) @ dw


def custom_jvp(params, example):
    return total(jax.nn.relu(doubled(example[0], params["w"])))


def branches(params, example):
    x = example[0]
    same = lax.cond(params["t"].sum() > 1e9, lambda x: x, lambda x: x @ params["w"] + params["b"], x)
    own = lax.switch(
        jnp.where(x[0, 0] > 0, 2, 0),
        [lambda h: h @ params["v"], lambda h: h, lambda h: h @ params["u"] + params["c"]],
        same,
    )
    return total(own)


def branches_in_scan(params, example):
    def body(h, w):
        return lax.cond(h[0, 0] > 0, lambda h: h @ w + params["b"], lambda h: jnp.sin(h), h), None

    return total(lax.scan(body, example[0], params["w"])[0])


def vmapped(params, example):
    row = lambda x: jnp.tanh(params["w"] @ x + params["b"])  # noqa: E731
    experts = jax.vmap(lambda w, x: x @ w)(params["e"], example[0])
    return total(jax.vmap(row)(example[0])) + total(experts)


def convolution(params, example, *, strides, padding, groups=1, dilation=(1, 1), before=(1, 1)):
    y = lax.conv_general_dilated(
        example[0][None], params["w"], strides, padding, before, dilation, ("NHWC", "HWIO", "NHWC"), groups
    )
    return total(y + params["b"])


def sequence(params, example):
    y = lax.conv_general_dilated(example[0].T[None], params["w"], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH"))
    return total(y)


def transposed_convolution(params, example):
    return total(lax.conv_transpose(example[0][None], params["w"], (2, 2), "SAME"))


def look_ups(params, example):
    tokens, _ = example
    wide = jnp.take(params["e"], tokens - 2, axis=0, mode="fill", fill_value=0) + params["e"].at[tokens + 4].get(
        mode="clip"
    )
    return total(wide) + total(params["f"][:, tokens])


def turned_table(params, example):
    """The rows of a table whose two numbers have changed places: an index counts others than the leaf's."""
    return total(params["e"].transpose(1, 0, 2).reshape(-1, D)[example[0]] @ params["w"])


def transformer(params, example):
    """Tied embeddings, learned positions, scanned pre-norm blocks, per-token loss."""
    tokens, _ = example
    norm = lambda x, g: x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * g  # noqa: E731

    @jax.checkpoint
    def block(x, layer):
        h = norm(x, layer["g"])
        q, k, v = jnp.split(h @ layer["qkv"] + layer["qkv_b"], 3, axis=-1)
        scores = jnp.where(jnp.tri(T, dtype=bool), q @ k.T / 2.0, -jnp.inf)
        x = x + jax.nn.softmax(scores) @ v @ layer["o"]
        return x + jax.nn.gelu(norm(x, layer["h"]) @ layer["up"] + layer["up_b"]) @ layer["down"], None

    x, _ = lax.scan(block, params["embed"][tokens] + params["positions"], params["layers"])
    logits = norm(x, params["final"]) @ params["embed"].T
    return -jnp.sum(jax.nn.log_softmax(logits[:-1])[jnp.arange(T - 1), tokens[1:]])


W = {"w": (D, D)}
LAYERS = {
    "g": (2, D),
    "h": (2, D),
    "o": (2, D, D),
    "qkv": (2, D, 12),
    "qkv_b": (2, 12),
    "up": (2, D, 7),
    "up_b": (2, 7),
}
TRANSFORMER = {"embed": (7, D), "final": (D,), "positions": (T, D), "layers": LAYERS | {"down": (2, 7, D)}}
MLP = {"w": (D, 6), "b": (6,), "v": (6, 2), "c": (2,)}
IMAGE = ((7, 6, 4),)
KERNEL = {"w": (3, 2, 4, 6), "b": (6,)}
DOTS = {"w": "dot", "b": "w"}
CONV = {"w": "conv", "b": "w"}
CASES = {
    "two layers": Case(two_layers, MLP, {**DOTS, "v": "dot", "c": "v"}),
    "one position": Case(two_layers, MLP, {**DOTS, "v": "dot", "c": "v"}, ((D,),)),
    "jit in jit": Case(nested_jit, W, {"w": "dot"}),
    "transpose, reshape, cast": Case(transposed_cast, {"w": (8, 2)}, {"w": "dot"}, tolerance=1e-6),
    "heads": Case(heads, {"q": (D, 2, 3), "b": (2, 3), "o": (2, 3, D)}, {"q": "dot", "b": "", "o": "dot"}),
    "a matrix a head": Case(per_head, {"w": (2, 2, 3)}, {"w": "dot"}, stack={"w": 2}),
    "slices": Case(slices, {"w": (D, 6), "v": (D, 6), "u": (3, 3)}, {"w": "dot", "v": "dot", "u": "dot"}),
    "scan over layers": Case(
        scanned, {"w": (3, D, D), "b": (3, D), "g": (3, D)}, {**DOTS, "g": "scale"}, stack={"w": 3, "g": 3}
    ),
    "reverse scan with outputs": Case(scanned_reverse_outputs, {"w": (3, D, D)}, {"w": "dot"}, stack={"w": 3}),
    "recurrent": Case(recurrent, {"w": (D, D), "u": (D, D), "b": (D,)}, {"w": "dot", "u": "dot", "b": "u"}),
    "recurrent, states before": Case(
        states_before, {"w": (D, D), "u": (D, D), "b": (D,)}, {"w": "dot", "u": "dot", "b": "u"}
    ),
    "scan in scan": Case(
        scan_in_scan, {"w": (2, 3, D, D), "shared": (D, D)}, {"w": "dot", "shared": "dot"}, stack={"w": 6}
    ),
    "remat": Case(rematerialised, {"w": (D, D), "v": (D, D)}, {"w": "dot", "v": "dot"}),
    "custom_vjp": Case(custom_vjp, {"w": (D, D), "v": (D, 2)}, {"w": "dot", "v": "dot"}),
    "custom_jvp": Case(custom_jvp, W, {"w": "dot"}),
    "cond and switch": Case(
        branches,
        dict.fromkeys("wvut", (D, D)) | {"b": (D,), "c": (D,)},
        {**DOTS, "v": "dot", "u": "dot", "c": "u", "t": ""},
    ),
    "cond in scan": Case(branches_in_scan, {"w": (3, D, D), "b": (D,)}, {"w": "dot", "b": "bias"}, stack={"w": 3}),
    "vmap": Case(vmapped, {"w": (3, D), "b": (3,), "e": (T, D, 2)}, {**DOTS, "e": "dot"}, stack={"e": T}),
    "convolution": Case(partial(convolution, strides=(2, 1), padding=((1, 2), (0, 1))), KERNEL, CONV, IMAGE),
    "negative padding": Case(partial(convolution, strides=(2, 2), padding=((-1, 1), (2, -2))), KERNEL, CONV, IMAGE),
    "dilated convolution": Case(
        partial(convolution, strides=(1, 2), padding=((2, 3), (1, 0)), dilation=(2, 3), before=(2, 1)),
        KERNEL, CONV, IMAGE,
    ),
    "grouped convolution": Case(
        partial(convolution, strides=(2, 2), padding="SAME", groups=2),
        KERNEL | {"w": (3, 2, 2, 6)}, {"w": "conv", "b": "bias"}, IMAGE, {"w": 2},
    ),
    "depthwise convolution": Case(
        partial(convolution, strides=(1, 1), padding="VALID", groups=4),
        {"w": (3, 2, 1, 8), "b": (8,)}, {"w": "conv", "b": "bias"}, IMAGE, {"w": 4},
    ),
    "convolution of sequences": Case(sequence, {"w": (2, D, 3)}, {"w": "conv"}),
    "transposed convolution": Case(transposed_convolution, {"w": (3, 3, 4, 2)}, {"w": "conv"}, IMAGE),
    "look-ups": Case(
        look_ups, {"e": (7, D), "f": (D, 7)}, {"e": "embedding+embedding", "f": "embedding"}, ((None, T), (1,))
    ),
    "look-ups in a turned table": Case(
        turned_table, {"e": (2, 4, D), "w": (D, D)}, {"e": "", "w": "dot"}, ((None, T),)
    ),
    "transformer": Case(
        transformer, TRANSFORMER,
        {"embed": "embedding+dot", "final": "scale", "positions": "", "layers/qkv": "dot", "layers/o": "dot",
         "layers/qkv_b": "layers/qkv", "layers/up": "dot", "layers/up_b": "layers/up", "layers/down": "dot",
         "layers/g": "scale", "layers/h": "scale"},
        ((None, T), (1,)), {f"layers/{name}": 2 for name in ("qkv", "o", "up", "down", "g", "h")},
    ),
}  # fmt: skip


def check(output, params, batch, tolerance=1e-10):
    """Compare with `vmap(grad)`; return the layers and the factors."""
    found = taps.find(output, params, jax.tree.map(lambda leaf: leaf[0], batch))

    @jax.jit
    def both(params, batch):
        factors = taps.factors(found, output, params, batch)
        expected = values_and_per_example(output, params, batch)
        products = {
            layer.name: sum(taps.outer(layer, a, s) for a, s in factors.layers[layer.name]) for layer in found.layers
        }
        matrices, _ = taps.matrices(found, expected[1])
        return factors, taps.gradients(found, factors, params), expected, products, matrices

    factors, got, (values, expected), products, matrices = both(params, batch)
    products, matrices, expected, got = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), (products, matrices, expected, got)
    )
    for name, leaf in matrices.items():  # in one arrangement, whatever the leaf's
        scale = np.abs(leaf).max() + 1e-3
        np.testing.assert_allclose(products[name] / scale, leaf / scale, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(factors.values, values, rtol=tolerance)
    for name, leaf in tree.to_names(expected).items():
        scale = np.abs(leaf).max() + 1e-3
        np.testing.assert_allclose(tree.to_names(got)[name] / scale, leaf / scale, atol=tolerance, err_msg=name)
    return found, factors


@pytest.mark.parametrize("name", CASES)
def test_factors_are_the_gradients(name, x64):
    case = CASES[name]
    params, batch = settings(case)
    found, factors = check(case.output, params, batch, case.tolerance)
    kinds = {layer.path: "+".join(use.kind for use in layer.uses) for layer in found.layers}
    kinds |= {layer.bias: layer.path for layer in found.layers if layer.bias} | {leaf.path: "" for leaf in found.plain}
    assert kinds == case.kinds
    assert {layer.path: layer.stack for layer in found.layers if layer.stack > 1} == case.stack
    for layer in found.layers:
        assert len(factors.layers[layer.name]) == len(layer.uses)
        for use, (a, s) in zip(layer.uses, factors.layers[layer.name], strict=True):
            assert a.shape[:3] == s.shape[:3] == (layer.stack, B, use.positions)
            assert a.shape[3:] == (() if use.kind == "embedding" else (layer.inputs,))
            assert s.shape[3] == layer.outputs
    assert {row.path for row in taps.report(found)} == set(tree.paths(params))


def double(tree_):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree_)


def test_the_layers_of_an_mlp_and_their_biases(x64):
    model = mlp(6, (5,), 3, activation="gelu")
    params, state = double(model.init(jax.random.key(0)))
    batch = normal(1, (B, 6)), np.array([0, 2, 1])
    found, factors = check(Margin(model.apply, state), params, batch)
    assert [(each.path, each.bias) for each in found.layers] == [
        (f"layers/{i}/kernel", f"layers/{i}/bias") for i in range(2)
    ]
    assert not found.plain
    a, _ = factors.layers["layers/0/kernel"][0]
    np.testing.assert_array_equal(a[0, :, 0], np.concatenate([batch[0], np.ones((B, 1))], axis=1))


def test_a_block_with_group_norm(x64):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.GroupNorm(4, None, 2, use_fast_variance=False, rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            with jax.numpy_dtype_promotion("standard"):
                return self.head(jax.nn.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))

    model = from_nnx(Block)
    params, state = double(model.init(jax.random.key(0)))
    batch = normal(1, (B, 6, 6, 2)), np.array([0, 1, 2])
    found, _ = check(Loss(model.apply, state), params, batch)
    report = {row.path: (row.layer, row.kinds) for row in taps.report(found)}
    assert report == {
        "conv/kernel": ("conv/kernel", ("conv",)), "conv/bias": ("conv/kernel", ("bias",)),
        "norm/scale": ("norm/scale", ("scale",)), "norm/bias": ("norm/bias", ("bias",)),
        "head/kernel": ("head/kernel", ("dot",)), "head/bias": ("head/kernel", ("bias",)),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("normalisation", ["group", "batch"])
def test_convolutions_and_norms_of_a_resnet(normalisation, x64):
    model = resnet9((12, 12, 1), 2, width=2, normalisation=normalisation)
    params, state = double(model.init(jax.random.key(0)))
    batch = normal(1, (2, 12, 12, 1)), np.array([0, 1])
    found, _ = check(Loss(model.apply, state), params, batch, tolerance=1e-9)
    kinds = {row.path: row.kinds for row in taps.report(found)}
    assert {kinds[path] for path in kinds if path.endswith("kernel")} == {("conv",), ("dot",)}
    assert {kinds[path] for path in kinds if path.endswith("scale")} == {("scale",)}
    assert {kinds[path] for path in kinds if path.endswith("norm/bias")} == {("bias",)}


@pytest.mark.parametrize("name", ["scan in scan", "recurrent", "cond in scan", "cond and switch"])
def test_reducers_see_every_factor_once_and_their_own_state(name, x64):
    """Sums over all positions, from within scans and branches, equal those of the collected factors."""
    case = CASES[name]
    params, batch = settings(case)
    found = taps.find(case.output, params, jax.tree.map(lambda leaf: leaf[0], batch))
    state = {layer.name: normal(7, (layer.stack, layer.inputs)) for layer in found.layers}

    def product(u, a, s):
        return jnp.einsum("li,lbpi,lbpo->lbo", u, a, s), jnp.einsum("lbpi,lbpj->lij", a, a)

    reducers = {layer.name: taps.Reducer(product, state[layer.name]) for layer in found.layers}
    kept = {name: taps.Reducer(lambda _, a, s: a * s[..., :1], keep_positions=True) for name in state}

    @jax.jit
    def run(params, batch):
        factors = taps.factors(found, case.output, params, batch)
        summed, apart = (taps.reduce(found, case.output, params, batch, reducers=each) for each in (reducers, kept))
        return factors, summed, apart

    factors, summed, apart = run(params, batch)
    for layer in found.layers:
        expected = [product(state[layer.name], a, s) for a, s in factors.layers[layer.name]]
        for got, *want in zip(summed.layers[layer.name], *expected, strict=True):
            np.testing.assert_allclose(got, sum(want), rtol=1e-10, atol=1e-10)
        for got, (a, s) in zip(apart.layers[layer.name], factors.layers[layer.name], strict=True):
            np.testing.assert_allclose(got, a * s[..., :1], rtol=1e-10, atol=1e-10)


def test_matrices_and_back(x64):
    case = CASES["transformer"]
    params, batch = settings(case)
    found = taps.find(case.output, params, jax.tree.map(lambda leaf: leaf[0], batch))
    got, plain = taps.matrices(found, params)
    assert got["layers/qkv"].shape == (2, D + 1, 12)
    np.testing.assert_array_equal(got["layers/qkv"][1, -1], params["layers"]["qkv_b"][1])
    np.testing.assert_array_equal(got["embed"][0], params["embed"])
    back = taps.from_matrices(found, got, plain, params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    batched = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), params)
    back = taps.from_matrices(found, *taps.matrices(found, batched), params)
    jax.tree.map(np.testing.assert_array_equal, back, batched)


def test_shards_and_checkpoints_change_nothing():
    """Eight devices, the batch over four and the matrices over two; and two checkpoints under one vmap."""
    params, _ = settings(CASES["scan over layers"])
    params, batch = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (params, (normal(9, (4, T, D)),)))
    found = taps.find(scanned, params, jax.tree.map(lambda leaf: leaf[0], batch))
    call = jax.jit(lambda params, batch: taps.factors(found, scanned, params, batch))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf, *axes):
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    expected = call(params, batch)
    spread = jax.tree.map(lambda leaf: place(leaf, *[None] * (leaf.ndim - 1), "model"), params)
    got = call(spread, jax.tree.map(lambda leaf: place(leaf, "data"), batch))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), got, expected)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, 0.5 * leaf]), params)
    both = jax.jit(jax.vmap(call, (0, None)))(stacked, batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y, rtol=2e-4, atol=2e-5), both, expected)


def test_half_precision_is_cast_where_the_model_casts():
    def output(params, example):
        h = jax.nn.gelu(
            example[0].astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16) + params["b"].astype(jnp.bfloat16)
        )
        return total(h.astype(jnp.float32) @ params["v"] + params["c"])

    params, batch = settings(CASES["two layers"])
    params, batch = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (params, batch))
    found, factors = check(output, params, batch, tolerance=2e-2)
    assert {layer.path: layer.bias for layer in found.layers} == {"w": "b", "v": "c"}
    assert factors.layers["w"][0][1].dtype == jnp.bfloat16


def test_what_has_no_form_says_why():
    def output(params, example):
        x = example[0] @ params["dot"]
        x = x @ (params["left"] @ params["right"]) + jnp.tril(params["masked"]).sum() + params["table"]
        return total(x) + jnp.sum(params["decayed"] ** 2) + total(example[0] @ params["decayed"])

    names = ("dot", "left", "right", "masked", "decayed")
    params = {name: np.ones((D, D), np.float32) for name in names} | {"table": np.ones((T, D), np.float32)}
    params |= {"unused": np.ones(3, np.float32), "empty": np.ones((0, 2), np.float32)}
    found = taps.find(output, params, (np.ones((T, D), np.float32),))
    assert [layer.path for layer in found.layers] == ["dot"]
    reasons = {leaf.path: leaf.reason for leaf in found.plain}
    assert "does not depend on it" in reasons["unused"]
    assert "empty" in reasons["empty"]
    for name in ("left", "right", "masked", "decayed", "table"):
        assert "comes out of `" in reasons[name], (name, reasons[name])
    factors = taps.factors(found, output, params, (np.ones((2, T, D), np.float32),))
    assert {name: leaf.shape for name, leaf in factors.plain.items()} == {
        name: (2, *params[name].shape) for name in params if name != "dot"
    }


def test_the_number_of_positions_may_change():
    params, _ = settings(CASES["two layers"])
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    found = taps.find(two_layers, params, (np.ones((T, D), np.float32),))
    longer = taps.factors(found, two_layers, params, (np.ones((2, T + 3, D), np.float32),))
    assert longer.layers["w"][0][0].shape == (1, 2, T + 3, D + 1)


def linear(params, x):
    return total(x @ params["w"])


def turned(params, x):
    return total(x @ params["w"].T)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: taps.find(lambda p, x: x @ p["w"], p, x), r"an output that is float32\[5, 4\]"),
        (lambda p, x: taps.find(lambda p, x: (x.sum(), x.sum()), p, x), "an output that is .*expected: *one"),
        (lambda p, x: taps.find(lambda p, x: jnp.sum(x).astype(jnp.int32), p, x), "an output that is int32"),
        (lambda p, x: taps.find(lambda p, x: jnp.sum(p["w"] ** 2) * x[0, 0], p, x), "no parameter is used linearly"),
        (lambda p, x: taps.find(lambda p, x: x.sum(), p, x), "does not depend on it"),
        (lambda p, x: taps.find(lambda p, x: x.sum(), {"n": np.arange(3)}, x), "leaf 'n' is not floating"),
        (lambda p, x: taps.find(lambda p, x: x.sum(), {}, x), "without a leaf"),
        (
            lambda p, x: taps.reduce(taps.find(linear, p, x), linear, p, x[None], reducers={"v": taps.Reducer(sum)}),
            "'v', which is no layer",
        ),
        (
            lambda p, x: taps.factors(taps.find(linear, p, x), turned, p, x[None]),
            "found in another model: they differ at 'w'",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(InvalidInputError, match=f"(?s){message}"):
        call({"w": np.ones((D, D), np.float32)}, np.ones((T, D), np.float32))
