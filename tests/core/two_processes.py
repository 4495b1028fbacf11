"""One of two `jax.distributed` processes: `python two_processes.py PORT RANK DIRECTORY`.  Not a test by itself."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jattrib.core import mesh as meshes
from jattrib.core import stream
from jattrib.core.store import Rows
from jattrib.core.types import Fold

ROWS, CHUNK = 37, 8
IDENTITY = {"seed": 3}


class Watched:
    """A source that keeps which rows this process has read, and fails when it is told to."""

    def __init__(self, failing_at: int | None = None):
        self.data = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
        self.read: list[int] = []
        self.failing_at = failing_at

    def __len__(self):
        return ROWS

    def take(self, indices: np.ndarray):
        if self.failing_at is not None and self.failing_at in indices // CHUNK:
            raise RuntimeError("the source failed")
        self.read.extend(indices.tolist())
        return self.data[indices]


def project(operand, batch):
    matrix, key = operand
    noise = jax.random.normal(key, (3, 2))
    return {"product": batch @ (matrix + noise), "sum": jnp.sum(batch, axis=1)}


def gram(factor, batch, valid):
    weighted = jnp.where(valid[:, None], batch, jnp.zeros_like(batch))
    return {"gram": factor * (weighted.T @ weighted), "count": jnp.sum(valid, dtype=jnp.int32)}


def main(port: int, rank: int, directory: Path):
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    mesh = meshes.data_mesh()
    assert mesh.devices.size == 4, mesh
    assert jax.process_count() == 2
    operand = (np.arange(6, dtype=np.float32).reshape(3, 2), jax.random.key(1))
    watched = Watched()
    found = {f"map_{k}": v for k, v in stream.map_rows(project, operand, watched, chunk=CHUNK, mesh=mesh).items()}
    found["read"] = np.array(watched.read)

    rows = Rows.create_or_open(
        directory / "rows", arrays={"product": ((2,), np.float32), "sum": ((), np.float32)}, length=ROWS, chunk=5
    )
    stored = stream.map_rows(project, operand, Watched(), chunk=CHUNK, mesh=mesh, into=rows)
    found |= {f"stored_{name}": stored.array(name) for name in stored.arrays}
    again = Watched()
    stream.map_rows(project, operand, again, chunk=CHUNK, mesh=mesh, into=rows)
    found["read_again"] = np.array(again.read)

    statistic = Fold(
        init=lambda: {"gram": jnp.zeros((3, 3)), "count": jnp.zeros((), jnp.int32)},
        update=jax.tree_util.Partial(gram, jnp.asarray(2.0)),
        finish=lambda state: {**state, "mean": state["gram"] / state["count"].astype(jnp.float32)},
    )
    keep = {"chunk": CHUNK, "mesh": mesh, "checkpoint": directory / "sum", "checkpoint_every": 0.0}
    try:
        stream.fold(statistic, Watched(failing_at=3), **keep, identity=IDENTITY)
    except RuntimeError as error:
        found["failed"] = np.array(str(error))
    resumed = Watched()
    found |= {f"fold_{k}": np.asarray(v) for k, v in stream.fold(statistic, resumed, **keep, identity=IDENTITY).items()}
    found["read_resumed"] = np.array(resumed.read)
    np.savez(directory / f"rank{rank}.npz", **found)
    jax.distributed.shutdown()


main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
