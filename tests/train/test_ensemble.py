"""Many runs at once: the same models as one by one, in any chunk, on any mesh, after any interruption."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jattrib.core import mesh as meshes
from jattrib.core import stream, tree
from jattrib.core.errors import DivergedError, InvalidInputError, StoreError
from jattrib.data import masks as subset_masks
from jattrib.data.synthetic import gaussian_classes
from jattrib.models.adapt import from_function, from_nnx
from jattrib.models.mlp import mlp
from jattrib.models.resnet import resnet9
from jattrib.train import ensemble, loop, recall

N = 40


def small(**changes):
    members = ensemble.Ensemble(mlp(6, (5,), 3), optax.sgd(0.1, momentum=0.9), loop.Plan(2, 8, 20), width=4)
    return members._replace(**changes)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, 6)).astype(np.float32), rng.integers(0, 3, N).astype(np.int32)


def members(count, start=0):
    masks = subset_masks.subsets(jax.random.key(1), N, alpha=0.5, count=start + count)[start:]
    keys = ensemble.member_keys(jax.random.key(2), np.arange(start, start + count), np.zeros(count, int))
    return masks, keys


def alone(group, data, mask, key):
    """One member, trained by the loop itself, outside any ensemble."""
    init_key, order_key = jax.random.split(key)
    params, state = group.model.init(init_key)
    order = loop.schedule(order_key, jnp.asarray(mask), group.plan)
    loss = loop.classification_loss(group.model)
    return loop.train(loss, group.optimizer, (params, state), jax.tree.map(jnp.asarray, data), order, epochs=2)


def assert_same_bits(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right, rtol=2e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), left, right)


@pytest.mark.parametrize("strategy", ["vmap", "map", "threads", "processes", "steps"])
def test_a_member_is_the_model_trained_alone(data, strategy):
    group = small(strategy=strategy)
    masks, keys = members(5)
    trained = ensemble.train(group, data, masks, keys)
    for number in range(5):
        assert_close(
            jax.tree.map(lambda leaf, i=number: leaf[i], trained), alone(group, data, masks[number], keys[number])
        )


@pytest.mark.parametrize("strategy", ["vmap", "map", "threads", "processes"])
def test_a_member_has_the_same_bits_in_any_chunk(data, strategy):
    group = small(strategy=strategy)
    masks, keys = members(6)
    trained = ensemble.train(group, data, masks, keys)
    shuffled = np.array([5, 0, 3, 1, 4, 2])
    again = ensemble.train(group, data, masks[shuffled], keys[shuffled])
    assert_same_bits(jax.tree.map(lambda leaf: leaf[shuffled], trained), again)
    assert_same_bits(jax.tree.map(lambda leaf: leaf[:1], trained), ensemble.train(group, data, masks[:1], keys[:1]))


@pytest.mark.parametrize("strategy", ["vmap", "threads"])
def test_settings_of_the_calling_thread_hold(data, strategy):
    """Double precision within a `with` block, and whatever else a program is traced under."""
    seen = []

    def apply(params, x):
        seen.append(jax.config.jax_default_matmul_precision)
        return x @ params["w"]

    model = from_function(lambda key: {"w": jax.random.normal(key, (6, 3))}, apply)
    group = small(strategy=strategy, model=model)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        double = data[0].astype(np.float64), data[1]
        masks, keys = members(5)
        trained = ensemble.train(group, double, masks, keys)
        for number in range(5):
            expected = alone(group, double, masks[number], keys[number])
            assert_close(jax.tree.map(lambda leaf, i=number: leaf[i], trained), expected, rtol=1e-11)
    assert trained.params["w"].dtype == np.float64
    assert set(seen) == {"highest"}


def test_eight_devices_train_what_one_does(data):
    masks, keys = members(10)
    one = ensemble.train(small(width=8), data, masks, keys)
    eight = ensemble.train(small(width=8), data, masks, keys, mesh=meshes.data_mesh())
    assert_close(one, eight)


def test_members_of_one_key_are_paired(data):
    """With zero weights, leaving out nothing and leaving out one example differ by that example's effect alone."""
    group = small(removal="zero_weight", plan=loop.Plan(2, 8, N))
    masks = np.ones((2, N), bool)
    masks[1, 7] = False
    keys = ensemble.member_keys(jax.random.key(2), np.zeros(2, int), np.zeros(2, int))
    trained = ensemble.train(group, data, masks, keys)
    init_key, order_key = jax.random.split(keys[0])
    order = loop.schedule(order_key, jnp.ones(N, bool), group.plan)
    for row, weights in enumerate(masks.astype(np.float32)):
        expected = loop.train(
            loop.classification_loss(group.model), group.optimizer, group.model.init(init_key),
            jax.tree.map(jnp.asarray, data), order, weights=jnp.asarray(weights), epochs=2,
        )  # fmt: skip
        assert_close(jax.tree.map(lambda leaf, i=row: leaf[i], trained), expected)


