import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core import mesh as meshes
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.unlearning import dmm, finetune
from jattrib.unlearning.finetune import Settings
from tests.unlearning import oracles
from tests.unlearning.conftest import linear


@pytest.mark.parametrize(
    ("forget", "said"),
    [
        ([], "a forget set of 0 of 60 examples"),
        (range(60), "a forget set of 60 of 60 examples"),
        ([3, 60], "the forget index 60, at place 1"),
        ([-1], "the forget index -1"),
        ([4, 7, 4], "the forget index 4, 2 times"),
    ],
)
def test_a_forget_set_that_makes_no_sense_is_refused(task, forget, said):
    problem, _, _ = task
    with pytest.raises(InvalidInputError, match=said):
        finetune.problem(problem.apply, problem.data, np.array(list(forget), np.int64))


@pytest.mark.parametrize(
    ("forget", "said"),
    [
        ([1.0, 3.0], r"a forget set of float64 of shape \(2,\)"),
        ([np.nan, 3.0], r"a forget set of float64 of shape \(2,\)"),
        ([True, False], r"a forget set of bool of shape \(2,\)\n.*\n.*np.flatnonzero\(mask\)"),
        ([[1, 2]], r"a forget set of int64 of shape \(1, 2\)"),
    ],
)
def test_a_forget_set_that_is_no_row_of_whole_numbers_is_refused(task, forget, said, shapes_unchecked):
    problem, _, _ = task
    with pytest.raises(InvalidInputError, match=said):
        finetune.problem(problem.apply, problem.data, np.array(forget))


def test_labels_of_other_examples_are_refused(task, shapes_unchecked):
    apply, (x, labels), forget = task[0]
    with pytest.raises(InvalidInputError, match="30 labels, and inputs of 60 examples"):
        finetune.problem(apply, (x, labels[:30]), forget)
    with pytest.raises(InvalidInputError, match="60 labels, and inputs of 59 and 60 examples"):
        finetune.problem(apply, ({"a": x, "b": x[1:]}, labels), forget)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"optimizer": "adamw"}, r"optimizer = 'adamw'\n.*one of adam, sgd"),
        ({"optimizer": "Adam"}, "optimizer = 'Adam'"),
        ({"strategy": "thread"}, r"strategy = 'thread'\n.*one of auto, vmap, threads"),
        ({"strategy": "threads", "mesh": True}, "strategy 'threads' on a mesh"),
    ],
)
def test_choices_that_are_none_are_refused(task, choice, said, shapes_unchecked):
    problem, models, keys = task
    if "mesh" in choice:
        choice = choice | {"mesh": meshes.data_mesh(jax.devices()[:2])}
    steps = finetune.shuffled(keys, 60, Settings(1, 16))
    with pytest.raises(InvalidInputError, match=said):
        finetune.tune(dmm._Matching(problem.apply), models, problem.data[0], np.zeros((2, 60, 3)), steps, **choice)


def test_the_retained_examples_are_all_others(task):
    np.testing.assert_array_equal(task[0].retain, np.arange(5, 60))


