import re
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import lds


@pytest.fixture
def problem():
    """Scores, half-subsets, and outputs of three seeds that are what the scores predict, and noise."""
    random = np.random.default_rng(0)
    n, m, s, q = 40, 30, 3, 6
    scores = random.standard_normal((n, q)).astype(np.float32)
    masks = np.argsort(random.random((m, n)), axis=1) < n // 2
    outputs = (masks @ scores)[:, None] + 4 * random.standard_normal((m, s, q))
    return scores, masks, outputs


def brute_force(scores, masks, actual):
    """Sum the scores of each subset one by one, and correlate with scipy."""
    predicted = [[sum(scores[i, j] for i in np.flatnonzero(mask)) for mask in masks] for j in range(scores.shape[1])]
    return np.array([scipy.stats.spearmanr(p, a).statistic for p, a in zip(predicted, actual.T, strict=True)])


def test_expected_is_brute_force_over_averaged_seeds(problem, key):
    scores, masks, outputs = problem
    found = lds.lds_expected(scores, masks, outputs, key=key)
    expected = brute_force(scores.astype(float), masks, outputs.mean(axis=1))
    np.testing.assert_allclose(found.per_query, expected, atol=1e-12)
    assert found.mean == pytest.approx(expected.mean())
    assert found.low < found.mean < found.high
    assert len(found.constant_queries) == 0


def test_fixed_is_brute_force_over_one_seed(problem, key):
    scores, masks, outputs = problem
    found = lds.lds_fixed(jnp.asarray(scores), jnp.asarray(masks), outputs[:, 0], key=key)
    np.testing.assert_allclose(found.per_query, brute_force(scores.astype(float), masks, outputs[:, 0]), atol=1e-12)


def test_predict_in_blocks_is_predict_whole(problem, monkeypatch):
    scores, masks, _ = problem
    whole = lds.predict(scores, masks)
    monkeypatch.setattr(lds, "QUERIES_AT_ONCE", 4)
    np.testing.assert_allclose(lds.predict(scores, masks), whole, rtol=1e-14)
    assert whole.dtype == np.float64


def test_equal_scores_predict_nothing_whatever_their_rounding(key):
    random = np.random.default_rng(10)
    masks = np.argsort(random.random((50, 1001)), axis=1) < 500
    scores = random.standard_normal((1001, 3))
    scores[:, 1] = 0.1
    assert len(np.unique(masks.astype(float) @ scores[:, 1])) > 1
    found = lds.lds(lds.predict(scores, masks), random.standard_normal((50, 3)), key=key)
    assert found.constant_queries.tolist() == [1]


@pytest.mark.parametrize("low", [0.1, -0.1, 1e-18, 1e-320])
def test_subsets_with_the_same_scores_have_the_same_prediction(low):
    random = np.random.default_rng(11)
    high = 3 * low if low < 1e-300 else 0.3
    few = random.random((1000, 2)) < 0.5
    scores = np.where(few, low, high)
    chosen = np.argsort(random.random((60, 50)), axis=1) < 25
    masks = np.repeat(chosen, 20, axis=1)
    predicted = lds.predict(scores, masks)
    for query in range(2):
        counts = masks.astype(int) @ few[:, query].astype(int)
        assert len(np.unique(predicted[:, query])) == len(np.unique(counts))
        for count in np.unique(counts):
            exact = float(count * Fraction(low) + (500 - count) * Fraction(high))
            np.testing.assert_allclose(predicted[counts == count, query], exact, rtol=3e-16)


def test_predictions_are_sums_rounded_once():
    random = np.random.default_rng(12)
    scores = random.standard_normal((300, 4)) * 10.0 ** random.uniform(-12, 0, (300, 4))
    masks = random.random((20, 300)) < 0.5
    exact = [[float(sum(map(Fraction, scores[mask, query]))) for query in range(4)] for mask in masks]
    np.testing.assert_allclose(lds.predict(scores, masks), exact, rtol=3e-16)


def test_bounds(problem, key):
    scores, masks, _ = problem
    predicted = lds.predict(scores, masks)
    assert lds.lds(predicted, np.exp(predicted / 10), key=key).mean == pytest.approx(1)
    assert lds.lds(predicted, -predicted, key=key).mean == pytest.approx(-1)


