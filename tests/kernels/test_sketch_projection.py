import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from jattrib_kernels.random import Stream, fold_in
from jattrib_kernels.sketch_projection import (
    api,
    cases,
    classic,
    pallas_gpu,
    pallas_tpu,
    sketch_projection,
    sketch_projection_transpose,
)
from tests.kernels import matrices

KEY = np.array([0x9E3779B9, 42], np.uint32)
BACKENDS = ("reference", "interpret")


def matrix(case, key=KEY):
    return matrices.sketch(key, case.p, case.dim, block=case.block_offset, copies=case.copies)


def seeds(case, key=KEY):
    """What the API hands to an implementation."""
    words = [
        fold_in((jnp.asarray(key)[0], jnp.asarray(key)[1]), int(s))
        for s in (Stream.SKETCH_SIGNS, Stream.SKETCH_ROTATIONS)
    ]
    return jnp.stack([jnp.stack(w) for w in words]), jnp.uint32(case.block_offset)


def relative(got, expected):
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


def recovered(case, backend, key=KEY):
    """The matrix from unit vectors, a few at a time: their rows are p long."""
    some = np.unique(np.linspace(0, case.p - 1, 400).astype(int))
    where = {"block_offset": case.block_offset, "copies": case.copies, "backend": backend}
    forth = sketch_projection(jax.nn.one_hot(some, case.p, dtype=case.dtype), key, case.dim, **where)
    back = sketch_projection_transpose(jnp.eye(case.dim, dtype=case.dtype), key, case.p, **where)
    return some, np.asarray(forth), np.asarray(back)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("n", "threads", "parts"), [(20, 3, 3), (7, 2, 2), (5, 4, 3), (3, 3, 3), (2, 3, 2), (300, 2, 2)]
)
def test_parts_on_threads_are_the_same_bits(monkeypatch, x64, n, threads, parts, dtype):
    rows = jax.random.normal(jax.random.key(n), (n, 700), dtype)
    whole = jax.jit(lambda x: sketch_projection(x, KEY, 96))(rows)
    concrete = lambda *operands: 1 if any(isinstance(each, Tracer) for each in operands) else threads  # noqa: E731
    monkeypatch.setattr(api, "cores", concrete)
    monkeypatch.setattr(api, "PART", 1)
    asked, part = [], api._part
    monkeypatch.setattr(api, "_part", lambda *given: asked.append(given) or part(*given))
    np.testing.assert_array_equal(sketch_projection(rows, KEY, 96), whole)
    assert len(asked) == parts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.SMALL, ids=lambda c: c.name)
def test_unit_vectors_recover_the_specified_matrix(case, backend):
    some, forth, back = recovered(case, backend)
    expected = matrix(case)
    # Copies may meet in a bucket: sums of ±1/√s are equal to rounding; signs alone are equal.
    equal = (
        np.testing.assert_array_equal if case.copies == 1 else functools.partial(np.testing.assert_allclose, atol=1e-6)
    )
    equal(forth, expected[some])
    equal(back, expected.T)


def test_any_dim_will_do_for_the_reference():
    case = cases.Case("", 0, 1000, 77, block_offset=3)
    some, forth, back = recovered(case, "reference")
    np.testing.assert_array_equal(forth, matrix(case)[some])
    np.testing.assert_array_equal(back, matrix(case).T)


@pytest.mark.parametrize("tile", [(16, 1), (32, 3), (16, 64)])
def test_the_matrix_is_that_of_any_tile(tile):
    case = cases.Case("", 0, 9 * 128 + 5, 128, block_offset=60, copies=2)
    x = jax.random.normal(jax.random.key(0), (40, case.p))
    static = {"copies": case.copies, "tile": tile, "interpret": True}
    got = pallas_tpu.project(x, *seeds(case), dim=case.dim, **static)
    back = pallas_tpu.transpose(jnp.eye(case.dim), *seeds(case), size=case.p, **static)
    assert relative(got, np.asarray(x, np.float64) @ matrix(case)) < 1e-6
    np.testing.assert_allclose(np.asarray(back), matrix(case).T, atol=1e-6)


