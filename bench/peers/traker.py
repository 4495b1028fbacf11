# pyright: reportMissingImports=false
"""The package `traker` 0.3.2 on the CPU: how to drive it, with models that may come from this package.

What it does off the beaten path, and how it is driven because of that:

* it works in half precision unless told otherwise, which is slow and inexact on a CPU: here it works in float32;
* its projector makes the matrix anew for every batch, in blocks of 100 columns, unless one block holds all k columns:
  then it keeps it, p·k numbers, which is much faster where the memory is there (`whole_matrix`).  With one block it
  forgets the matrix when features are finalised and does not miss it if the next checkpoint is the last one again, so
  checkpoints are scored in the order in which they were featurised, and `scores` makes it draw afresh.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from trak import TRAKer
from trak.projectors import BasicProjector, ProjectionType
from trak.utils import vectorize

from jattrib.data.vision import Dataset

State = Mapping[str, torch.Tensor]
Traker = Any
"""A `TRAKer`, whose annotations are narrower than what it takes."""


def classifier(sizes: Sequence[int]) -> torch.nn.Sequential:
    """Return the multilayer perceptron that `models.mlp` is, in PyTorch: linear layers with ReLU between them."""
    layers: list[torch.nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def state_from(params: Any) -> dict[str, torch.Tensor]:
    """Return one model's parameters, as `models.mlp` has them, as a state of `classifier`."""
    layers = params["layers"]
    state = {}
    for number in range(len(layers)):
        layer = layers[str(number)]
        # Copies: torch warns about arrays that it must not write to, as those of JAX are.
        state[f"{2 * number}.weight"] = torch.from_numpy(np.array(layer["kernel"]).T.copy())
        state[f"{2 * number}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    return state


def batches(data: Dataset, size: int) -> Iterator[list[torch.Tensor]]:
    """Yield the examples, flattened, as the batches of tensors that the package takes."""
    for start in range(0, len(data.labels), size):
        inputs = data.inputs[start : start + size]
        labels = data.labels[start : start + size]
        flat = torch.from_numpy(inputs.reshape(len(inputs), -1))
        yield [flat, torch.from_numpy(labels.astype(np.int64))]


def make(
    model: torch.nn.Module,
    folder: Path,
    *,
    examples: int,
    dim: int,
    seed: int = 0,
    distribution: str = "normal",
    whole_matrix: bool = False,
    damping: float = 0.0,
) -> Traker:
    """Return a `TRAKer` in float32 on the CPU.

    Args:
        model: the architecture.
        folder: where it keeps its arrays.
        examples: the size of the training set.
        dim: k.
        seed: of the projections; each checkpoint's is another.
        distribution: `normal`, its own choice on the CPU, or `rademacher`.
        whole_matrix: keep each checkpoint's whole matrix; its own choice is blocks of 100 columns, made for each batch.
        damping: its `lambda_reg`, added to ΦᵀΦ.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    projector = BasicProjector(
        grad_dim=count, proj_dim=dim, seed=seed, proj_type=ProjectionType(distribution), device=torch.device("cpu"),
        dtype=torch.float32, block_size=dim if whole_matrix else 100,
    )  # fmt: skip
    return TRAKer(
        model=model, task="image_classification", train_set_size=examples, save_dir=str(folder), device="cpu",
        projector=projector, use_half_precision=False, lambda_reg=damping, logging_level=logging.ERROR,
    )  # fmt: skip


def featurize(traker: Traker, state: State, number: int, data: Sequence[Sequence[torch.Tensor]]) -> None:
    """Featurise the training set at one checkpoint, into the package's own store."""
    traker.load_checkpoint(state, model_id=number)
    for batch in data:
        traker.featurize(batch=batch, num_samples=len(batch[1]))


def featurize_again(traker: Traker, state: State, number: int, data: Sequence[Sequence[torch.Tensor]]) -> None:
    """Featurise a checkpoint as if for the first time, in the same place and with the same matrix."""
    traker.load_checkpoint(state, model_id=number)
    traker.saver.current_store["is_featurized"][:] = 0
    for batch in data:
        traker.featurize(batch=batch, num_samples=len(batch[1]))


def stored(traker: Traker, number: int, name: str) -> Float[np.ndarray, "n d"]:
    """Return an array of the package's store at a checkpoint: `grads`, `features` or `out_to_loss`."""
    traker.saver.load_current_store(number)
    return np.array(traker.saver.current_store[name])


def scores(
    traker: Traker,
    states: Mapping[int, State],
    queries: Sequence[Sequence[torch.Tensor]],
    *,
    name: str,
    damping: float | None = None,
) -> Float[np.ndarray, "n q"]:
    """Finish the features of all checkpoints, anew if there is another `damping`, and score the queries with them."""
    count = sum(len(labels) for _, labels in queries)
    if damping is not None:
        traker.score_computer.lambda_reg = damping
        for number in states:
            traker.saver.model_ids[number]["is_finalized"] = 0
    traker.finalize_features(list(states))
    traker.projector.model_id = -1
    for number, state in states.items():
        traker.start_scoring_checkpoint(exp_name=name, checkpoint=state, model_id=number, num_targets=count)
        for batch in queries:
            traker.score(batch=batch, num_samples=len(batch[1]))
    return combined(traker, list(states), name)


def combined(traker: Traker, numbers: Sequence[int], name: str) -> Float[np.ndarray, "n q"]:
    """Return the scores of an ensemble of checkpoints that `scores` has been through."""
    return np.array(traker.finalize_scores(exp_name=name, model_ids=list(numbers)))


def gradients(traker: Traker, batch: Sequence[torch.Tensor]) -> Float[np.ndarray, "b p"]:
    """Return the gradients of the margins at the loaded checkpoint, as the package computes and orders them."""
    tree = traker.gradient_computer.compute_per_sample_grad(batch=batch)
    return vectorize(tree, device="cpu").detach().numpy().copy()
