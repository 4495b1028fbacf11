import numpy as np
import pytest
import scipy.stats

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import brittleness

N, QUERIES = 60, 7


class World:
    """A world in which the margin of a query is a bias plus the sum of its scores over what is trained on."""

    def __init__(self, wanted):
        """Make margins that flip when exactly `wanted` of the most helpful sources are gone."""
        random = np.random.default_rng(0)
        self.scores = np.abs(random.standard_normal((N, QUERIES))) + 0.1
        falls = np.cumsum(-np.sort(-self.scores, axis=0), axis=0)
        self.bias = np.array([falls[k - 1, j] - 1e-3 if k else -1.0 for j, k in enumerate(wanted)])
        self.calls = []

    def retrain(self, masks):
        self.calls.append(masks)
        return self.bias - (~masks) @ self.scores


WANTED = [0, 1, 2, 13, 20, 21, 50]


def test_finds_the_smallest_flipping_removal_of_each_query():
    world = World(WANTED)
    found = brittleness.brittleness(world.scores, world.retrain, limit=20)
    assert found.sizes.tolist() == [0, 1, 2, 13, 20, -1, -1]
    assert found.holds.tolist() == [-1, 0, 1, 12, 19, 20, 20]
    np.testing.assert_allclose(found.before, world.bias)
    # Every reported size was retrained, and so was the removal below it.
    seen = {(trial.query, trial.size): trial.margin for trial in found.trials}
    for query, size in enumerate(found.sizes.tolist()):
        if size > 0:
            assert seen[query, size] <= 0
            assert size == 1 or seen[query, size - 1] > 0
    # Rounds are ensembles: one mask a query that is still open, and each removes that query's own most helpful.
    assert len(world.calls) == found.rounds <= 2 + np.log2(20)
    assert [len(masks) for masks in world.calls][:2] == [1 + QUERIES, 4]
    assert len(found.trials) == sum(map(len, world.calls)) - 1
    rows = [mask for masks in world.calls for mask in masks][1:]
    for trial, mask in zip(found.trials, rows, strict=True):
        removed = np.flatnonzero(~mask)
        assert sorted(removed) == sorted(np.argsort(-world.scores[:, trial.query])[: trial.size])


def test_a_tolerance_stops_early_with_a_verified_bracket():
    world = World(WANTED)
    found = brittleness.brittleness(world.scores, world.retrain, limit=40, tolerance=0.2)
    exact = brittleness.brittleness(world.scores, world.retrain, limit=40)
    assert found.rounds < exact.rounds
    assert exact.sizes.tolist() == [0, 1, 2, 13, 20, 21, -1]
    open_ = (found.sizes > 0) & (found.sizes - found.holds > 1)
    assert open_.any()
    assert (found.sizes[open_] - found.holds[open_] <= 0.2 * found.sizes[open_]).all()
    flips = exact.sizes > 0
    assert (found.holds[flips] < exact.sizes[flips]).all()
    assert (exact.sizes[flips] <= found.sizes[flips]).all()


def test_a_worse_ranking_needs_more():
    world = World([3] * QUERIES)
    good = brittleness.brittleness(world.scores, world.retrain, limit=50)
    bad = brittleness.brittleness(-world.scores, world.retrain, limit=50)
    assert (good.sizes == 3).all()
    assert (bad.sizes > 10).all()


def test_selected_queries_are_those_bisected_alone():
    world = World(WANTED)
    found = brittleness.brittleness(world.scores, world.retrain, limit=20)
    chosen = np.array([3, 1])
    part = brittleness.select(found, chosen)
    alone = brittleness.brittleness(world.scores[:, chosen], lambda masks: world.retrain(masks)[:, chosen], limit=20)
    for name in ("sizes", "holds", "before"):
        np.testing.assert_array_equal(getattr(part, name), getattr(alone, name))
    assert [trial[:2] for trial in sorted(part.trials)] == [trial[:2] for trial in sorted(alone.trials)]


def test_curve_is_a_proportion_with_wilsons_interval():
    world = World(WANTED)
    found = brittleness.brittleness(world.scores, world.retrain, limit=20)
    sizes = np.array([0, 1, 2, 12, 13, 20])
    curve = brittleness.flipped(found, sizes)
    np.testing.assert_allclose(curve.fraction, np.array([0, 1, 2, 2, 3, 4]) / 6)
    for count, low, high in zip([0, 1, 2, 2, 3, 4], curve.low, curve.high, strict=True):
        expected = scipy.stats.binomtest(count, 6).proportion_ci(0.95, method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    with_wrong = brittleness.flipped(found, sizes, correct_only=False)
    np.testing.assert_allclose(with_wrong.fraction, np.array([1, 2, 3, 3, 4, 5]) / 7)


def test_refuses_what_it_cannot_search(shapes_unchecked):
    world = World(WANTED)
    for limit in (0, N):
        with pytest.raises(InvalidInputError, match=f"limit = {limit} of {N} sources"):
            brittleness.brittleness(world.scores, world.retrain, limit=limit)
    with pytest.raises(InvalidInputError, match=r"tolerance = 1\.5"):
        brittleness.brittleness(world.scores, world.retrain, limit=5, tolerance=1.5)
    with pytest.raises(InvalidInputError, match="scores that are NaN"):
        brittleness.brittleness(np.full((5, 2), np.nan), world.retrain, limit=2)
    with pytest.raises(InvalidInputError, match=r"shape \(8, 1\)\n.*8 models at 7 queries"):
        brittleness.brittleness(world.scores, lambda masks: np.ones((len(masks), 1)), limit=5)
    with pytest.raises(InvalidInputError, match="not all of them finite"):
        brittleness.brittleness(world.scores, lambda masks: np.full((len(masks), QUERIES), np.inf), limit=5)
    found = brittleness.brittleness(world.scores, world.retrain, limit=5)
    with pytest.raises(InvalidInputError, match="a curve up to 6 removed sources"):
        brittleness.flipped(found, np.array([6]))
    wrong = found._replace(sizes=np.zeros(QUERIES, int))
    with pytest.raises(InvalidInputError, match="0 queries"):
        brittleness.flipped(wrong, np.array([1]))
