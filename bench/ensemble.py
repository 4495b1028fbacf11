# pyright: reportMissingImports=false
"""The cost of an ensemble: models a second of `train.ensemble`, beside a plain PyTorch loop over the same models.

Both sides train the demo's classifier (784-64-10, SGD with momentum, a triangular rate set at every step) on random
halves of the 5,000 embedded images, with the same epochs and batch size.  The loop is PyTorch as one would write it
with care: tensors in memory, indexing for batches, the fused optimiser.  It trains one model after another, so that
some models tell its rate; ours is that of a whole ensemble, with the start of its processes.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench import harness
from jattrib.core import mesh as meshes
from jattrib.data import masks as subset_masks
from jattrib.data import vision
from jattrib.models.mlp import mlp
from jattrib.recipes import build, config
from jattrib.train import ensemble
from jattrib.train.loop import Plan

SIZES = (784, 64, 10)
MODELS, MODELS_OF_LOOP = 1000, 32
PLAN = Plan(epochs=30, batch_size=250, size=2500)
TRAINING = config.Training()


def run() -> list[harness.Row]:
    """Measure ensembles."""
    harness.require("torch")
    train, _ = vision.fashion_mnist_excerpt()
    masks = subset_masks.subsets(jax.random.key(0), len(train.labels), alpha=0.5, count=MODELS)
    keys = ensemble.member_keys(jax.random.key(1), np.arange(MODELS), np.zeros(MODELS, int))
    strategy = "processes" if jax.default_backend() == "cpu" else "vmap"
    members = ensemble.Ensemble(
        mlp(SIZES[0], SIZES[1:-1], SIZES[-1]), build.optimizer(TRAINING, PLAN.steps), PLAN, strategy=strategy, width=50
    )
    threads = sorted({1, meshes.cores()})
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: ensemble.train(members, tuple(train), masks, keys)}
    sides |= {str(count): torch_loop(train, masks[:MODELS_OF_LOOP], count) for count in threads}
    timings = harness.compare(sides, calls=3)
    sizes, plan = "-".join(map(str, SIZES)), f"{PLAN.epochs} epochs of {PLAN.size}, batch {PLAN.batch_size}"
    note = f"MLP {sizes}, {MODELS} models ({MODELS_OF_LOOP} by the loop), {plan}, strategy {strategy}"
    return [
        harness.rates(
            "ensemble", timings["ours"], timings[str(count)], work=MODELS, other_work=MODELS_OF_LOOP, unit="models/s",
            other_name=f"PyTorch loop, {count} thread{'s' if count > 1 else ''}", packages=("torch",),
            note=note,
        )
        for count in threads
    ]  # fmt: skip


def torch_loop(train: vision.Dataset, masks: np.ndarray, threads: int) -> Callable[[], Any]:
    """Return the function that trains a model a mask, one after another, with PyTorch."""
    import torch

    from bench.peers import traker

    inputs = torch.from_numpy(train.inputs.reshape(len(train.labels), -1))
    labels = torch.from_numpy(train.labels.astype(np.int64))
    rate = build.learning_rate(TRAINING, PLAN.steps)
    rates = np.array([rate(step) for step in range(PLAN.steps)]).tolist()

    def work() -> Any:
        torch.set_num_threads(threads)
        trained = []
        for seed, mask in enumerate(masks):
            torch.manual_seed(seed)
            model = traker.classifier(SIZES)
            optimizer = torch.optim.SGD(model.parameters(), lr=rates[0], momentum=TRAINING.momentum, fused=True)
            chosen, steps = torch.from_numpy(np.flatnonzero(mask)), iter(rates)
            for _ in range(PLAN.epochs):
                for batch in chosen[torch.randperm(len(chosen))].split(PLAN.batch_size):
                    optimizer.param_groups[0]["lr"] = next(steps)
                    loss = torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            trained.append(model.state_dict())
        return trained

    return work


if __name__ == "__main__":
    harness.main(run, "ensemble")
