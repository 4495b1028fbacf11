import itertools

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import mislabelled


def scores_and_marks(*, ties, seed=0, n=200):
    random = np.random.default_rng(seed)
    planted = random.random(n) < 0.2
    scores = random.standard_normal(n) + planted
    return (np.round(scores) if ties else scores), planted


@pytest.mark.parametrize("ties", [False, True])
def test_auc_and_average_precision_are_sklearns(key, ties):
    scores, planted = scores_and_marks(ties=ties)
    found = mislabelled.recall(scores, planted, key=key)
    assert found.auc.value == pytest.approx(sklearn.metrics.roc_auc_score(planted, scores), abs=1e-12)
    expected = sklearn.metrics.average_precision_score(planted, scores)
    assert found.average_precision.value == pytest.approx(expected, abs=1e-12)
    assert found.base_rate == planted.mean()
    for each in (found.auc, found.average_precision):
        assert each.low < each.value < each.high


@pytest.mark.parametrize("ties", [False, True])
def test_resamples_are_sklearns_on_repeated_examples(ties):
    """The bootstrap's statistic at any counts is that of the sample with each example so many times."""
    scores, planted = scores_and_marks(ties=ties, n=40)
    counts = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=5)
    found = mislabelled._auc_and_precision(mislabelled._groups(scores), planted, counts)
    for column, count in zip(found.T, counts, strict=True):
        s, p = np.repeat(scores, count), np.repeat(planted, count)
        expected = (sklearn.metrics.roc_auc_score(p, s), sklearn.metrics.average_precision_score(p, s))
        assert column == pytest.approx(expected, abs=1e-12)


def test_interval_is_as_wide_as_delong_says(key):
    scores, planted = scores_and_marks(ties=False, n=1000)
    auc = mislabelled.recall(scores, planted, key=key).auc
    above = scores[planted][:, None] > scores[~planted]
    variance = above.mean(1).var(ddof=1) / planted.sum() + above.mean(0).var(ddof=1) / (~planted).sum()
    assert auc.high - auc.low == pytest.approx(2 * scipy.stats.norm.ppf(0.975) * np.sqrt(variance), rel=0.1)


def test_recall_without_ties_counts_the_found(key):
    scores = np.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    planted = np.isin(np.arange(10), [0, 1, 4, 9])
    found = mislabelled.recall(scores, planted, key=key, inspected=(0.0, 0.2, 0.4, 0.5, 1.0))
    assert found.recall.tolist() == [0, 0.5, 0.5, 0.75, 1]


def test_recall_with_ties_is_the_mean_over_their_orders(key):
    scores = np.array([2.0, 1, 1, 1, 1, 0])
    planted = np.array([False, True, False, True, False, False])
    parts = np.arange(7) / 6
    found = mislabelled.recall(scores, planted, key=key, inspected=tuple(parts.tolist()))
    orders = [(0, *middle, 5) for middle in itertools.permutations([1, 2, 3, 4])]
    each = [[planted[list(order[:k])].sum() / 2 for k in range(7)] for order in orders]
    np.testing.assert_allclose(found.recall, np.mean(each, axis=0), atol=1e-12)


def test_scores_that_say_nothing_find_what_chance_finds(key):
    _, planted = scores_and_marks(ties=False)
    found = mislabelled.recall(np.zeros(200), planted, key=key)
    assert found.auc == (0.5, 0.5, 0.5)
    assert found.average_precision.value == pytest.approx(planted.mean())
    np.testing.assert_allclose(found.recall, found.inspected)


def test_infinite_scores_have_their_place(key):
    found = mislabelled.recall(np.array([np.inf, np.inf, 0, -np.inf]), np.array([True, True, False, False]), key=key)
    assert found.auc.value == 1


def test_refuses_what_cannot_be_ranked(key, shapes_unchecked):
    with pytest.raises(InvalidInputError, match=r"scores of shape \(4, 4\), 0 of them NaN, and marks of shape \(4,\)"):
        mislabelled.recall(np.eye(4), np.ones(4, bool), key=key)
    with pytest.raises(InvalidInputError, match="1 of them NaN"):
        mislabelled.recall(np.array([1.0, np.nan, 2.0]), np.ones(3, bool), key=key)
    with pytest.raises(InvalidInputError, match="1 planted examples of 4"):
        mislabelled.recall(np.arange(4.0), np.arange(4) < 1, key=key)
    with pytest.raises(InvalidInputError, match=r"inspected = \(5,\)"):
        mislabelled.recall(np.arange(4.0), np.arange(4) < 2, key=key, inspected=(5,))
