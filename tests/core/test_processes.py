"""Two processes of `jax.distributed`, two devices each, have what one process has."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

HERE = Path(__file__).parent
ROWS, CHUNK = 37, 8


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    paths = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "two_processes.py"), str(port), str(rank), str(directory)],
            env={**os.environ, **flags, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [dict(np.load(directory / f"rank{rank}.npz")) for rank in (0, 1)]


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
