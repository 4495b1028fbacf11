# pyright: reportMissingImports=false
"""The cost of influence with EK-FAC, factors and scores, beside `kronfluence`.

    jattrib bench influence --out bench/results/influence.jsonl

Both sides have the same trained weights (an MLP 784-256-64-10 and a net of two convolutions, trained here for a few
epochs), the same 2,000 training images and 100 queries, the empirical Fisher matrix, a damping of a tenth of the mean
eigenvalue a layer, batches of 250 and float32 with eigendecompositions in float64.  A call begins with nothing and ends
with all scores; the first, which compiles, does not count.  With the empirical Fisher nothing is random, so scores can
be held against each other; with labels drawn from the model, each side by its own generator, they nearly agree too.
"""

import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import harness
from jattrib.attribution import influence
from jattrib.core import mesh as meshes
from jattrib.core import stream
from jattrib.core.types import Params
from jattrib.curvature import ekfac
from jattrib.data import vision
from jattrib.models.mlp import mlp
from jattrib.models.model import Model
from jattrib.models.outputs import Logits, Loss, Margin, draw_label, label_loss
from jattrib.train import loop

WIDTHS, CHANNELS = (256, 64), (1, 16, 32)
FLAT = CHANNELS[-1] * 7 * 7
TRAIN, QUERIES, BATCH, EPOCHS = 2000, 100, 250, 5
PACKAGES = ("torch", "kronfluence")
KINDS = ("mlp", "conv")


class Case(NamedTuple):
    """A trained model and its data."""

    model: Model
    params: Params
    state: Any
    train: vision.Dataset
    queries: vision.Dataset


def run() -> list[harness.Row]:
    """Measure EK-FAC end to end, its memory, and whether both sides agree."""
    harness.require("kronfluence", "torch")
    rows = []
    for kind in KINDS:
        sides = {"ours": ours(kind), "other": package(kind)}
        timings = harness.compare(sides, calls=3)
        note = f"{kind}, {TRAIN} examples, {QUERIES} queries, batch {BATCH}; {agreement(kind)}"
        rows.append(
            harness.rates(
                f"EK-FAC influence, {kind}", timings["ours"], timings["other"], work=TRAIN, unit="examples/s",
                other_name="kronfluence", packages=PACKAGES, note=note,
            )
        )  # fmt: skip
        peaks = [harness.peak_memory(f"bench.influence:{side}", kind) for side in ("ours", "package")]
        rows.append(
            harness.memories(
                f"EK-FAC influence, {kind}, peak memory", *peaks, other_name="kronfluence", packages=PACKAGES
            )
        )
    return rows


def agreement(kind: str) -> str:
    """Return in words how the scores of both sides correlate, of all pairs together."""
    found = []
    for empirical in (True, False):
        mine, theirs = -ours(kind, empirical)(), package(kind, empirical)()
        found.append(float(np.corrcoef(mine.ravel(), theirs.ravel())[0, 1]))
    return f"scores correlate {found[0]:.6f} (empirical Fisher), {found[1]:.4f} (labels drawn)"


def ours(kind: str, empirical: bool = True) -> Callable[[], np.ndarray]:
    """Return the function that scores with this package."""
    model, params, state, train, queries = trained(kind)
    logits, loss, margin = (output(model.apply, state) for output in (Logits, Loss, Margin))
    source, asked = stream.InMemory(tuple(train)), stream.InMemory(tuple(queries))
    fisher = (
        ekfac.empirical_fisher(loss) if empirical
        else ekfac.true_fisher(logits, label_loss, draw_label, key=jax.random.key(2))
    )  # fmt: skip

    def work() -> np.ndarray:
        factors = ekfac.fit(fisher, params, source, chunk=BATCH, progress=False)
        directions = ekfac.inverse(factors)(influence.gradients(margin, params, asked, chunk=BATCH))
        return influence.scores(loss, params, source, directions, chunk=BATCH, progress=False)

    return work


