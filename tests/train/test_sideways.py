"""Training with narrow matrices on their side is training; optimisers that know rows from columns are left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattrib.data.synthetic import gaussian_classes
from jattrib.models.mlp import mlp
from jattrib.train import loop, sideways

SIZES = (7, 9, 3)
PLAN = loop.Plan(epochs=2, batch_size=4, size=16)
FACTORS = {"layers": {"0": {"kernel": jnp.arange(63.0).reshape(7, 9) / 63, "bias": jnp.ones(9)},
                      "1": {"kernel": jnp.ones((9, 3)), "bias": jnp.ones(3)}}}  # fmt: skip

BY_ENTRY = {
    "sgd": optax.sgd(0.1), "momentum": optax.sgd(lambda step: 0.1 / (1 + step), momentum=0.9, nesterov=True),
    "adam": optax.adam(0.01), "adamw": optax.adamw(0.01, weight_decay=0.1), "lion": optax.lion(0.01),
    "rmsprop": optax.rmsprop(0.01), "adagrad": optax.adagrad(0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "clipped by entry": optax.chain(optax.clip(0.01), optax.adam(0.01)),
    "masked": optax.masked(optax.sgd(0.1), {"layers": {"0": True, "1": {"kernel": True, "bias": False}}}),
    "if finite": optax.apply_if_finite(optax.adam(0.01), 3),
}  # fmt: skip


def by_row(updates, params):
    del params
    return jax.tree.map(lambda leaf: leaf / (0.01 + jnp.linalg.norm(leaf, axis=0, keepdims=True)), updates)


def by_scan(updates, params):
    """Each row's sum so far, by a loop that sees a matrix as vectors."""
    del params
    running = lambda leaf: jax.lax.scan(lambda total, row: (total + row,) * 2, jnp.zeros_like(leaf[0]), leaf)[1]  # noqa: E731
    return jax.tree.map(running, updates)


def by_fan_in(updates, params):
    del params
    return jax.tree.map(lambda leaf: leaf / leaf.shape[0], updates)


def is_head(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2 and leaf.shape[1] == 3, params)


def known_shapes(updates, params):
    return jax.tree.map(lambda leaf: {(7, 9): 1.0, (9, 3): 2.0, (9,): 1.0, (3,): 1.0}[leaf.shape] * leaf, updates)


NOT_BY_ENTRY = {
    "fan-in": optax.chain(optax.stateless(by_fan_in), optax.sgd(0.5)),
    "decay of the head": optax.chain(optax.add_decayed_weights(0.5, mask=is_head), optax.sgd(0.1)),
    "known shapes": optax.chain(optax.stateless(known_shapes), optax.sgd(0.1)),
    "factors, NumPy": optax.chain(
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, jax.tree.map(np.asarray, FACTORS))),
        optax.sgd(0.1),
    ),
    "lamb": optax.lamb(0.01),  # flattens matrices for their norms, which would do, but is not known to
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=2),
    "noisy": optax.noisy_sgd(0.1, key=3),
    "columns": optax.chain(optax.stateless(by_row), optax.sgd(0.1)),
    "scan": optax.chain(optax.stateless(by_scan), optax.sgd(0.1)),
    "cumulative": optax.chain(
        optax.stateless(lambda updates, _: jax.tree.map(lambda leaf: jnp.cumsum(leaf, axis=0), updates)), optax.sgd(0.1)
    ),
    "factors": optax.chain(
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, FACTORS)), optax.sgd(0.1)
    ),
    "factors, compiled": optax.chain(
        optax.stateless(jax.jit(lambda updates, _: jax.tree.map(jnp.multiply, updates, FACTORS))), optax.sgd(0.1)
    ),
}


@pytest.mark.parametrize("name", [*BY_ENTRY, *NOT_BY_ENTRY])
def test_training_sideways_is_training(x64, name):
    optimizer = (BY_ENTRY | NOT_BY_ENTRY)[name]
    model = mlp(SIZES[0], SIZES[1:-1], SIZES[-1])
    params, state = model.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    inputs, labels = gaussian_classes(jax.random.key(1), 20, features=7, classes=3)
    data = jnp.asarray(inputs, jnp.float64), jnp.asarray(labels)
    order = loop.schedule(jax.random.key(2), jnp.arange(20) < 16, PLAN)
    loss, start = loop.classification_loss(model), (params, state)
    assert sideways.by_entry(optimizer, params) == (name in BY_ENTRY)
    plain, turned = (
        jax.jit(lambda start, train=train: train(loss, optimizer, start, data, order, epochs=2))(start)
        for train in (loop.train, sideways.train)
    )
    moved = jax.tree.map(lambda before, after: float(jnp.abs(before - after).max()), params, plain.params)
    assert min(moved["layers"][layer]["kernel"] for layer in ("0", "1")) > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), plain, turned)


@pytest.mark.parametrize("columns", [3, sideways.NARROW, sideways.NARROW + 1])
def test_a_turned_loss_is_the_same_function(x64, columns):
    rng = np.random.default_rng(columns)
    kernel, inputs = jnp.asarray(rng.normal(size=(7, columns))), jnp.asarray(rng.normal(size=(4, 7)))

    def loss(params, state, batch):
        return jnp.sin(batch @ params).sum(axis=1), state

    def derivative(loss, at):
        return jax.grad(lambda kernel: loss(kernel, (), inputs)[0].sum())(at)

    on_side = sideways.turn(kernel, kernel)
    assert on_side.shape == ((columns, 7) if columns <= sideways.NARROW else (7, columns))
    found = derivative(sideways.turned(loss, kernel), on_side)
    np.testing.assert_allclose(sideways.turn(found, kernel), derivative(loss, kernel), rtol=1e-13)


def test_square_matrices_turn_back():
    square = jnp.arange(9.0).reshape(3, 3)
    assert (sideways.turn(square, square) == square.T).all()
    assert (sideways.turn(sideways.turn(square, square), square) == square).all()