@pytest.mark.parametrize(
    ("tile", "words", "dim", "copies"), [(None, 1 << 23, 128, 1), ((2, 64), 1, 128, 2), (None, 1, 100, 2)]
)
def test_the_gpu_kernel_makes_the_same_matrix(tile, words, dim, copies):
    case = cases.Case("", 0, 70 * dim + 5, dim, block_offset=60, copies=copies)
    x = jax.random.normal(jax.random.key(0), (5, case.p))
    static = {"copies": copies, "tile": tile, "words": words, "interpret": True}
    got = pallas_gpu.project(x, *seeds(case), dim=dim, **static)
    back = pallas_gpu.transpose(jnp.eye(dim), *seeds(case), size=case.p, **static)
    assert relative(got, np.asarray(x, np.float64) @ matrix(case)) < 1e-6
    np.testing.assert_allclose(np.asarray(back), matrix(case).T, atol=1e-6 * (copies > 1))


@pytest.mark.parametrize("n", [1, 40, 64])
def test_tiles_of_rows_of_the_reference_leave_no_trace(n, monkeypatch):
    from jattrib_kernels.sketch_projection import reference

    monkeypatch.setattr(reference, "_TILE", 2 * 64 * 16)
    case = cases.Case("", n, 1000, 64)
    x = jax.random.normal(jax.random.key(0), (n, case.p))
    assert relative(sketch_projection(x, KEY, 64), np.asarray(x, np.float64) @ matrix(case)) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "interpret", "gpu"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_accuracy_against_float64(dtype, bound, backend):
    case = cases.Case("", 12, 5000, 256)
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((case.n, case.p)) * np.exp(rng.standard_normal(case.p))
    x = jnp.asarray(exact, jnp.float32).astype(dtype)
    if backend == "gpu":
        got = pallas_gpu.project(x, *seeds(case), dim=case.dim, copies=1, interpret=True)
    else:
        got = sketch_projection(x, KEY, case.dim, backend=backend)
    assert got.dtype == jnp.float32
    assert relative(got, exact @ matrix(case)) < bound


def test_float64_stays_float64(x64):
    case = cases.Case("", 4, 300, 70)
    x = np.random.default_rng(0).standard_normal((case.n, case.p))
    got = sketch_projection(jnp.asarray(x), KEY, case.dim)
    assert relative(got, x @ matrix(case)) < 1e-14
    assert relative(sketch_projection_transpose(got, KEY, case.p), x @ matrix(case) @ matrix(case).T) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_stays_float32_beside_float64(x64, backend):
    x = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)
    got = sketch_projection(jnp.asarray(x), KEY, 128, block_offset=jnp.asarray(2), backend=backend)
    assert got.dtype == jnp.float32
    assert relative(got, x.astype(np.float64) @ matrices.sketch(KEY, 300, 128, block=2)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_columns_add_up(backend):
    x = jax.random.normal(jax.random.key(1), (3, 700))
    project = functools.partial(sketch_projection, key=KEY, dim=128, backend=backend)
    parts = [project(x[:, :128]), project(x[:, 128:384], block_offset=1), project(x[:, 384:], block_offset=3)]
    assert relative(sum(parts), np.asarray(x, np.float64) @ matrices.sketch(KEY, 700, 128)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_keys_rows_and_offsets(backend):
    keys = jnp.stack([KEY, KEY + np.uint32(1)])
    x = jax.random.normal(jax.random.key(1), (2, 4, 300))
    exact = np.asarray(x, np.float64)
    one = functools.partial(sketch_projection, dim=128, backend=backend)
    s = [matrices.sketch(key, 300, 128) for key in np.asarray(keys)]
    both = jax.jit(jax.vmap(one))(x, keys)
    shared = jax.vmap(one, in_axes=(0, None))(x, keys[0])
    for i in range(2):
        assert relative(both[i], exact[i] @ s[i]) < 1e-6
        assert relative(shared[i], exact[i] @ s[0]) < 1e-6
    offsets = jax.vmap(lambda at: one(x[0], keys[0], block_offset=at))(jnp.array([0, 5], jnp.uint32))
    assert relative(offsets[1], exact[0] @ matrices.sketch(KEY, 300, 128, block=5)) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_each_map_is_the_others_derivative(dtype):
    x = jax.random.normal(jax.random.key(1), (3, 130)).astype(dtype)
    y = jax.random.normal(jax.random.key(2), (3, 40))
    s = matrices.sketch(KEY, 130, 40, copies=2)
    _, pull = jax.vjp(lambda x: sketch_projection(x, KEY, 40, copies=2), x)
    (back,) = pull(y)
    assert back.dtype == x.dtype
    assert relative(back, np.asarray(y, np.float64) @ s.T) < (1e-6 if dtype == "float32" else 5e-3)
    _, pull = jax.vjp(lambda y: sketch_projection_transpose(y, KEY, 130, copies=2), y)
    (forth,) = pull(x.astype(jnp.float32))
    assert relative(forth, np.asarray(x, np.float64) @ s) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("over", ["rows", "coordinates", "buckets"])
def test_eight_devices_make_the_same_matrix(over, backend):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    k, p = 128, 16 * 128
    x = jnp.concatenate([jnp.eye(p)[::32], -jnp.eye(p)[5::32]])

    def rows(x):
        return sketch_projection(x, KEY, k, backend=backend)

    def part(x):
        return sketch_projection(x, KEY, k, block_offset=lax.axis_index("i") * 2, backend=backend)

    f, inside, outside = {
        "rows": (rows, P("i"), P("i")),
        "coordinates": (lambda x: lax.psum(part(x), "i"), P(None, "i"), P()),
        "buckets": (
            lambda x: lax.psum_scatter(part(x), "i", scatter_dimension=1, tiled=True),
            P(None, "i"),
            P(None, "i"),
        ),
    }[over]
    # Pallas' interpreter does not keep track of varying axes.
    check = backend == "reference"
    got = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=check))(x)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(x) @ matrices.sketch(KEY, p, k))


