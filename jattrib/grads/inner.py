"""Inner products of per-example gradients with directions, layer by layer: the gradients are never together."""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jattrib.core import tree
from jattrib.core.types import Batch, OutputFn, Params
from jattrib.grads import taps
from jattrib.grads.taps import Layer, Layers


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "plain"], meta_fields=["number"])
@dataclasses.dataclass(frozen=True)
class Directions:
    """q directions, arranged for products with factors.

    Attributes:
        layers: by layer, its matrices, in the order that `_way` says.
        plain: by path, the leaves without factors.
        number: q.
    """

    layers: dict[str, Float[Array, "stack _ _ _"]]
    plain: dict[str, Array]
    number: int


Way = Literal["outer", "inputs", "outputs"]
"""How `Σ_t s_tᵀ D a_t` is computed: from the outer product, or with the product of D and one factor first."""


def arrange(layers: Layers, directions: Params) -> Directions:
    """Return directions, a tree like the parameters with a leading axis, as `products` takes them: half as single."""
    matrices, plain = taps.matrices(layers, tree.widen(directions))
    count = len(jax.tree.leaves(directions)[0])
    orders = {"outer": (1, 0, 2, 3), "inputs": (1, 2, 0, 3), "outputs": (1, 3, 0, 2)}
    arranged = {layer.name: matrices[layer.name].transpose(orders[_way(layer, count)]) for layer in layers.layers}
    return Directions(arranged, plain, count)


def products(
    layers: Layers, output: OutputFn, params: Params, batch: Batch, directions: Directions
) -> Float[Array, "b q"]:
    """Return `⟨∇_θ f(z_i; θ), d_j⟩` for every example of a batch and every direction, in one backward pass.

    Args:
        layers: what `taps.find` found.
        output: the output f.
        params: the parameters θ.
        batch: examples with a leading axis.
        directions: d, from `arrange`.
    """
    reducers = {}
    for layer in layers.layers:
        arranged = directions.layers[layer.name]
        reducers[layer.name] = taps.Reducer(_Contract(layer, _way(layer, directions.number)), arranged)
    found = taps.reduce(layers, output, params, batch, reducers=reducers)
    parts = [jnp.sum(each, axis=0) for each in found.layers.values()]
    for path, gradient in found.plain.items():
        rows, columns = (each.reshape(len(each), -1) for each in (gradient, directions.plain[path]))
        parts.append(jnp.matmul(rows.astype(columns.dtype), columns.T, precision="highest"))
    return sum(parts[1:], start=parts[0])


def _way(layer: Layer, count: int) -> Way:
    """Return the way that holds the fewest numbers an example; with several positions, outer products are cheapest."""
    single = len(layer.uses) == 1 and layer.whole and layer.uses[0].kind == "dot" and layer.uses[0].positions == 1
    if not single or count >= max(layer.inputs, layer.outputs):
        return "outer"
    return "inputs" if layer.outputs <= layer.inputs else "outputs"


class _Contract(NamedTuple):
    """`Σ_t s_tᵀ D a_t` for each example and direction."""

    layer: Layer
    way: Way

    def __call__(self, directions: Array, a: Array, s: Array) -> Float[Array, "stack b q"]:
        if self.way == "outer":
            gradients = taps.outer(self.layer, a, s)
            return jnp.einsum("blio,lqio->lbq", gradients, directions, precision="highest")
        a, s = a[:, :, 0].astype(directions.dtype), s[:, :, 0].astype(directions.dtype)
        first, second = (a, s) if self.way == "inputs" else (s, a)
        product = jnp.einsum("lbi,liqo->lbqo", first, directions, precision="highest")
        return jnp.sum(product * jax.lax.broadcast_in_dim(second, product.shape, (0, 1, 3)), axis=3)
