import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jattrib.core.errors import InvalidInputError
from jattrib.metrics.correlation import midranks, pearson, resampled_pearson, resampled_spearman, spearman

PAIRS = st.integers(2, 12).flatmap(
    lambda m: st.tuples(*[arrays(np.int64, (m, 3), elements=st.integers(-3, 3)) for _ in range(2)])
)
"""Few values, so that ties and constant columns are common."""


def column_by_column(function, a, b):
    constant = [len(np.unique(x)) == 1 or len(np.unique(y)) == 1 for x, y in zip(a.T, b.T, strict=True)]
    pairs = zip(a.T, b.T, constant, strict=True)
    return np.array([np.nan if skip else function(x, y).statistic for x, y, skip in pairs]), np.array(constant)


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_ties_and_constants_as_scipy(pair):
    a, b = pair
    for ours, scipys in ((spearman, scipy.stats.spearmanr), (pearson, scipy.stats.pearsonr)):
        expected, constant = column_by_column(scipys, a.astype(float), b.astype(float))
        got = ours(a, b, axis=0)
        np.testing.assert_allclose(got.values, expected, atol=1e-12)
        np.testing.assert_array_equal(got.constant, constant)
        np.testing.assert_array_equal(np.isnan(got.values), got.constant)


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, (9, 2), elements=st.floats(-1e3, 1e3)))
def test_midranks_as_scipy(a):
    np.testing.assert_array_equal(midranks(a, axis=0), scipy.stats.rankdata(a, axis=0))
    np.testing.assert_array_equal(midranks(a, axis=-1), scipy.stats.rankdata(a, axis=-1))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_any_axis_of_any_shape(axis):
    a, b = np.random.default_rng(0).standard_normal((2, 5, 6, 7))
    got = spearman(a, b, axis=axis).values
    left, right = (np.moveaxis(each, axis, -1) for each in (a, b))
    for index in np.ndindex(got.shape):
        assert got[index] == pytest.approx(scipy.stats.spearmanr(left[index], right[index]).statistic, abs=1e-12)


def test_one_pair_of_vectors_and_jax_arrays():
    a, b = np.random.default_rng(1).standard_normal((2, 20)).astype(np.float32)
    got = pearson(jnp.asarray(a), jnp.asarray(b))
    assert got.values.shape == got.constant.shape == ()
    assert float(got.values) == pytest.approx(scipy.stats.pearsonr(a.astype(float), b.astype(float)).statistic)


@pytest.mark.parametrize("scale", [1e-300, 1e-3, 1e300])
def test_pearson_neither_overflows_nor_vanishes(scale):
    a, b = np.random.default_rng(2).standard_normal((2, 10))
    expected = scipy.stats.pearsonr(a, b).statistic
    assert pearson(a * scale, b * scale).values == pytest.approx(expected, abs=1e-12)


def test_constant_that_does_not_average_to_itself():
    constant = np.full(3, 0.1)
    assert constant.mean() != 0.1 or constant.sum() != 0.3  # what makes a test of the variance fail
    got = pearson(constant, np.arange(3.0))
    assert bool(got.constant)
    assert np.isnan(got.values)


def test_resamples_are_those_of_copied_rows():
    random = np.random.default_rng(3)
    a = random.integers(0, 5, (12, 4)).astype(float)
    b = a + random.integers(0, 4, (12, 4))
    drawn = random.integers(0, 12, (30, 12))
    counts = np.stack([np.bincount(each, minlength=12) for each in drawn])
    got = resampled_spearman(a, b, counts)
    for number, rows in enumerate(drawn):
        expected, constant = column_by_column(scipy.stats.spearmanr, a[rows], b[rows])
        np.testing.assert_allclose(got.values[number], expected, atol=1e-12)
        np.testing.assert_array_equal(got.constant[number], constant)


def test_resample_of_one_row_only_is_constant():
    a, b = np.random.default_rng(4).standard_normal((2, 3, 2))
    got = resampled_spearman(a, b, np.array([[3, 0, 0], [1, 1, 1]]))
    assert got.constant.tolist() == [[True, True], [False, False]]
    assert np.isnan(got.values[0]).all()


def test_refuses_what_has_no_correlation(shapes_unchecked):
    a = np.arange(6.0).reshape(3, 2)
    with pytest.raises(InvalidInputError, match=r"shapes \(3, 2\) and \(2, 2\)"):
        spearman(a, a[:2])
    with pytest.raises(InvalidInputError, match="two entries or more"):
        pearson(a[:1], a[:1])
    with pytest.raises(InvalidInputError, match="two entries or more"):
        pearson(a, a, axis=2)
    with pytest.raises(InvalidInputError, match="second array holds 2 entries that are not finite"):
        spearman(a, np.where(a > 3, np.nan, a))


def test_resampled_pearson_is_pearson_of_the_resample():
    random = np.random.default_rng(5)
    a, b = random.standard_normal((2, 12, 3))
    a[:, 2] = np.repeat([1e9, 1e9 + 1], 6)  # far from zero, of two values
    counts = random.multinomial(12, np.full(12, 1 / 12), size=6)
    counts[5] = np.eye(12, dtype=int)[3] * 12
    found = resampled_pearson(a, b, counts)
    for row, count in enumerate(counts[:5]):
        rows = np.repeat(np.arange(12), count)
        expected = [scipy.stats.pearsonr(a[rows, j], b[rows, j]).statistic for j in range(3)]
        np.testing.assert_allclose(found.values[row], expected, atol=1e-7)
    assert found.constant[5].all()
    assert np.isnan(found.values[5]).all()
    assert not found.constant[:5].any()
