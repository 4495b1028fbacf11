"""Scores against retraining, smoothness against its formula, and descent on data weights."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattrib.attribution import magic, smoothness
from jattrib.core.errors import DivergedError, InvalidInputError, StoreError
from jattrib.data import masks as subset_masks
from jattrib.data.synthetic import gaussian_classes
from jattrib.metrics.lds import lds_fixed
from jattrib.models.adapt import from_function
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Margin
from jattrib.train import ensemble, loop, replay

N = 60


def group(activation="gelu", optimizer=None, plan=None):
    optimizer = optax.sgd(0.1, momentum=0.9) if optimizer is None else optimizer
    return ensemble.Ensemble(
        mlp(6, (8,), 3, activation=activation), optimizer, plan or loop.Plan(4, 20, N), removal="zero_weight", width=20
    )


@pytest.fixture(scope="module")
def data():
    train = gaussian_classes(jax.random.key(0), N + 200, features=6, classes=3)
    inputs, labels = np.asarray(train.inputs), np.asarray(train.labels)
    return (inputs[:N], labels[:N]), (inputs[N:], labels[N:])


def case(members, data, queries=6):
    run, inputs = replay.member(members, data[0], jax.random.key(5))
    asked = jax.tree.map(lambda leaf: jnp.asarray(leaf[:queries]), data[1])
    return partial(Margin, members.model.apply), run, inputs, asked


def linear():
    """A linear model and an output that is linear in its parameters: after one step, linear in the weights too."""
    rng = np.random.default_rng(0)
    model = from_function(lambda key: {"w": jnp.asarray(rng.normal(size=(4, 3)))}, lambda p, x: x @ p["w"])
    inputs, labels = jnp.asarray(rng.normal(size=(10, 4))), jnp.asarray(rng.integers(0, 3, 10))
    order = loop.schedule(jax.random.key(1), jnp.ones(10, bool), loop.Plan(1, 10, 10))
    run = replay.Run(loop.classification_loss(model), optax.sgd(0.5), (inputs, labels), order)
    params, state = model.init(jax.random.key(0))

    def output(state):
        return lambda params, example: jnp.vdot(example[0] @ params["w"], jnp.asarray([1.0, -2.0, 0.5]))

    return output, run, replay.Inputs(jnp.ones(10), params, state), (jnp.asarray(rng.normal(size=(3, 4))),)


def test_scores_are_what_removal_takes_away(x64):
    output, run, inputs, queries = linear()
    scores, info = magic.scores(output, run, inputs, queries, key=jax.random.key(0), fraction=0.3, progress=False)
    assert scores.shape == (10, 3)
    params, state = replay.train(run, inputs)
    whole = jax.vmap(partial(output(state), params))(queries)
    np.testing.assert_allclose(info.values, whole, rtol=1e-12)
    for source in range(10):
        params, state = replay.train(run, inputs._replace(weights=inputs.weights.at[source].set(0.0)))
        without = jax.vmap(partial(output(state), params))(queries)
        np.testing.assert_allclose(scores[source], whole - without, rtol=1e-9, atol=1e-12)
    assert info.error < 1e-9
    assert info.metasmoothness == 1.0
    assert info.causes == ()


def test_scores_are_the_closed_form_of_one_step(x64):
    output, run, inputs, queries = linear()
    scores, _ = magic.scores(output, run, inputs, queries, progress=False)
    x, y, kernel = np.asarray(run.data[0]), np.asarray(run.data[1]), np.asarray(inputs.params["w"])
    p = np.exp(x @ kernel)
    error = p / p.sum(1, keepdims=True) - np.eye(3)[y]
    towards = np.einsum("qi,c->qic", np.asarray(queries[0]), [1.0, -2.0, 0.5])
    expected = -0.5 / 10 * np.einsum("ni,nc,qic->nq", x, error, towards)
    np.testing.assert_allclose(scores, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_scores_predict_paired_retraining(data):
    members = group()
    output, run, inputs, queries = case(members, data)
    scores, info = magic.scores(output, run, inputs, queries, key=jax.random.key(3), progress=False)
    masks = subset_masks.subsets(jax.random.key(7), N, alpha=0.95, count=40)
    keys = jax.random.wrap_key_data(np.tile(jax.random.key_data(jax.random.key(5)), (40, 1)))

    def margins(queries, trained):
        return jax.vmap(partial(Margin(members.model.apply, trained.state), trained.params))(queries)

    outputs = ensemble.collect(jax.tree_util.Partial(margins, queries), members, data[0], masks, keys)
    found = lds_fixed(scores, masks, outputs, key=jax.random.key(0))
    assert found.mean > 0.97
    assert info.metasmoothness > 0.95
    assert info.error < 0.2


@pytest.mark.slow
def test_metasmoothness_is_its_formula(data):
    _, run, inputs, _ = case(group(), data)
    direction = smoothness.removal(inputs.weights, 0.2, jax.random.key(1))
    assert int((direction == -0.5).sum()) == 12
    assert int((direction == 0).sum()) == N - 12
    flat = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(replay.train(run, inputs._replace(weights=w))[0])])
        for w in (inputs.weights, inputs.weights + direction, inputs.weights + 2 * direction)
    ]
    first, second = flat[1] - flat[0], flat[2] - flat[1]
    far = np.abs(flat[2] - flat[0])
    expected = far[(first * second) > 0].sum() - far[(first * second) < 0].sum()
    np.testing.assert_allclose(smoothness.metasmoothness(run, inputs, direction), expected / far.sum(), rtol=1e-5)


def test_a_direction_must_change_something(data):
    _, run, inputs, _ = case(group(), data)
    for direction in (jnp.zeros(N), jnp.ones(3)):
        with pytest.raises(InvalidInputError, match="a direction of shape"):
            smoothness.metasmoothness(run, inputs, direction)


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        (group("relu", optax.sgd(2.0, momentum=0.9)), r"the loss has kinks \(relu\)"),
        (group("gelu", optax.sgd(2.0, momentum=0.9)), "the derivative grows .*-fold .* lower the learning rate"),
    ],
    ids=["relu", "rate"],
)
def test_rough_training_is_told_with_its_cause(data, members, cause):
    with pytest.warns(magic.RoughTrainingWarning, match=f"not smooth enough(?s:.*){cause}"):
        _, info = magic.scores(*case(members, data), key=jax.random.key(3), progress=False)
    assert info.metasmoothness < magic.SMOOTH or info.error > magic.ACCURATE
    assert info.causes
    smooth = magic.scores(*case(group(), data), key=jax.random.key(3), progress=False)[1]
    assert smooth.metasmoothness > info.metasmoothness
    assert smooth.error < info.error
    assert smooth.growth < info.growth


def test_a_run_that_diverges_on_the_line_is_rough(x64):
    """Where the update is any longer or shorter than that of the run itself, it is infinite."""
    output, run, inputs, queries = linear()
    length = jnp.linalg.norm(replay.train(run, inputs)[0]["w"] - inputs.params["w"])

    def narrow(updates, params):
        del params
        off = jnp.abs(jnp.linalg.norm(updates["w"]) - length)
        return {"w": updates["w"] + jnp.where((off < 1e-10) | (updates["w"].size == 1), 0, jnp.inf)}

    run = run._replace(optimizer=optax.chain(run.optimizer, optax.stateless(narrow)))
    with pytest.warns(magic.RoughTrainingWarning, match="a metasmoothness of nan"):
        scores, _ = magic.scores(output, run, inputs, queries, key=jax.random.key(0), progress=False)
    np.testing.assert_allclose(scores, magic.scores(*linear(), progress=False)[0], rtol=1e-9)


def test_only_what_has_a_weight_is_removed():
    weights = jnp.asarray([0.0, 0.0, 3.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    for seed in range(5):
        direction = smoothness.removal(weights, 0.5, jax.random.key(seed))
        left = np.sort(weights + 2 * direction)[::-1]
        assert list(left[:2]) in ([3.0, 0.0], [2.0, 0.0])
    assert (weights + 2 * smoothness.removal(weights, 1.0, jax.random.key(0)) == 0).all()


@pytest.mark.parametrize(("fraction", "weight"), [(0.0, 1.0), (5.0, 1.0), (float("nan"), 1.0), (0.1, 0.0)])
def test_a_removal_of_nothing_is_refused_before_the_replay(data, monkeypatch, fraction, weight):
    output, run, inputs, queries = case(group(), data)
    monkeypatch.setattr(replay, "metagradient", lambda *arguments, **settings: pytest.fail("replayed"))
    inputs = inputs._replace(weights=weight * inputs.weights)
    with pytest.raises(InvalidInputError, match=f"a fraction of {fraction} of {round(weight * N)} weights"):
        magic.scores(output, run, inputs, queries, key=jax.random.key(0), fraction=fraction)


WARM = optax.linear_schedule(0.01, 0.1, 4)


@pytest.mark.parametrize(
    ("optimizer", "kinks", "first", "cause"),
    [
        (optax.sgd(WARM, momentum=0.9), (), 0.1, None),
        (optax.adam(WARM, eps_root=1e-8), (), 0.1, "Adam divides"),
        (optax.sgd(0.1, momentum=0.9), (), 1.0, "the first step is already 100% of the highest: let a warm-up"),
        (optax.chain(optax.clip(0.1), optax.sgd(WARM)), ("clip",), 0.1, r"the optimiser clips .* \(clip\)"),
        (optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(WARM)), ("where",), 0.1, r"clips .* \(where\)"),
    ],
    ids=["smooth", "adam", "cold", "clip", "norm"],
)
def test_causes_in_the_optimizer_are_told_apart(data, optimizer, kinks, first, cause):
    _, run, inputs, _ = case(group(optimizer=optimizer), data)
    assert smoothness.optimizer_kinks(run, inputs) == kinks
    norms = np.ones((2, 1), np.float32)
    flat = replay.Metagradient(*(jnp.zeros(()),) * 4, ((), ()), norms)
    told = smoothness.causes(run, inputs, flat)
    assert len(told) == (cause is not None)
    assert cause is None or re.search(cause, told[0])
    if cause is None or "Adam" not in cause:  # whose empty moments are corrected by their age
        np.testing.assert_allclose(smoothness.first_rate(run, inputs), first, rtol=1e-5)


def test_weights_of_draws_are_refused(data):
    output, run, inputs, queries = case(group(), data)
    with pytest.raises(InvalidInputError, match=r"weights of shape \(12, 20\)(?s:.*)one weight an example"):
        magic.scores(output, run, inputs._replace(weights=jnp.ones((12, 20))), queries)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda p, x: jax.nn.gelu(x @ p), ()),
        (lambda p, x: jax.nn.softplus(x @ p), ()),
        (lambda p, x: jax.nn.log_softmax(x @ p), ()),
        (lambda p, x: jnp.abs(x) @ p, ()),  # of the data, not of the parameters
        (lambda p, x: x @ p - jax.lax.stop_gradient(jnp.max(x @ p)), ()),
        (lambda p, x: jax.nn.relu(x @ p), ("relu",)),
        (lambda p, x: jnp.maximum(x @ p, 0), ("max",)),
        (lambda p, x: jnp.clip(jnp.abs(x @ p), 0, 1), ("abs", "clip")),
        (lambda p, x: (x @ p) * jnp.max(p), ("reduce_max",)),
        (lambda p, x: jax.lax.map(lambda row: jax.nn.relu(row @ p), x), ("relu",)),
        (lambda p, x: jax.lax.cond(x.sum() > 0, jax.nn.relu, lambda z: jnp.abs(z), x @ p), ("abs", "relu")),
        (lambda p, x: jax.lax.cond(x.sum() > 0, jnp.tanh, lambda z: z * jnp.abs(x[:, :3]), x @ p), ()),
        (
            lambda p, x: jax.lax.while_loop(
                lambda at: at[1].sum() < 9, lambda at: (jax.nn.relu(at[0]) * p[:1], at[1] + 1), (x[:, :3], x)
            )[0],
            ("relu",),
        ),
    ],
)
def test_kinks_are_found_where_parameters_go_through_them(forward, expected):
    model = from_function(lambda key: jnp.ones((4, 3)), forward)
    order = loop.schedule(jax.random.key(0), jnp.ones(5, bool), loop.Plan(1, 5, 5))
    run = replay.Run(loop.classification_loss(model), optax.sgd(0.1), (jnp.ones((5, 4)), jnp.zeros(5, int)), order)
    inputs = replay.Inputs(jnp.ones(5), *model.init(jax.random.key(0)))
    assert smoothness.kinks(run, inputs) == expected


def flipped(data, share=0.2):
    (inputs, labels), held = data
    rng = np.random.default_rng(2)
    wrong = np.zeros(N, bool)
    wrong[rng.choice(N, round(share * N), replace=False)] = True
    return ((inputs, np.where(wrong, (labels + 1) % 3, labels).astype(labels.dtype)), held), wrong


def descent(data, **settings):
    members = group()
    _, run, inputs, _ = case(members, data)
    held = jax.tree.map(lambda leaf: jnp.asarray(leaf[:100]), data[1])
    settings = {"optimizer": optax.sign_sgd(0.25), "steps": 6, **settings}
    return magic.descend(partial(magic.MeanLoss, members.model.apply), run, inputs, held, progress=False, **settings)


@pytest.mark.parametrize(
    "settings", [{}, {"parametrisation": "softplus", "optimizer": optax.adam(0.7)}, {"optimizer": optax.sgd(30.0)}],
    ids=["sign", "softplus", "gradient"],
)  # fmt: skip
def test_descent_finds_the_flipped_labels(data, settings):
    data, wrong = flipped(data)
    found = descent(data, **settings)
    assert found.values[found.step] == found.values.min() < 0.8 * found.values[0]
    assert (found.weights >= 0).all()
    weights = np.asarray(found.weights)
    pairs = weights[wrong][:, None] - weights[~wrong][None]
    assert np.mean((pairs < 0) + 0.5 * (pairs == 0)) > 0.75  # the area under the curve; chance is .5 ± .09


def test_one_step_of_descent_is_one_of_gradient_descent(data):
    members = group()
    _, run, inputs, _ = case(members, data)
    held = jax.tree.map(lambda leaf: jnp.asarray(leaf[:100]), data[1])

    def value(weights):
        params, state = replay.train(run, inputs._replace(weights=weights))
        logits = members.model.apply(params, state, held[0])[0]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(100), held[1]])

    expected, gradient = jax.value_and_grad(value)(inputs.weights)
    rate = 1.5 / float(gradient.max())
    found = descent(data, optimizer=optax.sgd(rate), steps=1)
    np.testing.assert_allclose(found.values[0], expected, rtol=1e-5)
    stepped = np.maximum(1 - rate * np.asarray(gradient), 0)
    assert (stepped == 0).any()
    np.testing.assert_allclose(found.path[-1], stepped, atol=2e-4)
    np.testing.assert_allclose(found.values[1], value(jnp.asarray(stepped)), rtol=1e-4)


def test_descent_on_several_runs_is_descent_on_their_mean(data):
    members = group()
    runs = [replay.member(members, data[0], jax.random.key(seed)) for seed in (3, 4)]
    held = jax.tree.map(lambda leaf: jnp.asarray(leaf[:100]), data[1])
    output = partial(magic.MeanLoss, members.model.apply)
    queries = jax.tree.map(lambda leaf: leaf[None], held)
    each = [replay.metagradient(output, run, inputs, queries, progress=False) for run, inputs in runs]
    gradient = sum(found.weights[:, 0] for found in each) / 2
    rate = 0.5 / float(jnp.abs(gradient).max())
    (run, inputs), other = runs
    found = magic.descend(
        output, run, inputs, held, optimizer=optax.sgd(rate), steps=1, others=[other], monitor=held, progress=False
    )
    np.testing.assert_allclose(found.values[0], np.mean([one.values[0] for one in each]), rtol=1e-6)
    np.testing.assert_allclose(found.monitored, found.values, rtol=1e-5)
    np.testing.assert_allclose(found.path[1], 1 - rate * np.asarray(gradient), rtol=1e-5)
    assert np.abs(np.asarray(each[0].weights - each[1].weights)).max() > 0.1 * float(jnp.abs(gradient).max())


def test_the_margin_loss_is_minus_the_mean_log_odds(data):
    members = group()
    params, state = members.model.init(jax.random.key(1))
    inputs, labels = data[1]
    logits = np.asarray(members.model.apply(params, state, inputs)[0], np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    right = chances[np.arange(len(labels)), labels]
    found = magic.MarginLoss(members.model.apply, state)(params, (jnp.asarray(inputs), jnp.asarray(labels)))
    np.testing.assert_allclose(found, -np.mean(np.log(right / (1 - right))), rtol=1e-5)


def test_a_monitor_chooses_the_step(data):
    data, _ = flipped(data)
    monitor = jax.tree.map(lambda leaf: jnp.asarray(leaf[100:]), data[1])
    found = descent(data, monitor=monitor, optimizer=optax.sign_sgd(0.6))
    assert found.step == np.argmin(found.monitored)
    again = descent(data, optimizer=optax.sign_sgd(0.6), steps=found.step)
    np.testing.assert_array_equal(again.path[-1], found.weights)
    np.testing.assert_array_equal(again.path, found.path[: found.step + 1])


def test_a_monitor_that_is_not_finite_is_an_error(data):
    inputs, labels = jax.tree.map(lambda leaf: jnp.asarray(leaf[100:]), data[1])
    with pytest.raises(DivergedError, match=r"the objective on the monitor is nan at the weights of step 0"):
        descent(data, monitor=(inputs.at[3, 0].set(jnp.nan), labels))


def test_descent_is_resumed_to_the_same_bits(data, tmp_path, monkeypatch):
    whole = descent(data)
    original, calls = replay.metagradient, []

    def dies(*arguments, **settings):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(replay, "metagradient", dies)
        with pytest.raises(KeyboardInterrupt):
            descent(data, directory=tmp_path)
    with pytest.raises(StoreError, match="belongs to another run: its steps is 6"):
        descent(data, directory=tmp_path, steps=5)
    resumed = descent(data, directory=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    monkeypatch.setattr(replay, "metagradient", dies)  # dies at once
    jax.tree.map(np.testing.assert_array_equal, whole, descent(data, directory=tmp_path))


def test_a_descent_on_other_data_is_refused_whatever_their_name(data, tmp_path):
    settings = {"directory": tmp_path, "identity": {"data": "CIFAR", "heldout": "CIFAR"}, "steps": 1}
    descent(data, **settings)
    with pytest.raises(StoreError, match="belongs to another run: its data is"):
        descent(flipped(data)[0], **settings)
    (train, (inputs, labels)) = data
    with pytest.raises(StoreError, match="belongs to another run: its heldout is"):
        descent((train, (inputs, labels[::-1])), **settings)


@pytest.mark.parametrize(
    ("weights", "parametrisation"), [(jnp.zeros(N), "softplus"), (-jnp.ones(N), "clip"), (jnp.ones((12, 20)), "clip")]
)
def test_weights_that_descent_cannot_begin_at_are_refused(data, weights, parametrisation):
    members = group()
    _, run, inputs, _ = case(members, data)
    with pytest.raises(InvalidInputError, match=f"parametrisation '{parametrisation}'(?s:.*)begin at jnp.ones"):
        magic.descend(
            partial(magic.MeanLoss, members.model.apply), run, inputs._replace(weights=weights), run.data,
            optimizer=optax.sign_sgd(0.1), steps=1, parametrisation=parametrisation,
        )  # fmt: skip


def test_a_parametrisation_that_does_not_exist_is_refused(data, shapes_unchecked):
    with pytest.raises(InvalidInputError, match=r"parametrisation = 'Softplus'(?s:.*)clip, softplus"):
        descent(data, parametrisation="Softplus")


def test_a_member_must_see_all_of_the_data(data):
    with pytest.raises(InvalidInputError, match=r"plan.size = 50, data of \[60\] examples"):
        replay.member(group(plan=loop.Plan(1, 10, 50)), data[0], jax.random.key(0))