# Statistics.


def test_signs_and_rotations_are_balanced_and_uncorrelated():
    k, blocks = 256, 512
    twice = [np.asarray(sketch_projection_transpose(jnp.eye(k), key, blocks * k)) for key in (KEY, KEY + np.uint32(1))]
    position, sign = zip(*((np.abs(s).argmax(axis=0), s.sum(axis=0)) for s in twice), strict=True)
    for s in twice:
        np.testing.assert_array_equal(np.abs(s).sum(axis=0), 1)
    sigma = [s.reshape(blocks, k) for s in sign]
    five = 5 / np.sqrt(blocks * k)
    assert abs(sigma[0].mean()) < five
    assert abs((sigma[0] * sigma[1]).mean()) < five  # of two seeds
    for distance in (1, 31, 32, 63, 64, 65):
        assert abs((sigma[0][distance:] * sigma[0][:-distance]).mean()) < 5 / np.sqrt((blocks - distance) * k)
        assert abs((sigma[0][:, distance:] * sigma[0][:, :-distance]).mean()) < 5 / np.sqrt(blocks * (k - distance))
    gram = (sigma[0].T @ sigma[0])[np.triu_indices(k, 1)] / np.sqrt(blocks)
    assert abs(gram.mean()) < 5 / np.sqrt(gram.size)
    assert abs(gram.var() - 1) < 5 * np.sqrt(2 / gram.size)
    # Within a block, buckets are a rotation of positions; rotations are uniform and differ from block to block.
    turn = [(p.reshape(blocks, k) - np.arange(k)) % k for p in position]
    assert all((t == t[:, :1]).all() for t in turn)
    r = turn[0][:, 0]
    counts = np.bincount(r // 16, minlength=16)
    assert ((counts - blocks / 16) ** 2 / (blocks / 16)).sum() < 15 + 5 * np.sqrt(30)
    assert abs((r == turn[1][:, 0]).sum() - blocks / k) < 5 * np.sqrt(blocks / k)
    assert abs(np.corrcoef(r[1:], r[:-1])[0, 1]) < 5 / np.sqrt(blocks)


def variance(x, y, k, copies=1):
    """The theory: of ⟨sketch x, sketch y⟩, row by row."""
    bound = (x**2).sum(axis=1) * (y**2).sum(axis=1) + (x * y).sum(axis=1) ** 2
    xb, yb = (v.reshape(len(v), -1, k) for v in (x, y))
    inside = (xb**2).sum(axis=2) * (yb**2).sum(axis=2) + (xb * yb).sum(axis=2) ** 2
    once = (bound - inside.sum(axis=1)) / k
    return once / copies + (1 - 1 / copies) * bound / k


def sketches(x, k, keys, copies=1, seed=5):
    words = jax.random.key_data(jax.random.split(jax.random.key(seed), keys))
    rows = jnp.asarray(x, jnp.float32)
    found = jax.jit(lambda keys: lax.map(lambda key: sketch_projection(rows, key, k, copies=copies), keys))(words)
    return np.asarray(found, np.float64)


@pytest.mark.parametrize(("k", "keys", "copies"), [(512, 300, 1), (512, 200, 3), (4096, 200, 1)])
def test_inner_products_are_unbiased_with_the_variance_of_theory(k, keys, copies):
    x = np.random.default_rng(0).standard_normal((64, 4 * k))
    x[1::2] += x[0::2]  # pairs that are not orthogonal
    features = sketches(x, k, keys, copies)
    left, right = x[0::2], x[1::2]
    got = (features[:, 0::2] * features[:, 1::2]).sum(axis=-1)
    error = (got - (left * right).sum(axis=1)) / np.sqrt(variance(left, right, k, copies))
    assert abs(error.mean()) < 5 / np.sqrt(error.size)
    assert abs((error**2).mean() - 1) < 0.05


@pytest.mark.parametrize("name", ["constant", "one-hot", "two of one place", "block-periodic", "alternating"])
def test_adversarial_vectors_keep_their_norm_on_average(name):
    k, blocks, keys = 64, 16, 4000
    i = np.arange(k * blocks)
    x = {
        "constant": np.ones(i.size),
        "one-hot": (i == 77) * 1.0,
        "two of one place": (i % (3 * k) == 5) * (i < 6 * k) * 1.0,  # the same position of two blocks
        "block-periodic": np.random.default_rng(0).standard_normal(k)[i % k],
        "alternating": (-1.0) ** i,
    }[name][None]
    features = sketches(x, k, keys)[:, 0]
    error = (features**2).sum(axis=1) - (x**2).sum()
    theory = variance(x, x, k)[0]
    if name == "one-hot":
        np.testing.assert_array_equal(error, 0)
        assert theory == 0
    else:
        assert abs(error.mean()) < 5 * np.sqrt(theory / keys)
        # The fourth moment of rare collisions is large: two unit vectors collide in one key of 64.
        assert abs(error.var() / theory - 1) < (0.5 if name == "two of one place" else 0.12)


def test_it_errs_no_more_than_the_textbook_count_sketch():
    k, p, trials = 128, 512, 400
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 40, p))
    exact = (x * y).sum(axis=1)
    ours = sketches(np.concatenate([x, y]), k, trials)
    ours = (ours[:, :40] * ours[:, 40:]).sum(axis=-1) - exact
    classic = [matrices.count_sketch(rng, p, k) for _ in range(trials)]
    classic = np.stack([((x @ s) * (y @ s)).sum(axis=1) for s in classic]) - exact
    bound = ((x**2).sum(axis=1) * (y**2).sum(axis=1) + exact**2) / k
    assert abs((classic**2 / bound).mean() - 1) < 0.08  # the yardstick itself
    # A quarter of the pairs share one of the four blocks and never collide.
    assert abs((ours**2 / bound).mean() - 0.75) < 0.06


