"""Products with the curvature of a mean loss over a source, `Cv`, for several vectors v at once.

A product is summed over a batch by a pure function (`hessian`, `ggn`, `fisher`), and becomes an operator on vectors
either over all of a source (`streamed`) or over a random batch of it (`sampled`).  Vectors are pytrees like the
parameters with a leading axis, as per-example gradients are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jattrib.core import stream, tree
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.core.types import Batch, Example, Fold, OutputFn, Params, Source

Vectors = Params
"""A pytree like the parameters, each leaf with a leading axis over q vectors."""

Outputs = Any
"""What a model says of one example: its logits, say."""

Product = Callable[[Vectors, Batch, Bool[Array, " b"]], Vectors]
"""`Σ_i C_i v` over the valid rows of a batch, for every v: a `jax.tree_util.Partial` over its arrays."""

Operator = Callable[[Vectors], Vectors]
"""`C v` for every v."""

RandomOperator = Callable[[Key[Array, ""], Vectors], Vectors]
"""An unbiased estimate of `C v` for every v, the same for the same key."""


def hessian(loss: OutputFn, params: Params) -> Product:
    """Return the product with the Hessian, `∇²ℓ(z_i; θ) v`, by forward over reverse differentiation.

    It may have negative eigenvalues: away from a minimum `ggn` is the safer curvature.
    """
    return jax.tree_util.Partial(_hessian, tree.callable_tree(loss), params)


def ggn(
    outputs: Callable[[Params, Example], Outputs], loss: Callable[[Outputs, Example], Float[Array, ""]], params: Params
) -> Product:
    """Return the product with the generalised Gauss-Newton matrix, `J_iᵀ ∇²_o ℓ(o_i) J_i v` with J the Jacobian of o.

    For a loss that is the negative logarithm of an exponential family's density in its natural parameters
    (cross-entropy of logits, squared error) it is the Fisher information, and positive semi-definite.

    Args:
        outputs: the outputs o of one example (`models.outputs.Logits`).
        loss: the loss of one example as a function of them (`models.outputs.label_loss`).
        params: the parameters θ.

    Source: Schraudolph 2002; Martens 2020, section 8.
    """
    return jax.tree_util.Partial(_ggn, tree.callable_tree(outputs), tree.callable_tree(loss), params)


def fisher(loss: OutputFn, params: Params) -> Product:
    """Return the product with the empirical Fisher matrix, `g_i g_iᵀ v`, of the labels as they are in the data."""
    return jax.tree_util.Partial(_fisher, tree.callable_tree(loss), params)


def streamed(product: Product, source: Source, *, chunk: int = 256, mesh: jax.sharding.Mesh | None = None) -> Operator:
    """Return the product with the mean curvature, `(1/n) Σ_i C_i v`: each call is one pass over the source.

    Args:
        product: its sum over a batch.
        source: the n examples.
        chunk: examples at a time; with q vectors, q times their activations are in memory.
        mesh: spreads the examples over its first axis.
    """

    def operator(vectors: Vectors) -> Vectors:
        statistic = Fold(
            lambda: tree.zeros_like(vectors),
            jax.tree_util.Partial(_on_batch, product, jax.tree.map(jnp.asarray, vectors)),
            lambda total: jax.tree.map(lambda leaf, v: (leaf / len(source)).astype(v.dtype), total, vectors),
        )
        return stream.fold(statistic, source, chunk=chunk, mesh=mesh, progress=False)

    return operator


def sampled(product: Product, source: Source, *, size: int = 256) -> RandomOperator:
    """Return the product with the mean curvature of `size` random examples, drawn with replacement.

    Raises:
        InvalidInputError: the source is empty, or `size` is below one.
    """
    if len(source) < 1 or size < 1:
        raise InvalidInputError(
            f"batches of {size} of {len(source)} examples", expected="one or more of one or more",
            remedy="check the source, and ask for batches of 1 or more",
        )  # fmt: skip

    def operator(key: Key[Array, ""], vectors: Vectors) -> Vectors:
        indices = np.asarray(jax.random.randint(key, (size,), 0, len(source)))
        return _mean_of_batch(product, vectors, source.take(indices))

    return operator


def mean_eigenvalue(operator: Operator, like: Params, *, key: Key[Array, ""], samples: int = 16) -> float:
    """Return an estimate of `tr(C) / p`, the mean eigenvalue: the natural unit of `damping`.

    It is `E[vᵀCv] / p` over random signs v; its relative error is at most `√(2 tr(C²) / samples) / tr(C)`.

    Args:
        operator: the product with C.
        like: the parameters.
        key: of the signs.
        samples: how many, all in one call of the operator.

    Raises:
        DivergedError: it is not finite.

    Source: Hutchinson 1990.
    """
    signs = random_vectors(key, like, samples, distribution="signs")
    found = float(jnp.mean(jax.vmap(tree.dot)(signs, operator(signs)))) / tree.size(like)
    if not np.isfinite(found):
        raise DivergedError(
            f"a mean eigenvalue of {found}",
            expected="finite products with the curvature",
            remedy="look for NaN or overflow: a diverged checkpoint, an input, gradients in half precision",
        )
    return found


def random_vectors(key: Key[Array, ""], like: Params, count: int, *, distribution: str = "normal") -> Vectors:
    """Return `count` random vectors of the structure and dtypes of `like`, `normal` or of `signs`.

    Raises:
        InvalidInputError: the distribution is neither.
    """
    if distribution not in ("normal", "signs"):
        raise InvalidInputError(
            f"distribution = {distribution!r}", expected="'normal' or 'signs'", remedy="choose one of them"
        )
    draw = jax.random.normal if distribution == "normal" else jax.random.rademacher
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        draw(each, (count, *jnp.shape(leaf)), jnp.result_type(leaf)) for each, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def check_vectors(like: Params, vectors: Vectors) -> None:
    """Refuse vectors that are not of a tree like the parameters, with a leading axis.

    Raises:
        InvalidInputError: they are not; a leaf is named.
    """
    shapes = {name: np.shape(leaf) for name, leaf in tree.to_names(like).items()}
    check_shapes(shapes, vectors)
    check_rows(vectors)
    for name, leaf in tree.to_names(vectors).items():
        if name not in shapes:
            raise _other_vectors(f"vectors with {_shape(leaf)} at {name!r}, where the parameters have nothing")


def check_shapes(shapes: Mapping[str, tuple[int | None, ...]], vectors: Vectors) -> None:
    """Refuse vectors of which a leaf is not there, or not of the shape that it has among the parameters.

    Args:
        shapes: by path the shape of a leaf, None where a size is not known.
        vectors: with a leading axis.

    Raises:
        InvalidInputError: there is such a leaf; it is named.
    """
    named = tree.to_names(vectors)
    for path, shape in shapes.items():
        found = np.shape(named[path]) if path in named else None
        if found is None or len(found) != len(shape) + 1:
            wanted = f"{len(shape)} dimensions"
        elif any(size not in (None, other) for size, other in zip(shape, found[1:], strict=True)):
            wanted = f"the shape {list(shape)}"
        else:
            continue
        has = "nothing" if found is None else _shape(named[path])
        raise _other_vectors(f"vectors with {has} at {path!r}, where the parameters have {wanted}")


def check_rows(vectors: Vectors) -> None:
    """Refuse vectors whose leaves do not share a leading axis.

    Raises:
        InvalidInputError: they do not; a leaf is named.
    """
    first: tuple[str, int] | None = None
    for name, leaf in tree.to_names(vectors).items():
        shape = np.shape(leaf)
        if not shape:
            raise _other_vectors(f"vectors with a single number at {name!r}")
        if first is not None and shape[0] != first[1]:
            raise _other_vectors(f"{shape[0]} vectors at {name!r}, {first[1]} at {first[0]!r}")
        first = first or (name, shape[0])


def _shape(leaf: Any) -> str:
    return f"the shape {list(np.shape(leaf))}"


def _other_vectors(got: str) -> InvalidInputError:
    return InvalidInputError(
        got,
        expected="a tree like the parameters, every leaf with a leading axis over vectors",
        remedy="pass per-example gradients of these parameters; of one vector, `leaf[None]` of its leaves",
    )


def _on_batch(product: Product, vectors: Vectors, batch: Batch, valid: Bool[Array, " b"]) -> Vectors:
    return product(vectors, batch, valid)


@jax.jit
def _mean_of_batch(product: Product, vectors: Vectors, batch: Batch) -> Vectors:
    count = jax.tree.leaves(batch)[0].shape[0]
    return tree.scale(1 / count, product(vectors, batch, jnp.ones(count, bool)))


def _hessian(loss: OutputFn, params: Params, vectors: Vectors, batch: Batch, valid: Bool[Array, " b"]) -> Vectors:
    check_vectors(params, vectors)

    def total(params: Params) -> Float[Array, ""]:
        return _sum(jax.vmap(loss, in_axes=(None, 0))(params, batch), valid)

    def product(vector: Params) -> Params:
        return jax.jvp(jax.grad(total), (params,), (vector,))[1]

    return jax.vmap(product)(vectors)


def _ggn(
    outputs: Callable[[Params, Example], Outputs],
    loss: Callable[[Outputs, Example], Float[Array, ""]],
    params: Params,
    vectors: Vectors,
    batch: Batch,
    valid: Bool[Array, " b"],
) -> Vectors:
    check_vectors(params, vectors)

    def forward(params: Params) -> Outputs:
        return jax.vmap(outputs, in_axes=(None, 0))(params, batch)

    def total(out: Outputs) -> Float[Array, ""]:
        return _sum(jax.vmap(loss)(out, batch), valid)

    out, pull = jax.vjp(forward, params)

    def product(vector: Params) -> Params:
        change = jax.jvp(forward, (params,), (vector,))[1]
        return pull(jax.jvp(jax.grad(total), (out,), (change,))[1])[0]

    return jax.vmap(product)(vectors)


def _fisher(loss: OutputFn, params: Params, vectors: Vectors, batch: Batch, valid: Bool[Array, " b"]) -> Vectors:
    check_vectors(params, vectors)

    def losses(params: Params) -> Float[Array, " b"]:
        return jax.vmap(loss, in_axes=(None, 0))(params, batch)

    _, pull = jax.vjp(losses, params)

    def product(vector: Params) -> Params:
        change = jax.jvp(losses, (params,), (vector,))[1]
        return pull(jnp.where(valid, change, 0))[0]

    return jax.vmap(product)(vectors)


def _sum(values: Float[Array, " b"], valid: Bool[Array, " b"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(valid, values, 0))
