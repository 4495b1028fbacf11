"""A pass that is killed with SIGKILL goes on where it stopped, with the bits of one that was not."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jattrib.core import params
from jattrib.core.store import Rows
from tests.distributed import environment

SCRIPT = """
import sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jattrib.core import stream
from jattrib.core.store import Rows
from jattrib.core.types import Fold

what, directory, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])

class Slow:
    read = []
    def __len__(self):
        return 200
    def take(self, indices):
        time.sleep(seconds)
        self.read.append(int(indices[0]))
        return np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)[indices]

def rows(matrix, batch):
    return {"tanh": jnp.tanh(batch @ matrix)}

def gram(batch, valid):
    return jnp.where(valid[:, None], batch, jnp.zeros_like(batch)).T @ batch

if what == "map_rows":
    into = Rows.create_or_open(directory / what, arrays={"tanh": ((8,), np.float32)}, length=200, chunk=6)
    matrix = jax.random.normal(jax.random.key(0), (16, 8))
    result = stream.map_rows(rows, matrix, Slow(), chunk=8, into=into).array("tanh")
else:
    statistic = Fold(lambda: jnp.zeros((16, 16)), gram, lambda state: state)
    result = stream.fold(statistic, Slow(), chunk=8, checkpoint=directory / what, checkpoint_every=0.0)
np.savez(directory / f"{what}.npz", result=result, read=Slow.read)
"""


def start(what, directory, seconds):
    command = [sys.executable, "-c", SCRIPT, what, str(directory), str(seconds)]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)


def underway(what, directory):
    if what == "fold":
        return params.exists(directory / what)
    return (directory / what / "manifest.json").exists() and Rows.open(directory / what).completed.sum() >= 3


@pytest.mark.parametrize("what", ["map_rows", "fold"])
def test_killed_and_resumed(what, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    uninterrupted, first = start(what, whole, 0.0), start(what, killed, 0.2)
    try:
        for _ in range(600):
            if underway(what, killed):
                break
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        assert not (killed / f"{what}.npz").exists()
        resumed = start(what, killed, 0.0)
        for process in (uninterrupted, resumed):
            said = process.communicate(timeout=120)[1]
            assert process.returncode == 0, said
    finally:
        for process in (uninterrupted, first):
            process.kill()
            process.communicate()
    one, other = np.load(whole / f"{what}.npz"), np.load(killed / f"{what}.npz")
    np.testing.assert_array_equal(one["result"], other["result"])
    assert len(one["read"]) == 25
    assert 0 < len(other["read"]) < 25
    assert other["read"].min() > 0
