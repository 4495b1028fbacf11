import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jattrib_kernels.dense_projection import cases, dense_projection, dense_projection_transpose, pallas_gpu, pallas_tpu
from jattrib_kernels.random import Stream, fold_in
from tests.kernels import matrices

KEY = np.array([0x9E3779B9, 42], np.uint32)
BACKENDS = ("reference", "interpret")


def matrix(case, key=KEY):
    make = matrices.dense_signs if case.distribution == "rademacher" else matrices.dense_normal
    return make(key, case.p, case.dim, block=case.block_offset, col=case.col_offset)


def where(case):
    return {
        "block_offset": case.block_offset,
        "col_offset": case.col_offset,
        "distribution": case.distribution,
    }


def seed(case, key=KEY):
    """What the API hands to an implementation."""
    stream = Stream.DENSE_SIGNS if case.distribution == "rademacher" else Stream.DENSE_NORMAL
    words = fold_in((jnp.asarray(key)[0], jnp.asarray(key)[1]), int(stream))
    return jnp.stack([*words, jnp.uint32(case.block_offset), jnp.uint32(case.col_offset)])


def relative(got, expected):
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.SMALL, ids=lambda c: c.name)
def test_unit_vectors_recover_the_specified_matrix(case, backend):
    got = dense_projection(jnp.eye(case.p, dtype=case.dtype), KEY, case.dim, backend=backend, **where(case))
    back = dense_projection_transpose(jnp.eye(case.dim, dtype=case.dtype), KEY, case.p, backend=backend, **where(case))
    if case.distribution == "rademacher":
        np.testing.assert_array_equal(np.asarray(got), matrix(case))
        np.testing.assert_array_equal(np.asarray(back), matrix(case).T)
    else:
        np.testing.assert_allclose(np.asarray(got), matrix(case), atol=5e-6)
        np.testing.assert_allclose(np.asarray(back), matrix(case).T, atol=5e-6)


@pytest.mark.parametrize("tile", [(16, 128, 128), (32, 256, 128)])
def test_the_matrix_is_that_of_any_tile(tile):
    case = cases.Case("", 0, 300, 200, block_offset=9, col_offset=5)
    static = {"distribution": "rademacher", "tile": tile, "interpret": True}
    got = pallas_tpu.project(jnp.eye(case.p), seed(case), dim=case.dim, **static)
    back = pallas_tpu.transpose(jnp.eye(case.dim), seed(case), size=case.p, **static)
    np.testing.assert_array_equal(np.asarray(got), matrix(case))
    np.testing.assert_array_equal(np.asarray(back), matrix(case).T)


@pytest.mark.parametrize(
    ("tile", "words", "distribution"),
    [(None, 1 << 23, "rademacher"), ((64, 128, 32), 1, "rademacher"), (None, 1, "normal")],
)
def test_the_gpu_kernel_makes_the_same_matrix(tile, words, distribution):
    case = cases.Case("", 0, 300, 200, distribution=distribution, block_offset=9, col_offset=5)
    static = {"distribution": distribution, "tile": tile, "words": words, "interpret": True}
    got = pallas_gpu.project(jnp.eye(case.p), seed(case), dim=case.dim, **static)
    back = pallas_gpu.transpose(jnp.eye(case.dim), seed(case), size=case.p, **static)
    if distribution == "rademacher":
        np.testing.assert_array_equal(np.asarray(got), matrix(case))
        np.testing.assert_array_equal(np.asarray(back), matrix(case).T)
    else:
        np.testing.assert_allclose(np.asarray(got), matrix(case), atol=5e-6)
        np.testing.assert_allclose(np.asarray(back), matrix(case).T, atol=5e-6)


