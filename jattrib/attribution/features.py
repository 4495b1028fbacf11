"""Influence from features that are kept: projected training gradients on disk, which later queries reuse.

Features `φ = Pᵀ ∇ℓ` of the training set are made once, with any projector (`projection.sketch`, `projection.dense`,
`curvature.arnoldi.projector`), and a query costs one gradient, one product with an inverse curvature of the features,
and one pass over the rows.  A store says which parameters and which projection it is of, and refuses others.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jattrib.attribution.influence import Top, best
from jattrib.core import files, stream, tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.store import Rows
from jattrib.core.types import Batch, Fold, OutputFn, Params, Projector, Source
from jattrib.curvature.diagonal import RELATIVE_DAMPING
from jattrib.curvature.solve import solve
from jattrib.projection import gradients

NAME = "features"
"""The array of a store."""

Features = Rows | Float[np.ndarray, "n k"]
"""A store, or its rows."""

BLOCK = 8192
"""Rows read at once."""


def layout(projector: Projector, dtype: Any = np.float32) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the arrays of a store for features: `Rows.create_or_open(path, arrays=layout(projector), ...)`."""
    return {NAME: ((projector.dim,), dtype)}


def identity(params: Params, *, projector: Projector, key: Key[Array, ""]) -> dict[str, Any]:
    """Return what features depend on beside loss and data: for a store's `identity`, to which more may be added.

    It is the digest of the parameters, that of the projection's state (its seed, its basis), and what it makes of
    the first coordinate: signs tell families of one state apart.
    """
    state = projector.init(key, params)
    flat, unravel = tree.ravel(params)
    unit = jax.tree.map(lambda leaf: leaf[None], unravel(jnp.zeros_like(flat).at[0].set(1)))
    image = np.asarray(projector.apply(state, unit))[0]
    scale = float(np.abs(image).max())
    return {
        "parameters": tree.digest(params),
        "projection": tree.digest(state),
        "projection's first row": f"{tree.digest(np.sign(image).astype(np.int8))[:16]}, at most {scale:.2g}",
        "dimension": projector.dim,
    }


def features(
    output: OutputFn,
    params: Params,
    source: Source,
    *,
    projector: Projector,
    key: Key[Array, ""],
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    into: Rows | None = None,
) -> Features:
    """Return `φ_i = Pᵀ ∇_θ f(z_i; θ)` of every example: of training examples f is the loss, of queries the output.

    Args:
        output: f.
        params: the parameters.
        source: the examples.
        projector: the family of P.
        key: fixes P; the same for training examples and queries.
        chunk: examples differentiated at once; when left out, as many as `projection.gradients.at_once` says.
        mesh: spreads the examples over its first axis.
        into: a store (`layout`, `identity`); chunks that it has are not computed again, and it is what is returned.

    Raises:
        InvalidInputError: a feature is not finite, or the projection does not fit the parameters.
        StoreError: the store is of other parameters or another projection.
    """
    if into is not None:
        check(into, params, projector=projector, key=key)
    chunk = gradients.at_once(params, projector=projector, mesh=mesh) if chunk is None else chunk
    operand = tree.callable_tree(output), params, projector.init(key, params)
    return stream.map_rows(
        _Featurize(projector), operand, source, chunk=chunk, mesh=mesh, into=into, label="features", progress=False,
        check=_check_finite,
    )  # fmt: skip


def check(store: Rows, params: Params, *, projector: Projector, key: Key[Array, ""]) -> None:
    """Refuse a store of other parameters or another projection.

    Raises:
        StoreError: it is one; what differs is named.
    """
    wanted = identity(params, projector=projector, key=key)
    files.check_identity(store.path, {name: store.identity.get(name) for name in wanted}, wanted)


def inverse(
    train: Features, *, damping: float | int | None = None, relative_damping: float | int = RELATIVE_DAMPING
) -> Callable[[Float[Array, "q k"]], Float[Array, "q k"]]:
    """Return `φ ↦ (ΦᵀΦ/n + λI)⁻¹ φ`: the empirical Fisher matrix of the projected gradients, damped and inverted.

    Args:
        train: Φ.
        damping: λ; when left out, `relative_damping` times the mean eigenvalue.
        relative_damping: see there.

    Raises:
        DivergedError: the damped matrix is not positive definite.

    Source: Choe et al. 2024, section 3.2 (LoGra), whose damping is a tenth of the mean eigenvalue too.
    """
    rows = train if isinstance(train, Rows) else stream.InMemory({NAME: train})
    shape, kind = train.arrays[NAME] if isinstance(train, Rows) else (train.shape[1:], train.dtype)
    start = jnp.zeros((*shape, *shape), kind)
    total = stream.fold(Fold(lambda: start, _gram, lambda state: state), rows, chunk=BLOCK, progress=False)
    gram = total / len(rows)
    ridge = relative_damping * float(jnp.trace(gram)) / shape[0] if damping is None else damping
    whole, _ = solve(gram, jnp.eye(shape[0], dtype=gram.dtype), damping=ridge)
    return jax.tree_util.Partial(_times, whole)


