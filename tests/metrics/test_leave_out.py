import numpy as np
import pytest
import scipy.stats

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import leave_out


@pytest.fixture
def problem():
    """Scores, removals of three sources each, and effects of two seeds: half of what the scores predict, and noise."""
    random = np.random.default_rng(0)
    n, m, s, q = 30, 25, 2, 5
    scores = random.standard_normal((n, q)) * np.array([0.1, 1, 2, 3, 4])
    removed = np.argsort(random.random((m, n)), axis=1) < 3
    predicted = np.array([[-sum(scores[i, j] for i in np.flatnonzero(row)) for j in range(q)] for row in removed])
    before = 10 * random.standard_normal((s, q))
    after = before + 0.5 * predicted[:, None] + 0.3 * random.standard_normal((m, s, q))
    return scores, removed, before, after, predicted


@pytest.mark.parametrize(
    ("measure", "oracle"), [("spearman", scipy.stats.spearmanr), ("pearson", scipy.stats.pearsonr)]
)
def test_agreement_is_scipys_per_query_and_pooled(problem, key, measure, oracle):
    scores, removed, before, after, predicted = problem
    found = leave_out.agreement(scores, removed, leave_out.effects(before, after), key=key, measure=measure)
    actual = (after - before).mean(axis=1)
    expected = [oracle(p, a).statistic for p, a in zip(predicted.T, actual.T, strict=True)]
    np.testing.assert_allclose(found.correlations, expected, atol=1e-12)
    assert found.per_query.value == pytest.approx(np.mean(expected))
    assert found.pooled.value == pytest.approx(oracle(predicted.ravel(), actual.ravel()).statistic)
    # Queries differ in the size of their effects, so pooling sees more than the queries do one by one.
    assert found.pooled.value > found.per_query.value
    for each in (found.per_query, found.pooled, found.slope):
        assert each.low < each.value < each.high
    slope = np.linalg.lstsq(predicted.reshape(-1, 1), actual.ravel())[0][0]
    assert found.slope.value == pytest.approx(slope)
    assert found.slope.low < 0.5 < found.slope.high
    assert found.slope.high < 0.6  # scores twice too large are seen as such


def test_leave_one_out_of_a_linear_model_is_exact(key):
    """An output that is a sum over sources: leaving one out takes its share, which the scores are."""
    scores = np.random.default_rng(1).standard_normal((12, 3))
    removed = np.eye(12, dtype=bool)
    before = np.tile(scores.sum(axis=0), (2, 1))
    after = np.stack([before - scores[i] for i in range(12)])
    found = leave_out.agreement(scores, removed, leave_out.effects(before, after), key=key, measure="pearson")
    assert found.per_query.value == pytest.approx(1)
    assert found.pooled == pytest.approx((1, 1, 1))
    assert found.slope == pytest.approx((1, 1, 1))


def test_constant_queries_are_listed_and_not_averaged(problem, key):
    scores, removed, before, after, _ = problem
    scores, after = scores.copy(), after.copy()
    scores[:, 1], after[:, :, 3] = 0, before[:, 3]
    found = leave_out.agreement(scores, removed, leave_out.effects(before, after), key=key)
    assert found.constant_queries.tolist() == [1, 3]
    assert np.isnan(found.correlations[[1, 3]]).all()
    assert found.per_query.value == pytest.approx(np.mean(found.correlations[[0, 2, 4]]))


def test_pooled_in_blocks_is_pooled_whole(problem, key, monkeypatch):
    scores, removed, before, after, _ = problem
    measured = leave_out.effects(before, after)
    whole = leave_out.agreement(scores, removed, measured, key=key, resamples=50)
    monkeypatch.setattr(leave_out, "CELLS_AT_ONCE", 900)
    blocks = leave_out.agreement(scores, removed, measured, key=key, resamples=50)
    assert blocks.pooled == whole.pooled


@pytest.mark.parametrize("measure", ["spearman", "pearson"])
def test_intervals_cover_the_truth_of_the_population(key, measure):
    """Effects are of one law in every trial: the intervals of 20 trials miss the true value a few times at most."""
    random, misses = np.random.default_rng(2), 0
    rho = 0.6
    truth = rho if measure == "pearson" else 6 / np.pi * np.arcsin(rho / 2)
    for _ in range(20):
        scores = random.standard_normal((30, 8))
        removed = np.eye(30, dtype=bool)
        measured = -(rho * scores + np.sqrt(1 - rho**2) * random.standard_normal((30, 8)))[:, None]
        found = leave_out.agreement(scores, removed, measured, key=key, measure=measure, resamples=100)
        misses += not found.pooled.low < truth < found.pooled.high
    assert misses <= 4


def test_refuses_what_does_not_fit(problem, key, shapes_unchecked):
    scores, removed, before, after, _ = problem
    measured = leave_out.effects(before, after)
    with pytest.raises(InvalidInputError, match="the same seeds and queries before and after"):
        leave_out.effects(before[:1], after)
    with pytest.raises(InvalidInputError, match="scores of 29 sources and masks of 30"):
        leave_out.agreement(scores[1:], removed, measured, key=key)
    with pytest.raises(InvalidInputError, match="model 4, from which nothing is removed"):
        leave_out.agreement(scores, removed & (np.arange(25) != 4)[:, None], measured, key=key)
    with pytest.raises(InvalidInputError, match="the same for all models, at each of 5 queries"):
        leave_out.agreement(np.zeros_like(scores), removed, measured, key=key)
    with pytest.raises(InvalidInputError, match="not finite"):
        leave_out.agreement(scores, removed, np.where(measured > 1, np.nan, measured), key=key)
    with pytest.raises(InvalidInputError, match=r"measure = 'kendall'[\s\S]*spearman, pearson"):
        leave_out.agreement(scores, removed, measured, key=key, measure="kendall")
    with pytest.raises(InvalidInputError, match="1 of 5 queries at which both predictions and outputs vary"):
        leave_out.agreement(scores * (np.arange(5) == 3), removed, measured, key=key)
