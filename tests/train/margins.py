"""Trains ten models, keeps their margins: `margins.py DIRECTORY STRATEGY`, to be killed, or `PORT RANK DIRECTORY`."""

import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import optax

from jattrib.core import mesh as meshes
from jattrib.data import masks as subset_masks
from jattrib.models.mlp import mlp
from jattrib.models.outputs import margin
from jattrib.train import chunk, ensemble, loop

N, MODELS = 30, 10


def margins(
    directory: Path | None, mesh: jax.sharding.Mesh | None = None, strategy: chunk.Strategy = "vmap"
) -> np.ndarray:
    """Return the margins of five queries, kept in chunks of two models."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(N, 6)).astype(np.float32), rng.integers(0, 3, N).astype(np.int32)
    model = mlp(6, (8,), 3)
    masks = subset_masks.subsets(jax.random.key(1), N, alpha=0.5, count=MODELS)
    keys = ensemble.member_keys(jax.random.key(2), np.arange(MODELS), np.zeros(MODELS, int))
    members = ensemble.Ensemble(
        model, optax.sgd(0.1), loop.Plan(40, 5, 15), strategy=strategy, width=4 if mesh is not None else 2
    )

    def outputs(queries, trained):
        logits, _ = model.apply(trained.params, trained.state, queries[0])
        return jax.vmap(margin)(logits, queries[1])

    bound = jax.tree_util.Partial(outputs, jax.tree.map(lambda leaf: leaf[:5], data))
    return ensemble.collect(bound, members, data, masks, keys, mesh=mesh, directory=directory)


def main() -> None:
    """Train here until killed, or as one of two processes of two devices each."""
    if len(sys.argv) == 3:
        strategy = next(each for each in get_args(chunk.Strategy) if each == sys.argv[2])
        margins(Path(sys.argv[1]), strategy=strategy)
        return
    port, rank, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    np.savez(directory / f"rank{rank}.npz", margins=margins(directory / "rows", meshes.data_mesh()))


if __name__ == "__main__":
    main()
