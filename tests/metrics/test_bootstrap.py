import jax
import numpy as np
import pytest
import scipy.stats

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import bootstrap


def test_counts_are_of_resamples_with_replacement(key):
    counts = bootstrap.counts(bootstrap.generator(key), 10, resamples=4000)
    assert (counts.sum(axis=1) == 10).all()
    # A unit's count is binomial(10, .1): mean 1, variance .9; two units' covariance is −.1.
    assert counts.mean(axis=0) == pytest.approx(np.ones(10), abs=5 * np.sqrt(0.9 / 4000))
    covariance = np.cov(counts.T)
    assert np.diag(covariance) == pytest.approx(np.full(10, 0.9), abs=0.15)
    assert covariance[~np.eye(10, dtype=bool)].mean() == pytest.approx(-0.1, abs=0.02)


def test_mean_as_scipy(key):
    values = np.random.default_rng(0).gamma(1.0, size=60)
    ours = bootstrap.mean(values, key=key, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours[1:] == pytest.approx((theirs.low, theirs.high), abs=0.015)


def test_same_key_same_interval_other_key_another(key):
    values = np.random.default_rng(0).standard_normal(30)
    first = bootstrap.mean(values, key=key)
    assert first == bootstrap.mean(values, key=key)
    assert first.low != bootstrap.mean(values, key=jax.random.key(1)).low


def test_two_way_draws_are_means_of_resampled_tables(key):
    table = np.random.default_rng(1).standard_normal((4, 3))
    random = bootstrap.generator(key)
    rows, columns = (bootstrap.counts(random, each, resamples=500) for each in (4, 3))
    expected = [
        np.repeat(np.repeat(table, r, axis=0), c, axis=1).mean() for r, c in zip(rows, columns, strict=True)
    ]  # fmt: skip
    got = bootstrap.mean_two_way(table, key=key, resamples=500)
    assert got.value == pytest.approx(table.mean())
    assert got[1:] == pytest.approx(np.quantile(expected, [0.025, 0.975]), abs=1e-12)


def test_one_way_covers_the_mean():
    random = np.random.default_rng(2)
    trials = 250
    hits = 0
    for trial in range(trials):
        found = bootstrap.mean(random.standard_normal(40) ** 2, key=jax.random.key(trial), resamples=300)
        hits += found.low <= 1 <= found.high
    # Of a skewed population 40 values give a little less than 95%.
    assert 0.88 <= hits / trials <= 0.97


def test_two_way_covers_where_one_way_does_not():
    """Rows and columns have effects of their own; an interval over columns alone ignores the rows'."""
    random = np.random.default_rng(3)
    trials, joint, columns_only = 250, 0, 0
    for trial in range(trials):
        effects = random.standard_normal((30, 1)) + random.standard_normal((1, 50))
        table = effects + random.standard_normal((30, 50))
        key = jax.random.key(trial)
        both = bootstrap.mean_two_way(table, key=key, resamples=250)
        one = bootstrap.mean(table.mean(axis=0), key=key, resamples=250)
        joint += both.low <= 0 <= both.high
        columns_only += one.low <= 0 <= one.high
    assert 0.9 <= joint / trials <= 0.98
    assert columns_only / trials < 0.85


def test_centred_interval_keeps_its_width_and_loses_the_shift():
    draws = np.random.default_rng(4).standard_normal(1000) - 3
    plain = bootstrap.percentile(1.0, draws)
    centred = bootstrap.percentile(1.0, draws, centred=True)
    assert centred.high - centred.low == pytest.approx(plain.high - plain.low)
    assert centred.low - plain.low == pytest.approx(1 - draws.mean())


@pytest.mark.usefixtures("shapes_unchecked")
def test_values_of_other_axes_than_units_are_refused_and_none_are_counted(key):
    with pytest.raises(InvalidInputError, match=r"shape \[3, 2\]\n  expected: one axis over units\n.*`mean_two_way`"):
        bootstrap.mean(np.ones((3, 2)), key=key)
    with pytest.raises(InvalidInputError, match=r"shape \[\]\n"):
        bootstrap.mean(np.float64(1), key=key)
    with pytest.raises(InvalidInputError, match=r"shape \[3\]\n  expected: a table, of two axes over units\n"):
        bootstrap.mean_two_way(np.ones(3), key=key)
    for none in (lambda: bootstrap.mean(np.ones(0), key=key), lambda: bootstrap.mean_two_way(np.ones((0, 3)), key=key)):
        with pytest.raises(InvalidInputError, match="1000 resamples of 0 units"):
            none()


def test_refuses_what_has_no_interval(key):
    with pytest.raises(InvalidInputError, match="1000 resamples of 1 units"):
        bootstrap.mean(np.ones(1), key=key)
    with pytest.raises(InvalidInputError, match="confidence = 95"):
        bootstrap.mean(np.ones(5), key=key, confidence=95.0)
    with pytest.raises(InvalidInputError, match="1 of 3 values are not finite"):
        bootstrap.mean(np.array([1.0, np.inf, 2.0]), key=key)
    with pytest.raises(InvalidInputError, match="undefined in 2 of 10 resamples"):
        bootstrap.percentile(0.0, np.array([np.nan] * 2 + [1.0] * 8))
    assert bootstrap.percentile(0.0, np.array([np.nan] + [1.0] * 99)).low == 1
    with pytest.raises(InvalidInputError, match="undefined in 2 of 10 resamples"):
        bootstrap.percentile(0.0, np.array([np.inf, -np.inf] + [1.0] * 8))
    assert bootstrap.percentile(2.0, np.array([-np.inf] + [1.0] * 99), centred=True) == (2, 2, 2)
