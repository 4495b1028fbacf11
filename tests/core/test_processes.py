"""Two processes of `jax.distributed`, two devices each, have what one process has."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.distributed import run_two

ROWS, CHUNK = 37, 8


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_two(Path(__file__).with_name("two_processes.py"), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)


def test_both_have_the_same_bits(ranks):
    assert ranks[0].keys() == ranks[1].keys()
    for name in ranks[0]:
        if not name.startswith("read"):
            np.testing.assert_array_equal(ranks[0][name], ranks[1][name], err_msg=name)


def test_map_rows_is_the_matrix_product(ranks, data):
    noise = np.asarray(jax.random.normal(jax.random.key(1), (3, 2)), np.float64)
    product = data.astype(np.float64) @ (np.arange(6).reshape(3, 2) + noise)
    for way in ("map", "stored"):
        np.testing.assert_allclose(ranks[0][f"{way}_product"], product, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ranks[0][f"{way}_sum"], data.sum(axis=1, dtype=np.float64), rtol=1e-5, atol=1e-6)


def test_each_reads_only_its_own_rows(ranks):
    halves = [set(each["read"].tolist()) for each in ranks]
    assert halves[0] | halves[1] == set(range(ROWS))
    # the last row is what pads the last chunk, so that either may read it
    assert halves[0] & halves[1] <= {ROWS - 1}
    assert {row % CHUNK // (CHUNK // 2) for row in halves[0] - {ROWS - 1}} == {0}


def test_what_is_stored_is_not_read_again(ranks):
    assert all(each["read_again"].size == 0 for each in ranks)


def test_fold_goes_on_from_its_checkpoint(ranks, data):
    gram = 2 * data.T.astype(np.float64) @ data
    assert str(ranks[0]["failed"]) == "the source failed"
    assert min(ranks[0]["read_resumed"]) == 3 * CHUNK
    np.testing.assert_allclose(ranks[0]["fold_gram"], gram, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ranks[0]["fold_mean"], gram / ROWS, rtol=1e-5, atol=1e-6)
    assert ranks[0]["fold_count"] == ROWS
