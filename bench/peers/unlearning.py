# pyright: reportMissingImports=false
"""Datamodel Matching as a PyTorch loop over models, as one would write it with care: the same updates as ours.

Tensors stay in memory, batches are indexed, and Adam is the fused one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int


def match(
    models: Sequence[torch.nn.Module],
    inputs: Float[np.ndarray, "s d"],
    targets: Float[np.ndarray, "models s c"],
    order: tuple[Int[np.ndarray, "models steps batch"], Bool[np.ndarray, "models steps batch"]],
    rates: Float[np.ndarray, " steps"],
    *,
    threads: int,
) -> list[dict[str, torch.Tensor]]:
    """Fine-tune one model after another towards its targets, by the mean squared error of logits, and return them.

    Args:
        models: the trained models, which are changed.
        inputs: of the fine-tuning set.
        targets: of each model.
        order: the rows of each step of each model, and which of them count.
        rates: the learning rate of every step.
        threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    rows, goals = torch.from_numpy(inputs), torch.from_numpy(targets)
    found = []
    for number, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), lr=rates[0], fused=True)
        batches = [torch.from_numpy(at[kept]) for at, kept in zip(order[0][number], order[1][number], strict=True)]
        for rate, batch in zip(rates.tolist(), batches, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            loss = torch.nn.functional.mse_loss(model(rows[batch]), goals[number, batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(model.state_dict())
    return found
