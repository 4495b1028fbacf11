"""Runs scripts as processes of their own: two of `jax.distributed` on this machine, two CPU devices each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def environment(**settings: str) -> dict[str, str]:
    """Return the environment of a process that imports this checkout."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, **settings}


def run_two(script: Path, directory: Path) -> list[dict[str, np.ndarray]]:
    """Run `python script PORT RANK DIRECTORY` for both ranks, and return the arrays each leaves in `rankR.npz`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), str(rank), str(directory)],
            env=environment(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2"),
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
