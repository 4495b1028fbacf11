import jax.numpy as jnp
import numpy as np
import pytest

from bench import harness, projection
from jattrib_kernels.sketch_projection.cases import Case


def test_rows_compare_with_a_copy_a_product_and_everyone_else_fastest_first(monkeypatch):
    def others(x, dim):
        dense = {"slow": projection.Side(lambda: None), "fast": projection.Side(lambda: None)}
        return dense, {}, ["nobody is installed"]

    times = {"sketch": 1.0, "inside": 5.0, "copy": 4.0, "dense": 2.0, "product": 3.0, "slow": 8.0, "fast": 6.0}
    monkeypatch.setattr(projection, "peers", others)
    monkeypatch.setattr(
        projection, "timed",
        lambda sides, **_: {name: harness.Timing(*[times.get(name, 9.0)] * 4, 3) for name in sides},
    )  # fmt: skip
    monkeypatch.setattr(
        projection, "uncached", lambda sides, **_: {name: harness.Timing(*[10 * times[name]] * 4, 3) for name in sides}
    )
    rows = projection.speeds((Case("one", 8, 512, 128),), backend="reference", sustain=0, product=16)
    ratios = {(row.case.partition(", ")[0].split()[1], row.other_name): row.ratio for row in rows}
    assert ratios == {
        ("sketch", "a copy"): 2.0,  # a copy writes as much as it reads
        ("sketch", "called by itself"): 0.2,
        ("sketch", "fast"): 6.0,
        ("sketch", "slow"): 8.0,
        ("sketch", "CountSketch, scattered by XLA"): 9.0,
        ("dense", "a product of 16 x 16 float32"): pytest.approx(3.0 * 8 * 512 * 128 / 16**3 / 2.0),
        ("dense", "fast"): 3.0,
        ("dense", "slow"): 4.0,
    }
    (fresh,) = [row for row in rows if "no cache" in row.case]
    assert (fresh.ours, fresh.other) == (pytest.approx(8 / 10.0), pytest.approx(8 / 60.0))
    assert [row.other_name for row in rows if "the fastest other" in row.case] == ["fast", "fast"]
    assert "nobody is installed" in rows[0].note
    assert rows[0].ours == pytest.approx(8 * 512 * 4 / 1e9)


def test_repeats_are_divided_out(monkeypatch):
    clock, calls = [0.0], [0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def work():
        calls[0] += 1
        clock[0] += 5.0 if calls[0] == 1 else 0.1

    found = projection.timed({"a": projection.Side(work)}, sustain=1.0, calls=2)["a"]
    assert (found.first, found.calls) == (5.0, 2)
    np.testing.assert_allclose(found[:3], 0.1)
    assert calls[0] == 2 + 10 * 3


def test_both_forms_make_the_same_features():
    made = [projection.gradients(form, (12, 8, 3), 5, 32)() for form in ("streamed", "naive")]
    np.testing.assert_allclose(*made, rtol=1e-5, atol=1e-6)
    assert jnp.abs(made[0]).max() > 0


def test_a_copy_is_one():
    x = jnp.arange(6.0).reshape(2, 3)
    copy = projection.copier(x)
    for _ in range(2):
        np.testing.assert_array_equal(copy(), -x)
