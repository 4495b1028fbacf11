"""Datamodels against closed forms in double precision, and on outputs whose truth is known."""

import jax
import numpy as np
import pytest
from scipy import stats

from jattrib.attribution import datamodels, surrogate
from jattrib.core import mesh as meshes
from jattrib.core import stream
from jattrib.core.errors import InvalidInputError
from jattrib.data import masks as subset_masks

PATH = surrogate.Path(ratio=0.05, count=10)


@pytest.fixture(scope="module")
def models():
    """Additive outputs with noise: a few sources matter to a query."""
    rng = np.random.default_rng(0)
    masks = subset_masks.subsets(jax.random.key(0), 60, alpha=0.5, count=200)
    truth = rng.normal(size=(60, 5)) * (rng.random((60, 5)) < 0.15)
    return masks, masks @ truth + 3 + 0.5 * rng.normal(size=(200, 5)), truth


def test_the_difference_is_that_of_means_with_welchs_error(models, x64):
    masks, outputs, _ = models
    found = datamodels.difference(masks, outputs)
    for source in (0, 17, 59):
        inside = masks[:, source]
        test = stats.ttest_ind(outputs[inside], outputs[~inside], equal_var=False)
        expected = outputs[inside].mean(axis=0) - outputs[~inside].mean(axis=0)
        np.testing.assert_allclose(found.scores[source], expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.scores[source] / found.errors[source], test.statistic, rtol=1e-9)


def test_a_stream_of_models_on_any_mesh_has_the_same_difference(models):
    """Outputs far from 0, in single precision: an offset near them keeps the errors."""
    masks, outputs, _ = models
    shifted = (outputs + 1000).astype(np.float32)
    whole = datamodels.difference(masks, shifted.astype(np.float64))
    statistic = datamodels.differences(60, shifted[:10].mean(axis=0))
    for settings in ({"chunk": 64}, {"chunk": 40, "mesh": meshes.data_mesh()}):
        found = stream.fold(statistic, stream.InMemory((masks, shifted)), progress=False, **settings)
        np.testing.assert_allclose(found.scores, whole.scores, atol=1e-3)
        np.testing.assert_allclose(found.errors, whole.errors, rtol=2e-3)


def test_a_source_that_all_models_have_says_nothing():
    masks = np.ones((6, 3), bool)
    masks[:3, 1] = False
    found = datamodels.difference(masks, np.arange(6.0)[:, None])
    np.testing.assert_allclose(found.scores[:, 0], [0, 3, 0], atol=1e-6)
    np.testing.assert_array_equal(np.isinf(found.errors[:, 0]), [True, False, True])
    np.testing.assert_array_equal(datamodels.denoise(found, 0.0)[:, 0], found.scores[:, 0])


def test_denoising_keeps_what_is_beyond_the_threshold(models):
    masks, outputs, _ = models
    found = datamodels.difference(masks, outputs)
    kept = datamodels.denoise(found, 2.0)
    ratio = np.abs(found.scores) / found.errors
    np.testing.assert_array_equal(kept, np.where(ratio > 2, found.scores, 0))
    assert 0 < (kept != 0).mean() < 0.5


def test_the_threshold_is_the_one_that_ranks_held_out_models_best(models):
    masks, outputs, _ = models
    found = datamodels.difference(masks[:150], outputs[:150])
    choice = datamodels.choose_threshold(found, masks[150:], outputs[150:], thresholds=(0.0, 2.0, 1000.0))
    for threshold, value in zip(choice.thresholds[:2], choice.held_out, strict=False):
        predicted = masks[150:].astype(float) @ datamodels.denoise(found, threshold)
        rho = [stats.spearmanr(predicted[:, q], outputs[150:, q]).statistic for q in range(5)]
        assert value == pytest.approx(np.mean(rho), abs=1e-12)
    assert choice.held_out[2] == 0  # nothing is left
    assert choice.best == 2.0


