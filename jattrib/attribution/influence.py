"""Influence functions: what more weight on a training example does to an output, to first order, with any curvature.

With the mean loss `L(w) = (1/n) Σ_i w_i ℓ_i` and its curvature C, weight on example i moves the parameters by
`−(1/n) C⁻¹ ∇ℓ_i`, so the output f of a query changes by

    τ_ij = −(1/n) ∇ℓ_iᵀ C⁻¹ ∇f_j,

the score `[source, query]`: positive where the example raises the output, its weight going from 0 to 1.  The inverse is
applied to the queries once (`directions = precondition(gradients(...))`, with any function on pytrees that have a
leading axis: `curvature.explicit`, `krylov`, `arnoldi`, `ekfac`, `datainf`, `diagonal`), and the training set is passed
over once, for all queries.

Source: Koh and Liang 2017, section 2.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jattrib.core import stream, tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch, Example, OutputFn, Params, Source
from jattrib.grads import inner, taps
from jattrib.grads.per_example import check_floating, per_example
from jattrib.grads.taps import Layers

Vectors = Params
"""A pytree like the parameters, each leaf with a leading axis: one gradient or direction a row."""

Precondition = Callable[[Vectors], Vectors]
"""A damped inverse of the curvature, of every row."""

Norm = Callable[[Vectors], Float[Array, " b"]]
"""A number for the gradient of each training example, which its scores are divided by."""

BLOCK = 4096
"""Training examples whose scores are in memory at once where only the best are kept."""


class Top(NamedTuple):
    """For each query the sources of the most extreme scores, the most extreme first; of equals, the lower index."""

    indices: Int[np.ndarray, "q k"]
    scores: Float[np.ndarray, "q k"]


def gradients(
    output: OutputFn, params: Params, source: Source, *, chunk: int = 256, mesh: jax.sharding.Mesh | None = None,
    progress: bool = False,
) -> Vectors:  # fmt: skip
    """Return `∇_θ f(z_j; θ)` of every example of a source, as a tree like the parameters with a leading axis.

    Raises:
        InvalidInputError: a gradient is not finite, the source is empty, or the output is not one number.
    """
    layers = _find(output, params, source)
    return stream.map_rows(
        jax.tree_util.Partial(_gradients, layers), (tree.callable_tree(output), params), source, chunk=chunk, mesh=mesh,
        label="query gradients", progress=progress, check=_check_finite,
    )  # fmt: skip


def scores(
    loss: OutputFn,
    params: Params,
    train: Source,
    directions: Vectors,
    *,
    norm: Norm | None = None,
    chunk: int = 256,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Float[np.ndarray, "n q"]:
    """Return `τ_ij = −(1/n) ∇ℓ_i · d_j` for every training example and direction, in one pass over the training set.

    Args:
        loss: the loss ℓ of one training example.
        params: the parameters.
        train: the n training examples.
        directions: `d_j = C⁻¹ ∇f_j`, `precondition(gradients(output, params, queries))`.
        norm: what each example's scores are divided by (`local_norm`, `parameter_norm`); they then only rank.
        chunk: examples differentiated at once.
        mesh: spreads the examples over its first axis.
        progress: whether to show it.

    Raises:
        InvalidInputError: a score is not finite, directions are not like the parameters, or the loss is not one number.
    """
    run = _products(loss, params, train, directions, norm, chunk=chunk, mesh=mesh, progress=progress)
    return run(train) * (-1 / len(train))


def top(
    loss: OutputFn,
    params: Params,
    train: Source,
    directions: Vectors,
    *,
    k: int,
    harmful: bool = False,
    norm: Norm | None = None,
    chunk: int = 256,
) -> Top:
    """Return the k largest scores of each direction (`harmful`: the smallest), exactly, without the n×q matrix.

    The arguments and errors are those of `scores`; 4,096 training examples' scores are in memory at once.

    Raises:
        InvalidInputError: k is below one, or beyond the training set.
    """
    run = _products(loss, params, train, directions, norm, chunk=chunk, mesh=None, progress=False)

    def blocks() -> Iterator[tuple[int, Float[np.ndarray, "b q"]]]:
        for start in range(0, len(train), BLOCK):
            part = stream.Subset(train, np.arange(start, min(start + BLOCK, len(train))))
            yield start, run(part) * (-1 / len(train))

    return best(blocks(), k=k, count=len(train), harmful=harmful)


def best(blocks: Iterable[tuple[int, Float[np.ndarray, "_ q"]]], *, k: int, count: int, harmful: bool = False) -> Top:
    """Return each query's k largest scores (`harmful`: the smallest) of blocks `(first source, scores)`.

    Args:
        blocks: in ascending order of sources.
        k: how many.
        count: sources in all.
        harmful: whether the smallest are asked for.

    Raises:
        InvalidInputError: k is below one, or beyond the sources.
    """
    if not 1 <= k <= count:
        raise InvalidInputError(f"k = {k}", expected=f"from 1 to {count}, the number of sources", remedy="change k")
    values, indices = np.zeros((0, 0)), np.zeros((0, 0), np.int64)
    for start, block in blocks:
        numbers = np.broadcast_to(np.arange(start, start + len(block)), block.T.shape)
        values = np.concatenate([values, block.T], axis=1) if values.size else block.T
        indices = np.concatenate([indices, numbers], axis=1) if indices.size else numbers
        order = np.argsort(values if harmful else -values, axis=1, kind="stable")[:, :k]
        values, indices = np.take_along_axis(values, order, 1), np.take_along_axis(indices, order, 1)
    return Top(indices, values)


def gradient_dot(
    loss: OutputFn, params: Params, train: Source, queries: Vectors, *, chunk: int = 256,
    mesh: jax.sharding.Mesh | None = None,
) -> Float[np.ndarray, "n q"]:  # fmt: skip
    """Return `−∇ℓ_i · ∇f_j`: the change of the output in a step of gradient descent on one example, at rate 1.

    Args:
        loss: the loss ℓ of one training example.
        params: the parameters.
        train: the training examples.
        queries: `gradients(output, params, queries)`.
        chunk: examples differentiated at once.
        mesh: spreads the examples over its first axis.
    """
    return -_products(loss, params, train, queries, None, chunk=chunk, mesh=mesh, progress=False)(train)


def cosine(
    loss: OutputFn, params: Params, train: Source, queries: Vectors, *, chunk: int = 256,
    mesh: jax.sharding.Mesh | None = None,
) -> Float[np.ndarray, "n q"]:  # fmt: skip
    """Return `−cos(∇ℓ_i, ∇f_j)`, 0 where a gradient is 0; see `gradient_dot`.  It only ranks.

    Source: Charpiat et al. 2019; Hanawa et al. 2021, whose similarity is of two losses: the output is here minus one.
    """
    units = _unit(tree.widen(queries))
    return -_products(loss, params, train, units, euclidean_norm, chunk=chunk, mesh=mesh, progress=False)(train)


def self_influence(
    loss: OutputFn,
    params: Params,
    source: Source,
    precondition: Precondition,
    *,
    chunk: int = 256,
    mesh: jax.sharding.Mesh | None = None,
    compiled: bool = True,
) -> Float[np.ndarray, " n"]:
    """Return `(1/n) ∇ℓ_iᵀ C⁻¹ ∇ℓ_i`: by how much an example's own weight lowers its own loss.

    Args:
        loss: the loss ℓ of one example.
        params: the parameters.
        source: the n examples.
        precondition: C⁻¹.
        chunk: examples differentiated, and preconditioned, at once.
        mesh: spreads the examples over its first axis.
        compiled: whether `precondition` may be compiled with the gradients; a loop on the host (`krylov`) may not.

    Raises:
        InvalidInputError: a number is not finite, or the loss is not one number.

    Source: Koh and Liang 2017, section 5.4; Feldman and Zhang 2020 for what it says of memorisation.
    """
    operand = tree.callable_tree(loss), params, tree.callable_tree(precondition)
    found = stream.map_rows(
        jax.tree_util.Partial(_selves, _find(loss, params, source)), operand, source, chunk=chunk, mesh=mesh,
        label="self-influence", progress=False, check=_check_finite, compiled=compiled,
    )  # fmt: skip
    return found * (1 / len(source))


def token_scores(
    losses: Callable[[Params, Example], Float[Array, " t"]],
    params: Params,
    train: Source,
    directions: Vectors,
    *,
    chunk: int = 32,
    mesh: jax.sharding.Mesh | None = None,
) -> Float[np.ndarray, "n t q"]:
    """Return `−(1/n) ∇ℓ_it · d_j` for every token t of every training example: its part of the example's score.

    The tokens' scores of an example add up to its score for the loss `Σ_t ℓ_it`.  No gradient of a token is formed: a
    forward derivative along each direction gives all tokens at once.

    Args:
        losses: the losses of one example's tokens (`models.outputs.token_losses` of its logits).
        params: the parameters.
        train: the n training examples.
        directions: see `scores`.
        chunk: examples differentiated at once.
        mesh: spreads the examples over its first axis.

    Raises:
        InvalidInputError: a score is not finite, directions are not like the parameters, or losses are not a vector.

    Source: Grosse et al. 2023, section 4.3.2.
    """
    directions = _checked(params, directions)
    found = stream.map_rows(
        _token_products, (tree.callable_tree(losses), params, directions), train, chunk=chunk, mesh=mesh,
        label="token scores", progress=False, check=_check_finite,
    )  # fmt: skip
    return found * (-1 / len(train))


def euclidean_norm(vectors: Vectors) -> Float[Array, " b"]:
    """Return `‖g‖` of every row."""
    return jax.vmap(tree.norm)(vectors)


def local_norm(precondition: Precondition) -> Norm:
    """Return the norm `√(gᵀ C⁻¹ g)` of ℓ-RelatIF, for `scores`: influence a unit of the example's own.

    Where C is not positive definite, and the square negative, it is NaN, which `scores` refuses.

    Source: Barshan, Brunet and Dziugaite 2020, section 4, equation 8.
    """
    return jax.tree_util.Partial(_local, tree.callable_tree(precondition))


def parameter_norm(precondition: Precondition) -> Norm:
    """Return the norm `‖C⁻¹ g‖` of θ-RelatIF, for `scores`: influence a unit of change in the parameters.

    Source: Barshan, Brunet and Dziugaite 2020, section 4, equation 6.
    """
    return jax.tree_util.Partial(_moved, tree.callable_tree(precondition))


def _find(output: OutputFn, params: Params, source: Source) -> Layers | None:
    """Return the layers of an output; None where no parameter has factors, and plain gradients serve."""
    if not len(source):
        raise InvalidInputError(
            "a source of 0 examples",
            expected="one example or more",
            remedy="check the path and the selection that made the source",
        )
    example = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), source.take(np.zeros(1, np.int64))
    )
    check_floating(params)
    try:
        return taps.find(output, params, example)
    except InvalidInputError:
        value = jax.eval_shape(output, params, example)
        number = isinstance(value, jax.ShapeDtypeStruct) and not value.shape
        if not number or not jnp.issubdtype(value.dtype, jnp.floating):
            raise
        return None


def _gradients(layers: Layers | None, operand: tuple[OutputFn, Params], batch: Batch) -> Vectors:
    output, params = operand
    if layers is None:
        return per_example(output, params, batch)
    return taps.gradients(layers, taps.factors(layers, output, params, batch), params)


def _products(
    loss: OutputFn, params: Params, train: Source, directions: Vectors, norm: Norm | None, *, chunk: int,
    mesh: jax.sharding.Mesh | None, progress: bool,
) -> Callable[[Source], Float[np.ndarray, "n q"]]:  # fmt: skip
    """Return the function from examples to their inner products with the directions."""
    directions = _checked(params, directions)
    layers = _find(loss, params, train)
    function, operand = tree.callable_tree(loss), (tree.callable_tree(loss), params, directions)
    if layers is not None and norm is None:
        fn = jax.tree_util.Partial(_factored, layers)
        operand = function, params, _arrange(layers, directions)
    else:
        fn = jax.tree_util.Partial(_plain, layers, tree.callable_tree(norm or _one))
    return partial(
        stream.map_rows, fn, operand, chunk=chunk, mesh=mesh, label="influence", progress=progress, check=_check_finite
    )


_arrange = jax.jit(inner.arrange, static_argnums=0)


def _factored(layers: Layers, operand: tuple[OutputFn, Params, Any], batch: Batch) -> Float[Array, "b q"]:
    loss, params, directions = operand
    return inner.products(layers, loss, params, batch, directions)


def _plain(
    layers: Layers | None, norm: Norm, operand: tuple[OutputFn, Params, Vectors], batch: Batch
) -> Float[Array, "b q"]:
    loss, params, directions = operand
    found = _gradients(layers, (loss, params), batch)
    parts = [
        jnp.matmul(g.reshape(len(g), -1), d.reshape(len(d), -1).T, precision="highest")
        for g, d in zip(*(jax.tree.leaves(tree.widen(each)) for each in (found, directions)), strict=True)
    ]
    norms = norm(found)[:, None]
    return jnp.where(norms == 0, 0, sum(parts[1:], start=parts[0]) / jnp.where(norms == 0, 1, norms))


def _selves(layers: Layers | None, operand: tuple[OutputFn, Params, Precondition], batch: Batch) -> Float[Array, " b"]:
    loss, params, precondition = operand
    found = _gradients(layers, (loss, params), batch)
    return jax.vmap(tree.dot)(found, precondition(found))


def _token_products(operand: tuple[Any, Params, Vectors], batch: Batch) -> Float[Array, "b t q"]:
    losses, params, directions = operand

    def values(params: Params) -> Array:
        return jax.vmap(losses, in_axes=(None, 0))(params, batch)

    shape = jax.eval_shape(values, params).shape
    if len(shape) != 2:
        raise InvalidInputError(
            f"losses of the shape {list(shape[1:])} for one example",
            expected="a vector: a loss a token",
            remedy="return the tokens' losses themselves, not their sum",
        )
    directions = jax.tree.map(lambda leaf, d: d.astype(jnp.result_type(leaf)), params, directions)
    along = jax.lax.map(lambda direction: jax.jvp(values, (params,), (direction,))[1], directions)
    return jnp.moveaxis(along, 0, 2)


def _one(vectors: Vectors) -> Float[Array, " b"]:
    leaf = jax.tree.leaves(vectors)[0]
    return jnp.ones(leaf.shape[0], tree.sum_dtype(leaf.dtype))


@jax.jit
def _unit(vectors: Vectors) -> Vectors:
    norms = euclidean_norm(vectors)
    return jax.vmap(tree.scale)(1 / jnp.where(norms > 0, norms, 1), vectors)


def _local(precondition: Precondition, vectors: Vectors) -> Float[Array, " b"]:
    vectors, sizes = jax.vmap(tree.level)(vectors)
    turned = precondition(vectors)
    squares = jax.vmap(tree.dot)(vectors, turned)
    rounding = 100 * jnp.finfo(squares.dtype).eps * euclidean_norm(turned)
    return sizes * jnp.sqrt(jnp.where(squares >= -rounding, jnp.maximum(squares, 0), jnp.nan))


def _moved(precondition: Precondition, vectors: Vectors) -> Float[Array, " b"]:
    return euclidean_norm(precondition(vectors))


def _checked(params: Params, directions: Vectors) -> Vectors:
    shapes, found = ([(name, np.shape(leaf)) for name, leaf in tree.to_names(each).items()]
                     for each in (params, directions))  # fmt: skip
    counts = {shape[:1] for _, shape in found}
    if [(name, shape[1:]) for name, shape in found] != shapes or len(counts) != 1:
        odd = next((pair for pair in zip(found, shapes, strict=False) if pair[0][1][1:] != pair[1][1]), (found, shapes))
        raise InvalidInputError(
            f"directions {odd[0]} for parameters {odd[1]}",
            expected="a tree like the parameters, every leaf with a leading axis over queries",
            remedy="pass `precondition(influence.gradients(output, params, queries))` of these parameters",
        )
    return jax.tree.map(jnp.asarray, directions)


def _check_finite(start: int, rows: Any) -> None:
    for leaf in jax.tree.leaves(rows):
        bad = ~np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)
        if bad.any():
            raise InvalidInputError(
                f"example {start + int(bad.argmax())} has a gradient or a score that is not finite",
                expected="finite and differentiable losses and outputs, and finite directions",
                remedy="check inputs and checkpoint for NaN, and that the solver of the curvature converged; a local "
                "norm needs one that is positive definite",
            )
