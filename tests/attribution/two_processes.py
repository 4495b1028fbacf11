"""One of two `jax.distributed` processes that train and attribute: `python two_processes.py PORT RANK DIRECTORY`."""

import sys
from pathlib import Path

import jax
import numpy as np
import optax

from jattrib.attribution import trak
from jattrib.core import mesh as meshes
from jattrib.core import stream
from jattrib.data import masks as subset_masks
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Margin
from jattrib.projection import sketch
from jattrib.train import ensemble, loop


def attribute(mesh: jax.sharding.Mesh | None) -> dict[str, np.ndarray]:
    """Train five models, four of a chunk side by side, and attribute with all of them."""
    rng = np.random.default_rng(0)
    train = rng.normal(size=(30, 6)).astype(np.float32), rng.integers(0, 3, 30).astype(np.int32)
    queries = rng.normal(size=(5, 6)).astype(np.float32), rng.integers(0, 3, 5).astype(np.int32)
    model = mlp(6, (8,), 3)
    members = ensemble.Ensemble(model, optax.sgd(0.1), loop.Plan(2, 5, 15), width=4)
    masks = subset_masks.subsets(jax.random.key(1), 30, alpha=0.5, count=5)
    keys = ensemble.member_keys(jax.random.key(2), np.arange(5), np.zeros(5, int))
    trained = ensemble.train(members, train, masks, keys, mesh=mesh)
    features, targets = [], []
    for number in range(5):
        params, state = jax.tree.map(lambda leaf, i=number: leaf[i], (trained.params, trained.state))
        both = [
            trak.features(
                Margin(model.apply, state), params, stream.InMemory(each), projector=sketch.projector(16),
                key=jax.random.key(number), chunk=8, mesh=mesh, progress=False,
            )
            for each in (train, queries)
        ]  # fmt: skip
        features.append(both[0])
        targets.append(both[1].gradients)
    scores = np.asarray(trak.scores(features, targets, relative_damping=0.1))
    return {"scores": scores, "losses": trained.losses}


def main(port: int, rank: int, directory: Path):
    """Attribute on the four devices of both processes."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    mesh = meshes.data_mesh()
    assert mesh.devices.size == 4
    np.savez(directory / f"rank{rank}.npz", **attribute(mesh))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
