import jax
import numpy as np
import pytest
import scipy.stats

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import counterfactual


def test_most_helpful_by_hand():
    scores = np.array([[0.5, -1.0], [0.1, 3.0], [0.9, 2.0], [-2.0, 0.0]])
    removed = counterfactual.most_helpful(scores, 2)
    assert removed.tolist() == [[True, False, True, False], [False, True, True, False]]
    harmful = counterfactual.most_helpful(-scores, 1)
    assert harmful.tolist() == [[False, False, False, True], [True, False, False, False]]


def test_most_helpful_breaks_ties_by_index_and_keeps_the_size():
    removed = counterfactual.most_helpful(np.zeros((6, 3), np.float32), 4)
    assert removed.tolist() == [[True] * 4 + [False] * 2] * 3


def test_random_removal_is_uniform_and_of_the_size_asked_for(key):
    removed = counterfactual.random_removal(key, 20, k=5, count=2000)
    assert removed.shape == (2000, 20)
    assert (removed.sum(axis=1) == 5).all()
    # Without replacement: each source with probability 1/4, each pair with 5·4 / (20·19).
    assert removed.mean(axis=0) == pytest.approx(np.full(20, 0.25), abs=5 * np.sqrt(0.25 * 0.75 / 2000))
    pairs = (removed.T.astype(float) @ removed)[np.triu_indices(20, 1)] / 2000
    assert pairs.mean() == pytest.approx(20 / 380, abs=1e-12)
    assert pairs.std() < 2 * np.sqrt(20 / 380 / 2000)
    np.testing.assert_array_equal(removed, counterfactual.random_removal(key, 20, k=5, count=2000))
    assert (removed != counterfactual.random_removal(jax.random.key(1), 20, k=5, count=2000)).any()


def test_effect_is_paired_over_queries(key):
    random = np.random.default_rng(0)
    level = 10 * random.standard_normal(50)
    before, after_random = level, level - 0.1 + 0.2 * random.standard_normal(50)
    after = level - 0.6 + 0.2 * random.standard_normal(50)
    found = counterfactual.effect(before, after, after_random, key=key)
    difference = after_random - after
    assert found.difference.value == pytest.approx(difference.mean())
    assert found.removed.value == pytest.approx((before - after).mean())
    assert found.random.value == pytest.approx((before - after_random).mean())
    assert found.fraction == np.mean(difference > 0)
    # The queries' levels differ by 10 and drop out: the interval is that of differences.
    expected = scipy.stats.t.interval(0.95, 49, difference.mean(), scipy.stats.sem(difference))
    assert found.difference[1:] == pytest.approx(expected, abs=0.01)
    assert found.difference.low > 0


def test_effect_of_nothing_spans_zero(key):
    before, after, control = np.random.default_rng(1).standard_normal((3, 50))
    found = counterfactual.effect(before, after, control, key=key)
    assert found.difference.low < 0 < found.difference.high


def test_refuses_what_cannot_be_removed_or_compared(key, shapes_unchecked):
    with pytest.raises(InvalidInputError, match="4 of 4 examples to remove"):
        counterfactual.most_helpful(np.ones((4, 2)), 4)
    with pytest.raises(InvalidInputError, match="0 of 9 examples to remove"):
        counterfactual.random_removal(key, 9, k=0, count=1)
    with pytest.raises(InvalidInputError, match="scores that are NaN"):
        counterfactual.most_helpful(np.array([[np.nan], [1.0]]), 1)
    with pytest.raises(InvalidInputError, match=r"shapes \(2,\), \(3,\)"):
        counterfactual.effect(np.ones(2), np.ones(3), np.ones(3), key=key)
    with pytest.raises(InvalidInputError, match="not finite"):
        counterfactual.effect(np.ones(3), np.array([1.0, np.nan, 1.0]), np.ones(3), key=key)
