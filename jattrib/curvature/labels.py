"""Whose labels a Fisher matrix takes: those that the model draws, or those of the data."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from jattrib.core import tree
from jattrib.core.types import Batch, Example, OutputFn, Params, Source
from jattrib.curvature.products import Outputs


@partial(jax.tree_util.register_dataclass, data_fields=["outputs", "loss", "sample", "key"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Sampled:
    """The loss of an example whose label is drawn from the model: `(params, (example, number)) -> loss`.

    The draw depends on the key and on the example's number, on nothing else; no gradient passes through it.
    """

    outputs: Any
    loss: Any
    sample: Any
    key: Key[Array, ""]

    def __call__(self, params: Params, numbered: tuple[Example, Integer[Array, ""]], /) -> Array:
        """Return the loss; `taps.find` refuses what is no number."""
        example, number = numbered
        out = self.outputs(params, example)
        drawn = self.sample(jax.random.fold_in(self.key, number), jax.lax.stop_gradient(out), example)
        return self.loss(out, drawn)


@partial(jax.tree_util.register_dataclass, data_fields=["loss"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Observed:
    """The loss of an example with the label that it has, in the same form: the empirical Fisher matrix."""

    loss: Any

    def __call__(self, params: Params, numbered: tuple[Example, Integer[Array, ""]], /) -> Array:
        """Return the loss; `taps.find` refuses what is no number."""
        return self.loss(params, numbered[0])


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A source whose examples come with their numbers."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: np.ndarray, /) -> tuple[Batch, np.ndarray]:
        """Return the examples at `indices`, and the indices."""
        return self.source.take(indices), indices.astype(np.int32)


def true_fisher(
    outputs: Callable[[Params, Example], Outputs],
    loss: Callable[[Outputs, Example], Float[Array, ""]],
    sample: Callable[[Key[Array, ""], Outputs, Example], Example],
    *,
    key: Key[Array, ""],
) -> Sampled:
    """Return the loss whose second moment is the true Fisher matrix: labels are drawn from the model.

    Where the loss is a sum of negative log-likelihoods over an example's labels (one, or a token each), this is the
    Gauss-Newton matrix in expectation; of a mean over T labels it is that divided by T.

    Args:
        outputs: what the model says of an example (`models.outputs.Logits`).
        loss: the loss as a function of that (`models.outputs.label_loss`).
        sample: an example with a label drawn from the outputs (`models.outputs.draw_label`).
        key: of the draws.
    """
    return Sampled(tree.callable_tree(outputs), tree.callable_tree(loss), tree.callable_tree(sample), key)


def empirical_fisher(loss: OutputFn) -> Observed:
    """Return the loss whose second moment is the empirical Fisher matrix: labels are those of the data."""
    return Observed(tree.callable_tree(loss))
