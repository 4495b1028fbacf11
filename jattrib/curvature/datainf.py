"""DataInf: the mean of inverses of single examples' damped curvatures, in closed form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jattrib.core import stream, tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch, Fold, OutputFn, Params, Source
from jattrib.curvature import diagonal
from jattrib.curvature.diagonal import RELATIVE_DAMPING
from jattrib.curvature.products import Vectors, check_vectors
from jattrib.grads.per_example import at_once, per_example

Layers = dict[str, Any]
"""Something for each layer, by the path of its leaves without their last part."""


def precondition(
    loss: OutputFn,
    params: Params,
    source: Source,
    vectors: Vectors,
    *,
    damping: float | int | None = None,
    relative_damping: float | int = RELATIVE_DAMPING,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Vectors:
    """Return `(1/n) Σ_i (g_i g_iᵀ + λI)⁻¹ v` in each layer, `(v − (1/n) Σ_i g_i (g_iᵀv) / (λ + ‖g_i‖²)) / λ`.

    A layer is the leaves whose paths differ in their last part alone: a kernel and its bias.  The mean of inverses
    stands for the inverse of the mean; the error grows with the layer's width.

    Args:
        loss: the loss of one example.
        params: the parameters.
        source: the n examples; two passes, or one if `damping` is given.
        vectors: v, several at once.
        damping: λ; when left out, each layer has its own, `relative_damping` times its mean eigenvalue.
        relative_damping: see there.
        chunk: examples differentiated at once; when left out, as many as `per_example.at_once` says.
        mesh: spreads the examples over its first axis.

    Raises:
        InvalidInputError: a layer's damping is not positive, or vectors are not like the parameters.
        DivergedError: a sum is not finite.

    Source: Kwon et al. 2024, equation 5 and section 3.2.
    """
    check_vectors(params, vectors)
    chunk = at_once(params, mesh=mesh) if chunk is None else chunk
    loss, settings = tree.callable_tree(loss), {"chunk": chunk, "mesh": mesh, "progress": False}
    names, sizes = _layers(params), {}
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
        sizes[name] = sizes.get(name, 0) + np.size(leaf)
    kind = tree.sum_dtype(jnp.result_type(jax.tree.leaves(params)[0]))
    if damping is None:
        zeros = {name: jnp.zeros((), kind) for name in sizes}
        sums = stream.fold(
            Fold(lambda: zeros, jax.tree_util.Partial(_squares, loss, params), lambda total: total), source, **settings
        )
        diagonal.check_finite(sums, "a sum of squared gradients")
        ridges = {name: relative_damping * sums[name] / (len(source) * sizes[name]) for name in sizes}
    else:
        ridges = {name: jnp.asarray(damping, kind) for name in sizes}
    for name, ridge in ridges.items():
        if not 0 < float(ridge) < np.inf:
            raise InvalidInputError(
                f"a damping of {float(ridge):g} in the layer {name!r}",
                expected="a positive, finite damping in every layer",
                remedy="give such a `damping`: where it is 0, no gradient reaches this layer",
            )
    vectors = jax.tree.map(jnp.asarray, vectors)
    update = jax.tree_util.Partial(_projections, loss, params, ridges, vectors)
    total = stream.fold(Fold(lambda: tree.zeros_like(vectors), update, lambda total: total), source, **settings)
    diagonal.check_finite(total, "a sum of products of gradients")
    return _finish(vectors, total, ridges, len(source))


def _layers(params: Params) -> list[str]:
    return [name.rpartition("/")[0] for name in tree.paths(params)]


def _squares(loss: OutputFn, params: Params, batch: Batch, valid: Bool[Array, " b"]) -> Layers:
    squares = _norms(tree.widen(per_example(loss, params, batch)))
    return {name: jnp.vdot(valid.astype(each.dtype), each) for name, each in squares.items()}


def _norms(gradients: Params) -> dict[str, Float[Array, " b"]]:
    """Return `‖g_i‖²` in each layer."""
    found: dict[str, Float[Array, " b"]] = {}
    for name, leaf in zip(_layers(gradients), jax.tree.leaves(gradients), strict=True):
        squares = jnp.sum(jnp.square(leaf.reshape(len(leaf), -1)), axis=1)
        found[name] = found[name] + squares if name in found else squares
    return found


def _projections(
    loss: OutputFn, params: Params, ridges: Layers, vectors: Vectors, batch: Batch, valid: Bool[Array, " b"]
) -> Vectors:
    gradients = tree.widen(per_example(loss, params, batch))
    names, norms = _layers(gradients), _norms(gradients)
    rows, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.reshape(len(leaf), -1), gradients))
    columns = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(vectors)]
    products: dict[str, Float[Array, "q b"]] = {}
    for name, g, v in zip(names, rows, columns, strict=True):
        product = jnp.matmul(v.astype(g.dtype), g.T, precision="highest")
        products[name] = products[name] + product if name in products else product
    weights = {name: valid.astype(norms[name].dtype) / (ridges[name] + norms[name]) for name in norms}
    sums = [
        jnp.matmul(products[name] * weights[name][None], g, precision="highest").reshape(leaf.shape)
        for name, g, leaf in zip(names, rows, jax.tree.leaves(vectors), strict=True)
    ]
    return jax.tree.unflatten(structure, sums)


def _finish(vectors: Vectors, total: Vectors, ridges: Layers, count: int) -> Vectors:
    leaves = [
        ((v.astype(each.dtype) - each / count) / ridges[name]).astype(v.dtype)
        for name, v, each in zip(_layers(vectors), jax.tree.leaves(vectors), jax.tree.leaves(total), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(vectors), leaves)
