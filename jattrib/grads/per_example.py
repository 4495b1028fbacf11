"""Per-example gradients: `vmap` of `grad`."""

import jax
from jaxtyping import Array, Float

from jattrib.core.types import Batch, OutputFn, Params


def per_example(output: OutputFn, params: Params, batch: Batch) -> Params:
    """Return `g_i = ∇_θ f(z_i; θ)` for every example: the tree of `params` with a leading axis over the batch."""
    return jax.vmap(jax.grad(output), in_axes=(None, 0))(params, batch)


def values_and_per_example(output: OutputFn, params: Params, batch: Batch) -> tuple[Float[Array, " b"], Params]:
    """Return the outputs `f(z_i; θ)` and their gradients, from one forward pass."""
    return jax.vmap(jax.value_and_grad(output), in_axes=(None, 0))(params, batch)
