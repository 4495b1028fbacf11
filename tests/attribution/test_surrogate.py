"""Surrogates against scikit-learn and closed forms in double precision, and what must not matter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import ElasticNet, Lasso, LinearRegression, Ridge
from sklearn.preprocessing import StandardScaler

from jattrib.attribution import active_set, elastic_net, surrogate
from jattrib.attribution.surrogate import Path, Solver
from jattrib.core import mesh as meshes
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib_kernels.by_rows import by_rows

EXACT = Solver(tolerance=1e-12)


@pytest.fixture(scope="module")
def problem():
    """More columns than rows: random halves, sparse weights, outputs of different scales, a constant column."""
    rng = np.random.default_rng(0)
    masks = np.array([rng.permutation(130) < 65 for _ in range(90)])
    masks[:, 7] = True
    weights = rng.standard_t(3, size=(130, 6)) * (rng.random((130, 6)) < 0.2)
    outputs = masks @ weights + rng.normal(size=(90, 6))
    return masks, outputs * np.array([1, 10, 0.1, 1, 1, 1]) + np.arange(6)


@pytest.fixture(scope="module")
def noisy(problem):
    """The same with more noise in some targets, whose best penalties are then within the path."""
    masks, outputs = problem
    noise = np.random.default_rng(5).normal(size=outputs.shape)
    return masks, outputs + noise * np.array([0, 0, 0, 4, 8, 16])


def sklearn_path(masks, outputs, lambdas, *, l1_ratio=1.0, standardize=True, weights=None):
    """Return coefficients [k, n, t] and intercepts [k, t] in natural units, by coordinate descent to 1e-14."""
    found = np.zeros((len(lambdas), masks.shape[1], outputs.shape[1])), np.zeros((len(lambdas), outputs.shape[1]))
    X = masks.astype(float)
    scaler = StandardScaler(with_std=standardize).fit(X, sample_weight=weights)
    X = scaler.transform(X)
    scale = scaler.scale_ if standardize else np.ones(X.shape[1])
    for target in range(outputs.shape[1]):
        for step, value in enumerate(lambdas[:, target]):
            model = ElasticNet(alpha=value, l1_ratio=l1_ratio, tol=1e-14, max_iter=200_000)
            model.fit(X, outputs[:, target], sample_weight=weights)
            found[0][step, :, target] = model.coef_ / scale
            found[1][step, target] = model.intercept_ - scaler.mean_ @ found[0][step, :, target]
    return found


@pytest.mark.parametrize("l1_ratio", [1.0, pytest.param(0.6, marks=pytest.mark.slow)])
def test_the_path_is_that_of_scikit_learn(problem, x64, l1_ratio):
    masks, outputs = problem
    path = Path(ratio=0.03, count=6, l1_ratio=l1_ratio)
    found, info = surrogate.lasso(masks, outputs, path=path, solver=EXACT, keep_path=True, progress=False)
    coefficients, intercepts = sklearn_path(masks, outputs, info.lambdas, l1_ratio=l1_ratio)
    scale = np.abs(coefficients).max(axis=(0, 1))
    np.testing.assert_allclose(info.path / scale, coefficients / scale, atol=1e-5)
    np.testing.assert_allclose(found.coefficients / scale, coefficients[-1] / scale, atol=1e-5)
    np.testing.assert_allclose(found.intercepts, intercepts[-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.coefficients[7], 0)
    assert (info.gaps <= 1e-12).all()
    assert (info.products > 2 * len(info.lambdas) - 2).all()  # of every penalty but λ_max's a step and a check
    np.testing.assert_allclose(info.lambdas[-1] / info.lambdas[0], 0.03)


def test_a_path_of_one_penalty_is_its_last_and_penalties_may_be_an_array(problem):
    masks, outputs = problem
    _, whole = surrogate.lasso(masks, outputs, path=Path(ratio=0.3, count=3), progress=False)
    found, info = surrogate.lasso(masks, outputs, path=Path(ratio=0.3, count=1), progress=False)
    np.testing.assert_allclose(info.lambdas, whole.lambdas[-1:])
    assert (np.abs(found.coefficients).max(axis=0) > 0.01).all()
    values = np.array([0.1, 0.5])
    by_array, by_tuple = (
        surrogate.lasso(masks, outputs[:, :1], path=Path(lambdas=each), progress=False)[0].coefficients
        for each in (values, tuple(values.tolist()))
    )
    np.testing.assert_array_equal(by_array, by_tuple)


@pytest.mark.slow
def test_single_precision_reaches_the_same(problem):
    """float32 throughout: a gap below 1e-6, and so coefficients to about its root times the outputs."""
    masks, outputs = problem
    found, info = surrogate.lasso(masks, outputs, path=Path(ratio=0.1, count=6), progress=False,
                                  solver=Solver(tolerance=1e-6))  # fmt: skip
    assert found.coefficients.dtype == np.float32
    assert (info.gaps <= 1e-6).all()
    coefficients, _ = sklearn_path(masks, outputs, info.lambdas[-1:])
    scale = np.abs(outputs).max(axis=0)
    np.testing.assert_allclose(found.coefficients / scale, coefficients[0] / scale, atol=3e-4)


def test_weights_of_rows_and_columns_as_they_are(problem, x64):
    """With no standardisation the objective is scikit-learn's own, sample weights included."""
    masks, outputs = problem
    weights = np.random.default_rng(1).uniform(0.1, 3, len(masks))
    solver = EXACT._replace(standardize=False)
    found, info = surrogate.lasso(
        masks, outputs[:, :2], weights=weights, path=Path(ratio=0.05, count=5), solver=solver, progress=False
    )
    for target in range(2):
        model = Lasso(alpha=info.penalties[target], tol=1e-14, max_iter=200_000)
        model.fit(masks.astype(float), outputs[:, target], sample_weight=weights)
        scale = np.abs(model.coef_).max()
        np.testing.assert_allclose(found.coefficients[:, target] / scale, model.coef_ / scale, atol=1e-5)
        assert found.intercepts[target] == pytest.approx(model.intercept_, rel=1e-6)


