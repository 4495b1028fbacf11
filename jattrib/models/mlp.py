"""A multilayer perceptron."""

from collections.abc import Sequence
from itertools import pairwise

import jax
from flax import nnx
from jaxtyping import Array, Float

from jattrib.core.errors import InvalidInputError
from jattrib.models.adapt import from_nnx
from jattrib.models.model import Model

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}


class MLP(nnx.Module):
    """Linear layers with an activation between them; whatever follows the batch axis is flattened first."""

    def __init__(self, sizes: Sequence[int], activation: str, rngs: nnx.Rngs):
        pairs = pairwise(sizes)
        self.layers = nnx.List(nnx.Linear(before, after, rngs=rngs) for before, after in pairs)
        self.activation = activation

    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b c"]:
        """Return the logits."""
        x = x.reshape(len(x), -1)
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.activation](layer(x))
        return self.layers[-1](x)


def mlp(inputs: int, widths: Sequence[int], classes: int, *, activation: str = "relu") -> Model:
    """A multilayer perceptron `inputs → widths… → classes` with biases; without widths, logistic regression.

    Weights start as LeCun's normal, biases as zero, both float32.  `gelu` (its tanh form) is the smooth choice, for
    metagradients.

    Raises:
        InvalidInputError: a size is not positive, or the activation is unknown.
    """
    sizes = (inputs, *widths, classes)
    if min(sizes) < 1 or activation not in ACTIVATIONS:
        raise InvalidInputError(
            f"layers {sizes}, activation {activation!r}",
            expected=f"positive sizes and an activation among {', '.join(ACTIVATIONS)}",
            remedy="for example mlp(784, (64,), 10, activation='relu')",
        )
    return from_nnx(lambda rngs: MLP(sizes, activation, rngs))