def test_outputs_are_collected_where_models_are_trained(data):
    group = small()
    masks, keys = members(5)
    trained = ensemble.train(group, data, masks, keys)

    def logits(scale, each):
        return scale * group.model.apply(each.params, each.state, jnp.asarray(data[0][:3]))[0]

    outputs = ensemble.collect(jax.tree_util.Partial(logits, jnp.float32(2)), group, data, masks, keys)
    for number in range(5):
        params, state = jax.tree.map(lambda leaf, i=number: leaf[i], (trained.params, trained.state))
        np.testing.assert_allclose(outputs[number], 2 * group.model.apply(params, state, data[0][:3])[0], rtol=1e-5)


def test_a_longer_ensemble_extends_a_shorter_one(data, tmp_path):
    group = small()
    masks, keys = members(11)
    whole = ensemble.train(group, data, masks, keys)
    assert_same_bits(
        ensemble.train(group, data, masks[:5], keys[:5], directory=tmp_path / "models"),
        jax.tree.map(lambda leaf: leaf[:5], whole),
    )
    assert_same_bits(ensemble.train(group, data, masks, keys, directory=tmp_path / "models"), whole)


def test_finished_chunks_are_not_trained_again(data, tmp_path, monkeypatch):
    group = small()
    masks, keys = members(8)
    first = ensemble.train(group, data, masks, keys, directory=tmp_path / "models")

    def refuse(*arguments, **settings):
        raise AssertionError("trained again")

    monkeypatch.setattr(stream, "_rows", refuse)
    assert_same_bits(ensemble.train(group, data, masks, keys, directory=tmp_path / "models"), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": loop.Plan(3, 8, 20)}, "plan.epochs"),
        ({"strategy": "map"}, "strategy"),
        ({"removal": "zero_weight"}, "removal"),
    ],
)
def test_a_directory_of_another_ensemble_is_refused(data, tmp_path, change, message):
    masks, keys = members(4)
    ensemble.train(small(), data, masks, keys, directory=tmp_path / "models")
    with pytest.raises(StoreError, match=message):
        ensemble.train(small(**change), data, masks, keys, directory=tmp_path / "models")


def test_a_directory_of_other_data_is_refused_whatever_their_name(data, tmp_path):
    masks, keys = members(4)
    settings = {"directory": tmp_path / "models", "identity": {"data": "CIFAR"}}
    first = ensemble.train(small(), data, masks, keys, **settings)
    with pytest.raises(StoreError, match="belongs to another run: its data is"):
        ensemble.train(small(), (3 * data[0], data[1]), masks, keys, **settings)
    assert_same_bits(ensemble.train(small(), data, masks, keys, **settings), first)


def test_a_directory_of_other_members_is_refused(data, tmp_path):
    masks, keys = members(4)
    ensemble.train(small(), data, masks, keys, directory=tmp_path / "models")
    others = masks.copy()
    others[2] = masks[3]
    with pytest.raises(StoreError, match="model 2 was trained on another mask or key"):
        ensemble.train(small(), data, others, keys, directory=tmp_path / "models")


def test_a_loss_that_is_not_finite_names_the_model_and_is_not_stored(data, tmp_path):
    masks, keys = members(4)
    group = small(optimizer=optax.sgd(1e30))
    with pytest.raises(
        DivergedError, match=r"the loss of model 0 is nan in epoch \d of 2(?s:.*)lower the learning rate"
    ):
        ensemble.train(group, data, masks, keys, directory=tmp_path / "models")
    with pytest.raises(DivergedError):
        ensemble.train(group, data, masks, keys, directory=tmp_path / "models")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda masks, keys: (masks & False, keys), "mask 0 includes 0 examples"),
        (lambda masks, keys: (masks | True, keys), "mask 0 includes 40 examples"),
        (lambda masks, keys: (masks[:, :30], keys), "4 masks of 30 examples"),
    ],
)
def test_masks_that_do_not_fit_are_refused(data, spoil, message):
    masks, keys = spoil(*members(4))
    with pytest.raises(InvalidInputError, match=message):
        ensemble.train(small(), data, masks, keys)


def test_masks_that_leave_whole_batches_empty_are_refused(data):
    masks, keys = members(4)  # epochs of 8, 8 and 4 examples
    masks[2, np.flatnonzero(masks[2])[:3]] = False
    ensemble.train(small(), data, masks, keys)
    masks[2, np.flatnonzero(masks[2])[:1]] = False
    with pytest.raises(InvalidInputError, match=r"mask 2 includes 16 examples, plan.size is 20(?s:.*)of their own"):
        ensemble.train(small(), data, masks, keys)
    ensemble.train(small(plan=loop.Plan(2, 8, 16)), data, masks[2:3], keys[2:3])
    ensemble.train(small(removal="zero_weight", plan=loop.Plan(2, 8, N)), data, masks, keys)


def test_steps_take_no_mesh(data):
    with pytest.raises(InvalidInputError, match="strategy 'steps' on a mesh"):
        ensemble.train(small(strategy="steps"), data, *members(4), mesh=meshes.data_mesh())


