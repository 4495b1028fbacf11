import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.projection import dense, leaves, sketch
from tests.kernels import matrices

PARAMS = {"b": jnp.zeros(50), "empty": jnp.zeros((3, 0)), "scale": jnp.zeros(()), "w": jnp.zeros((30, 10))}
P = 351
N = 7


def gradients(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((N, *leaf.shape)).astype(dtype) for name, leaf in PARAMS.items()}


def virtual(tree, unit):
    """The vector that the leaves stand for, each at a multiple of `unit`."""
    parts = []
    for name in sorted(tree):
        rows = np.asarray(tree[name], np.float64).reshape(N, -1)
        parts.append(np.pad(rows, ((0, 0), (0, -rows.shape[1] % unit))))
    return np.concatenate(parts, axis=1)


def expected(room, tree, key, k):
    words = np.asarray(jax.random.key_data(key))
    if room is dense:
        g = virtual(tree, 64)
        return g @ matrices.dense_signs(words, g.shape[1], k) / np.sqrt(k)
    g = virtual(tree, k)
    return g @ matrices.sketch(words, g.shape[1], k)


both = pytest.mark.parametrize("room", [dense, sketch], ids=["dense", "sketch"])


@both
@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_features_are_the_gradients_times_one_matrix(room, backend, key):
    projector = room.projector(128, backend=backend)
    state = projector.init(key, PARAMS)
    got = jax.jit(projector.apply)(state, jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients()))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got), expected(room, gradients(), key, 128), rtol=1e-5, atol=1e-5)


@both
def test_float64_gradients_give_float64_features(room, x64):
    key = jax.random.key(3)
    projector = room.projector(100)
    tree = gradients()
    got = projector.apply(projector.init(key, PARAMS), jax.tree.map(jnp.asarray, tree))
    np.testing.assert_allclose(np.asarray(got), expected(room, tree, key, 100), rtol=1e-12, atol=1e-12)
    # Half-precision leaves beside them do not spoil the rest.
    tree["b"] = jnp.asarray(tree["b"], jnp.bfloat16)
    got = projector.apply(projector.init(key, PARAMS), jax.tree.map(jnp.asarray, tree))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(np.asarray(got), expected(room, tree, key, 100), rtol=1e-12, atol=1e-12)


def test_normal_entries_and_copies_reach_the_kernels(key):
    words = np.asarray(jax.random.key_data(key))
    tree = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients())
    normal = dense.projector(128, distribution="normal")
    got = normal.apply(normal.init(key, PARAMS), tree)
    g = virtual(tree, 64)
    np.testing.assert_allclose(got, g @ matrices.dense_normal(words, g.shape[1], 128) / np.sqrt(128), atol=1e-4)
    copies = sketch.projector(128, copies=3)
    got = copies.apply(copies.init(key, PARAMS), tree)
    g = virtual(tree, 128)
    np.testing.assert_allclose(got, g @ matrices.sketch(words, g.shape[1], 128, copies=3), rtol=1e-5, atol=1e-5)


@both
def test_an_ensemble_of_keys_goes_through_vmap(room):
    keys = jax.random.split(jax.random.key(1), 3)
    projector = room.projector(128)
    tree = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients())
    states = jax.vmap(lambda key: projector.init(key, PARAMS))(keys)
    got = jax.vmap(projector.apply, in_axes=(0, None))(states, tree)
    for i in range(3):
        np.testing.assert_allclose(got[i], expected(room, tree, keys[i], 128), rtol=1e-5, atol=1e-5)


@both
def test_an_absent_leaf_keeps_its_place(room, key):
    projector = room.projector(128)
    state = projector.init(key, PARAMS)
    tree = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients())
    absent = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape, g.dtype), tree)
    parts = [projector.apply(state, absent | {name: leaf}) for name, leaf in tree.items() if leaf.size]
    np.testing.assert_allclose(sum(parts), projector.apply(state, tree), rtol=1e-5, atol=1e-5)


@both
def test_unit_vectors_of_leaves_in_any_order_recover_one_matrix(room, key):
    k, words = 256, np.asarray(jax.random.key_data(key))  # 1/√k is exact
    starts, end = {}, 0
    for name in sorted(PARAMS):
        starts[name], end = end, end + -(-PARAMS[name].size // (64 if room is dense else k))
    matrix = matrices.dense_signs(words, 64 * end, k) / 16 if room is dense else matrices.sketch(words, k * end, k)
    projector = room.projector(k)
    state = projector.init(key, PARAMS)
    for name in ("w", "scale", "b"):
        leaf = PARAMS[name]
        absent = {other: jax.ShapeDtypeStruct((leaf.size, *x.shape), x.dtype) for other, x in PARAMS.items()}
        unit = jnp.eye(leaf.size).reshape(leaf.size, *leaf.shape)
        start = starts[name] * (64 if room is dense else k)
        got = projector.apply(state, absent | {name: unit})
        np.testing.assert_array_equal(np.asarray(got), matrix[start : start + leaf.size])


@both
def test_inner_products_are_unbiased(room):
    tree = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients())
    g = virtual(tree, 1)
    projector = room.projector(256)
    keys = jax.random.split(jax.random.key(0), 300)
    states = jax.vmap(lambda key: projector.init(key, PARAMS))(keys)
    features = np.asarray(jax.jit(lambda s: jax.lax.map(lambda s: projector.apply(s, tree), s))(states), np.float64)
    got = np.einsum("tnk,tmk->tnm", features, features)
    norms = (g**2).sum(axis=1)
    spread = np.sqrt((norms[:, None] * norms[None, :] + (g @ g.T) ** 2) / 256)
    assert np.abs((got - g @ g.T) / spread).mean(axis=0).max() < 1.0
    assert np.abs(((got - g @ g.T) / spread).mean(axis=0)).max() < 5 / np.sqrt(300)


@both
def test_equal_arguments_give_the_same_projector_and_no_second_compilation(room):
    assert room.projector(64) is room.projector(64)
    assert room.projector(64) is not room.projector(65)


@both
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda room: room.projector(0), "dim = 0"),
        (lambda room: room.projector(8.0), "dim = 8.0"),
        (lambda room: room.projector(512).init(jax.random.key(0), PARAMS), "dim = 512 for 351 parameters"),
        (lambda room: room.projector(512).init(jax.random.key(0), PARAMS), "without a projection"),
        (lambda room: room.projector(8).init(jax.random.key(0, impl="rbg"), PARAMS), "generator rbg"),
        (lambda room: room.projector(8).init(jax.random.PRNGKey(0), PARAMS), "one typed key"),
        (lambda room: room.projector(8).init(jax.random.split(jax.random.key(0)), PARAMS), r"shape \(2,\)"),
        (lambda room: room.projector(8).init(jax.random.key(0), {}), "without a leaf"),
        (lambda room: room.projector(8).init(jax.random.key(0), PARAMS | {"step": jnp.zeros(9, jnp.int32)}), "int32"),
    ],
)
def test_errors_name_the_remedy(room, call, message, shapes_unchecked):
    with pytest.raises(InvalidInputError, match=message):
        call(room)


def test_no_copies_are_refused():
    with pytest.raises(InvalidInputError, match="copies = 0"):
        sketch.projector(8, copies=0)


def test_leaves_start_at_whole_blocks():
    tree = {name: jnp.zeros((N, *leaf.shape)) for name, leaf in PARAMS.items()}
    assert [(leaf.rows.shape, leaf.block) for leaf in leaves.matrices(tree, block=64)] == [
        ((N, 50), 0),
        ((N, 1), 1),
        ((N, 300), 2),
    ]