def scores(train: Features, directions: Float[Array | np.ndarray, "q k"]) -> Float[np.ndarray, "n q"]:
    """Return `τ_ij = −(1/n) φ_i · d_j`, with φ of training losses and `d = inverse(train)(query features)`.

    Raises:
        InvalidInputError: features and directions are of different dimensions, a direction or a score is not finite, or
            there are no features.
        StoreError: rows of the store are missing or damaged.
    """
    return np.concatenate([block for _, block in _blocks(train, directions)])


def top(train: Features, directions: Float[Array | np.ndarray, "q k"], *, k: int, harmful: bool = False) -> Top:
    """Return the k largest scores of each direction (`harmful`: the smallest), without the n×q matrix; see `scores`."""
    return best(_blocks(train, directions), k=k, count=len(train), harmful=harmful)


class _Featurize:
    """`fn(operand, batch)` of a projector, equal to another of the same: it is compiled once."""

    def __init__(self, projector: Projector):
        self.projector = projector

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Featurize) and self.projector == other.projector

    def __hash__(self) -> int:
        return hash(self.projector)

    def __call__(self, operand: tuple[OutputFn, Params, Any], batch: Batch) -> Float[Array, "b k"]:
        output, params, state = operand
        return gradients.of_gradients(output, params, batch, projector=self.projector, state=state)


def _gram(batch: dict[str, Array], valid: Bool[Array, " b"]) -> Float[Array, "k k"]:
    rows = tree.widen(batch[NAME])  # the sum of a chunk, too, may be beyond half precision
    rows = rows * valid.astype(rows.dtype)[:, None]
    return jnp.matmul(rows.T, rows, precision="highest")


@jax.jit
def _times(matrix: Float[Array, "k k"], rows: Float[Array, "q k"]) -> Float[Array, "q k"]:
    return jnp.matmul(rows, matrix, precision="highest")


_product = jax.jit(lambda rows, directions: jnp.matmul(rows, directions.T, precision="highest"))


def _blocks(
    train: Features, directions: Float[Array | np.ndarray, "q k"]
) -> Iterator[tuple[int, Float[np.ndarray, "b q"]]]:
    width = train.arrays[NAME][0][0] if isinstance(train, Rows) else train.shape[1]
    check_directions(directions, width)
    count, directions = len(train), jnp.asarray(directions)
    if not count:
        raise InvalidInputError("features of 0 examples", expected="one example or more", remedy="check their source")
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        rows = train.read(NAME, start, stop) if isinstance(train, Rows) else train[start:stop]
        block = np.asarray(_product(rows, directions)) * (-1 / count)
        check_finite(block, "the row of scores", start)
        yield start, block


def check_directions(directions: Float[Array | np.ndarray, "q k"], width: int) -> None:
    """Refuse directions that are not rows of `width` finite numbers.

    Raises:
        InvalidInputError: they are not.
    """
    if np.ndim(directions) != 2:
        raise InvalidInputError(
            f"directions of the shape {list(np.shape(directions))}",
            expected=f"one row a query, (q, {width})",
            remedy="of one direction alone, pass `direction[None]`",
        )
    if directions.shape[1] != width:
        raise InvalidInputError(
            f"{width} features a training example, {directions.shape[1]} a direction",
            expected="features of one projection",
            remedy="make both with the same projector and key",
        )
    check_finite(np.asarray(directions), "direction")


def check_finite(rows: Float[np.ndarray, "q k"], name: str, first: int = 0) -> None:
    """Refuse rows, numbered from `first`, of which one is not finite.

    Raises:
        InvalidInputError: one is; it is named.
    """
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise InvalidInputError(
            f"{name} {first + int(bad.argmax())} is not finite",
            expected="finite numbers",
            remedy="check features, queries and checkpoint for NaN, and that the solver of the curvature converged",
        )


def _check_finite(start: int, rows: Any) -> None:
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise InvalidInputError(
            f"example {start + int(bad.argmax())} has a gradient that is not finite",
            expected="losses and outputs that are finite and differentiable",
            remedy="check inputs and checkpoint for NaN",
        )