@pytest.mark.slow
def test_the_penalty_is_that_of_least_held_out_error(noisy, x64):
    masks, outputs = noisy
    held_out = surrogate.hold_out(jax.random.key(3), 90, fraction=0.3)
    assert held_out.sum() == 27
    settings = {"held_out": held_out, "path": Path(ratio=0.05, count=6), "progress": False}
    found, info = surrogate.lasso(masks, outputs, solver=EXACT._replace(refit=False), keep_path=True, **settings)
    rows = masks[~held_out], outputs[~held_out]
    coefficients, intercepts = sklearn_path(*rows, info.lambdas)
    predicted = np.einsum("mn,knt->kmt", masks[held_out].astype(float), coefficients) + intercepts[:, None]
    errors = np.square(predicted - outputs[held_out]).mean(axis=1)
    np.testing.assert_allclose(info.errors, errors, rtol=1e-5)
    np.testing.assert_array_equal(info.chosen, errors.argmin(axis=0))
    assert len(np.unique(info.chosen)) > 1
    own = np.arange(6)
    np.testing.assert_allclose(found.coefficients, coefficients[info.chosen, :, own].T, atol=1e-4)
    again, refitted = surrogate.lasso(masks, outputs, solver=EXACT, **settings)
    whole, _ = sklearn_path(masks, outputs, info.penalties[None])
    scale = np.maximum(np.abs(whole[0]).max(axis=0), 1e-3)  # 0 where the best penalty is the first
    np.testing.assert_allclose(again.coefficients / scale, whole[0] / scale, atol=1e-5)
    assert (refitted.gap <= 1e-12).all()


