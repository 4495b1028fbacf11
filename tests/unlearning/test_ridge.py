import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.unlearning import ridge

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def problem():
    """F spans directions in which R hardly varies, as rare examples do."""
    random = np.random.default_rng(0)
    n, p, f = 200, 12, 10
    forget = np.zeros(n)
    forget[:f] = 1
    x = random.standard_normal((n, p))
    x[f:, :4] *= 0.02
    y = x @ random.standard_normal(p) + 0.5 * random.standard_normal(n)
    return ridge.Ridge(jnp.asarray(x), jnp.asarray(y), jnp.asarray(forget), 0.01)


def by_deletion(problem):
    keep = np.asarray(problem.forget) == 0
    x, y = np.asarray(problem.x)[keep], np.asarray(problem.y)[keep]
    return np.linalg.solve(x.T @ x + problem.penalty * np.eye(x.shape[1]), x.T @ y)


def test_the_retrained_solution_is_that_of_the_rows_that_are_left(problem):
    np.testing.assert_allclose(ridge.retrained(problem), by_deletion(problem), rtol=1e-10)


def test_the_exact_update_needs_no_retraining(problem):
    full = ridge.fit(problem, jnp.ones_like(problem.y))
    assert np.linalg.norm(full - by_deletion(problem)) > 0.1
    np.testing.assert_allclose(ridge.exact_update(problem, full), by_deletion(problem), rtol=1e-9)


def steps_until(problem, iteration, full, tolerance=1e-6, most=20_000):
    found = ridge.path(iteration, full, rate=ridge.best_rate(iteration), steps=most)
    reached = np.flatnonzero(np.asarray(ridge.distances(found, ridge.retrained(problem))) <= tolerance)
    return reached[0] if len(reached) else most + 1


def test_oracle_matching_needs_fewer_steps_than_descent_and_ascent(problem):
    full = ridge.fit(problem, jnp.ones_like(problem.y))
    weights = jnp.where(problem.forget == 1, 5.0, (jnp.arange(200) < 110).astype(float))
    ours = steps_until(problem, ridge.oracle_matching(problem, weights), full)
    assert ours < 300
    assert 20 * ours < steps_until(problem, ridge.retain_descent(problem), full)
    # Ascent-descent converges to another point, if it converges at all; pure ascent leaves for good.
    mixed = ridge.ascent_descent(problem, 1e-3)
    assert steps_until(problem, mixed, full) > 20_000
    away = ridge.path(ridge.gradient_ascent(problem), full, rate=1e-2, steps=200)
    assert ridge.distances(away, ridge.retrained(problem))[-1] > 1


def test_a_path_contracts_as_its_matrix_says(problem):
    full = ridge.fit(problem, jnp.ones_like(problem.y))
    iteration = ridge.oracle_matching(problem, jnp.ones_like(problem.y))
    found = np.asarray(ridge.path(iteration, full, rate=1e-3, steps=7))
    goal = by_deletion(problem)
    shrink = np.eye(12) - 1e-3 * np.asarray(problem.x).T @ np.asarray(problem.x)
    np.testing.assert_allclose(found[7] - goal, np.linalg.matrix_power(shrink, 7) @ (found[0] - goal), rtol=1e-8)


def test_an_ascent_has_no_rate(problem):
    with pytest.raises(InvalidInputError, match="smallest eigenvalue"):
        ridge.best_rate(ridge.gradient_ascent(problem))


@pytest.mark.parametrize("column", ["zero", "twice"])
def test_a_singular_problem_has_no_solution(problem, column):
    more = problem.x[:, :1] * (0.0 if column == "zero" else 1.0)
    singular = problem._replace(x=jnp.concatenate([problem.x, more], axis=1), penalty=0.0)
    full = jnp.zeros(13)
    for solve in (ridge.retrained, lambda each: ridge.exact_update(each, full)):
        with pytest.raises(InvalidInputError, match=r"between.*\n.*not singular in float64\n.*a penalty"):
            solve(singular)
    assert np.isfinite(ridge.retrained(singular._replace(penalty=0.01))).all()


def test_rows_that_are_not_finite_have_no_solution(problem):
    with pytest.raises(InvalidInputError, match="check that the rows are finite"):
        ridge.retrained(problem._replace(x=problem.x.at[50, 2].set(jnp.nan)))
