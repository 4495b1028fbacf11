"""The kernel inverse on matrices of known spectra, against float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib_kernels.kernel_inverse import blocked, cases, factorize, kernel_inverse, pallas_gpu, sharded, solve
from jattrib_kernels.kernel_inverse.cases import Case
from jattrib_kernels.kernel_inverse.place import Place
from jattrib_kernels.kernel_inverse.refine import residual

BACKENDS = ("reference", "interpret")
SHARED = Case(384, columns=2)  # most tests are of this shape: one compilation a backend


@cache
def system(case: Case) -> tuple[np.ndarray, np.ndarray]:
    matrix, targets, _ = cases.system(case)
    return matrix.astype(np.float32), targets.astype(np.float32)


@cache
def run(backend: str, refine: int = 1):
    return jax.jit(partial(kernel_inverse, backend=backend, refine=refine))


def relative_residual(matrix, solution, targets, damping=0.0) -> float:
    solution = np.asarray(solution, np.float64)
    left = targets - matrix.astype(np.float64) @ solution - damping * solution
    return float(np.linalg.norm(left) / np.linalg.norm(targets))


def rounding_floor(matrix, targets, damping=0.0) -> float:
    """The residual to expect of the exact solution, rounded to float32: what no solver in float32 can be far below."""
    damped = matrix.astype(np.float64) + damping * np.eye(len(matrix))
    exact = np.linalg.solve(damped, targets.astype(np.float64))
    variance = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) ** 2 / 12
    return float(np.sqrt((damped**2 @ variance).sum()) / np.linalg.norm(targets))


@pytest.mark.parametrize("case", cases.NUMERIC, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_solution_leaves_no_more_than_the_rounding_of_the_exact_one(backend, case):
    matrix, targets = system(case)
    solution, info = run(backend)(matrix, targets)
    left = relative_residual(matrix, solution, targets)
    # Where one eigenvalue stands out, the error has as many degrees of freedom as there are columns: it scatters.
    assert left <= 2 * rounding_floor(matrix, targets) + 1e-7
    assert float(info.residual) == pytest.approx(left, rel=0.1, abs=1e-7)
    assert info.positive_definite


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spectrum", ["linear", "geometric", "outlier"])
def test_relative_residual_at_condition_1e4_is_below_1e_5(backend, spectrum):
    case = SHARED._replace(spectrum=spectrum)
    matrix, _ = system(case)
    # As features are: drawn from the distribution whose covariance is the matrix.
    targets = np.linalg.cholesky(matrix.astype(np.float64)) @ np.random.default_rng(1).standard_normal((384, 2))
    targets = targets.astype(np.float32)
    solution, info = run(backend)(matrix, targets)
    assert relative_residual(matrix, solution, targets) < 1e-5
    assert float(info.residual) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_condition_1e8_is_reported_and_cured_by_damping(backend):
    matrix, targets = system(SHARED._replace(condition=1e8, spectrum="geometric"))
    _, info = run(backend)(matrix, targets)
    assert not info.positive_definite
    assert float(info.smallest_pivot) < 1e-6
    damped, info = jax.jit(partial(kernel_inverse, backend=backend, damping=1e-3))(matrix, targets)
    assert relative_residual(matrix, damped, targets, 1e-3) < max(1e-5, 2 * rounding_floor(matrix, targets, 1e-3))
    assert info.positive_definite


def test_at_condition_1e8_without_a_small_pivot_the_residual_tells():
    matrix, targets = system(SHARED._replace(condition=1e8))
    solution, info = run("reference")(matrix, targets)
    left = relative_residual(matrix, solution, targets)
    assert left > 1e-3
    assert left / 3 < float(info.residual) < 3 * left


@pytest.mark.parametrize("backend", BACKENDS)
def test_refinement_is_worth_its_price(backend):
    matrix, targets = system(SHARED)
    (plain, info), (refined, _) = (run(backend, refine)(matrix, targets) for refine in (0, 1))
    left = relative_residual(matrix, plain, targets)
    assert relative_residual(matrix, refined, targets) < left / 4
    assert left / 2 < float(info.residual) < 2 * left


@pytest.mark.parametrize("case", [Case(37, condition=1e2), SHARED], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_factor_is_that_of_float64(backend, case):
    matrix, targets = system(case)
    factor = jax.jit(partial(factorize, backend=backend, damping=0.5))(matrix)
    exact = np.linalg.cholesky(matrix.astype(np.float64) + 0.5 * np.eye(case.k))
    np.testing.assert_allclose(factor.lower, exact, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(np.triu(factor.lower, 1), 0)
    assert float(factor.smallest_pivot) == pytest.approx((np.diagonal(exact) ** 2).min(), rel=1e-5)
    solution = solve(factor, targets)
    np.testing.assert_allclose(exact @ exact.T @ solution, targets, rtol=0, atol=2e-5)


def test_the_steps_of_the_gpu_kernel_are_those_of_float64():
    matrix, _ = system(SHARED)
    factorise = jax.jit(partial(blocked.cholesky, kernels=pallas_gpu.kernels(interpret=True)))
    lower, inverses, smallest = factorise(jnp.tril(matrix))
    exact = np.linalg.cholesky(matrix.astype(np.float64))
    np.testing.assert_allclose(lower, exact, rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.float64(lower) @ np.float64(lower).T, matrix, rtol=0, atol=2e-7)
    assert float(smallest) == pytest.approx((np.diagonal(exact) ** 2).min(), rel=1e-3)
    for j, inverse in enumerate(inverses):
        at = slice(j * pallas_gpu.BLOCK, (j + 1) * pallas_gpu.BLOCK)
        np.testing.assert_allclose(inverse @ exact[at, at], np.eye(pallas_gpu.BLOCK), rtol=0, atol=2e-4)
    _, _, smallest = factorise(jnp.tril(matrix) - 0.3 * jnp.eye(384))
    assert float(smallest) < 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_indefinite_matrix_is_reported_with_the_pivot_that_fails(backend):
    diagonal = np.linspace(1, 2, 384)
    diagonal[[250, 270]] = -3, -5
    solution, info = run(backend)(np.diag(diagonal).astype(np.float32), np.ones((384, 2), np.float32))
    assert float(info.smallest_pivot) == -3
    assert not info.positive_definite
    assert np.isinf(info.residual)
    assert np.isnan(solution).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_are_not_finite_are_reported(backend):
    matrix, targets = system(SHARED)
    broken = matrix.copy()
    broken[7, 3] = broken[3, 7] = np.nan
    _, info = run(backend)(broken, targets)
    assert not info.positive_definite
    assert np.isinf(info.residual)


@pytest.mark.parametrize("backend", ["reference", pytest.param("interpret", marks=pytest.mark.slow)])
def test_an_ensemble_is_solved_under_vmap(backend):
    systems = [system(Case(140, columns=2, seed=seed)) for seed in range(3)]
    matrices, targets = (np.stack(parts) for parts in zip(*systems, strict=True))
    matrices[1] -= 0.5 * np.eye(140, dtype=np.float32)
    solutions, info = jax.jit(jax.vmap(partial(kernel_inverse, backend=backend)))(matrices, targets)
    np.testing.assert_array_equal(info.positive_definite, [True, False, True])
    for i in (0, 2):
        assert relative_residual(matrices[i], solutions[i], targets[i]) < 2e-5
    assert np.isnan(solutions[1]).all()


def test_damping_may_be_traced_and_one_column_may_be_a_vector():
    matrix, targets = system(Case(300))
    solution, _ = jax.jit(lambda damping: kernel_inverse(matrix, targets[:, 0], damping=damping))(0.25)
    exact = np.linalg.solve(matrix.astype(np.float64) + 0.25 * np.eye(300), targets[:, 0].astype(np.float64))
    np.testing.assert_allclose(solution, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_no_targets_and_zero_targets_have_no_residual():
    matrix, targets = system(SHARED)
    for some in (targets[:, :0], np.zeros_like(targets)):
        solution, info = run("reference")(matrix, some)
        np.testing.assert_array_equal(solution, some)
        assert float(info.residual) == 0


@pytest.mark.usefixtures("x64")
def test_float64_goes_to_the_reference():
    matrix, targets, _ = cases.system(SHARED._replace(condition=1e8))
    solution, info = kernel_inverse(jnp.asarray(matrix), jnp.asarray(targets))
    assert solution.dtype == jnp.float64
    assert float(info.residual) < 1e-7
    with pytest.raises(ValueError, match=r"(?s)'interpret' was asked for a float64 matrix.*cast"):
        kernel_inverse(jnp.asarray(matrix), jnp.asarray(targets), backend="interpret")


def mesh(*shape: int) -> jax.sharding.Mesh:
    names = ("data", "model")[: len(shape)]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, names)


@pytest.mark.parametrize(
    ("backend", "shape"),
    [
        ("reference", (8,)),
        ("interpret", (2,)),
        pytest.param("reference", (1,), marks=pytest.mark.slow),
        pytest.param("reference", (2, 4), marks=pytest.mark.slow),
        pytest.param("interpret", (8,), marks=pytest.mark.slow),
    ],
)
def test_sharded_is_the_same_as_on_one_device(backend, shape):
    matrix, targets = system(Case(300))
    spread = mesh(*shape)
    function = partial(sharded.kernel_inverse, mesh=spread, axis=spread.axis_names, backend=backend, damping=0.01)
    solution, info = jax.jit(function)(matrix, targets)
    exact = np.linalg.solve(matrix.astype(np.float64) + 0.01 * np.eye(300), targets.astype(np.float64))
    np.testing.assert_allclose(solution, exact, rtol=0, atol=3e-7 * np.abs(exact).max())
    assert float(info.residual) == pytest.approx(relative_residual(matrix, solution, targets, 0.01), rel=0.1)
    assert info.positive_definite


def test_sharded_reports_an_indefinite_matrix():
    diagonal = np.linspace(1, 2, 40)
    diagonal[25] = -3
    function = partial(sharded.kernel_inverse, mesh=mesh(8), axis="data")
    solution, info = jax.jit(function)(np.diag(diagonal).astype(np.float32), np.ones(40, np.float32))
    assert float(info.smallest_pivot) == -3
    assert not info.positive_definite
    assert np.isnan(solution).all()


def test_sharded_keeps_rows_where_they_are():
    spread = mesh(8)
    rows = jax.sharding.NamedSharding(spread, jax.sharding.PartitionSpec("data"))
    matrix, targets = (jax.device_put(x, rows) for x in system(Case(64, condition=10)))
    solution, _ = jax.jit(partial(sharded.kernel_inverse, mesh=spread, axis="data"))(matrix, targets)
    assert solution.sharding.is_equivalent_to(rows, 2)


@pytest.mark.parametrize("operand", [jnp.float32, jnp.bfloat16])
def test_residual_has_digits_that_float32_has_not(operand):
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((70, 600)) * np.exp(generator.standard_normal((70, 1)) * 5)
    solution = generator.standard_normal((600, 3)) * [1e-3, 1, 1e5]
    matrix, solution = matrix.astype(np.float32), solution.astype(np.float32)
    product = matrix.astype(np.float64) @ solution + 0.25 * solution[100:170].astype(np.float64)
    targets = product.astype(np.float32)
    exact = targets - product
    left = residual(matrix, solution, targets, damping=jnp.float32(0.25), rows=jnp.arange(100, 170), operand=operand)
    scale = np.abs(matrix.astype(np.float64)) @ np.abs(solution)
    assert np.abs(exact).max() > 0
    assert (np.abs(left - exact) / scale).max() < 2.0**-34
    assert np.abs(left - exact).sum() < 0.01 * np.abs(exact).sum()


def test_a_place_alone_changes_nothing():
    x = jnp.arange(6.0).reshape(3, 2)
    place = Place()
    for same in (place.gather(x), place.total(x), place.largest(x), place.from_owner(jnp.int32(5), x)):
        np.testing.assert_array_equal(same, x)


EYE, ONES = np.eye(4, dtype=np.float32), np.ones((4, 2), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((EYE[:3], ONES), {}, r"(?s)`matrix` has shape \(3, 4\).*square.*vmap"),
        ((EYE[:0, :0], ONES[:0]), {}, r"(?s)`matrix` has shape \(0, 0\).*one row at least"),
        ((EYE.astype(np.int32), ONES), {}, r"(?s)type int32.*float32 or float64"),
        ((EYE, ONES[:3]), {}, r"(?s)`targets` has shape \(3, 2\).*\(k, q\).*transpose"),
        ((EYE, ONES.astype(np.float16)), {}, r"(?s)type float16.*matrix's type.*cast"),
        ((EYE, ONES), {"damping": -0.5}, r"(?s)`damping` is -0.5.*at least 0"),
        ((EYE, ONES), {"damping": float("nan")}, r"(?s)`damping` is nan.*at least 0"),
        ((EYE, ONES), {"damping": np.ones(4)}, r"(?s)`damping` has shape \(4,\).*one number.*vmap"),
        ((EYE, ONES), {"refine": -1}, r"(?s)`refine` is -1.*at least 0"),
        ((EYE, ONES), {"backend": "cuda"}, r"backend 'cuda' is not known"),
    ],
)
def test_bad_input_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_inverse(*arguments, **options)


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match=r"(?s)`axis` is 'rows'.*axes of the mesh: \('data',\)"):
        sharded.kernel_inverse(EYE, ONES, mesh=mesh(2), axis="rows")


@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_gpu"])
def test_a_backend_asked_for_by_name_never_falls_back(backend):
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        kernel_inverse(EYE, ONES, backend=backend)
