import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.models.model import Model
from jattrib.train import loop
from jattrib.unlearning import dmm, finetune
from jattrib.unlearning.finetune import Settings
from tests.unlearning import oracles
from tests.unlearning.conftest import linear


def test_the_fine_tuning_set_oversamples_what_is_to_be_forgotten(task):
    problem, _, _ = task
    chosen = dmm.rows(problem, jax.random.key(0), forget_repeats=5, retain_ratio=4)
    seen, counts = np.unique(chosen.examples[chosen.draws], return_counts=True)
    np.testing.assert_array_equal(counts[:5], 5)
    np.testing.assert_array_equal(counts[5:], 1)
    assert len(seen) == 25
    assert set(seen[5:]) <= set(problem.retain)
    everything = dmm.rows(problem, jax.random.key(0), retain_ratio=1000)
    np.testing.assert_array_equal(np.sort(everything.examples), np.arange(60))


def test_a_fine_tuning_set_without_retained_examples_is_refused(task):
    with pytest.raises(InvalidInputError, match="without retained examples the model forgets them too"):
        dmm.rows(task[0], jax.random.key(0), retain_ratio=0)


def test_matching_reaches_targets_that_can_be_reached(task):
    """The shift of a linear model is linear: the models end at their own weights plus it."""
    problem, models, _ = task
    shift = np.random.default_rng(2).standard_normal((5, 3))
    settings = Settings(epochs=120, batch_size=16, learning_rate=0.2, decay=0.97, optimizer="sgd")
    found = dmm.datamodel_matching(
        problem, models, lambda at: oracles.extended(problem.data[0][at]) @ shift, jax.random.key(3),
        multiplier=0.5, settings=settings,
    )  # fmt: skip
    for model in range(2):
        expected = oracles.stacked(models.params, model) + 0.5 * shift
        np.testing.assert_allclose(oracles.stacked(found.params, model), expected, atol=2e-3)


@pytest.mark.parametrize("orders", [None, 1])
def test_matching_oracles_makes_oracles_of_models(task, orders):
    problem, models, _ = task
    oracle = jax.tree.map(lambda leaf: jnp.ones_like(leaf[:1]), models)
    settings = Settings(epochs=120, batch_size=16, learning_rate=0.2, decay=0.97, optimizer="sgd")
    found = dmm.oracle_matching(problem, models, oracle, jax.random.key(3), settings=settings, orders=orders)
    for leaf in jax.tree.leaves(found.params):
        np.testing.assert_allclose(leaf, 1, atol=2e-3)


@pytest.mark.parametrize("classes", [(), (1,), (4,), (1, 3)])
def test_targets_that_are_not_of_all_logits_are_refused(task, classes, shapes_unchecked):
    problem, models, keys = task
    chosen = dmm.rows(problem, jax.random.key(0))
    targets = np.zeros((2, len(chosen.examples), *classes), np.float32)
    with pytest.raises(InvalidInputError, match=r"an array of shape \(2, 60, 3\)"):
        dmm.match(problem, models, chosen, targets, keys)


def test_targets_of_others_are_refused(task):
    problem, models, keys = task
    chosen = dmm.rows(problem, jax.random.key(0))
    with pytest.raises(InvalidInputError, match=r"targets of shape \(2, 7, 3\)"):
        dmm.match(problem, models, chosen, np.zeros((2, 7, 3), np.float32), keys)
    with pytest.raises(InvalidInputError, match="a shift for every example and class"):
        dmm.direct(np.zeros((2, 7, 3)), np.zeros((6, 3)))