def test_constant_queries_are_listed_and_not_averaged(problem, key):
    scores, masks, outputs = problem
    scores, outputs = scores.copy(), outputs.copy()
    scores[:, 1] = 0
    outputs[:, :, 4] = 7
    found = lds.lds_expected(scores, masks, outputs, key=key)
    assert found.constant_queries.tolist() == [1, 4]
    assert np.isnan(found.per_query[[1, 4]]).all()
    kept = [0, 2, 3, 5]
    alone = lds.lds_expected(scores[:, kept], masks, outputs[:, :, kept], key=key)
    assert (found.mean, found.low, found.high) == pytest.approx((alone.mean, alone.low, alone.high))
    assert lds.noise_ceiling(outputs).constant_queries.tolist() == [4]


def test_interval_is_over_models_and_queries(key):
    """It covers the LDS expected of new models and queries; one over queries alone does not."""
    random = np.random.default_rng(1)
    m, q, trials = 25, 30, 100

    def draw():
        predicted = random.standard_normal((m, q))
        shared = random.standard_normal((m, 1)) * random.uniform(1, 3, (1, q))
        return predicted, predicted + shared + random.standard_normal((m, q))

    truth = np.mean([lds.spearman(*draw()).values.mean() for _ in range(600)])
    joint, queries_only = 0, 0
    for trial in range(trials):
        found = lds.lds(*draw(), key=jax.random.key(trial), resamples=150)
        joint += found.low <= truth <= found.high
        error = 1.96 * found.per_query.std() / np.sqrt(q)
        queries_only += abs(found.mean - truth) <= error
    assert 0.9 <= joint / trials <= 1
    assert queries_only / trials < 0.9


def test_difference_is_of_means_and_sharper_than_either_interval(key):
    random = np.random.default_rng(9)
    actual = random.standard_normal((60, 40))
    better = actual + random.standard_normal((60, 40)) + random.standard_normal((60, 1))
    worse = better + random.standard_normal((60, 40))
    one, two = (lds.lds(each, actual, key=key) for each in (better, worse))
    found = lds.difference(better, worse, actual, key=key)
    assert found.value == pytest.approx(one.mean - two.mean)
    assert found.high - found.low < 0.7 * (one.high - one.low)
    assert 0 < found.low < found.value < found.high
    back = lds.difference(worse, better, actual, key=key)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_difference_is_over_queries_that_have_both(problem, key):
    scores, masks, outputs = problem
    predicted, actual = lds.predict(scores, masks), outputs[:, 0]
    other = predicted.copy()
    other[:, 2] = 1
    assert lds.difference(predicted, other, actual, key=key) == (0, 0, 0)


def test_interval_narrows_with_models_and_queries(key):
    random = np.random.default_rng(2)
    predicted = random.standard_normal((160, 80))
    actual = predicted + 2 * random.standard_normal((160, 80))
    few = lds.lds(predicted[:40, :20], actual[:40, :20], key=key)
    many = lds.lds(predicted, actual, key=key)
    # Four times the cells in each direction: a quarter of the width.
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("seeds", [2, 4])
def test_ceiling_is_what_perfect_scores_reach(seeds):
    random = np.random.default_rng(3)
    truth = random.standard_normal((400, 1, 60))
    outputs = truth + 0.8 * random.standard_normal((400, seeds, 60))
    reached = np.mean(
        [scipy.stats.spearmanr(truth[:, 0, j], outputs[:, :, j].mean(axis=1)).statistic for j in range(60)]
    )
    ceiling = lds.noise_ceiling(outputs)
    # The formula is exact for Pearson's correlation and within .02 for Spearman's of normal numbers.
    assert ceiling.value == pytest.approx(reached, abs=0.02)
    c = np.mean([
        scipy.stats.spearmanr(outputs[:, a, j], outputs[:, b, j]).statistic
        for a in range(seeds) for b in range(a) for j in range(60)
    ])  # fmt: skip
    assert ceiling.correlation == pytest.approx(c)
    if seeds == 2:
        assert ceiling.value == pytest.approx(np.sqrt(2 * c / (1 + c)))


