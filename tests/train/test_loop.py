"""One training run, against arithmetic done by hand in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.models.mlp import mlp
from jattrib.train import loop, sideways

PLAN = loop.Plan(epochs=3, batch_size=4, size=10)


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def by_hand(kernel, bias, inputs, labels, order, weights, rate, momentum):
    """Softmax regression by gradient descent with momentum, written out."""
    speed_kernel, speed_bias, losses = np.zeros_like(kernel), np.zeros_like(bias), []
    for indices, valid in zip(np.asarray(order.indices), np.asarray(order.valid), strict=True):
        x, y = inputs[indices], np.eye(kernel.shape[1])[labels[indices]]
        p = softmax(x @ kernel + bias)
        scale = (valid * weights[indices] / valid.sum())[:, None]
        losses.append(-(scale[:, 0] * np.log((p * y).sum(1))).sum())
        error = scale * (p - y)
        speed_kernel = momentum * speed_kernel + x.T @ error
        speed_bias = momentum * speed_bias + error.sum(0)
        kernel, bias = kernel - rate * speed_kernel, bias - rate * speed_bias
    return kernel, bias, np.array(losses)


@pytest.fixture
def problem(x64):
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(12, 5)), rng.integers(0, 3, 12)
    model = mlp(5, (), 3)
    params, state = model.init(jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    return model, params, state, inputs, labels


@pytest.mark.parametrize("train", [loop.train, sideways.train], ids=["plain", "sideways"])
@pytest.mark.parametrize("weighted", [False, True])
def test_training_is_gradient_descent_on_the_weighted_mean_of_each_batch(problem, weighted, train):
    model, params, state, inputs, labels = problem
    mask = np.ones(12, bool)
    mask[[3, 7]] = False
    order = loop.schedule(jax.random.key(2), jnp.asarray(mask), PLAN)
    weights = np.random.default_rng(1).uniform(0, 2, 12) if weighted else np.ones(12)
    trained = train(
        loop.classification_loss(model), optax.sgd(0.3, momentum=0.9), (params, state),
        (jnp.asarray(inputs), jnp.asarray(labels)), order, weights=jnp.asarray(weights) if weighted else None, epochs=3,
    )  # fmt: skip
    layer = params["layers"]["0"]
    kernel, bias, losses = by_hand(
        np.asarray(layer["kernel"]), np.asarray(layer["bias"]), inputs, labels, order, weights, 0.3, 0.9
    )
    np.testing.assert_allclose(trained.params["layers"]["0"]["kernel"], kernel, rtol=1e-12)
    np.testing.assert_allclose(trained.params["layers"]["0"]["bias"], bias, rtol=1e-11)
    np.testing.assert_allclose(trained.losses, losses.reshape(3, -1).mean(1), rtol=1e-12)


def test_the_order_is_that_of_random_words_for_every_example():
    """A mask takes examples out of an epoch's order, and moves no other: the words do not depend on it."""
    n, plan = 40, loop.Plan(epochs=2, batch_size=8, size=24)
    mask = np.random.default_rng(2).permutation(n) < plan.size
    order = loop.schedule(jax.random.key(9), jnp.asarray(mask), plan)
    for epoch, key in zip(
        np.asarray(order.indices).reshape(2, -1), jax.random.split(jax.random.key(9), 2), strict=True
    ):
        words = np.asarray(jax.random.bits(key, (n,), jnp.uint32)) >> 1
        ranked = np.argsort(words, kind="stable")
        np.testing.assert_array_equal(epoch, ranked[mask[ranked]])


