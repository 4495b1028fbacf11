import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.data import synthetic


def test_gaussian_classes_have_unit_covariance_about_means_of_the_asked_length(key):
    x, y = synthetic.gaussian_classes(key, 30_000, features=4, classes=3, separation=5.0)
    np.testing.assert_array_equal(y[:7], [0, 1, 2, 0, 1, 2, 0])
    for label in range(3):
        own = x[y == label].astype(np.float64)
        assert abs(np.linalg.norm(own.mean(0)) - 5) < 0.05
        np.testing.assert_allclose(np.cov(own.T), np.eye(4), atol=0.06)


def test_linear_regression_is_recovered_by_least_squares_up_to_its_noise(key):
    (x, y), w = synthetic.linear_regression(key, 5000, features=3, noise=0.5)
    fitted, residual, *_ = np.linalg.lstsq(x.astype(np.float64), y.astype(np.float64), rcond=None)
    np.testing.assert_allclose(fitted, w, atol=0.03)
    np.testing.assert_allclose(residual / 5000, 0.25, rtol=0.1)


def test_double_precision_is_kept(key, x64):
    assert synthetic.gaussian_classes(key, 4, features=2, classes=2).inputs.dtype == np.float64


def test_sizes_must_be_positive(key):
    with pytest.raises(InvalidInputError, match="n=4, features=0, classes=2"):
        synthetic.gaussian_classes(key, 4, features=0, classes=2)
    with pytest.raises(InvalidInputError, match="n=0, features=1"):
        synthetic.linear_regression(key, 0, features=1)