@pytest.mark.parametrize("regression", ["lasso", "ridge"])
def test_estimates_find_the_truth_and_know_how_well(models, regression):
    masks, outputs, truth = models
    held_out = surrogate.hold_out(jax.random.key(1), 200, fraction=0.2)
    found = datamodels.estimate(masks, outputs, regression=regression, held_out=held_out, path=PATH, progress=False)
    assert found.scores.shape == (60, 5)
    assert np.abs(found.scores - truth).max() < 0.35
    fresh = subset_masks.subsets(jax.random.key(2), 60, alpha=0.5, count=400)
    actual = fresh @ truth + 3 + 0.5 * np.random.default_rng(1).normal(size=(400, 5))
    predicted = surrogate.predict(surrogate.Surrogate(found.scores, found.intercepts), fresh)
    explained = 1 - np.square(actual - predicted).mean(axis=0) / actual.var(axis=0)
    # 40 held-out models, which also chose the penalty, against 400.
    np.testing.assert_allclose(found.held_out, explained, atol=0.3)
    assert found.held_out.mean() == pytest.approx(explained.mean(), abs=0.12)
    np.testing.assert_array_equal(found.prior_weight, 0)


def test_held_out_fit_is_one_minus_error_over_variance(models, x64):
    """Leaving each model out of the mean alone explains nothing: the damping is so large that ridge is the mean."""
    masks, outputs, _ = models
    _, info = surrogate.ridge(masks, outputs, dampings=(1e9,))
    np.testing.assert_allclose(datamodels._explained(outputs, info.errors[0], None), 0, atol=1e-6)
    held_out = surrogate.hold_out(jax.random.key(1), 200, fraction=0.2)
    _, info = surrogate.ridge(masks, outputs, dampings=(1e9,), held_out=held_out)
    np.testing.assert_allclose(datamodels._explained(outputs, info.errors[0], held_out), 0, atol=1e-6)


@pytest.mark.parametrize("value", [-0.32, 1.14, -0.69])
def test_a_query_that_does_not_vary_has_no_held_out_fit(models, value):
    masks, outputs, _ = models
    flat = np.stack([outputs[:, 0], np.full(200, value)], axis=1)
    held_out = surrogate.hold_out(jax.random.key(1), 200)
    for settings in ({"regression": "ridge"}, {"regression": "ridge", "held_out": held_out}, {"held_out": held_out}):
        found = datamodels.estimate(masks, flat, progress=False, **settings)
        np.testing.assert_array_equal(np.isnan(found.held_out), [False, True])
        np.testing.assert_array_equal(found.scores[:, 1], 0)


def test_logits_have_scores_of_every_class(models):
    masks, outputs, _ = models
    logits = np.stack([outputs, -outputs, 2 * outputs], axis=2)
    both = datamodels.estimate(masks, logits, regression="ridge")
    alone = datamodels.estimate(masks, outputs, regression="ridge")
    assert both.scores.shape == (60, 5, 3)
    for number, factor in enumerate((1, -1, 2)):
        np.testing.assert_allclose(both.scores[:, :, number], factor * alone.scores, atol=1e-4)
    np.testing.assert_allclose(both.held_out, np.repeat(alone.held_out[:, None], 3, axis=1), atol=1e-4)


def test_ridge_with_a_prior_is_generalised_least_squares(models, x64):
    """Against the estimator written out with explicit inverses, and leaving out one model against doing so."""
    masks, outputs, truth = models
    masks, outputs = masks[:40], outputs[:40]
    prior = 7 * (truth + 0.3 * np.random.default_rng(3).normal(size=truth.shape))
    found, info = surrogate.ridge(masks, outputs, dampings=(0.5,), prior=prior, standardize=False)

    def explicit(masks, outputs, query, unit):
        X = masks - masks.mean(axis=0)
        inverse = np.linalg.inv(X @ X.T + 0.5 * unit * np.eye(len(X)))
        design = np.stack([np.ones(len(X)), masks @ prior[:, query]], axis=1)
        mean, gamma = np.linalg.solve(design.T @ inverse @ design, design.T @ inverse @ outputs[:, query])
        own = X.T @ inverse @ (outputs[:, query] - design @ [mean, gamma])
        return gamma * prior[:, query] + own, mean - masks.mean(axis=0) @ own, gamma

    unit = np.square(masks - masks.mean(axis=0)).sum() / 40
    for query in range(5):
        coefficients, intercept, gamma = explicit(masks, outputs, query, unit)
        np.testing.assert_allclose(found.coefficients[:, query], coefficients, atol=1e-8)
        assert found.intercepts[query] == pytest.approx(intercept, abs=1e-8)
        assert info.prior_weights[query] == pytest.approx(gamma, rel=1e-8)
    errors = np.zeros(5)
    for left in range(40):
        rest = np.arange(40) != left
        for query in range(5):
            coefficients, intercept, _ = explicit(masks[rest], outputs[rest], query, unit)
            errors[query] += np.square(outputs[left, query] - intercept - masks[left] @ coefficients) / 40
    np.testing.assert_allclose(info.errors[0], errors, rtol=1e-6)


