"""An index of features beside the exact answer: what it finds, its signs and scores, what it refuses."""

import sys

import numpy as np
import pytest

from jattrib.attribution import features, index
from jattrib.core import store
from jattrib.core.errors import InvalidInputError, StoreError

N, DIM = 3000, 16


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(N, DIM)) * rng.lognormal(sigma=0.5, size=(N, 1))).astype(np.float32)
    return rows, rng.normal(size=(6, DIM)).astype(np.float32)


@pytest.mark.parametrize("harmful", [False, True])
def test_a_flat_index_is_exact_in_both_directions(setting, harmful):
    rows, directions = setting
    exact = features.top(rows, directions, k=7, harmful=harmful)
    found = index.search(index.build(rows, factory="Flat"), directions, k=7, harmful=harmful)
    np.testing.assert_array_equal(found.indices, exact.indices)
    np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-4)
    wanted = -rows[found.indices[2, 0]].astype(float) @ directions[2] / N
    assert found.scores[2, 0] == pytest.approx(wanted, rel=1e-5)
    assert index.recall(found, exact) == 1


@pytest.mark.parametrize("factory", ["HNSW32", "IVF16,Flat"])
def test_approximate_indices_find_most_and_more_with_more_effort(setting, factory):
    rows, directions = setting
    exact, built = features.top(rows, directions, k=10), index.build(rows, factory=factory)
    little, much = (index.recall(index.search(built, directions, k=10, effort=e), exact) for e in (10, 400))
    if factory.startswith("IVF"):  # all cells are opened
        assert much == 1
    assert 0.3 < little <= much
    assert much > 0.95
    found = index.search(built, directions, k=10)
    products = np.einsum("qkd,qd->qk", rows[found.indices].astype(float), directions)
    np.testing.assert_allclose(found.scores, -products / N, rtol=1e-4, atol=1e-9)  # of those found, scores are exact


@pytest.mark.parametrize("factory", ["RR16,IVF64,Flat", "IVF64,Flat,RFlat", "RR16,HNSW8", "HNSW8,RFlat", "NSG8"])
def test_effort_reaches_what_is_wrapped(setting, factory):
    """A rotation, or rows that are compared again, around cells or a graph; and a graph of another kind."""
    rows, directions = setting
    exact, built = features.top(rows, directions, k=1), index.build(rows, factory=factory)
    little, much = (index.recall(index.search(built, directions, k=1, effort=e), exact) for e in (1, 1000))
    assert little < 0.9
    assert much == 1


def test_an_index_of_a_store_says_what_it_is_of_and_refuses_others(setting, tmp_path):
    rows, directions = setting
    identity = {"parameters": "abc", "projection": "seed 0"}
    kept = store.Rows.create_or_open(
        tmp_path / "rows", arrays={features.NAME: ((DIM,), np.float32)}, length=N, chunk=1000, identity=identity
    )
    for start in range(0, N, 1000):
        kept.write(start, {features.NAME: rows[start : start + 1000]})
    built = index.build(kept, factory="Flat")
    index.save(built, tmp_path / "index")
    again = index.load(tmp_path / "index", identity={"projection": "seed 0"})
    np.testing.assert_array_equal(index.search(again, directions, k=3).indices, features.top(kept, directions, k=3)[0])
    with pytest.raises(StoreError, match="its projection is 'seed 0', this run's is 'seed 1'"):
        index.load(tmp_path / "index", identity={"projection": "seed 1"})
    other = index.Index(index.build(rows[::-1], factory="Flat").searcher, N, DIM, {"projection": "seed 1"})
    index.save(other, tmp_path / "other")
    (tmp_path / "index" / index.FILE).write_bytes((tmp_path / "other" / index.FILE).read_bytes())  # killed half-way
    with pytest.raises(StoreError, match="not what its manifest describes"):
        index.load(tmp_path / "index", identity={"projection": "seed 0"})
    (tmp_path / "index" / index.FILE).write_bytes(b"nothing")
    with pytest.raises(StoreError, match="build it anew"):
        index.load(tmp_path / "index")


def test_bad_input_is_refused(setting, monkeypatch, shapes_unchecked):
    rows, directions = setting
    built = index.build(rows[:50], factory="Flat")
    with pytest.raises(InvalidInputError, match="16 features a training example, 5 a direction"):
        index.search(built, directions[:, :5], k=1)
    for refused in (index.search, lambda _, directions, k: features.top(rows, directions, k=k)):
        with pytest.raises(InvalidInputError, match=r"(?s)directions of the shape \[16\].*direction\[None\]"):
            refused(built, directions[0], k=1)
    with pytest.raises(InvalidInputError, match="k = 51, effort = 64"):
        index.search(built, directions, k=51)
    with pytest.raises(InvalidInputError, match="factory = 'Pyramid' for 50 rows of 16"):
        index.build(rows[:50], factory="Pyramid")
    with pytest.raises(InvalidInputError, match="factory = 'IVF64,Flat' for 50 rows of 16"):
        index.build(rows[:50], factory="IVF64,Flat")
    with pytest.raises(InvalidInputError, match=r"factory = 'IDMap,Flat' for 50 rows of 16[\s\S]*numbers itself"):
        index.build(rows[:50], factory="IDMap,Flat")
    for value in (np.nan, np.inf):
        bad = np.where(np.arange(6)[:, None] == 2, value, directions)
        with pytest.raises(InvalidInputError, match="direction 2 is not finite"):
            index.search(built, bad, k=1)
    with pytest.raises(InvalidInputError, match="the row of features 7 is not finite"):
        index.build(np.where(np.arange(50)[:, None] == 7, np.nan, rows[:50]), factory="Flat")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'jattrib\[index\]'"):
        index.build(rows[:50])