def test_the_classic_reference_scatters_as_the_textbook_says():
    k, p, copies = 64, 3000, 3
    bucket, sign = (np.asarray(each) for each in classic.buckets_and_signs(jnp.asarray(KEY), p, k, copies))
    expected = np.zeros((p, k))
    for h, s in zip(bucket, sign, strict=True):
        np.add.at(expected, (np.arange(p), h), s / np.sqrt(copies))
    x = np.random.default_rng(0).standard_normal((4, p))
    got = classic.count_sketch(jnp.asarray(x, jnp.float32), KEY, k, copies=copies)
    assert relative(got, x @ expected) < 1e-6
    # Buckets are uniform, signs balanced, copies and neighbours independent.
    counts = np.bincount(bucket.ravel(), minlength=k)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < k - 1 + 5 * np.sqrt(2 * (k - 1))
    assert abs(sign.mean()) < 5 / np.sqrt(sign.size)
    for product in (sign[0] * sign[1], sign[:, 1:] * sign[:, :-1]):
        assert abs(product.mean()) < 5 / np.sqrt(product.size)
    for same in (bucket[0] == bucket[1], bucket[:, 1:] == bucket[:, :-1]):
        assert abs(same.mean() - 1 / k) < 5 * np.sqrt(1 / k / same.size)