def package(kind: str, empirical: bool = True) -> Callable[[], np.ndarray]:
    """Return the function that scores with the package, which keeps its factors on disk."""
    import torch

    from bench.peers import kronfluence, traker

    torch.set_num_threads(meshes.cores())
    torch.manual_seed(0)
    _, params, _, train, queries = trained(kind)
    layers = [params["layers"][str(number)] for number in range(len(params["layers"]))]
    if kind == "mlp":
        model = traker.classifier((784, *WIDTHS, 10))
        model = kronfluence.load(model, [(np.asarray(each["kernel"]).T, each["bias"]) for each in layers])
        flat = [vision.Dataset(each.inputs.reshape(len(each.labels), -1), each.labels) for each in (train, queries)]
    else:
        model = kronfluence.convolutional(CHANNELS, 10, FLAT)
        kernels = [(each["kernel"] if each["kernel"].ndim == 4 else each["kernel"].T, each["bias"]) for each in layers]
        model = kronfluence.load(model, kernels)
        flat = [
            vision.Dataset(np.ascontiguousarray(each.inputs.reshape(-1, 1, 28, 28)), each.labels)
            for each in (train, queries)
        ]

    def work() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            # A copy, as the package wraps the layers of the model that it is given, and does so again in every call.
            return kronfluence.scores(copy.deepcopy(model), Path(folder), *flat, batch=BATCH, empirical=empirical)

    return work


def trained(kind: str) -> Case:
    """Return the model of a kind after a few epochs, the same in every process."""
    whole, test = vision.fashion_mnist_excerpt()
    train, queries = (vision.Dataset(*(np.ascontiguousarray(leaf[:count]) for leaf in each))
                      for each, count in ((whole, TRAIN), (test, QUERIES)))  # fmt: skip
    model = mlp(784, WIDTHS, 10) if kind == "mlp" else convolutional()
    plan = loop.Plan(epochs=EPOCHS, batch_size=BATCH, size=TRAIN)
    initial = model.init(jax.random.key(0))
    order = loop.schedule(jax.random.key(1), jnp.ones(TRAIN, bool), plan)
    data, optimizer = jax.tree.map(jnp.asarray, tuple(train)), optax.sgd(0.05, momentum=0.9)
    step = jax.jit(loop.step(loop.classification_loss(model), optimizer, data, None))
    carry = (*initial, optimizer.init(initial[0]))
    for number in range(plan.steps):
        carry, _ = step(carry, jax.tree.map(lambda leaf, number=number: leaf[number], order))
    return Case(model, carry[0], carry[1], train, queries)


def convolutional() -> Model:
    """Return 3×3 convolutions of stride 2 with ReLU between them, and a linear layer, in PyTorch's order of axes."""

    def init(key: jax.Array) -> tuple[Params, dict[str, Any]]:
        pairs = list(itertools.pairwise(CHANNELS))
        layers = {}
        for number, (before, after) in enumerate(pairs):
            kernel = jax.random.normal(jax.random.fold_in(key, number), (after, before, 3, 3)) / np.sqrt(4.5 * before)
            layers[str(number)] = {"kernel": kernel, "bias": jnp.zeros(after)}
        kernel = jax.random.normal(jax.random.fold_in(key, len(pairs)), (FLAT, 10)) / np.sqrt(FLAT)
        layers[str(len(pairs))] = {"kernel": kernel, "bias": jnp.zeros(10)}
        return {"layers": layers}, {}

    def apply(params: Params, state: Any, x: jax.Array, /, *, train: bool = False) -> tuple[jax.Array, Any]:
        del train
        layers, x = params["layers"], x.reshape(len(x), 1, 28, 28)
        for number in range(len(CHANNELS) - 1):
            layer = layers[str(number)]
            x = jax.lax.conv_general_dilated(x, layer["kernel"], (2, 2), [(1, 1), (1, 1)])
            x = jax.nn.relu(x + layer["bias"].reshape(1, -1, 1, 1))
        last = layers[str(len(CHANNELS) - 1)]
        return x.reshape(len(x), -1) @ last["kernel"] + last["bias"].reshape(1, -1), state

    return Model(init, apply)


if __name__ == "__main__":
    harness.main(run, "influence")
