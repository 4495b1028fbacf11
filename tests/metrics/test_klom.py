import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from jattrib.core.errors import InvalidInputError
from jattrib.metrics import klom


def laws(seed=0, n=100, m=90, points=7):
    random = np.random.default_rng(seed)
    shift, scale = np.linspace(0, 3, points), np.linspace(1, 0.5, points)
    return shift + scale * random.standard_normal((n, points)), random.standard_normal((m, points))


def by_histogram(p, q, bins=20):
    """One point: NumPy's histograms, whose last bin is closed, and the sum as written."""
    p, q = np.clip(p, -100, 100), np.clip(q, -100, 100)
    limits = min(p.min(), q.min()), max(p.max(), q.max())
    masses = [np.histogram(each, bins=bins, range=limits)[0] / len(each) for each in (p, q)]
    return sum(a * np.log(a / max(b, 1e-5)) for a, b in zip(*masses, strict=True) if a > 0)


@pytest.mark.parametrize("bins", [20, 7])
def test_binned_is_numpys_histogram(bins):
    p, q = laws()
    expected = [by_histogram(a, b, bins) for a, b in zip(p.T, q.T, strict=True)]
    np.testing.assert_allclose(klom.binned(p, q, bins=bins), expected, rtol=1e-10)
    # Neither location nor scale is seen, nor how many points are computed at once.
    np.testing.assert_allclose(klom.binned(3 + 2 * p, 3 + 2 * q, bins=bins), expected, rtol=1e-6)


def test_points_in_blocks_are_points_at_once(monkeypatch):
    p, q = laws()
    whole = klom.binned(p, q)
    monkeypatch.setattr(klom, "CELLS_AT_ONCE", 2 * 190 * 20)
    np.testing.assert_array_equal(klom.binned(p, q), whole)


def test_both_extremes_fall_into_bins():
    """Half of the unlearned margins are the least there are, half the greatest; half the oracles join each of them."""
    q = np.repeat([[0.0], [1.0]], 20, axis=0)
    assert klom.binned(q, q)[0] == 0
    p = q.copy()
    p[:20] = 0.5  # in the middle, where no oracle is
    expected = 0.5 * np.log(0.5 / 1e-5) + 0.5 * np.log(0.5 / 0.5)
    assert klom.binned(p, q)[0] == pytest.approx(expected)
    greatest = klom.binned(np.ones((20, 1)), np.linspace(0, 1, 20)[:, None])
    assert greatest[0] == pytest.approx(np.log(20))  # one oracle in twenty lies in the last bin


def test_laws_apart_cost_the_most_there_is():
    p, q = laws()
    apart = klom.binned(np.full((30, 2), 9.0), np.zeros((30, 2)))
    np.testing.assert_allclose(apart, np.log(1e5))
    assert apart[0] == pytest.approx(11.5129, abs=1e-4)
    assert klom.binned(p + 500, q).max() == pytest.approx(np.log(1e5))


def test_margins_are_clipped_and_may_be_infinite():
    p, q = laws(points=2)
    p[0], q[0] = np.inf, 250
    clipped = np.where(np.abs(p) > 100, 100, p), np.where(np.abs(q) > 100, 100, q)
    np.testing.assert_array_equal(klom.binned(p, q), klom.binned(*clipped))
    assert klom.binned(np.full((20, 1), np.inf), np.full((20, 1), 100.0))[0] == 0


@pytest.mark.parametrize(("models", "mean", "p95"), [(100, 0.33, 0.66), (32, 1.6, 2.9)])
def test_identical_laws_score_at_the_floor(key, models, mean, p95):
    """Any Gaussian scores there against itself; versions that lose the greatest margin score a little lower."""
    floor = klom.floor(models, models, key=key, points=4000)
    assert floor.mean == pytest.approx(mean, rel=0.08)
    assert floor.percentiles[95] == pytest.approx(p95, rel=0.06)
    random = np.random.default_rng(3)
    p, q = (5 + 7 * random.standard_normal((models, 2000)) for _ in range(2))
    found = klom.klom(p, q, key=key, resamples=20)
    assert found.mean.value == pytest.approx(floor.mean, rel=0.05)
    assert found.percentiles[95].value == pytest.approx(floor.percentiles[95], rel=0.1)
    gaussian = klom.floor(models, models, key=key, form="gaussian")
    # Half of two parameters' chi-square on either side: (1/N + 1/N), and more beyond the first order.
    assert gaussian.mean == pytest.approx(2 / models, rel=0.25)


def test_gaussian_is_the_integral_of_the_fitted_densities():
    p, q = laws(points=3)
    found = klom.gaussian(p, q)
    for column, value in enumerate(found):
        fitted = [scipy.stats.norm(each[:, column].mean(), each[:, column].std(ddof=1)) for each in (p, q)]
        expected, _ = scipy.integrate.quad(
            lambda x, a=fitted[0], b=fitted[1]: a.pdf(x) * (a.logpdf(x) - b.logpdf(x)), -15, 15
        )
        assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", ["binned", "gaussian"])