def test_the_classic_reference_has_the_variance_of_count_sketch():
    k, p, keys = 128, 512, 400
    x = np.random.default_rng(0).standard_normal((2, p))
    words = jax.random.key_data(jax.random.split(jax.random.key(5), keys))
    rows = jnp.asarray(np.concatenate([x, np.random.default_rng(1).standard_normal((30, p))]), jnp.float32)
    made = np.asarray(jax.jit(lambda w: lax.map(lambda key: classic.count_sketch(rows, key, k), w))(words), np.float64)
    exact = np.asarray(rows, np.float64)
    left, right = exact[::2], exact[1::2]
    error = (made[:, ::2] * made[:, 1::2]).sum(axis=-1) - (left * right).sum(axis=1)
    square = (left**2).sum(axis=1) * (right**2).sum(axis=1) + (left * right).sum(axis=1) ** 2
    theory = (square - 2 * (left**2 * right**2).sum(axis=1)) / k
    assert abs((error / np.sqrt(theory)).mean()) < 5 / np.sqrt(error.size)
    assert abs((error**2 / theory).mean() - 1) < 0.1


# The door.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones(4)}, r"`x` has shape \(4,\)"),
        ({"x": jnp.ones((2, 4), jnp.int32)}, "cast integers to float32"),
        ({"key": jnp.ones(2)}, "two uint32 words"),
        ({"dim": 0}, "`dim` is 0"),
        ({"copies": 0}, "`copies` is 0"),
        ({"block_offset": 2**32}, "`block_offset` is 4294967296"),
        ({"block_offset": np.int64(-1)}, "`block_offset` is -1"),
        ({"block_offset": 2**32 - 1}, "no number comes twice"),
        ({"backend": "cuda"}, "backend 'cuda' is not known"),
        ({"backend": "interpret", "dim": 100}, "a multiple of 128"),
        ({"backend": "interpret", "dim": 2**17, "copies": 4}, "131072 buckets with 4 copies"),
        ({"backend": "interpret", "x": jnp.ones((2, 4), jnp.float16)}, "float32 or bfloat16"),
    ],
)
def test_errors_name_the_remedy(change, message):
    arguments = {"x": jnp.ones((2, 4)), "key": KEY, "dim": 3} | change
    with pytest.raises(ValueError, match=message):
        sketch_projection(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows(backend):
    def there_and_back(x):
        return sketch_projection_transpose(sketch_projection(x, KEY, 128, backend=backend), KEY, 70, backend=backend)

    assert there_and_back(jnp.ones((0, 70))).shape == (0, 70)
    assert jax.vmap(there_and_back)(jnp.ones((3, 0, 70))).shape == (3, 0, 70)
    assert jax.grad(lambda x: there_and_back(x).sum())(jnp.ones((0, 70), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_backend_asked_for_by_name_is_not_replaced():
    for backend in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(ValueError, match="interpret mode"):
            sketch_projection(jnp.ones((2, 128)), KEY, 128, backend=backend)


@pytest.mark.parametrize(("dim", "copies"), [(100, 1), (2**17, 4)])
def test_what_the_tpu_kernel_does_not_have_goes_to_the_reference(dim, copies, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (2, 300))
    expected = sketch_projection(x, KEY, dim, copies=copies, backend="reference")
    back = sketch_projection_transpose(expected, KEY, 300, copies=copies, backend="reference")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    np.testing.assert_array_equal(sketch_projection(x, KEY, dim, copies=copies), expected)
    np.testing.assert_array_equal(sketch_projection_transpose(expected, KEY, 300, copies=copies), back)