def test_tokens_are_matched_where_they_are_no_padding(sequences):
    """Gradient descent on `Σ_t kept ‖xW + b − target‖² / (C Σ_t kept)`, in NumPy and float64."""
    problem, models, keys = sequences
    chosen = dmm.rows(problem, jax.random.key(0), retain_ratio=100)
    targets = np.random.default_rng(6).standard_normal((2, 12, 4, 3)).astype(np.float32)
    kept = problem.data[1][chosen.examples] >= 0
    targets[:, ~kept] = 1e3
    settings = finetune.Settings(epochs=1, batch_size=100, learning_rate=0.3, optimizer="sgd")
    found = dmm.match(problem, models, chosen, targets, keys, settings=settings)
    x = np.asarray(problem.data[0], np.float64)[chosen.examples]
    weight = np.bincount(chosen.draws)[:, None] / len(chosen.draws) * kept / kept.sum(axis=1, keepdims=True)
    for number in range(2):
        kernel, bias = (np.asarray(models.params[name][number], np.float64) for name in ("kernel", "bias"))
        error = weight[..., None] * (x @ kernel + bias - targets[number]) * 2 / 3
        np.testing.assert_allclose(
            found.params["kernel"][number], kernel - 0.3 * np.einsum("ntd,ntc->dc", x, error), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(found.params["bias"][number], bias - 0.3 * error.sum((0, 1)), rtol=1e-4, atol=1e-5)


def test_a_multiplier_is_found_whatever_all_classes_share():
    random = np.random.default_rng(0)
    shift = random.standard_normal((20, 3))
    measured = 3.5 * shift + random.standard_normal((20, 1))
    assert dmm.calibrate(shift, measured) == pytest.approx(3.5)
    with pytest.raises(InvalidInputError, match="a predicted shift of zero everywhere"):
        dmm.calibrate(np.ones((20, 3)), measured)


@pytest.mark.parametrize(
    ("shift", "measured", "said"),
    [
        (np.ones((6, 3)), np.ones((3, 6)), r"shapes \(6, 3\) and \(3, 6\)"),
        (np.eye(3), np.full((3, 3), np.nan), "not finite at 0 and 9 logits"),
        (np.diag([1, 2, np.inf]), np.ones((3, 3)), "not finite at 1 and 0 logits"),
    ],
)
def test_a_multiplier_of_other_shifts_is_refused(shift, measured, said, shapes_unchecked):
    with pytest.raises(InvalidInputError, match=said):
        dmm.calibrate(shift, measured)


def test_scores_and_means_as_shifts():
    scores = np.arange(24.0).reshape(4, 2, 3)
    np.testing.assert_allclose(dmm.shift_of_scores(scores, np.array([1, 3])), -(scores[1] + scores[3]))
    np.testing.assert_allclose(dmm.shift_of_scores(scores[[1, 3]], np.array([1, 3])), -(scores[1] + scores[3]))
    oracles_, full = np.full((2, 2, 3), 4.0), np.stack([np.zeros((2, 3)), np.ones((2, 3))])
    np.testing.assert_allclose(dmm.shift_of_means(oracles_, full), 3.5)


def test_subset_models_give_denoised_differences():
    random = np.random.default_rng(0)
    masks = random.random((200, 6)) < 0.5
    effects = np.array([2.0, 0.0, 0.0, -1.0, 0.0, 0.0])
    outputs = (masks @ effects + 0.3 * random.standard_normal(200))[:, None, None] * np.array([[1.0, -1.0]])
    forget = np.array([0, 1, 3])

    def by_hand(threshold):
        total = np.zeros((1, 2))
        for example in forget:
            inside, outside = outputs[masks[:, example]], outputs[~masks[:, example]]
            difference = inside.mean(0) - outside.mean(0)
            error = np.sqrt(inside.var(0, ddof=1) / len(inside) + outside.var(0, ddof=1) / len(outside))
            total -= np.where(np.abs(difference) > threshold * error, difference, 0)
        return total

    for threshold in (0.0, 3.0, 1e9):
        found = dmm.shift_of_masks(masks, outputs, forget, threshold=threshold)
        np.testing.assert_allclose(found, by_hand(threshold), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dmm.shift_of_masks(masks, outputs, forget, threshold=3.0)[0, 0], -1.0, atol=0.5)
    masks[:, 3] = True
    with pytest.raises(InvalidInputError, match="the example 3, in 200 of 200 subsets"):
        dmm.shift_of_masks(masks, outputs, forget)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_subset_models_that_diverged_are_named(value, shapes_unchecked):
    random = np.random.default_rng(0)
    masks, outputs, forget = random.random((40, 6)) < 0.5, random.standard_normal((40, 4, 2)), np.arange(2)
    for threshold in (-1.0, np.nan):
        with pytest.raises(InvalidInputError, match=f"threshold = {threshold}"):
            dmm.shift_of_masks(masks, outputs, forget, threshold=threshold)
    with pytest.raises(InvalidInputError, match="30 masks and outputs of 40 models"):
        dmm.shift_of_masks(masks[:30], outputs, forget)
    outputs[7, 2, 1] = outputs[9] = value
    with pytest.raises(InvalidInputError, match=r"outputs of model 7 that are not finite \(of 2 of 40 models\)"):
        dmm.shift_of_masks(masks, outputs, forget)


def test_influence_predicts_the_shift_of_softmax_regression(trained):
    problem, models, _ = trained
    x, labels = problem.data
    theta, damping = oracles.stacked(models.params, 0), 1e-2
    inverse = np.linalg.inv(oracles.hessian(theta, x) + damping * np.eye(theta.size))

    def precondition(gradient):
        flat = np.concatenate([np.asarray(gradient["kernel"]), np.asarray(gradient["bias"])[None]]).ravel()
        solved = (inverse @ flat).reshape(theta.shape).astype(np.float32)
        return {"kernel": jnp.asarray(solved[:4]), "bias": jnp.asarray(solved[4])}

    params = jax.tree.map(lambda leaf: leaf[0], models.params)
    found = dmm.shift_of_influence(problem, params, (), x, precondition)
    summed = oracles.gradients(theta, x, labels)[problem.forget].sum(axis=0).ravel()
    expected = oracles.extended(x) @ (inverse @ summed / 60).reshape(theta.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    # The exact removal is not far: 5 of 60 examples.
    kept = problem.retain
    removed = oracles.minimum(x[kept], labels[kept], damping=damping * 60 / 55)
    exact = oracles.extended(x) @ (removed - theta)
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.9


@pytest.mark.usefixtures("x64")
def test_the_derivative_of_training_predicts_small_removals(task):
    problem, models, _ = task
    data = (problem.data[0].astype(np.float64), problem.data[1])
    problem = finetune.Problem(linear, data, problem.forget)
    initial = (jax.tree.map(lambda leaf: jnp.asarray(leaf[0], jnp.float64), models.params), ())
    plan = loop.Plan(2, 20, 60)
    order = loop.schedule(jax.random.key(0), jnp.ones(60, bool), plan)
    loss = loop.classification_loss(Model(lambda key: initial, linear))
    rule = optax.sgd(0.5)
    found = dmm.shift_of_training(problem, loss, rule, initial, order, data[0][:7])

    def outputs(weight):
        weights = jnp.ones(60).at[problem.forget].set(weight)
        ended = loop.train(loss, rule, initial, jax.tree.map(jnp.asarray, data), order, weights=weights)
        return np.asarray(linear(ended.params, (), jnp.asarray(data[0][:7]))[0])

    np.testing.assert_allclose(found, (outputs(1 - 1e-5) - outputs(1 + 1e-5)) / 2e-5, rtol=1e-5, atol=1e-7)
    middle = dmm.shift_of_training(problem, loss, rule, initial, order, data[0][:7], weight=0.5)
    np.testing.assert_allclose(middle, (outputs(0.5 - 1e-5) - outputs(0.5 + 1e-5)) / 2e-5, rtol=1e-5, atol=1e-7)
    removal = outputs(0.0) - outputs(1.0)
    assert np.linalg.norm(middle - removal) < 0.3 * np.linalg.norm(found - removal)