def test_each_epoch_is_a_permutation_of_the_masked_examples():
    mask = np.zeros(25, bool)
    mask[[1, 2, 3, 5, 8, 13, 21, 22, 23, 24]] = True
    order = loop.schedule(jax.random.key(0), jnp.asarray(mask), PLAN)
    assert order.indices.shape == order.valid.shape == (PLAN.steps, PLAN.batch_size) == (9, 4)
    epochs = np.asarray(order.indices).reshape(3, 12)
    valid = np.asarray(order.valid).reshape(3, 12)
    drawn = [row[keep] for row, keep in zip(epochs, valid, strict=True)]
    for row in drawn:
        np.testing.assert_array_equal(np.sort(row), np.flatnonzero(mask))
    assert (drawn[0] != drawn[1]).any()


def test_every_position_of_an_order_is_uniform():
    """First entries over many keys: each of 10 examples comes first in a tenth of the runs, within five deviations."""
    keys = jax.random.split(jax.random.key(3), 2000)
    plan = loop.Plan(1, 10, 10)
    first = jax.vmap(lambda key: loop.schedule(key, jnp.ones(10, bool), plan).indices[0, 0])(keys)
    counts = np.bincount(np.asarray(first), minlength=10)
    assert np.abs(counts - 200).max() < 5 * np.sqrt(2000 * 0.1 * 0.9)


def test_a_smaller_mask_is_padded_at_the_end_of_each_epoch():
    mask = np.arange(25) < 6
    order = loop.schedule(jax.random.key(0), jnp.asarray(mask), PLAN)
    valid = np.asarray(order.valid).reshape(3, 12)
    np.testing.assert_array_equal(valid.sum(1), [6, 6, 6])
    indices = np.asarray(order.indices).reshape(3, 12)
    for row, keep in zip(indices, valid, strict=True):
        np.testing.assert_array_equal(np.sort(row[keep]), np.arange(6))
        assert row.max() < 6  # batch statistics must not see an excluded example


@pytest.mark.parametrize("n", [1, 2, 700, 3001])
def test_words_are_ordered_as_a_stable_sort_orders_them(n):
    rng = np.random.default_rng(n)
    words = rng.integers(0, 2**31, n, dtype=np.uint32)
    crowded = (rng.integers(0, 4, n) << 20 | rng.integers(0, 50, n)).astype(np.uint32)  # many equal high bits, and ties
    order = jax.jit(loop._argsort)
    for values in (words, crowded):
        np.testing.assert_array_equal(order(values), np.argsort(values, kind="stable"))


def test_examples_are_taken_as_indexing_takes_them():
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(7, 2, 3)), "y": rng.integers(0, 9, 7), "empty": np.zeros((7, 0))}
    indices = jnp.array([6, 0, 0, 3])
    found = loop.take(jax.tree.map(jnp.asarray, data), indices)
    for name, rows in data.items():
        np.testing.assert_array_equal(found[name], rows[np.asarray(indices)].astype(found[name].dtype))


def test_a_weight_of_zero_removes_an_example_and_moves_no_other_draw(problem):
    model, params, state, inputs, labels = problem
    order = loop.schedule(jax.random.key(2), jnp.ones(12, bool), loop.Plan(2, 4, 12))
    weights = jnp.asarray(np.where(np.arange(12) == 5, 0.0, 1.0))
    train = loop.train
    loss, optimizer = loop.classification_loss(model), optax.sgd(0.1)
    left_out = train(
        loss, optimizer, (params, state), (jnp.asarray(inputs), jnp.asarray(labels)), order, weights=weights
    )
    changed = inputs.copy()
    changed[5] = 1e3  # what the removed example is must not matter
    again = train(loss, optimizer, (params, state), (jnp.asarray(changed), jnp.asarray(labels)), order, weights=weights)
    np.testing.assert_array_equal(left_out.params["layers"]["0"]["kernel"], again.params["layers"]["0"]["kernel"])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (loop.Plan(0, 4, 10), "plan.epochs = 0"),
        (loop.Plan(1, 0, 10), "plan.batch_size = 0"),
        (loop.Plan(1, 4, 13), "plan.size = 13 examples an epoch"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(plan, message):
    with pytest.raises(InvalidInputError, match=message):
        loop.check_plan(plan, 12)