@pytest.mark.parametrize("backend", ["reference", "interpret", "gpu"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_accuracy_against_float64(dtype, bound, backend):
    case = cases.Case("", 12, 5000, 256)
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((case.n, case.p)) * np.exp(rng.standard_normal(case.p))
    x = jnp.asarray(exact, jnp.float32).astype(dtype)
    if backend == "gpu":
        got = pallas_gpu.project(x, seed(case), dim=case.dim, distribution="rademacher", interpret=True)
    else:
        got = dense_projection(x, KEY, case.dim, backend=backend)
    assert got.dtype == jnp.float32
    assert relative(got, exact @ matrix(case)) < bound


def test_float64_stays_float64(x64):
    case = cases.Case("", 4, 300, 70)
    x = np.random.default_rng(0).standard_normal((case.n, case.p))
    got = dense_projection(jnp.asarray(x), KEY, case.dim)
    assert relative(got, x @ matrix(case)) < 1e-14
    assert relative(dense_projection_transpose(got, KEY, case.p), x @ matrix(case) @ matrix(case).T) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_stays_float32_beside_float64(x64, backend):
    x = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)
    got = dense_projection(jnp.asarray(x), KEY, 128, block_offset=jnp.asarray(2), backend=backend)
    assert got.dtype == jnp.float32
    assert relative(got, x.astype(np.float64) @ matrices.dense_signs(KEY, 300, 128, block=2)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_columns_add_up(backend):
    x = jax.random.normal(jax.random.key(1), (3, 320))
    project = functools.partial(dense_projection, key=KEY, dim=128, backend=backend)
    parts = [project(x[:, :64]), project(x[:, 64:192], block_offset=1), project(x[:, 192:], block_offset=3)]
    assert relative(sum(parts), np.asarray(x, np.float64) @ matrices.dense_signs(KEY, 320, 128)) < 1e-6


def test_a_tile_boundary_of_the_reference_is_no_boundary_of_the_matrix(monkeypatch):
    from jattrib_kernels.dense_projection import reference

    case = cases.Case("", 0, 700, 50)
    monkeypatch.setattr(reference, "_TILE", 64 * 50 * 3)
    np.testing.assert_array_equal(np.asarray(dense_projection(jnp.eye(700), KEY, 50)), matrix(case))
    np.testing.assert_array_equal(np.asarray(dense_projection_transpose(jnp.eye(50), KEY, 700)), matrix(case).T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_keys_rows_and_offsets(backend):
    keys = jnp.stack([KEY, KEY + np.uint32(1)])
    x = jax.random.normal(jax.random.key(1), (2, 4, 100))
    exact = np.asarray(x, np.float64)
    one = functools.partial(dense_projection, dim=64, backend=backend)
    r = [matrices.dense_signs(key, 100, 64) for key in np.asarray(keys)]
    both = jax.jit(jax.vmap(one))(x, keys)
    shared = jax.vmap(one, in_axes=(0, None))(x, keys[0])
    spread = jax.vmap(one, in_axes=(None, 0))(x[0], keys)
    for i in range(2):
        assert relative(both[i], exact[i] @ r[i]) < 1e-6
        assert relative(shared[i], exact[i] @ r[0]) < 1e-6
        assert relative(spread[i], exact[0] @ r[i]) < 1e-6
    offsets = jax.vmap(lambda at: one(x[0], keys[0], block_offset=at))(jnp.array([0, 5], jnp.uint32))
    assert relative(offsets[1], exact[0] @ matrices.dense_signs(KEY, 100, 64, block=5)) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_map_is_the_others_derivative(dtype):
    x = jax.random.normal(jax.random.key(1), (3, 130)).astype(dtype)
    y = jax.random.normal(jax.random.key(2), (3, 40))
    r = matrices.dense_signs(KEY, 130, 40)
    bound = 1e-6 if dtype == "float32" else 5e-3
    _, pull = jax.vjp(lambda x: dense_projection(x, KEY, 40), x)
    (back,) = pull(y)
    assert back.dtype == x.dtype
    assert relative(back, np.asarray(y, np.float64) @ r.T) < bound
    _, pull = jax.vjp(lambda y: dense_projection_transpose(y, KEY, 130), y)
    (forth,) = pull(x.astype(jnp.float32))
    assert relative(forth, np.asarray(x, np.float64) @ r) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("over", ["rows", "coordinates", "columns"])
def test_eight_devices_make_the_same_matrix(over, backend):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    p, k = 8 * 64, 8 * 16
    x = jnp.eye(p)

    def rows(x):
        return dense_projection(x, KEY, k, backend=backend)

    def coordinates(x):
        part = dense_projection(x, KEY, k, block_offset=lax.axis_index("i") * (p // 8 // 64), backend=backend)
        return lax.psum(part, "i")

    def columns(x):
        return dense_projection(x, KEY, k // 8, col_offset=lax.axis_index("i") * (k // 8), backend=backend)

    f, inside, outside = {
        "rows": (rows, P("i"), P("i")),
        "coordinates": (coordinates, P(None, "i"), P()),
        "columns": (columns, P(), P(None, "i")),
    }[over]
    # Pallas' interpreter does not keep track of varying axes.
    check = backend == "reference"
    got = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=check))(x)
    np.testing.assert_array_equal(np.asarray(got), matrices.dense_signs(KEY, p, k))


# Statistics.


def test_signs_are_balanced_and_uncorrelated():
    p, k = 2048, 512
    r = np.asarray(dense_projection(jnp.eye(p), KEY, k))
    other = np.asarray(dense_projection(jnp.eye(p), KEY + np.uint32(1), k))
    five = 5 / np.sqrt(p * k)
    assert abs(r.mean()) < five
    assert abs((r * other).mean()) < five  # of two seeds
    for distance in (1, 2, 31, 32, 63, 64, 65):  # within a word, across the two words of a hash, across hashes
        assert abs((r[distance:] * r[:-distance]).mean()) < 5 / np.sqrt((p - distance) * k)
        assert abs((r[:, distance:] * r[:, :-distance]).mean()) < 5 / np.sqrt(p * (k - distance))
    # All pairs at once: the off-diagonal of a Gram matrix has mean 0, variance p, and no outlier.
    gram = (r.T @ r)[np.triu_indices(k, 1)] / np.sqrt(p)
    assert abs(gram.mean()) < 5 / np.sqrt(gram.size)
    assert abs(gram.var() - 1) < 5 * np.sqrt(2 / gram.size)
    assert np.abs(gram).max() < 6.5
    assert np.abs(r.mean(axis=0)).max() < 5.5 / np.sqrt(p)
    assert np.abs(r.mean(axis=1)).max() < 5.5 / np.sqrt(k)


def test_normal_numbers_have_the_moments_of_normal_numbers():
    p, k = 1024, 512
    r = np.asarray(dense_projection(jnp.eye(p), KEY, k, distribution="normal"), np.float64)
    five = 5 / np.sqrt(p * k)
    for power, mean, second in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105)):
        assert abs((r**power).mean() - mean) < five * np.sqrt(second - mean**2)
    assert abs((r[0::2] * r[1::2]).mean()) < 5 / np.sqrt(p * k / 2)  # the two of one hash
    assert abs((np.abs(r) < 1).mean() - 0.6826895) < five


@pytest.mark.parametrize(("k", "keys"), [(512, 300), (4096, 100)])
def test_inner_products_are_unbiased_with_the_variance_of_theory(k, keys):
    p, n = 64, 64
    x = np.random.default_rng(0).standard_normal((n, p))
    x[1::2] += x[0::2]  # pairs that are not orthogonal
    words = jax.random.key_data(jax.random.split(jax.random.key(5), keys))
    rows = jnp.asarray(x, jnp.float32)
    features = jax.jit(lambda keys: lax.map(lambda key: dense_projection(rows, key, k), keys))(words)
    features = np.asarray(features, np.float64)
    got = (features[:, 0::2] * features[:, 1::2]).sum(axis=-1) / k
    left, right = x[0::2], x[1::2]
    inner = (left * right).sum(axis=1)
    square = (left**2).sum(axis=1) * (right**2).sum(axis=1)
    theory = (square + inner**2 - 2 * (left**2 * right**2).sum(axis=1)) / k
    error = (got - inner) / np.sqrt(theory)
    assert abs(error.mean()) < 5 / np.sqrt(error.size)
    assert abs((error**2).mean() - 1) < 0.05


@pytest.mark.parametrize("name", ["constant", "one-hot", "block-periodic", "alternating"])
def test_adversarial_vectors_keep_their_norm_on_average(name):
    k, p, keys = 64, 512, 1500
    i = np.arange(p)
    x = {
        "constant": np.ones(p),
        "one-hot": (i == 77) * 1.0,
        "block-periodic": np.random.default_rng(0).standard_normal(64)[i % 64],  # the same in every hash's block
        "alternating": (-1.0) ** i,
    }[name]
    words = jax.random.key_data(jax.random.split(jax.random.key(5), keys))
    features = norms_of(jnp.asarray(x, jnp.float32)[None], words)
    error = np.asarray(features, np.float64) - (x**2).sum()
    theory = 2 * ((x**2).sum() ** 2 - (x**4).sum()) / k
    if name == "one-hot":
        np.testing.assert_array_equal(error, 0)
    else:
        assert abs(error.mean()) < 5 * np.sqrt(theory / keys)
        # The norm is a sum of 64 squares: its square has about 2 (1 + 6 / 64) times the variance of a normal number's.
        assert abs(error.var() / theory - 1) < 5 * np.sqrt((2 + 12 / k) / keys)


@jax.jit
def norms_of(x, words):
    return lax.map(lambda key: jnp.sum(jnp.square(dense_projection(x, key, 64))) / 64, words)


# The door.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones(4)}, r"`x` has shape \(4,\)"),
        ({"x": jnp.ones((2, 4), jnp.int32)}, "cast integers to float32"),
        ({"x": jnp.ones((2, 0))}, "number of columns of `x`` is 0"),
        ({"key": jnp.ones(2)}, "two uint32 words"),
        ({"key": jnp.ones(4, jnp.uint32)}, "key_data"),
        ({"dim": 0}, "`dim` is 0"),
        ({"dim": 2**31}, r"size < 2\*\*31"),
        ({"block_offset": -1}, "`block_offset` is -1"),
        ({"col_offset": 2**32}, "`col_offset` is 4294967296"),
        ({"col_offset": np.int64(2**32 - 2)}, "0 <= col_offset <= 4294967293"),
        ({"block_offset": 2**32 - 1, "x": jnp.ones((2, 65))}, "no number comes twice"),
        ({"block_offset": 2**27, "distribution": "normal"}, "0 <= block_offset <= 134217727"),
        ({"block_offset": jnp.ones(3, jnp.int32)}, "an integer scalar"),
        ({"distribution": "uniform"}, "one of rademacher, normal"),
        ({"backend": "cuda"}, "backend 'cuda' is not known"),
        ({"backend": "interpret", "x": jnp.ones((2, 4), jnp.float16)}, "float32 or bfloat16"),
    ],
)
def test_errors_name_the_remedy(change, message):
    arguments = {"x": jnp.ones((2, 4)), "key": KEY, "dim": 3} | change
    with pytest.raises(ValueError, match=message):
        dense_projection(**arguments)


def test_sizes_and_offsets_may_be_numpys():
    x, last = jnp.ones((2, 64)), 2**32 - 1
    expected = dense_projection(x, KEY, 3, block_offset=last, col_offset=7)
    got = dense_projection(x, KEY, np.int64(3), block_offset=np.int64(last), col_offset=np.int32(7))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows(backend):
    def there_and_back(x):
        return dense_projection_transpose(dense_projection(x, KEY, 128, backend=backend), KEY, 70, backend=backend)

    assert there_and_back(jnp.ones((0, 70))).shape == (0, 70)
    assert jax.vmap(there_and_back)(jnp.ones((3, 0, 70))).shape == (3, 0, 70)
    assert jax.grad(lambda x: there_and_back(x).sum())(jnp.ones((0, 70), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_backend_asked_for_by_name_is_not_replaced():
    for backend in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(ValueError, match="interpret mode"):
            dense_projection(jnp.ones((2, 64)), KEY, 128, backend=backend)