def test_patience_ends_a_target_where_its_errors_rise(noisy, capfd):
    masks, outputs = noisy
    settings = {
        "held_out": surrogate.hold_out(jax.random.key(3), 90, fraction=0.3), "path": Path(ratio=0.05, count=12),
    }  # fmt: skip
    _, whole = surrogate.lasso(masks, outputs, progress=False, **settings)
    _, short = surrogate.lasso(masks, outputs, solver=Solver(patience=2), **settings)
    shown = capfd.readouterr().err
    assert "fitting: 72/72 (100%)" in shown  # penalties that are given up are past, too
    assert "refitting: 6/6 (100%)" in shown
    assert np.isnan(short.errors).any()
    for target in range(6):
        errors = whole.errors[:, target]
        best = [int(errors[: step + 1].argmin()) for step in range(12)]
        end = next((step for step in range(12) if step - best[step] >= 2), 11)
        np.testing.assert_array_equal(np.isnan(short.errors[:, target]), np.arange(12) > end)
        assert short.chosen[target] == best[end]


@pytest.mark.slow
def test_columns_that_depend_on_one_another_do_not_stop_it(x64):
    """Every column twice, and a target in their span: the solution is not unique, the fit and its gap are."""
    rng = np.random.default_rng(2)
    masks = np.repeat(rng.random((40, 20)) < 0.5, 2, axis=1)
    outputs = (masks[:, ::2] @ rng.normal(size=(20, 3))).astype(float)
    found, info = surrogate.lasso(masks, outputs, path=Path(ratio=1e-3, count=8), solver=EXACT, progress=False)
    assert (info.gaps <= 1e-12).all()
    once, _ = surrogate.lasso(masks[:, ::2], outputs, path=Path(lambdas=tuple(info.lambdas[-1])), progress=False,
                              solver=EXACT)  # fmt: skip
    assert once.coefficients.shape == (20, 3)
    single, _ = surrogate.lasso(masks[:, ::2], outputs[:, :1], path=Path(lambdas=(float(info.penalties[0]),)),
                                solver=EXACT, progress=False)  # fmt: skip
    sums = found.coefficients[::2, 0] + found.coefficients[1::2, 0]
    np.testing.assert_allclose(sums, single.coefficients[:, 0], atol=1e-5)


def test_few_rows_are_fitted_nearly_exactly():
    """Down to a thousandth of λ_max, far more columns than rows are in play: most Newton systems are singular."""
    rng = np.random.default_rng(0)
    masks = np.array([rng.permutation(200) < 100 for _ in range(22)])
    outputs = masks @ rng.standard_t(3, size=(200, 4)) + rng.normal(size=(22, 4))
    found, info = surrogate.lasso(masks, outputs, path=Path(ratio=1e-3, count=12), progress=False)
    assert (info.gaps <= 1e-6).all()
    left = surrogate.predict(found, masks) - outputs
    assert (np.square(left).mean(axis=0) < 1e-4 * outputs.var(axis=0)).all()


