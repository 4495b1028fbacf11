"""The kernel inverse's door: against float64, and by the errors that it raises."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.curvature.solve import solve


def features(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def gram_of(phi: np.ndarray) -> np.ndarray:
    return (phi.T.astype(np.float64) @ phi.astype(np.float64)).astype(np.float32)


@pytest.mark.parametrize("shape", [(60,), (60, 7)])
@pytest.mark.parametrize("damping", [0.0, 3.5])
def test_solution_is_that_of_float64(shape, damping):
    gram = gram_of(features(200, 60))
    targets = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    solution, info = solve(gram, targets, damping=damping)
    exact = np.linalg.solve(gram.astype(np.float64) + damping * np.eye(60), targets.astype(np.float64))
    assert solution.shape == shape
    np.testing.assert_allclose(solution, exact, rtol=0, atol=2e-7 * np.abs(exact).max())
    assert info.positive_definite
    assert float(info.residual) < 1e-6


def test_float64_is_kept(x64):
    gram = jnp.asarray(gram_of(features(200, 60)), jnp.float64)
    targets = jnp.ones(60, jnp.float64)
    solution, info = solve(gram, targets)
    assert solution.dtype == jnp.float64
    np.testing.assert_allclose(gram @ solution, targets, rtol=0, atol=1e-13)
    assert float(info.residual) < 1e-13


def test_damping_of_a_singular_gram_is_ridge_regression():
    phi = features(40, 60)
    targets = phi.T @ np.random.default_rng(1).standard_normal((40, 7)).astype(np.float32)
    solution, _ = solve(gram_of(phi), targets, damping=2)
    dual = np.linalg.solve(phi.astype(np.float64) @ phi.T + 2 * np.eye(40), phi @ targets.astype(np.float64))
    exact = (targets - phi.T @ dual) / 2  # Woodbury
    np.testing.assert_allclose(solution, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_fewer_examples_than_features_is_an_error_that_names_the_damping():
    gram = gram_of(features(40, 60))
    with pytest.raises(
        DivergedError, match=r"(?s)not positive definite: its smallest pivot.*n < k.*larger damping.*mean"
    ):
        solve(gram, np.ones(60, np.float32))


def test_an_indefinite_matrix_names_the_pivot_that_fails():
    diagonal = np.full(60, 2.0, np.float32)
    diagonal[31] = -3
    with pytest.raises(DivergedError, match=r"smallest pivot is -3, its mean eigenvalue 1\.92"):
        solve(np.diag(diagonal), np.ones(60, np.float32))


def test_a_solution_without_digits_is_an_error():
    vectors, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((60, 60)))
    gram = (vectors * np.append(np.ones(59), 1e-7)) @ vectors.T  # one direction is lost, and no pivot shows it
    with pytest.raises(DivergedError, match=r"(?s)leaves a relative residual of.*at most 0\.01.*larger damping"):
        solve(gram.astype(np.float32), vectors[:, -1].astype(np.float32))


def test_under_jit_and_vmap_the_report_is_in_info():
    grams = np.stack([gram_of(features(n, 30, seed)) for seed, n in enumerate([90, 20, 120])])
    targets = np.random.default_rng(1).standard_normal((3, 30, 4)).astype(np.float32)
    solutions, info = jax.jit(jax.vmap(solve))(grams, targets)
    np.testing.assert_array_equal(info.positive_definite, [True, False, True])
    assert float(info.smallest_pivot[1]) < 1e-3
    for i in (0, 2):
        alone, _ = solve(grams[i], targets[i])
        np.testing.assert_allclose(solutions[i], alone, rtol=0, atol=1e-6 * np.abs(alone).max())
        assert float(info.residual[i]) < 1e-6


GRAM, TARGETS = np.eye(4, dtype=np.float32), np.ones((4, 2), np.float32)
HOLE = np.array([[1, 0, 0, 0], [0, np.nan, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)


@pytest.mark.parametrize(
    ("gram", "targets", "damping", "message"),
    [
        (GRAM[:3], TARGETS, 0.0, r"(?s)shape \(3, 4\).*square.*vmap"),
        (GRAM[:0, :0], TARGETS[:0], 0.0, r"(?s)shape \(0, 0\).*k at least 1"),
        (GRAM, TARGETS, np.ones(4), r"(?s)damping of shape \(4,\).*one number"),
        (GRAM.astype(np.float16), TARGETS, 0.0, r"(?s)dtype float16.*float32 or float64"),
        (GRAM, TARGETS.T, 0.0, r"(?s)targets of shape \(2, 4\).*\(4, q\).*transpose"),
        (GRAM, TARGETS.astype(np.float16), 0.0, r"(?s)dtype float16.*cast"),
        (GRAM, TARGETS, -1.0, r"(?s)damping = -1.*at least 0"),
        (GRAM, TARGETS, float("nan"), r"(?s)damping = nan.*at least 0"),
        (HOLE, TARGETS, 0.0, r"(?s)entries of the Gram matrix that are not finite.*diverged"),
        (GRAM, TARGETS * np.inf, 0.0, r"entries of the targets that are not finite"),
        (GRAM + np.triu(GRAM + 1, 1), TARGETS, 0.0, r"(?s)differs from its transpose by 1 .*\(G \+ Gᵀ\) / 2"),
    ],
)
def test_bad_input_is_refused_by_name(gram, targets, damping, message):
    with pytest.raises(InvalidInputError, match=message):
        inspect.unwrap(solve)(gram, targets, damping=damping)