def test_the_scale_of_a_prior_does_not_matter_and_its_worth_does(models, x64):
    masks, outputs, truth = models
    few = masks[:50], outputs[:50]
    rng = np.random.default_rng(4)
    good = truth + 0.1 * rng.normal(size=truth.shape)
    one, hundred = (datamodels.estimate(*few, regression="ridge", prior=factor * good) for factor in (1, 100))
    np.testing.assert_allclose(hundred.scores, one.scores, atol=1e-8)
    np.testing.assert_allclose(100 * hundred.prior_weight, one.prior_weight, rtol=1e-8)
    without = datamodels.estimate(*few, regression="ridge")
    useless = datamodels.estimate(*few, regression="ridge", prior=rng.normal(size=truth.shape))
    error = {name: np.square(each.scores - truth).mean() for name, each in
             (("good", one), ("without", without), ("useless", useless))}  # fmt: skip
    assert error["good"] < 0.3 * error["without"]
    assert error["useless"] < 1.5 * error["without"]


def test_the_prior_counts_on_held_out_rows_too(models, x64):
    masks, outputs, truth = models
    held_out = surrogate.hold_out(jax.random.key(1), 200, fraction=0.2)
    _, info = surrogate.ridge(masks, outputs, dampings=(0.5, 5.0), prior=truth, held_out=held_out)
    for number, damping in enumerate((0.5, 5.0)):
        found, _ = surrogate.ridge(masks[~held_out], outputs[~held_out], dampings=(damping,), prior=truth)
        errors = np.square(surrogate.predict(found, masks[held_out]) - outputs[held_out]).mean(axis=0)
        np.testing.assert_allclose(info.errors[number], errors, rtol=1e-8)


def test_bad_input_is_refused(models, shapes_unchecked):
    masks, outputs, truth = models
    held_out = surrogate.hold_out(jax.random.key(1), 200, fraction=0.2)
    with pytest.raises(InvalidInputError, match="the LASSO without held-out models"):
        datamodels.estimate(masks, outputs)
    with pytest.raises(InvalidInputError, match="the LASSO with a prior"):
        datamodels.estimate(masks, outputs, held_out=held_out, prior=truth)
    with pytest.raises(InvalidInputError, match="regression = 'LASSO'"):
        datamodels.estimate(masks, outputs, regression="LASSO", held_out=held_out)
    with pytest.raises(InvalidInputError, match=r"a prior of \(5, 60\) for 60 columns and 5 targets"):
        datamodels.estimate(masks, outputs, regression="ridge", prior=truth.T)
    with pytest.raises(InvalidInputError, match="200 masks and outputs of 199 models"):
        datamodels.difference(masks, outputs[1:])
    with pytest.raises(InvalidInputError, match="threshold = -1"):
        datamodels.denoise(datamodels.difference(masks, outputs), -1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_have_no_difference(models, value):
    masks, outputs, _ = models
    bad = outputs.copy()
    bad[3, 1] = bad[9, 0] = value
    with pytest.raises(InvalidInputError, match=f"model 3 has an output of {value} at query 1"):
        datamodels.difference(masks, bad)
    with pytest.raises(InvalidInputError, match="outputs at query 0 that are not finite"):
        stream.fold(datamodels.differences(60, outputs.mean(axis=0)), stream.InMemory((masks, bad)), progress=False)


def test_what_is_undefined_is_not_denoised_to_0(models):
    found = datamodels.difference(*models[:2])
    undefined = np.where(np.arange(60)[:, None] < 2, np.nan, found.scores)
    for each in (found._replace(scores=undefined), found._replace(errors=undefined)):
        with pytest.raises(InvalidInputError, match="10 differences, or errors of them, that are NaN"):
            datamodels.denoise(each, 1.0)
    with pytest.raises(InvalidInputError, match="threshold = nan"):
        datamodels.denoise(found, float("nan"))


def test_batches_of_a_stream_have_the_shapes_of_its_offset(models):
    masks, outputs, _ = models
    statistic = datamodels.differences(60, outputs.mean(axis=0)[:4])
    with pytest.raises(InvalidInputError, match=r"outputs of shape \(256, 5\), with an offset of \(4,\)"):
        stream.fold(statistic, stream.InMemory((masks, outputs)), progress=False)