@pytest.mark.slow
def test_neither_chunks_nor_devices_matter(problem, monkeypatch):
    masks, outputs = problem
    held_out = surrogate.hold_out(jax.random.key(3), 90, fraction=0.3)
    settings = {"held_out": held_out, "path": Path(ratio=0.1, count=5), "progress": False}
    one, info = surrogate.lasso(masks, outputs, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(elastic_net, "TOGETHER", 2)
        in_turn, _ = surrogate.lasso(masks, outputs, **settings)
    monkeypatch.setattr(surrogate, "CHUNK", 4)
    chunked, _ = surrogate.lasso(masks, outputs, **settings)
    monkeypatch.setattr(surrogate, "CHUNK", 1)
    spread, other = surrogate.lasso(masks, outputs, mesh=meshes.data_mesh(jax.devices()[:4]), **settings)
    scale = np.abs(one.coefficients).max(axis=0)
    for each in (chunked, spread, in_turn):
        np.testing.assert_allclose(each.coefficients / scale, one.coefficients / scale, atol=2e-3)
    np.testing.assert_array_equal(other.chosen, info.chosen)
    np.testing.assert_allclose(other.errors, info.errors, rtol=1e-3)


def test_the_kernel_finds_the_same(problem, monkeypatch):
    """That of a TPU, by Pallas' interpreter: the same steps but for rounding, so nearly as many products."""
    masks, outputs = problem
    held_out = surrogate.hold_out(jax.random.key(3), 90, fraction=0.3)
    settings = {"held_out": held_out, "path": Path(ratio=0.1, count=4), "keep_path": True, "progress": False}
    plain, info = surrogate.lasso(masks, outputs, **settings)
    monkeypatch.setattr(elastic_net, "by_rows", partial(by_rows, backend="interpret"))
    jax.clear_caches()
    found, other = surrogate.lasso(masks, outputs, **settings)
    scale = np.abs(plain.coefficients).max(axis=0)
    np.testing.assert_allclose(found.coefficients / scale, plain.coefficients / scale, atol=2e-3)
    np.testing.assert_allclose(other.path, info.path, atol=2e-3 * scale.max())
    np.testing.assert_array_equal(other.chosen, info.chosen)
    np.testing.assert_allclose(other.errors, info.errors, rtol=1e-3)
    assert other.gap.max() <= 1e-6
    np.testing.assert_allclose(other.products, info.products, rtol=0.1)
    jax.clear_caches()


@pytest.mark.slow
def test_a_gram_matrix_too_large_to_keep_is_done_without(problem, x64, monkeypatch):
    masks, outputs = problem
    settings = {"path": Path(ratio=0.1, count=4), "solver": EXACT, "progress": False}
    kept, _ = surrogate.lasso(masks, outputs, **settings)
    monkeypatch.setattr(surrogate, "GRAM_BYTES", 0)
    without, _ = surrogate.lasso(masks, outputs, **settings)
    np.testing.assert_allclose(without.coefficients, kept.coefficients, atol=1e-6)


def test_ridge_is_that_of_scikit_learn_and_chooses_by_leaving_out(problem, x64):
    masks, outputs = problem
    dampings = (0.03, 0.3, 3.0)
    weights = np.random.default_rng(1).uniform(0.5, 2, len(masks))
    weights *= len(masks) / weights.sum()
    found, info = surrogate.ridge(masks, outputs, dampings=dampings, weights=weights, standardize=False)
    X = masks.astype(float)
    centred = (X - np.average(X, axis=0, weights=weights)) * np.sqrt(weights)[:, None]
    unit = np.square(centred).sum() / len(X)
    model = [Ridge(alpha=each * unit, tol=1e-12) for each in dampings]
    for target in range(6):
        best = model[info.chosen[target]].fit(X, outputs[:, target], sample_weight=weights)
        np.testing.assert_allclose(
            found.coefficients[:, target], best.coef_, atol=1e-8 * np.abs(best.coef_).max() + 1e-9
        )
        assert found.intercepts[target] == pytest.approx(best.intercept_, rel=1e-6)
    left = np.zeros((3, 6))
    for row in range(len(X)):
        rest = np.arange(len(X)) != row
        for number, each in enumerate(model):
            each.fit(X[rest], outputs[rest], sample_weight=weights[rest])
            left[number] += weights[row] * np.square(each.predict(X[row : row + 1])[0] - outputs[row]) / len(X)
    np.testing.assert_allclose(info.errors, left, rtol=1e-6)
    np.testing.assert_array_equal(info.chosen, left.argmin(axis=0))


def test_ridge_on_held_out_rows(problem, x64):
    masks, outputs = problem
    held_out = surrogate.hold_out(jax.random.key(3), 90, fraction=0.3)
    found, info = surrogate.ridge(masks, outputs, dampings=(0.1, 1.0, 10.0), held_out=held_out)
    scaler = StandardScaler().fit(masks[~held_out])
    X, H = (scaler.transform(masks[part]) for part in (~held_out, held_out))
    unit = np.square(X).sum() / len(X)
    errors = [
        np.square(Ridge(alpha=each * unit).fit(X, outputs[~held_out]).predict(H) - outputs[held_out]).mean(axis=0)
        for each in (0.1, 1.0, 10.0)
    ]
    np.testing.assert_allclose(info.errors, errors, rtol=1e-6)
    X = StandardScaler().fit_transform(masks)
    best = Ridge(alpha=(0.1, 1.0, 10.0)[info.chosen[0]] * np.square(X).sum() / len(X)).fit(X, outputs[:, 0])
    predicted = surrogate.predict(found, masks)[:, 0]
    np.testing.assert_allclose(predicted, best.predict(X), rtol=1e-6)


@pytest.mark.parametrize("rows", [60, 15])
def test_least_squares_are_exact_with_and_without_enough_rows(x64, rows):
    rng = np.random.default_rng(4)
    masks, outputs = rng.random((rows, 20)) < 0.5, rng.normal(size=(rows, 3))
    weights = rng.uniform(0.1, 2, rows)
    found = surrogate.least_squares(masks, outputs, weights=weights)
    model = LinearRegression().fit(masks.astype(float), outputs, sample_weight=weights)
    np.testing.assert_allclose(found.coefficients, model.coef_.T, atol=1e-8)
    np.testing.assert_allclose(found.intercepts, model.intercept_, atol=1e-8)


@pytest.mark.parametrize("offset", [1e6, 1e9])
def test_a_column_far_from_zero_is_not_constant(problem, offset):
    """What it varies by is exact in float64, in which it is centred; weights of rows move the mean, not the fit."""
    masks, outputs = problem
    near, far = (np.concatenate([masks[:, :20], at + masks[:, 20:21]], axis=1) for at in (0, offset))
    weights = np.random.default_rng(1).uniform(0.1, 3, 90)
    for fit in (surrogate.least_squares, lambda *arguments, **other: surrogate.ridge(*arguments, **other)[0]):
        expected, found = (fit(each, outputs, weights=weights).coefficients for each in (near, far))
        assert np.abs(expected[20]).max() > 1
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_column_of_one_number_is_constant_whatever_the_rounding(problem):
    """The mean of so many equal numbers is another number, and its square a variance."""
    masks, outputs = problem
    weights = np.random.default_rng(1).uniform(0.1, 3, 90)
    flat = np.concatenate([masks[:, :5], np.full((90, 2), [-0.32, 1e6 / 3])], axis=1)
    found = surrogate.least_squares(flat, outputs, weights=weights)
    np.testing.assert_array_equal(found.coefficients[5:], 0)


def test_a_target_that_is_constant_has_no_weights(problem):
    masks, outputs = problem
    flat = np.concatenate([outputs[:, :1], np.full((90, 1), 3.0)], axis=1)
    found, info = surrogate.lasso(masks, flat, path=Path(ratio=0.1, count=5), progress=False)
    np.testing.assert_array_equal(found.coefficients[:, 1], 0)
    assert found.intercepts[1] == pytest.approx(3)
    assert info.gap[1] == 0


@pytest.mark.parametrize("value", [-0.32, 1 / 3])
def test_the_rounding_of_a_constant_is_no_target(problem, value):
    """Few constants are the mean of so many in float64: what is left of 1e-17 has no λ at which it converges."""
    masks, outputs = problem
    held_out = surrogate.hold_out(jax.random.key(3), 90)
    settings = {"held_out": held_out, "weights": np.random.default_rng(1).uniform(0.1, 3, 90), "progress": False}
    path = Path(ratio=0.1, count=5)
    flat = np.stack([outputs[:, 0], np.full(90, value)], axis=1)
    found, info = surrogate.lasso(masks, flat, path=path, **settings)
    np.testing.assert_array_equal(found.coefficients[:, 1], 0)
    assert found.intercepts[1] == pytest.approx(value)
    np.testing.assert_array_equal(info.gap[1], 0)
    alone, _ = surrogate.lasso(masks, outputs[:, :1], path=path, **settings)
    np.testing.assert_allclose(found.coefficients[:, 0], alone.coefficients[:, 0], atol=1e-3)
    np.testing.assert_array_equal(surrogate.ridge(masks, flat)[0].coefficients[:, 1], 0)


def test_what_varies_on_held_out_rows_alone_has_no_weights(problem):
    """λ_max is 0 there, and with it every λ of the path: no refit is asked of what none can converge at."""
    masks, outputs = problem
    held_out = surrogate.hold_out(jax.random.key(3), 90)
    rare = np.where(np.arange(90) == np.flatnonzero(held_out)[0], 9.0, 0.0)
    found, info = surrogate.lasso(
        masks, np.stack([outputs[:, 0], rare], axis=1), held_out=held_out, path=Path(count=4), progress=False
    )
    np.testing.assert_array_equal(found.coefficients[:, 1], 0)
    assert found.intercepts[1] == pytest.approx(0.1)
    np.testing.assert_allclose(info.errors[:, 1], 9)
    assert np.abs(found.coefficients[:, 0]).max() > 0.1


def test_masks_that_do_not_vary_have_no_weights(problem):
    outputs = problem[1]
    found, info = surrogate.lasso(np.ones((90, 3)), outputs, progress=False)
    np.testing.assert_array_equal(info.gap, 0)
    held_out = surrogate.hold_out(jax.random.key(3), 90)
    settings = ({}, {"held_out": held_out}, {"prior": np.ones((3, 6))})
    ridges = [surrogate.ridge(np.ones((90, 3)), outputs, **each) for each in settings]
    for each in (found, *(ridge for ridge, _ in ridges)):
        np.testing.assert_array_equal(each.coefficients, 0)
        np.testing.assert_allclose(each.intercepts, outputs.mean(axis=0), rtol=1e-6)
    alone = outputs.var(axis=0) * (90 / 89) ** 2  # of each row, the mean of the others
    np.testing.assert_allclose(ridges[0][1].errors, np.tile(alone, (25, 1)), rtol=1e-4)
    apart = np.square(outputs[held_out] - outputs[~held_out].mean(axis=0)).mean(axis=0)
    np.testing.assert_allclose(ridges[1][1].errors, np.tile(apart, (25, 1)), rtol=1e-4)


@pytest.mark.parametrize("power", [-90, -60, 60])
def test_the_unit_of_outputs_does_not_matter(problem, power):
    """A power of two does not, to the bit: squares of float32 would vanish, or be infinite, at these."""
    masks, outputs = problem
    unit, held_out = 2.0**power, surrogate.hold_out(jax.random.key(3), 90)
    settings = {"held_out": held_out, "progress": False, "keep_path": True}
    path = Path(lambdas=(0.5, 0.1))
    one, info = surrogate.lasso(masks, outputs, path=path, **settings)
    found, other = surrogate.lasso(masks, unit * outputs, path=Path(lambdas=(0.5 * unit, 0.1 * unit)), **settings)
    for each in ("penalties", "lambdas", "path"):
        np.testing.assert_array_equal(getattr(other, each), unit * getattr(info, each))
    np.testing.assert_array_equal(other.errors, unit**2 * info.errors)
    ridge, chosen = surrogate.ridge(masks, outputs, prior=np.ones((130, 6)))
    scaled, again = surrogate.ridge(masks, unit * outputs, prior=np.full((130, 6), 1 / unit))
    np.testing.assert_array_equal(again.errors, unit**2 * chosen.errors)
    np.testing.assert_array_equal(again.prior_weights, unit**2 * chosen.prior_weights)
    pairs = (one, found), (ridge, scaled), tuple(surrogate.least_squares(masks, y) for y in (outputs, unit * outputs))
    for expected, made in pairs:
        np.testing.assert_array_equal(made.coefficients, np.float32(unit) * expected.coefficients)
        np.testing.assert_array_equal(made.intercepts, np.float32(unit) * expected.intercepts)
    assert np.abs(one.coefficients).max() > 1


def test_outputs_beyond_the_numbers_there_are_are_refused(problem):
    masks, outputs = problem
    for factor in (1e-33, 1e33):
        with pytest.raises(InvalidInputError, match=r"target 0, whose outputs are from[\s\S]* that float32 holds"):
            surrogate.lasso(masks, factor * outputs, progress=False)
        with jax.enable_x64(True):
            found = surrogate.least_squares(masks, factor * outputs).coefficients / factor
            np.testing.assert_allclose(found, surrogate.least_squares(masks, outputs).coefficients, atol=1e-9)


def test_the_gap_is_between_primal_and_dual(x64):
    """`relative_gap` against the two objectives written out, at a point that is not optimal."""
    rng = np.random.default_rng(5)
    X, y, w = rng.normal(size=(12, 5)), rng.normal(size=12), rng.normal(size=5)
    alpha = 0.7
    residual = y - X @ w
    primal = 0.5 * residual @ residual + alpha * np.abs(w).sum()
    scale = min(1, alpha / np.abs(X.T @ residual).max())
    dual = 0.5 * y @ y - 0.5 * np.square(y - scale * residual).sum()
    found = active_set.relative_gap(
        jnp.asarray(w), jnp.asarray(-X.T @ residual), jnp.asarray(X.T @ y), jnp.asarray(y @ y), jnp.asarray(alpha)
    )
    assert float(found) == pytest.approx((primal - dual) / (0.5 * y @ y), rel=1e-10)


def test_of_a_step_the_best_part_is_taken(x64):
    """Parts against the objective itself on a fine grid: beyond a minimum, across signs, and where all of it helps."""
    rng = np.random.default_rng(6)
    X, y, w = rng.normal(size=(30, 8)), rng.normal(size=30), rng.normal(size=8)
    alpha, beta = 2.0, 0.5
    parts = np.linspace(0, 1, 20_001)
    near = np.linalg.solve(X.T @ X + (beta + 40) * np.eye(8), X.T @ y + 40 * w)
    ends = (w + 4 * (near - w), -w, near)
    found = []
    for end in ends:
        points = w + parts[:, None] * (end - w)
        values = 0.5 * np.square(y - points @ X.T).sum(1) + alpha * np.abs(points).sum(1)
        best = parts[np.argmin(values + 0.5 * beta * np.square(points).sum(1))]
        step = end - w
        line = jax.tree.map(
            jnp.asarray, active_set.Line(w, X.T @ (X @ w - y), step, X.T @ X @ step, np.array(alpha), np.array(beta))
        )
        assert best - 2.0**-active_set.HALVINGS - 1e-4 <= float(active_set.best_part(line)) <= best + 1e-4
        assert bool(active_set.is_whole(line)) == (best == 1)
        found.append(best)
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1
    assert found[2] == 1


def test_damping_grows_where_steps_are_short_and_goes_where_they_are_whole():
    damped = lambda damping, part: float(active_set.damped(*map(jnp.float32, (damping, part, 100, 1000))))  # noqa: E731
    assert damped(0, 0.1) == pytest.approx(10)
    assert damped(10, 0.1) == pytest.approx(80)
    assert damped(640, 0.1) == 1000
    assert damped(80, 0.7) == 80
    assert damped(80, 1) == 10
    assert damped(10, 1) == 0


def test_a_gap_that_rounding_keeps_open_is_an_error(problem, monkeypatch):
    masks, outputs = problem
    monkeypatch.setattr(elastic_net, "CHECKS", 2)
    with pytest.raises(DivergedError, match=r"target \d has a duality gap of .* where 1e-13 was asked for"):
        surrogate.lasso(masks, outputs, path=Path(ratio=0.11, count=4), solver=Solver(1e-13), progress=False)


def test_bad_input_is_refused(problem, shapes_unchecked):
    masks, outputs = problem
    for arguments, words in (
        ((masks[:-1], outputs), r"masks of \(89, 130\), outputs of \(90, 6\)"),
        ((masks[:, :0], outputs), r"masks of shape \(90, 0\)"),
        ((masks, outputs[:, 0]), r"outputs of shape \(90,\)[\s\S]*outputs\[:, None\]"),
        ((masks, np.where(outputs == outputs[3, 2], np.nan, outputs)), "1 entries of the outputs that are not finite"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            surrogate.lasso(*arguments)
    for settings, words in (
        ({"weights": -np.ones(90)}, "a number a row, finite, not negative"),
        ({"held_out": np.zeros(90, bool)}, "held_out without a row"),
        ({"path": Path(l1_ratio=0.0)}, "use `ridge` for l1_ratio = 0"),
        ({"solver": Solver(tolerance=0.0)}, "positive lambdas and tolerance"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            surrogate.lasso(masks, outputs, **settings)
    with pytest.raises(InvalidInputError, match="one positive number or more"):
        surrogate.ridge(masks, outputs, dampings=(0.0,))
    with pytest.raises(InvalidInputError, match=r"1\.5 of 90 rows held out"):
        surrogate.hold_out(jax.random.key(0), 90, fraction=1.5)