def test_the_loop_is_gradient_descent_with_momentum_on_logits(task):
    problem, models, keys = task
    settings = Settings(epochs=2, batch_size=4, learning_rate=0.05, decay=0.5, optimizer="sgd")
    chosen = dmm.rows(problem, jax.random.key(2), forget_repeats=2, retain_ratio=1.0)
    targets = np.random.default_rng(1).standard_normal((2, 10, 3)).astype(np.float32)
    found = dmm.match(problem, models, chosen, targets, keys, settings=settings)
    steps = finetune.shuffled(keys, 15, settings)
    x = oracles.extended(problem.data[0][chosen.examples[chosen.draws]])
    for model in range(2):
        theta, velocity = oracles.stacked(models.params, model), 0.0
        for step in range(8):
            at = np.asarray(steps.order.indices[model, step])[np.asarray(steps.order.valid[model, step])]
            difference = x[at] @ theta - targets[model][chosen.draws][at]
            velocity = 0.9 * velocity + x[at].T @ difference * 2 / 3 / len(at)
            theta = theta - 0.05 * 0.5 ** (step // 4) * velocity
        np.testing.assert_allclose(oracles.stacked(found.params, model), theta, rtol=2e-5, atol=2e-6)


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(task):
    steps = finetune.shuffled(task[2], 10, Settings(epochs=3, batch_size=4))
    orders = np.asarray(steps.order.indices)[np.asarray(steps.order.valid)].reshape(2, 3, 10)
    np.testing.assert_array_equal(np.sort(orders), np.broadcast_to(np.arange(10), (2, 3, 10)))
    assert len({tuple(order) for order in orders.reshape(6, 10)}) == 6


def test_batches_side_by_side_keep_their_own_means(task):
    keys = task[2]
    first = finetune.shuffled(keys, 9, Settings(1, 4), weights=np.full(9, 2.0, np.float32))
    second = finetune.shuffled(keys, 2, Settings(1, 2), weights=np.full(2, -3.0, np.float32))
    both = finetune.beside(first, second).order
    assert both.indices.shape == (2, 3, 6)
    share = np.asarray(both.weights) * np.asarray(both.valid) / np.asarray(both.valid.sum(-1, keepdims=True))
    np.testing.assert_allclose(share[..., :4].sum(-1), 2.0, rtol=1e-6)
    np.testing.assert_allclose(share[..., 4:].sum(-1), -3.0, rtol=1e-6)


def test_of_a_longer_second_pass_the_end_is_left_out(task):
    first, second = (finetune.shuffled(task[2], count, Settings(1, 4)) for count in (8, 19))
    both = finetune.beside(first, second).order
    np.testing.assert_array_equal(both.indices[..., :4], first.order.indices)
    np.testing.assert_array_equal(both.indices[..., 4:], second.order.indices[:, :2])


def test_phases_follow_one_another(task):
    keys = task[2]
    first = finetune.shuffled(keys, 3, Settings(1, 2, learning_rate=1.0))
    second = finetune.shuffled(keys, 4, Settings(1, 4, learning_rate=2.0))
    joined = finetune.then(first, second)
    np.testing.assert_allclose(joined.rates, [[1, 1, 2]] * 2)
    np.testing.assert_array_equal(joined.order.valid.sum(-1), [[2, 1, 4]] * 2)


def normalised(params, state, x, *, train=False):
    """The linear model behind batch normalisation."""
    mean, spread = (x.mean(axis=0), x.var(axis=0)) if train else (state["mean"], state["spread"])
    new = {"mean": 0.9 * state["mean"] + 0.1 * mean, "spread": 0.9 * state["spread"] + 0.1 * spread}
    return linear(params, (), (x - mean[None]) / jnp.sqrt(spread + 1e-5)[None])[0], new if train else state


def test_batch_statistics_see_no_row_but_the_batchs_own(task):
    """Batches of 2 are padded to 8: their mean and variance are those of the 2 alone, and so are the gradients."""
    problem, models, keys = task
    rows = problem.data[0][20:32]
    models = models._replace(state={"mean": jnp.zeros((2, 4)), "spread": jnp.ones((2, 4))})
    settings = Settings(1, 2, 0.1, optimizer="sgd")
    away, back = finetune.shuffled(keys, 4, settings), finetune.shuffled(keys, 8, settings._replace(batch_size=8))
    back = back._replace(order=back.order._replace(indices=back.order.indices + jnp.int32(4)))
    own = np.random.default_rng(1).standard_normal((2, 12, 3)).astype(np.float32)
    found = finetune.tune(
        dmm._Matching(normalised), models, rows, own, finetune.then(away, back), optimizer="sgd"
    )  # fmt: skip
    for model in range(2):
        mean, spread, theta, velocity = 0.0, 1.0, oracles.stacked(models.params, model), 0.0
        batches = [np.asarray(each) for steps in (away, back) for each in steps.order.indices[model]]
        for at in batches:
            x = rows[at].astype(np.float64)
            mean, spread = 0.9 * mean + 0.1 * x.mean(axis=0), 0.9 * spread + 0.1 * x.var(axis=0)
            z = oracles.extended((x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5))
            velocity = 0.9 * velocity + z.T @ (z @ theta - own[model][at]) * 2 / 3 / len(at)
            theta = theta - 0.1 * velocity
        assert [len(at) for at in batches] == [2, 2, 8]
        np.testing.assert_allclose(found.state["mean"][model], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.state["spread"][model], spread, rtol=1e-5)
        np.testing.assert_allclose(oracles.stacked(found.params, model), theta, rtol=1e-3, atol=1e-4)


def test_models_do_not_see_one_another(task):
    problem, models, keys = task
    chosen = dmm.rows(problem, jax.random.key(2))
    targets = np.ones((2, len(chosen.examples), 3), np.float32)
    together = dmm.match(problem, models, chosen, targets, keys)
    alone = dmm.match(problem, jax.tree.map(lambda leaf: leaf[1:], models), chosen, targets[1:], keys[1:])
    np.testing.assert_allclose(together.params["kernel"][1], alone.params["kernel"][0], rtol=1e-5)


def test_models_on_cores_of_their_own_are_those_side_by_side(task):
    problem, models, keys = task
    chosen = dmm.rows(problem, jax.random.key(2))
    inputs = jnp.asarray(problem.data[0][chosen.examples[chosen.draws]])
    own = np.ones((2, len(chosen.draws), 3), np.float32)
    movable = jax.tree.map(lambda leaf: jnp.ones_like(leaf).at[1].set(0.0), models.params)
    steps = finetune.shuffled(keys, len(chosen.draws), Settings(2, 16, 1e-2))
    loss = dmm._Matching(problem.apply)
    threads, vmap = (
        finetune.tune(loss, models, inputs, own, steps, movable=movable, strategy=each) for each in ("threads", "vmap")
    )
    np.testing.assert_allclose(threads.params["kernel"], vmap.params["kernel"], rtol=1e-5, atol=1e-6)
    assert finetune.moved(models, threads)[0] > 1e-3
    np.testing.assert_array_equal(threads.params["kernel"][1], models.params["kernel"][1])


def dropping(params, state, x, *, train=False):
    """The linear model behind dropout, whose key is in the model's state."""
    if not train:
        return linear(params, state, x)
    key, own = jax.random.split(state["key"])
    kept = jax.random.bernoulli(own, 0.5, x.shape).astype(x.dtype)
    return linear(params, state, x * kept * 2)[0], {"key": key}


def test_keys_in_a_models_state_go_to_its_core_and_come_back(task):
    problem, models, keys = task
    models = models._replace(state={"key": jax.random.split(jax.random.key(7), 2)})
    rows = problem.data[0]
    own = np.random.default_rng(1).standard_normal((2, len(rows), 3)).astype(np.float32)
    steps = finetune.shuffled(keys, len(rows), Settings(2, 16, 1e-2))
    threads, vmap = (
        finetune.tune(dmm._Matching(dropping), models, rows, own, steps, strategy=each) for each in ("threads", "vmap")
    )
    np.testing.assert_allclose(threads.params["kernel"], vmap.params["kernel"], rtol=1e-5, atol=1e-6)
    expected = models.state["key"]
    for _ in range(8):
        expected = jax.vmap(jax.random.split, out_axes=1)(expected)[0]
    assert threads.state["key"].dtype == expected.dtype
    np.testing.assert_array_equal(jax.random.key_data(threads.state["key"]), jax.random.key_data(expected))


def test_cores_have_the_callers_precision(task):
    problem, models, keys = task
    with jax.enable_x64(True):
        models = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), models)
        x = problem.data[0].astype(np.float64)
        own = np.random.default_rng(1).standard_normal((2, len(x), 3))
        steps = finetune.shuffled(keys, len(x), Settings(1, 60, 0.1, optimizer="sgd"))
        found = finetune.tune(
            dmm._Matching(problem.apply), models, x, own, steps, optimizer="sgd", strategy="threads"
        )  # fmt: skip
        assert found.params["kernel"].dtype == np.float64
        rate = np.float64(np.float32(0.1))
        for model in range(2):
            theta = oracles.stacked(models.params, model)
            difference = oracles.extended(x) @ theta - own[model]
            expected = theta - rate * oracles.extended(x).T @ difference * 2 / 3 / 60
            np.testing.assert_allclose(oracles.stacked(found.params, model), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("strategy", ["threads", "vmap"])
def test_consecutive_models_share_an_order_where_there_are_fewer(task, monkeypatch, strategy):
    problem, models, keys = task
    monkeypatch.setattr(finetune, "TOGETHER", 2)  # three models of an order are two and one
    models = jax.tree.map(lambda leaf: jnp.concatenate([leaf, 2 * leaf, -leaf]), models)
    rows = jnp.asarray(problem.data[0])
    own = np.random.default_rng(1).standard_normal((6, len(rows), 3)).astype(np.float32)
    movable = jax.tree.map(lambda leaf: jnp.ones_like(leaf).at[4].set(0.0), models.params)
    shared, each = (
        finetune.tune(
            dmm._Matching(problem.apply), models, rows, own, finetune.shuffled(some, len(rows), Settings(2, 16, 1e-2)),
            movable=movable, strategy=strategy,
        )
        for some in (keys, jnp.repeat(keys, 3))
    )  # fmt: skip
    np.testing.assert_allclose(shared.params["kernel"], each.params["kernel"], rtol=1e-5, atol=1e-6)
    assert (finetune.moved(models, shared)[[0, 1, 2, 3, 5]] > 1e-3).all()
    np.testing.assert_array_equal(shared.params["kernel"][4], models.params["kernel"][4])


def test_a_core_tunes_a_few_models_of_an_order_together_but_not_those_that_convolve(monkeypatch):
    monkeypatch.setattr(meshes, "cores", lambda: 2)

    def convolved(params, state, x, *, train):
        kernel = params["kernel"].T[:, :, None]  # 3 of 4 channels, 1 wide
        return jax.jit(lambda x: jax.lax.conv(x, kernel, (1,), "VALID"))(x[:, :, None])[..., 0], state

    def together(apply, count, orders):
        models = finetune.Models({"kernel": jnp.ones((count, 4, 3)), "bias": jnp.zeros((count, 3))}, ())
        each = (models, np.zeros((count, 5, 3), np.float32), None)
        return finetune._together(dmm._Matching(apply), jnp.ones((5, 4)), each, orders)

    shapes = [(100, 1), (6, 1), (12, 2), (24, 2), (100, 50), (6, 6)]
    assert [together(linear, *each) for each in shapes] == [10, 3, 6, 6, 2, 1]
    assert [together(convolved, *each) for each in shapes] == [1] * 6


@pytest.mark.parametrize("count", [0, 3, 4])
def test_orders_that_do_not_divide_the_models_are_refused(task, count):
    problem, models, keys = task
    steps = finetune.shuffled(jax.random.split(keys[0], 4), 60, Settings(1, 16))
    some = jax.tree.map(lambda leaf: leaf[:count], steps)
    with pytest.raises(InvalidInputError, match=f"{count} orders for 2 models"):
        finetune.tune(dmm._Matching(problem.apply), models, problem.data[0], np.zeros((2, 60, 3)), some)


def test_an_order_for_all_spreads_over_devices_too(task):
    problem, models, keys = task
    mesh = meshes.data_mesh(jax.devices()[:2])
    chosen = dmm.rows(problem, jax.random.key(2))
    targets = np.ones((2, len(chosen.examples), 3), np.float32)
    one, two = (dmm.match(problem, models, chosen, targets, keys[:1], mesh=each) for each in (None, mesh))
    np.testing.assert_allclose(one.params["kernel"], two.params["kernel"], rtol=1e-5)


def test_models_spread_over_devices_are_the_same(task):
    problem, models, keys = task
    mesh = meshes.data_mesh(jax.devices()[:2])
    chosen = dmm.rows(problem, jax.random.key(2))
    targets = np.ones((2, len(chosen.examples), 3), np.float32)
    one, two = (dmm.match(problem, models, chosen, targets, keys, mesh=each) for each in (None, mesh))
    np.testing.assert_allclose(one.params["kernel"], two.params["kernel"], rtol=1e-5)
    with pytest.raises(InvalidInputError, match="orders = 1, each of models = 1, on a mesh of 2 devices"):
        dmm.match(problem, jax.tree.map(lambda leaf: leaf[1:], models), chosen, targets[1:], keys[1:], mesh=mesh)


@pytest.mark.parametrize(("shape", "names"), [((2,), ("a",)), ((2, 2), ("a", "b"))])
@pytest.mark.parametrize("orders", [1, 2])
def test_a_mesh_of_explicit_axes_is_one_of_auto_axes(task, shape, names, orders):
    problem, models, keys = task
    mesh = jax.make_mesh(shape, names)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    chosen = dmm.rows(problem, jax.random.key(2))
    targets = np.ones((2, len(chosen.examples), 3), np.float32)
    one, two = (dmm.match(problem, models, chosen, targets, keys[:orders], mesh=each) for each in (None, mesh))
    np.testing.assert_allclose(one.params["kernel"], two.params["kernel"], rtol=1e-5)
    assert len(two.params["kernel"].sharding.device_set) == np.prod(shape)


def test_ascent_that_leaves_the_finite_numbers_says_so(task):
    problem, models, keys = task
    chosen = dmm.rows(problem, jax.random.key(2))
    targets = np.full((2, len(chosen.examples), 3), np.float32(np.inf))
    with pytest.raises(DivergedError, match="parameters of model 0 are not finite"):
        dmm.match(problem, models, chosen, targets, keys)


def test_logits_come_in_chunks(task):
    problem, models, _ = task
    whole = finetune.logits(problem.apply, models, problem.data[0])
    np.testing.assert_allclose(whole, finetune.logits(problem.apply, models, problem.data[0], chunk=30), rtol=1e-6)
    for model in range(2):
        theta = oracles.stacked(models.params, model)
        np.testing.assert_allclose(whole[model], oracles.extended(problem.data[0]) @ theta, rtol=1e-4, atol=1e-5)


def test_how_far_models_moved(task):
    _, models, _ = task
    after = models._replace(params=jax.tree.map(lambda leaf: jnp.float32(1.25) * leaf, models.params))
    np.testing.assert_allclose(finetune.moved(models, after), 0.25, rtol=1e-6)
