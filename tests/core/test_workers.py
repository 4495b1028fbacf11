"""A program in processes of its own: the same numbers, in order, and nothing left behind however it ends."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core.errors import WorkerError
from jattrib.core.workers import Workers
from tests.distributed import environment

LIKE = (jax.ShapeDtypeStruct((3,), np.float32),)


def product(scale, operand, row):
    return {"product": scale * operand["matrix"] @ row, "sum": row.sum()}


@pytest.fixture
def operand():
    return {"matrix": jnp.arange(6, dtype=jnp.float32).reshape(2, 3)}


def running(pid):
    """Whether a process runs; one that has ended and is not yet waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_rows_are_computed_in_order_by_processes_that_end_with_the_block(operand):
    rows = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    with Workers(partial(product, jnp.float32(2)), operand, LIKE, count=2) as workers:
        assert not workers._processes  # nothing to do yet
        found = [*workers.map((row,) for row in rows[:5]), *workers.map((row,) for row in rows[5:])]
        processes = list(workers._processes)
        assert len({process.pid for process in processes} | {os.getpid()}) == 3
        assert all(running(process.pid) for process in processes)
    assert not any(running(process.pid) for process in processes)
    for row, each in zip(rows, found, strict=True):
        assert sorted(each) == ["product", "sum"]
        np.testing.assert_allclose(each["product"], 2 * np.asarray(operand["matrix"]) @ row, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(each["sum"], row.sum(), rtol=1e-5, atol=1e-6)


def test_a_program_that_cannot_be_traced_raises_each_time(operand):
    raised = []

    def untraceable(operand, row):
        raised.append(1)
        raise ArithmeticError("no such program")

    with Workers(untraceable, operand, LIKE, count=1) as workers:
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="no such program"):
                next(workers.map([(np.ones(3, np.float32),)]))
        assert len(workers._processes) == 1
    assert len(raised) == 2


def test_double_precision_stays(x64):
    rows = np.random.default_rng(1).normal(size=(2, 3))
    matrix = {"matrix": jnp.asarray(np.random.default_rng(2).normal(size=(2, 3)))}
    with Workers(partial(product, 1.0), matrix, (jax.ShapeDtypeStruct((3,), np.float64),), count=1) as workers:
        for row, each in zip(rows, workers.map((row,) for row in rows), strict=True):
            assert each["product"].dtype == np.float64
            np.testing.assert_allclose(each["product"], np.asarray(matrix["matrix"]) @ row, rtol=1e-13)


def test_a_process_that_is_killed_is_an_error_that_says_so(operand):
    row = np.ones(3, np.float32)
    with Workers(partial(product, 1.0), operand, LIKE, count=1) as workers:
        next(workers.map([(row,)]))
        workers._processes[0].kill()
        with pytest.raises(WorkerError, match=r"(?s)status -9.*remedy"):
            next(workers.map([(row,)]))


LONG = """
import signal
import jax, jax.numpy as jnp, numpy as np
from jattrib.core.workers import Workers

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin by ignoring it

def long(operand, row):
    return jax.lax.fori_loop(0, 2**31 - 1, lambda i, x: jnp.sin(x + operand), row)

with Workers(long, jnp.float32(1), (jax.ShapeDtypeStruct((), np.float32),), count=2) as workers:
    workers._start()
    print(*(process.pid for process in workers._processes), flush=True)
    list(workers.map([(np.float32(0),)] * 4))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_in_the_middle_of_a_row_with_the_one_that_started_them(tmp_path, how):
    """A script without a guard for its main module, too: workers do not import it."""
    script = tmp_path / "long.py"
    script.write_text(LONG)
    with subprocess.Popen(
        [sys.executable, script], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2, parent.stderr.read()
        wait_until(lambda: all(seconds(pid) > 0.2 for pid in pids))  # loaded, and at work
        assert all(map(running, pids))
        parent.send_signal(how)
        assert parent.wait(60) != 0
        wait_until(lambda: not any(map(running, pids)))


def seconds(pid):
    """Return the processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