@pytest.mark.parametrize("shape", [(30, 6), (30,), (30, 3, 6, 1)])
def test_ceiling_of_outputs_without_an_axis_of_seeds_is_refused(shape, shapes_unchecked):
    outputs = np.random.default_rng(13).standard_normal(shape)
    message = f"outputs of the shape {list(shape)}\n  expected: three axes, [model, seed, query]"
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        lds.noise_ceiling(outputs)


def test_ceiling_of_pure_noise_is_a_number():
    opposite = np.random.default_rng(4).standard_normal((10, 1, 2)) * np.array([1, -1])[None, :, None]
    assert lds.noise_ceiling(opposite)[:2] == (0.0, -1.0)


def test_random_baseline_is_that_of_scores_that_are_made(problem, key):
    _, masks, outputs = problem
    actual = outputs.mean(axis=1)
    found = lds.random_baseline(masks, actual, key=key, draws=400)
    random = np.random.default_rng(5)
    made = [
        lds.spearman(masks @ random.standard_normal((masks.shape[1], actual.shape[1])), actual).values.mean()
        for _ in range(400)
    ]
    assert found.value == pytest.approx(0, abs=5 * np.std(made) / 20)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(np.std(made), rel=0.2)


def test_permutation_null_is_that_of_permuted_models(problem, key):
    scores, masks, outputs = problem
    predicted, actual = lds.predict(scores, masks), outputs.mean(axis=1)
    found = lds.permutation_null(predicted, actual, key=key)
    random = np.random.default_rng(6)
    made = np.array([
        lds.spearman(predicted[random.permutation(len(predicted))], actual).values.mean() for _ in range(1000)
    ])  # fmt: skip
    assert found.mean == pytest.approx(0, abs=5 * made.std() / np.sqrt(1000))
    assert found.std == pytest.approx(made.std(), rel=0.1)
    assert (found.low, found.high) == pytest.approx(np.quantile(made, [0.025, 0.975]), abs=0.3 * made.std())
    assert found.p_value == 1 / 1001


def test_permutation_null_is_wider_than_standard_errors_over_queries(key):
    """Where queries are alike, many of them say no more than one."""
    random = np.random.default_rng(7)
    predicted = random.standard_normal((30, 1)) + 0.1 * random.standard_normal((30, 50))
    actual = random.standard_normal((30, 1)) + 0.1 * random.standard_normal((30, 50))
    found = lds.permutation_null(predicted, actual, key=key)
    assert found.std == pytest.approx(1 / np.sqrt(29), rel=0.15)
    assert found.std > 5 / np.sqrt(29 * 50)


def test_permutation_p_value_is_uniform_without_effect():
    random = np.random.default_rng(8)
    found = [
        lds.permutation_null(*random.standard_normal((2, 12, 5)), key=jax.random.key(trial), permutations=99).p_value
        for trial in range(200)
    ]
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.001


def test_refuses_what_has_no_score(problem, key, shapes_unchecked):
    scores, masks, outputs = problem
    with pytest.raises(InvalidInputError, match="scores of 6 sources and masks of 40"):
        lds.predict(scores.T, masks)
    with pytest.raises(InvalidInputError, match=r"same for all models, at each of 6 queries[\s\S]*scores are not zero"):
        lds.lds_expected(np.zeros_like(scores), masks, outputs, key=key)
    with pytest.raises(InvalidInputError, match="not finite"):
        lds.lds_fixed(scores, masks, np.full(outputs[:, 0].shape, np.nan), key=key)
    with pytest.raises(InvalidInputError, match="outputs of 1 seed a subset"):
        lds.noise_ceiling(outputs[:, :1])
    predicted, actual = lds.predict(scores, masks), outputs.mean(axis=1)
    one = predicted * (np.arange(6) == 2)
    for measure in (lds.lds, partial(lds.difference, predicted)):
        with pytest.raises(InvalidInputError, match="1 of 6 queries at which both predictions and outputs vary"):
            measure(one, actual, key=key)
    with pytest.raises(InvalidInputError, match=f"100 draws for masks of 3 models and outputs of {len(actual)}"):
        lds.random_baseline(masks[:3], actual, key=key)
    with pytest.raises(InvalidInputError, match="0 draws"):
        lds.random_baseline(masks, actual, key=key, draws=0)
    with pytest.raises(InvalidInputError, match="0 permutations"):
        lds.permutation_null(predicted, actual, key=key, permutations=0)