@pytest.mark.parametrize(
    ("change", "spoil", "message"),
    [
        ({"removal": "zero-weight"}, lambda m, k: (m, k), "removal = 'zero-weight'(?s:.*)skip, zero_weight"),
        ({"strategy": "pmap"}, lambda m, k: (m, k), "strategy = 'pmap'(?s:.*)vmap, map, threads"),
        ({}, lambda m, k: (m[0], k), r"masks of shape \(40,\)"),
        ({}, lambda m, k: (m, jax.random.split(jax.random.key(0, impl="rbg"), 4)), r"keys of 'rbg'\n.*'threefry2x32'"),
    ],
)
def test_what_shapes_do_not_tell_is_refused_in_words(data, shapes_unchecked, change, spoil, message):
    with pytest.raises(InvalidInputError, match=message):
        ensemble.train(small(**change), data, *spoil(*members(4)))


def test_no_models_fit_nothing(data):
    with pytest.raises(InvalidInputError, match="count = 0 models"):
        ensemble.fit(ensemble.whole, small(), data, 0)


def test_an_output_that_is_not_finite_is_an_error(data):
    masks, keys = members(6)
    kernels = ensemble.train(small(), data, masks, keys).params["layers"]["0"]["kernel"][:, 0, 0]

    def root(third, trained):
        return {"root": jnp.sqrt(jnp.where(trained.params["layers"]["0"]["kernel"][0, 0] == third, -1.0, 1.0))}

    with pytest.raises(DivergedError, match=r"the output 'root' of model 3 is not finite"):
        ensemble.collect(jax.tree_util.Partial(root, jnp.asarray(kernels[3])), small(), data, masks, keys)


@pytest.mark.slow
def test_choose_measures_every_strategy(data):
    seconds = ensemble.choose(small(), data, *members(4))
    assert set(seconds) == {"vmap", "map", "threads", "steps"}
    assert list(seconds.values()) == sorted(seconds.values())
    assert min(seconds.values()) > 0


@pytest.mark.slow
def test_batch_statistics_are_members_own():
    """A ResNet's state is trained with its parameters, member by member."""
    rng = np.random.default_rng(3)
    images = rng.normal(size=(12, 12, 12, 1)).astype(np.float32)
    labels = rng.integers(0, 3, 12).astype(np.int32)
    model = resnet9((12, 12, 1), 3, width=4)
    group = ensemble.Ensemble(model, optax.sgd(0.05), loop.Plan(2, 4, 8), width=2)
    masks = subset_masks.subsets(jax.random.key(5), 12, alpha=8 / 12, count=2)
    keys = ensemble.member_keys(jax.random.key(6), np.arange(2), np.zeros(2, int))
    trained = ensemble.train(group, (images, labels), masks, keys)
    start = model.init(jax.random.split(keys[0])[0])[1]
    moved = jax.tree.map(lambda after, before: np.abs(after[0] - before).max(), trained.state, start)
    assert max(jax.tree.leaves(moved)) > 1e-3
    for number in range(2):
        expected = alone(group, (images, labels), masks[number], keys[number])
        assert_close(jax.tree.map(lambda leaf, i=number: leaf[i], trained), expected, rtol=1e-3)


class Dropping(nnx.Module):
    """A linear model of features that are dropped at random, by a generator in its state."""

    def __init__(self, rngs):
        self.drop, self.last = nnx.Dropout(0.4, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(x))


@pytest.mark.parametrize("strategy", ["vmap", "map", "threads", "processes", "steps"])
def test_random_generators_in_the_state_are_members_own(data, tmp_path, strategy):
    group = small(model=from_nnx(Dropping), strategy=strategy, width=2)
    masks, keys = members(3)
    trained = ensemble.train(group, data, masks, keys, directory=tmp_path / "models")
    for number in range(3):
        expected = alone(group, data, masks[number], keys[number])
        found = jax.tree.map(lambda leaf, i=number: leaf[i], trained)
        assert_close(found.params, expected.params)
        for key, other in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected.state), strict=True):
            assert key.dtype == other.dtype
            assert (key == other).all()
    assert any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(trained.state))
    again = recall.again(tmp_path / "models", group, data, jax.random.key(2), masks, 1, 0)
    assert tree.digest(again) == tree.digest(jax.tree.map(lambda leaf: leaf[1], trained))


def test_trained_models_know_their_data():
    data = gaussian_classes(jax.random.key(0), 200, features=6, classes=3)
    group = small(plan=loop.Plan(20, 20, 100))
    masks = subset_masks.subsets(jax.random.key(1), 200, alpha=0.5, count=2)
    keys = ensemble.member_keys(jax.random.key(2), np.arange(2), np.zeros(2, int))
    trained = ensemble.train(group, tuple(data), masks, keys)
    assert (trained.losses[:, -1] < 0.5 * trained.losses[:, 0]).all()
