# pyright: reportMissingImports=false
"""The package `kronfluence` on the CPU: how to drive it, with models that come from this package.

It runs in float32 with eigendecompositions in float64, writes factors and scores to disk as it goes, and gives a score
the sign of its measurement's rise: `∇fᵀ H⁻¹ ∇ℓ`, without the 1/n and the minus of ours.
"""

import itertools
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task

from jattrib.data.vision import Dataset


class Classification(Task):
    """Cross-entropy, labels drawn from the model where it asks for them, and margins as the measurement."""

    def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
        """Return the summed loss."""
        inputs, labels = batch
        logits = model(inputs)
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(dim=-1), 1).flatten()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
        """Return the summed margins."""
        inputs, labels = batch
        logits = model(inputs)
        own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
        return (logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(dim=1)).sum()


def convolutional(channels: Sequence[int], classes: int, flat: int) -> torch.nn.Sequential:
    """Return 3×3 convolutions of stride 2 with ReLU between them, and a linear layer."""
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [torch.nn.Conv2d(before, after, 3, stride=2, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(flat, classes))


def load(model: torch.nn.Sequential, layers: Sequence[tuple[np.ndarray, np.ndarray]]) -> torch.nn.Sequential:
    """Give the layers that have weights theirs, in order: kernels as PyTorch has them, and biases."""
    own = [each for each in model if isinstance(each, torch.nn.Linear | torch.nn.Conv2d)]
    with torch.no_grad():
        for layer, (kernel, bias) in zip(own, layers, strict=True):
            layer.weight.copy_(torch.from_numpy(np.array(kernel)))
            layer.bias.copy_(torch.from_numpy(np.array(bias)))
    return model


def tensors(data: Dataset) -> torch.utils.data.TensorDataset:
    """Return examples as the package takes them."""
    return torch.utils.data.TensorDataset(torch.from_numpy(data.inputs), torch.from_numpy(data.labels.astype(np.int64)))


def scores(
    model: torch.nn.Module, folder: Path, train: Dataset, queries: Dataset, *, batch: int, empirical: bool
) -> Float[np.ndarray, "n q"]:
    """Return its EK-FAC scores of training examples for queries, factors included; damping a tenth of the mean."""
    logging.disable(logging.WARNING)
    task = Classification()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analyzer = Analyzer(
            "bench", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(folder),
            log_level=logging.ERROR,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "ekfac", tensors(train), per_device_batch_size=batch, overwrite_output_dir=True,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=empirical),
        )  # fmt: skip
        found = analyzer.compute_pairwise_scores(
            "scores", "ekfac", query_dataset=tensors(queries), train_dataset=tensors(train),
            per_device_query_batch_size=len(queries.labels), per_device_train_batch_size=batch,
            score_args=ScoreArguments(damping_factor=None), overwrite_output_dir=True,
        )  # fmt: skip
        found = found or analyzer.load_pairwise_scores("scores")
    logging.disable(logging.NOTSET)
    return found["all_modules"].numpy().T