def test_a_resample_is_the_sample_with_models_repeated(form):
    p, q = laws(n=40, m=30, points=3)
    random = np.random.default_rng(1)
    counts = [random.multinomial(len(each), np.full(len(each), 1 / len(each)), size=4) for each in (p, q)]
    for count, each in zip(counts, (p, q), strict=True):  # the extremes stay, and the bins with them
        count[:, [*each.argmin(axis=0), *each.argmax(axis=0)]] += 1
    repeated = [
        tuple(np.repeat(each, count[row], axis=0) for each, count in zip((p, q), counts, strict=True))
        for row in range(4)
    ]
    if form == "binned":
        found, expected = klom._resampled_binned(p, q, *counts, 20), [klom.binned(*both) for both in repeated]
    else:
        balanced = [random.multinomial(len(each), np.full(len(each), 1 / len(each)), size=4) for each in (p, q)]
        found = klom._gaussian(p, q, *balanced)
        expected = [
            klom.gaussian(np.repeat(p, a, axis=0), np.repeat(q, b, axis=0)) for a, b in zip(*balanced, strict=True)
        ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("form", ["binned", "gaussian"])
def test_summary_and_its_intervals(key, form):
    random = np.random.default_rng(2)
    p, q = 1 + random.standard_normal((100, 300)), random.standard_normal((100, 300))
    found = klom.klom(p, q, key=key, form=form)
    per_point = klom.binned(p, q) if form == "binned" else klom.gaussian(p, q)
    np.testing.assert_allclose(found.per_point, per_point, rtol=1e-10)
    assert found.mean.value == pytest.approx(per_point.mean())
    for part, each in found.percentiles.items():
        assert each.value == pytest.approx(np.percentile(per_point, part))
        assert each.low < each.value < each.high
    assert list(found.percentiles) == [95, 99]
    # The experiment repeated: its spread is what the interval says, or less.
    again = []
    for _ in range(30):
        others = 1 + random.standard_normal((100, 300)), random.standard_normal((100, 300))
        again.append((klom.binned(*others) if form == "binned" else klom.gaussian(*others)).mean())
    width = (found.mean.high - found.mean.low) / (2 * 1.96 * np.std(again))
    assert 0.7 < width < (2.8 if form == "binned" else 1.6)
    assert found.mean.low < np.mean(again) < found.mean.high


@pytest.mark.parametrize("turned", [False, True])
def test_resamples_whose_margins_do_not_vary_are_left_out_or_refused(key, turned):
    """All but two of 100 margins are the same, at one point: in 14% of resamples all are."""

    def measured(points, apart=2, **more):
        p, q = laws(points=points, m=100)
        p[apart:, 3] = -100.0
        p[:apart, 3] = 50.0 + np.arange(apart)
        return (klom.klom if not more else klom.average)(
            *((q, p) if turned else (p, q)), **more, key=key, form="gaussian", **({} if more else {"percentiles": ()})
        )

    with pytest.raises(InvalidInputError, match=r"all the same in \d\d of 200 resamples of models, at point 3 \(and"):
        measured(7)
    with pytest.raises(InvalidInputError, match="at point 3"):
        measured(40, parts=[np.arange(20), np.arange(20, 40)])
    found = measured(41, parts=[np.arange(4, 41)])  # without that point
    assert found.low < found.value < found.high < np.inf
    few = measured(7, apart=4).mean  # in 2% of resamples: left out
    assert np.isfinite(few).all()
    assert few.low < few.value < few.high


def test_a_form_that_is_none_is_refused(key, shapes_unchecked):
    p, q = laws(points=100)
    for run in (
        lambda: klom.klom(p, q, key=key, form="Binned"),
        lambda: klom.average(p, q, [np.arange(100)], key=key, form="Binned"),
        lambda: klom.floor(30, 30, key=key, form="Binned"),
    ):
        with pytest.raises(InvalidInputError, match=r"form = 'Binned'\n.*one of binned, gaussian"):
            run()


def test_refuses_what_it_cannot_tell_apart(key, shapes_unchecked):
    p, q = laws(points=100)
    with pytest.raises(InvalidInputError, match=r"margins of shapes \(100, 99\) and \(90, 100\)"):
        klom.klom(p[:, :99], q, key=key)
    with pytest.raises(InvalidInputError, match="1 NaN among the unlearned models' margins, 0"):
        klom.binned(np.where(p == p.max(), np.nan, p), q)
    with pytest.raises(InvalidInputError, match="19 unlearned models and 90 oracles, where 20 are needed"):
        klom.klom(p[:19], q, key=key)
    with pytest.raises(InvalidInputError, match="100 unlearned models and 7 oracles, where 8 are needed"):
        klom.gaussian(p, q[:7])
    klom.klom(p[:19], q, key=key, bins=10, resamples=2)
    with pytest.raises(InvalidInputError, match=r"percentile 99 of 99 points\n.*at least 100 points"):
        klom.klom(p[:, :99], q[:, :99], key=key)
    with pytest.raises(InvalidInputError, match="percentile 0"):
        klom.klom(p, q, key=key, percentiles=(0,))
    still = np.where(np.arange(100) == 3, 2.0, q)
    with pytest.raises(InvalidInputError, match="the margin 2 of all 90 oracles at point 3"):
        klom.gaussian(p, still)


def test_the_average_is_over_the_percentiles_of_parts(key):
    random = np.random.default_rng(4)
    p, q = random.standard_normal((60, 90)), random.standard_normal((50, 90))
    p[:, :30] += 2
    parts = [np.arange(30), np.arange(30, 90)]
    found = klom.average(p, q, parts, key=key, resamples=50)
    per_point = klom.binned(p, q)
    expected = np.mean([np.percentile(per_point[part], 95) for part in parts])
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high
    whole = klom.klom(p, q, key=key, resamples=50, percentiles=(95,)).percentiles[95]
    alone = klom.average(p, q, [np.arange(90)], key=key, resamples=50)
    assert alone == pytest.approx(whole)
    with pytest.raises(InvalidInputError, match="percentile 95 of 19 points"):
        klom.average(p, q, [np.arange(19), np.arange(19, 90)], key=key)
