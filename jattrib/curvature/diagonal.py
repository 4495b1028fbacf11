"""The diagonal of the Fisher matrix, and the damped inverse of it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from jattrib.core import stream, tree
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.core.types import Batch, Fold, OutputFn, Params, Source
from jattrib.curvature.products import Operator, Vectors, check_vectors
from jattrib.grads.per_example import at_once, per_example

RELATIVE_DAMPING = 0.1
"""Of a leaf's or a module's mean eigenvalue: the default of all factored curvatures."""


def fisher(
    loss: OutputFn,
    params: Params,
    source: Source,
    *,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Params:
    """Return the diagonal of the empirical Fisher matrix, `(1/n) Σ_i g_i²`, as a tree like the parameters.

    Of gradients in half precision, squares and sums are in single.

    Args:
        loss: the loss of one example.
        params: the parameters.
        source: the n examples.
        chunk: examples differentiated at once; when left out, as many as `per_example.at_once` says.
        mesh: spreads the examples over its first axis.
        progress: whether to show it.

    Raises:
        InvalidInputError: a leaf of the parameters is not floating.
        DivergedError: a sum is not finite.
    """
    chunk = at_once(params, mesh=mesh) if chunk is None else chunk
    statistic = Fold(
        lambda: tree.zeros_like(params),
        jax.tree_util.Partial(_squares, tree.callable_tree(loss), params),
        lambda total: tree.scale(1 / len(source), total),
    )
    found = stream.fold(statistic, source, chunk=chunk, mesh=mesh, label="diagonal", progress=progress)
    check_finite(found, "a sum of squared gradients")
    return found


def inverse(
    diagonal: Params, *, damping: float | int | None = None, relative_damping: float | int = RELATIVE_DAMPING
) -> Operator:
    """Return the preconditioner `v ↦ v / (d + λ)`, elementwise.

    Args:
        diagonal: d, from `fisher`.
        damping: λ; when left out, each leaf has its own, `relative_damping` times its mean.
        relative_damping: see there.

    Raises:
        InvalidInputError: a damped leaf is not positive and finite.
    """
    ridges = jax.tree.map(lambda leaf: relative_damping * jnp.mean(leaf) if damping is None else damping, diagonal)
    damped = jax.tree.map(lambda leaf, ridge: leaf + jnp.asarray(ridge, leaf.dtype), diagonal, ridges)
    for name, leaf in tree.to_names(damped).items():
        wrong = ~((leaf > 0) & jnp.isfinite(leaf))
        if wrong.any():
            raise InvalidInputError(
                f"a curvature of {float(leaf[wrong][0]):g} at {name!r}",
                expected="positive, finite numbers",
                remedy="give a positive, finite `damping`: where it is 0, no gradient reaches some of these parameters",
            )
    return jax.tree_util.Partial(_divide, damped)


def check_finite(sums: PyTree, what: str) -> None:
    """Refuse sums over a source of which one is not finite.

    Raises:
        DivergedError: one is; its leaf is named.
    """
    for name, leaf in tree.to_names(sums).items():
        if not bool(jnp.isfinite(leaf).all()):
            raise DivergedError(
                f"{what} that is not finite at {name!r}",
                expected="finite gradients",
                remedy="look for NaN or overflow: a diverged checkpoint, an input, gradients in half precision",
            )


def squares(gradients: PyTree, valid: Bool[Array, " b"]) -> PyTree:
    """Return `Σ_i g_i²` over the valid rows of every leaf `(b, …)`; those in half precision are summed in single."""
    wide = tree.widen(gradients)
    return jax.tree.map(lambda leaf: jnp.tensordot(valid.astype(leaf.dtype), jnp.square(leaf), axes=1), wide)


def _squares(loss: OutputFn, params: Params, batch: Batch, valid: Bool[Array, " b"]) -> Params:
    return squares(per_example(loss, params, batch), valid)


@jax.jit
def _divide(damped: Params, vectors: Vectors) -> Vectors:
    check_vectors(damped, vectors)
    return jax.tree.map(lambda leaf, v: (v.astype(leaf.dtype) / leaf[None]).astype(v.dtype), damped, vectors)
