# pyright: reportMissingImports=false
"""TRAK's cost: featurising (gradients and projection) and training ensembles, beside `traker` 0.3.2 and PyTorch.

    jattrib bench trak --out bench/results/trak.jsonl

Both sides featurise the same images at the same checkpoint (784-128-10, 101,770 parameters) in batches of the same size
(three sizes: a random matrix that is made anew for each batch costs large ones least) to k = 1,024, in float32, and
write features and weights to disk as their pipelines do.  The package takes part twice: as it comes on a CPU (normal
numbers, in blocks of 100 columns that are drawn anew for each batch) and, as the stronger opponent, with the whole
matrix kept in memory, an option of its projector.  Neither side's first call counts: compilation here, drawing the
whole matrix there.
"""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import ensemble, harness
from jattrib.attribution import trak
from jattrib.core import mesh as meshes
from jattrib.core import store, stream
from jattrib.data import vision
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Margin
from jattrib.projection import dense, sketch

SIZES = (784, 128, 10)
DIM = 1024
BATCHES = (64, 128, 256)
EXAMPLES = 1024
PACKAGES = ("torch", "traker")
OTHERS = {"default": "traker, as it comes", "whole": "traker, whole matrix kept"}


def run() -> list[harness.Row]:
    """Measure featurising, its memory, and ensembles."""
    harness.require("trak", "torch")
    return [row for batch in BATCHES for row in featurizing(batch)] + ensemble.run()


def featurizing(batch: int) -> list[harness.Row]:
    """Measure featurising in batches of one size; the largest in memory, too."""
    projections = ("sketch", "dense")
    sides = {name: ours(name, batch) for name in projections} | {name: package(name, batch) for name in OTHERS}
    timings = harness.compare(sides, calls=3)
    note = f"MLP {'-'.join(map(str, SIZES))}, batch {batch}, k = {DIM}, {EXAMPLES} examples a call"
    rows = [
        harness.rates(
            f"featurize, {name}, batch {batch}", timings[name], timings[other], work=EXAMPLES, unit="examples/s",
            other_name=OTHERS[other], packages=PACKAGES, note=note,
        )
        for name, other in itertools.product(projections, OTHERS)
    ]  # fmt: skip
    if batch != max(BATCHES):
        return rows
    peaks = {name: harness.peak_memory("bench.trak:ours", name, batch) for name in projections}
    peaks |= {name: harness.peak_memory("bench.trak:package", name, batch) for name in OTHERS}
    return rows + [
        harness.memories(
            f"featurize, {name}, batch {batch}, peak memory", peaks[name], peaks[other], other_name=OTHERS[other],
            packages=PACKAGES, note=note,
        )
        for name, other in itertools.product(projections, OTHERS)
    ]  # fmt: skip


def ours(projection: str, batch: int) -> Callable[[], Any]:
    """Return the function that featurises with this package, into a store of its own."""
    projector = {"sketch": sketch.projector, "dense": dense.projector}[projection](DIM)
    model = mlp(SIZES[0], SIZES[1:-1], SIZES[-1])
    params, state = model.init(jax.random.key(0))
    source, key = stream.InMemory(tuple(examples())), jax.random.key(1)

    def work() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            rows = store.Rows.create(
                Path(folder) / "features", arrays=trak.layout(projector), length=EXAMPLES, chunk=EXAMPLES,
                identity={"projection": projection},
            )  # fmt: skip
            return trak.features(
                Margin(model.apply, state), params, source, projector=projector, key=key, chunk=batch, into=rows,
                progress=False,
            )  # fmt: skip

    return work


def package(variant: str, batch: int) -> Callable[[], Any]:
    """Return the function that featurises with the package, into its own store."""
    import torch

    from bench.peers import traker

    torch.set_num_threads(meshes.cores())
    params, _ = mlp(SIZES[0], SIZES[1:-1], SIZES[-1]).init(jax.random.key(0))
    folder = tempfile.TemporaryDirectory()
    found = traker.make(
        traker.classifier(SIZES), Path(folder.name), examples=EXAMPLES, dim=DIM, whole_matrix=variant == "whole"
    )
    state, batches = traker.state_from(params), list(traker.batches(examples(), batch))

    def work() -> Any:
        assert folder.name  # holds the folder as long as the function lives
        traker.featurize_again(found, state, 0, batches)
        return traker.stored(found, 0, "grads")

    return work


def examples() -> vision.Dataset:
    """Return the images that both sides featurise."""
    train, _ = vision.fashion_mnist_excerpt()
    return vision.Dataset(*(np.ascontiguousarray(each[:EXAMPLES]) for each in train))


if __name__ == "__main__":
    harness.main(run, "trak")
