"""The Gram matrix against float64, and the sums in which it is accumulated against exact arithmetic."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattrib.core.sources import InMemory
from jattrib.core.stream import fold
from jattrib.core.types import Fold
from jattrib_kernels.gram import Sum, cases, gram, on_grid, pallas_gpu, sharded, value
from jattrib_kernels.gram.api import product
from jattrib_kernels.gram.sums import add, two_sum

BACKENDS = ("reference", "interpret")
EPS = float(jnp.finfo(jnp.float32).eps)
single = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 2.0**-40)


def features(case: cases.Case) -> jax.Array:
    return jnp.asarray(cases.features(case), case.dtype)


def exact_gram(x) -> np.ndarray:
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    return wide.T @ wide


def as_float64(total: Sum) -> np.ndarray:
    return np.asarray(total.high, np.float64) + np.asarray(total.low, np.float64)


def scale(exact: np.ndarray) -> np.ndarray:
    """What an entry's error is measured by: the product of the norms of its columns."""
    norm = np.sqrt(np.diagonal(exact))
    return np.outer(norm, norm)


@pytest.mark.parametrize("case", cases.NUMERIC, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gram_is_that_of_float64(backend, case):
    x = features(case)
    made = gram(x, compensated=case.compensated, backend=backend)
    exact = exact_gram(x)
    got = as_float64(made) if case.compensated else np.asarray(made, np.float64)
    assert (np.abs(got - exact) / scale(exact)).max() < 8 * EPS
    np.testing.assert_array_equal(got, got.T)


@pytest.mark.parametrize("case", [cases.Case(700, 130), cases.Case(700, 130, compensated=True)], ids=str)
def test_the_gpu_kernel_makes_the_lower_half(case):
    x = features(case)
    padded = jnp.pad(x, ((0, 324), (0, 62)))
    made = pallas_gpu.product(padded, padded, None, symmetric=True, compensated=case.compensated, interpret=True)
    got = sum(np.asarray(part, np.float64)[:130, :130] for part in made)
    exact = exact_gram(x)
    assert np.abs(np.tril(got - exact) / scale(exact)).max() < 8 * EPS


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_have_a_gram_matrix_of_zeros(backend, compensated):
    made = gram(jnp.ones((0, 3)), compensated=compensated, backend=backend)
    np.testing.assert_array_equal(value(made) if compensated else made, np.zeros((3, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_gram_matrix(backend):
    x = features(cases.Case(600, 300))
    (made,) = product(x[:, 40:100], x, backend=backend)
    exact = exact_gram(x)
    assert (np.abs(made - exact[40:100]) / scale(exact)[40:100]).max() < 8 * EPS


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compensated_stream_keeps_what_a_plain_one_loses(backend):
    # The sum stands where adding 1 or so changes nothing any more; a thousand batches do add up.
    x = jnp.full((1, 2), 1.1, jnp.float32)
    start = jnp.full((2, 2), 2.0**26, jnp.float32)

    def step(carry, _):
        plain, kept = carry
        return (plain + gram(x, backend=backend), gram(x, accumulator=kept, backend=backend)), None

    (plain, kept), _ = jax.lax.scan(step, (start, Sum(start, jnp.zeros_like(start))), length=1000)
    exact = 2.0**26 + 1000 * float(np.float32(1.1)) ** 2
    np.testing.assert_array_equal(plain, start)
    np.testing.assert_allclose(as_float64(kept), exact, rtol=1e-10, atol=0)
    assert float(value(kept)[0, 0]) == pytest.approx(exact, rel=EPS)


@given(single, single)
@settings(max_examples=200, deadline=None)
def test_two_sum_loses_nothing(a, b):
    total, error = jax.jit(two_sum)(np.float32(a), np.float32(b))
    assert Fraction(float(total)) + Fraction(float(error)) == Fraction(a) + Fraction(b)
    assert float(total) == float(np.float32(a) + np.float32(b))


@given(st.lists(single, min_size=2, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_sums_on_a_grid_add_up_in_any_order(terms, random):
    exact = sum(map(Fraction, terms))
    bound = max(float(sum(map(abs, map(Fraction, terms)))), 2.0**-60)
    spread = jax.vmap(partial(on_grid, bound=bound))(
        Sum(jnp.asarray(terms, jnp.float32), jnp.zeros(len(terms), jnp.float32))
    )
    for term, high, low in zip(terms, *map(np.asarray, spread), strict=True):
        assert Fraction(float(high)) + Fraction(float(low)) == Fraction(term)
    order = random.sample(range(len(terms)), len(terms))
    total, reordered = np.float32(0), np.float32(0)
    for i, j in enumerate(order):
        total, reordered = total + np.asarray(spread.high)[i], reordered + np.asarray(spread.high)[j]
    assert total == reordered
    rest = sum(Fraction(float(low)) for low in np.asarray(spread.low))
    assert Fraction(float(total)) + rest == exact


def test_add_is_two_sum_with_a_memory():
    total = Sum(jnp.float32(1), jnp.float32(0))
    for _ in range(100):
        total = add(total, jnp.float32(2.0**-30))
    assert as_float64(total) == 1 + 100 * 2.0**-30


@pytest.mark.parametrize("devices", [1, 8])
def test_it_is_a_fold_whose_state_is_a_sum(devices):
    x = cases.features(cases.Case(1000, 5)).astype(np.float32)
    exact = exact_gram(x)
    bound = np.diagonal(exact).max()

    def update(batch, valid):
        return on_grid(gram(jnp.where(valid[:, None], batch, 0), compensated=True), bound)

    zero = jnp.zeros((5, 5), jnp.float32)
    statistic = Fold(lambda: Sum(zero, zero), update, value)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    got = fold(statistic, InMemory(x), chunk=64, mesh=mesh, progress=False)
    assert (np.abs(got - exact) / scale(exact)).max() < 2 * EPS


def grid(*shape: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "model"))


@pytest.mark.parametrize(
    ("backend", "shape"), [("reference", (8, 1)), ("reference", (2, 4)), ("reference", (1, 8)), ("interpret", (2, 2))]
)
@pytest.mark.parametrize("compensated", [False, True])
def test_sharded_is_the_same(backend, shape, compensated):
    x = features(cases.Case(1024, 64))
    mesh = grid(*shape)
    function = partial(sharded.gram, mesh=mesh, rows="data", columns="model", compensated=compensated, backend=backend)
    made = jax.jit(function)(x)
    exact = exact_gram(x)
    got = as_float64(made) if compensated else np.asarray(made, np.float64)
    assert (np.abs(got - exact) / scale(exact)).max() < (4 if compensated else 8) * EPS
    spec = jax.sharding.PartitionSpec("model")
    assert jax.tree.leaves(made)[0].sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), 2)


def test_devices_lose_nothing_when_compensated():
    # One device has a large sum, seven have sums that it would swallow one by one.
    x = np.full((8, 1), 1.1, np.float32)
    x[0] = 2.0**13
    made = sharded.gram(x, mesh=grid(8, 1), rows="data", compensated=True)
    exact = 2.0**26 + 7 * float(np.float32(np.float32(1.1) ** 2))
    np.testing.assert_allclose(as_float64(made), exact, rtol=1e-13, atol=0)


@pytest.mark.usefixtures("x64")
def test_float64_goes_to_the_reference():
    x = cases.features(cases.Case(700, 37))
    made = gram(jnp.asarray(x))
    assert made.dtype == jnp.float64
    np.testing.assert_allclose(made, x.T @ x, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"(?s)'interpret' was asked for the Gram matrix of float64.*cast"):
        gram(jnp.asarray(x), backend="interpret")


X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gram(X[0]), r"(?s)shape \(3,\).*matrix of floating-point rows"),
        (lambda: gram(X.astype(np.int32)), r"(?s)type int32.*cast"),
        (lambda: gram(X, accumulator=Sum(X, X)), r"(?s)`accumulator` has shape \(4, 3\).*two arrays \(3, 3\)"),
        (lambda: gram(X, backend="cuda"), r"backend 'cuda' is not known"),
        (lambda: sharded.gram(X, mesh=grid(8, 1), rows="data"), r"(?s)shape \(4, 3\).*spread over 8.*pad"),
        (lambda: sharded.gram(X, mesh=grid(8, 1), rows="rows"), r"(?s)axes 'rows'.*\('data', 'model'\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_gpu"])
def test_a_backend_asked_for_by_name_never_falls_back(backend):
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        gram(X, backend=backend)
