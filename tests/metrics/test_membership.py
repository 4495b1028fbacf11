import itertools

import numpy as np
import pytest
import scipy.stats

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import membership


def laws(shift, n=60, points=40, seed=0):
    random = np.random.default_rng(seed)
    return shift + random.standard_normal((n, points)), random.standard_normal((n, points))


def test_the_attacker_is_the_likelihood_ratio_of_the_other_half(key):
    p, q = laws(1.0, n=11, points=5)
    p *= np.linspace(0.5, 2, 5)
    found = membership.ulira(p, q, key=key)
    for at in range(5):
        right = {0: [], 1: []}
        for side, sample in enumerate((p, q)):
            for number, margin in enumerate(sample[:, at]):
                fits = [each[1 - number % 2 :: 2, at] for each in (p, q)]
                logs = [scipy.stats.norm(fit.mean(), fit.std(ddof=1)).logpdf(margin) for fit in fits]
                right[side].append(logs[side] > logs[1 - side])
        assert found.per_point[at] == pytest.approx((np.mean(right[0]) + np.mean(right[1])) / 2)
    assert found.accuracy.value == pytest.approx(found.per_point.mean())
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high


@pytest.mark.parametrize("models", [4, 60])
def test_laws_that_are_the_same_score_a_half_however_few_the_models(key, models):
    p, q = laws(0.0, n=models, points=4000)
    found = membership.ulira(p, q, key=key)
    assert found.accuracy.value == pytest.approx(0.5, abs=0.005)
    assert found.accuracy.low < 0.5 < found.accuracy.high


def test_laws_a_shift_apart_score_what_gaussians_allow(key):
    p, q = laws(2.0, n=200, points=500)
    assert membership.ulira(p, q, key=key).accuracy.value == pytest.approx(scipy.stats.norm.cdf(1), abs=0.01)
    assert membership.ulira(p + 50, q, key=key).accuracy == (1, 1, 1)


def test_a_point_that_is_alone_has_an_interval_over_models(key):
    p, q = laws(1.0, points=9)
    every, found = (membership.ulira(p[:, :count], q[:, :count], key=key) for count in (9, 1))
    assert found.per_point[0] == every.per_point[0] == found.accuracy.value
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high


def test_margins_that_do_not_vary(key):
    still = np.ones((6, 3))
    assert membership.ulira(still, still, key=key).per_point.tolist() == [0.5] * 3
    assert membership.ulira(still, 0 * still, key=key).per_point.tolist() == [1] * 3


def every_attack(p, q, delta):
    """One point: every interval between thresholds in the gaps, called unlearned inside or outside, one by one."""
    values = np.unique(np.concatenate([p, q]))
    edges = [-np.inf, *((values[1:] + values[:-1]) / 2), np.inf]
    largest = 0.0
    for low, high in itertools.combinations(edges, 2):
        for inside in (True, False):
            called = [((low < each) & (each < high)) == inside for each in (p, q)]
            fpr, fnr = np.count_nonzero(called[1]) / len(q), np.count_nonzero(~called[0]) / len(p)
            if fpr == 0 and fnr == 0:
                return np.inf
            if fpr == 0 or fnr == 0:
                continue
            for one, other in ((fpr, fnr), (fnr, fpr)):
                if 1 - delta - one > 0:
                    largest = max(largest, np.log((1 - delta - one) / other))
    return largest


@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.1])
def test_epsilon_is_the_worst_of_all_attacks(delta):
    p, q = laws(0.8, n=14, points=6)
    p[:, 5] += 20  # never mistaken
    p[:, 4] = np.where(np.arange(14) % 2, 9, -9)  # on both sides of the oracles: found by an interval alone
    p[:, 3] = q[:, 3]
    found = membership.epsilon(p, q, delta=delta)
    expected = [every_attack(a, b, delta) for a, b in zip(p.T, q.T, strict=True)]
    np.testing.assert_allclose(found.epsilon, expected, rtol=1e-10, atol=1e-12)
    assert np.isinf(found.epsilon[4:]).all()
    numbers = np.digitize(found.epsilon, 0.5 * np.arange(13))
    assert found.quality == pytest.approx(np.mean(2.0 / 2.0**numbers))
    assert numbers[5] == 13


@pytest.mark.parametrize("models", [100, 512])
def test_laws_that_no_attack_confuses_are_infinitely_apart_whatever_the_thresholds(models):
    p, q = laws(0.0, n=models, points=7)
    p[:, 0] += 1000
    p[:, 1] -= 1000
    p[:, 2] = np.where(np.arange(models) % 2, 1000, -1000)  # on both sides: q is the block
    q[:, 3] = np.where(np.arange(models) % 2, 1000, -1000)
    p[:, 4] += 1000
    p[0, 4] = 0  # but for one model
    q[:, 5], p[:, 5] = 1.0, np.where(np.arange(models) % 2, 1.0, 2.0)  # ties
    for thresholds in (8, 64, 4096):
        found = membership.epsilon(p, q, thresholds=thresholds).epsilon
        assert np.isinf(found[:4]).all()
        assert np.isfinite(found[4:]).all()


def test_one_representable_number_apart_is_apart():
    q = np.ones((6, 1))
    assert np.isinf(membership.epsilon(np.nextafter(q, 2), q).epsilon[0])


def test_laws_that_overlap_score_what_their_thresholds_say():
    """Exactly, by every interval between the quantiles that are the thresholds."""
    p, q = laws(0.8, n=100, points=3)
    found = membership.epsilon(p, q, thresholds=16).epsilon
    for at in range(3):
        values = np.unique(np.concatenate([p[:, at], q[:, at]]))
        edges = np.quantile((values[1:] + values[:-1]) / 2, (np.arange(16) + 0.5) / 16)
        largest = 0.0
        for low, high in itertools.combinations([-np.inf, *edges, np.inf], 2):
            for inside in (True, False):
                called = [((low < each[:, at]) & (each[:, at] < high)) == inside for each in (p, q)]
                fpr, fnr = called[1].mean(), (~called[0]).mean()
                if fpr > 0 and fnr > 0:
                    for one, other in ((fpr, fnr), (fnr, fpr)):
                        largest = max(largest, np.log(max(1 - 1e-5 - one, 1e-300) / other))
        assert found[at] == pytest.approx(largest, rel=1e-10)


def test_quality_is_one_where_nothing_can_be_told():
    same = np.ones((10, 4))
    found = membership.epsilon(same, same)
    assert found.epsilon.tolist() == [0] * 4
    assert found.quality == 1


def test_fewer_thresholds_find_no_more():
    p, q = laws(1.0, n=50, points=10)
    few, all_ = (membership.epsilon(p, q, thresholds=count).epsilon for count in (8, 100))
    assert (few <= all_ + 1e-12).all()
    assert few.mean() > 0.5 * all_.mean()


def test_refuses_what_cannot_be_attacked(key, shapes_unchecked):
    p, q = laws(0.0)
    with pytest.raises(InvalidInputError, match=r"margins of shapes \(60, 39\) and \(60, 40\)"):
        membership.ulira(p[:, 1:], q, key=key)
    with pytest.raises(InvalidInputError, match="not finite"):
        membership.epsilon(np.where(p > 1, np.inf, p), q)
    with pytest.raises(InvalidInputError, match="3 unlearned models and 60 oracles"):
        membership.ulira(p[:3], q, key=key)
    with pytest.raises(InvalidInputError, match="delta = 1, thresholds = 64"):
        membership.epsilon(p, q, delta=1)
    with pytest.raises(InvalidInputError, match="thresholds = 0"):
        membership.epsilon(p, q, thresholds=0)
