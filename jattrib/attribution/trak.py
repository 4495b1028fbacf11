"""TRAK: influence in the linear model that a network's randomly projected gradients define.

Source: Park et al. 2023, "TRAK: Attributing model behavior at scale", section 3.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jattrib.attribution.features import check, check_finite
from jattrib.core import stream, tree
from jattrib.core.errors import InvalidInputError, StoreError, check_choice
from jattrib.core.store import Rows
from jattrib.core.types import Batch, OutputFn, Params, Projector, Source
from jattrib.curvature.solve import solve
from jattrib.grads.per_example import values_and_per_example
from jattrib.projection.gradients import at_once

Combination = Literal["mean_of_products", "product_of_means"]
"""How checkpoints are combined.

`mean_of_products`: `mean_m [Q_m ⊙ Φ_m K_m⁻¹ φ_mᵀ]`: each checkpoint is an estimate of its own.
`product_of_means`: `mean_m [Q_m] ⊙ mean_m [Φ_m K_m⁻¹ φ_mᵀ]`, the paper's form without its soft threshold.  With
`rescale` it is what the package `traker` 0.3.2 computes.
"""


class Features(NamedTuple):
    """What TRAK keeps of a set of examples at one checkpoint.

    Attributes:
        gradients: the projected output gradients φ.
        weights: `Q = −∂ℓ/∂f`, the residual of each example: `1 − p` for margins.
    """

    gradients: Float[np.ndarray, "n k"]
    weights: Float[np.ndarray, " n"]


class Products(NamedTuple):
    """One checkpoint's part of the scores, before checkpoints are combined.

    Attributes:
        products: `Φ K⁻¹ φᵀ`.
        weights: the training examples' Q.
    """

    products: Float[Array, "n q"]
    weights: Float[Array, " n"]


def logistic(margin: Float[Array, ""]) -> Float[Array, ""]:
    """Return `ℓ(f) = ln(1 + e^−f)`, the cross-entropy as a function of the margin, in nats."""
    return jax.nn.softplus(-margin)


def features(
    output: OutputFn,
    params: Params,
    source: Source,
    *,
    projector: Projector,
    key: Key[Array, ""],
    loss: Callable[[Float[Array, ""]], Float[Array, ""]] = logistic,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    into: Rows | None = None,
    progress: bool = True,
) -> Features:
    """Return `φ_i = Pᵀ ∇_θ f(z_i; θ)` and `Q_i = −∂ℓ/∂f(z_i; θ)` for every example of a source, in one pass.

    Train and query features of a checkpoint must share `key`; checkpoints should each have their own.

    Args:
        output: the output f whose gradients are the features.
        params: the checkpoint.
        source: the examples.
        projector: the family of the random projection P.
        key: fixes P.
        loss: the training loss as a function of f.
        chunk: examples differentiated at once; when left out, as many as `projection.gradients.at_once` says.
        mesh: spreads the examples over its first axis.
        into: rows on disk (`layout` gives their arrays, `features.identity` says whose they are); chunks that it
            already holds are not computed again.  An identity of the caller's own making is the caller's to keep.
        progress: whether to show it.

    Raises:
        InvalidInputError: a feature is not finite, or the projection does not fit the parameters.
        StoreError: the store is of other parameters or another projection, or does not say of which.

    Source: Park et al. 2023, section 3.2, steps 1 to 3.  The package stores features in half precision
    and scales P by 1/√p; here they are float32 and inner products are unbiased, which scores do not see.
    """
    if into is not None:
        _check_identity(into, params, projector=projector, key=key)
    chunk = at_once(params, projector=projector, mesh=mesh) if chunk is None else chunk
    operand = _Operand(tree.callable_tree(output), tree.callable_tree(loss), params, projector.init(key, params))
    rows = stream.map_rows(
        partial(_featurize, projector), operand, source, chunk=chunk, mesh=mesh, into=into, label="featurizing",
        progress=progress, check=_check_finite,
    )  # fmt: skip
    if into is not None:
        rows = {name: into.array(name) for name in ("gradients", "weights")}
    return Features(rows["gradients"], rows["weights"])


def layout(projector: Projector) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the arrays of a store for features: `Rows.create(..., arrays=layout(projector))`."""
    return {"gradients": ((projector.dim,), np.float32), "weights": ((), np.float32)}


def _check_identity(store: Rows, params: Params, *, projector: Projector, key: Key[Array, ""]) -> None:
    if not store.identity:
        raise StoreError(
            f"{store.path}, whose identity is empty: its rows could be of any checkpoint",
            expected="a store that says whose rows it keeps",
            remedy="make it with `identity=attribution.features.identity(params, projector=projector, key=key)`",
        )
    if "parameters" in store.identity:
        check(store, params, projector=projector, key=key)


class _Operand(NamedTuple):
    output: OutputFn
    loss: Callable[[Float[Array, ""]], Float[Array, ""]]
    params: Params
    state: Any


def _featurize(projector: Projector, operand: _Operand, batch: Batch) -> dict[str, Array]:
    if projector.direct is not None:
        values, features = projector.direct(operand.state, operand.output, operand.params, batch)
    else:
        values, gradients = values_and_per_example(operand.output, operand.params, batch)
        features = projector.apply(operand.state, gradients)
    return {"gradients": features, "weights": -jax.vmap(jax.grad(operand.loss))(values)}


def _check_finite(start: int, rows: dict[str, np.ndarray]) -> None:
    bad = ~(np.isfinite(rows["gradients"]).all(axis=1) & np.isfinite(rows["weights"]))
    if bad.any():
        raise InvalidInputError(
            f"the output of example {start + int(bad.argmax())} has a gradient that is not finite",
            expected="an output that is finite and differentiable at every example",
            remedy="compute margins from logits (models.outputs.margin), and check inputs and checkpoint for NaN",
        )


def mean_eigenvalue(gradients: Float[np.ndarray, "n k"]) -> float:
    """Return `tr(ΦᵀΦ) / (n k)`, the mean eigenvalue of the mean curvature: the natural unit of `damping`."""
    return float(np.mean(np.square(gradients, dtype=np.float64)))


def mean_gram(gradients: Float[np.ndarray, "n k"]) -> Float[Array, "k k"]:
    """Return `ΦᵀΦ / n`, the mean curvature of the linear model."""
    phi = jnp.asarray(gradients)
    return jnp.matmul(phi.T, phi, precision="highest") / phi.shape[0]


def products(
    train: Features,
    queries: Float[np.ndarray, "q k"],
    *,
    damping: float = 0.0,
    rescale: bool = False,
    gram: Float[Array, "k k"] | None = None,
) -> Products:
    """Return `Φ K⁻¹ φᵀ` of one checkpoint, with `K = ΦᵀΦ + n · damping · I`.

    Args:
        train: the training examples' features.
        queries: the queries' features, of the same checkpoint and key.
        damping: added to the mean curvature `ΦᵀΦ / n`; the package's `lambda_reg` is `n · damping`.
        rescale: divide `K⁻¹` by the mean of its absolute entries, as the package does.  It weighs checkpoints anew and
            leaves only a ranking.
        gram: `mean_gram(train.gradients)`, where several dampings are to share it.

    Raises:
        InvalidInputError: features are of different dimensions, weights are not as many as training examples, an entry
            is not finite, or `damping` is negative.
        DivergedError: the curvature is singular, as it is without damping where n is below k.
    """
    n, k = train.gradients.shape
    if queries.shape[1] != k:
        raise InvalidInputError(
            f"{k} features a training example, {queries.shape[1]} a query",
            expected="features of one projection", remedy="make both with the same projector and key",
        )  # fmt: skip
    if train.weights.shape != (n,):
        raise InvalidInputError(
            f"features of {n} training examples and weights of shape {train.weights.shape}",
            expected="one weight a training example", remedy="pass what `features` returned",
        )  # fmt: skip
    check_finite(np.asarray(queries), "query")
    check_finite(np.asarray(train.weights)[:, None], "the weight of training example")
    phi, targets = jnp.asarray(train.gradients), jnp.asarray(queries).T
    gram = mean_gram(train.gradients) if gram is None else gram
    refine = 0 if damping > 0 else 1  # a ridge keeps the condition low
    if rescale:
        inverse, _ = solve(gram, jnp.eye(k, dtype=gram.dtype), damping=damping, refine=refine)
        solution = jnp.matmul(inverse, targets, precision="highest") / jnp.abs(inverse).mean()
    else:
        solution = solve(gram, targets, damping=damping, refine=refine)[0] / n
    return Products(jnp.matmul(phi, solution, precision="highest"), jnp.asarray(train.weights))


class Total(NamedTuple):
    """A running sum over checkpoints: add with `add`, read with `mean`."""

    products: Float[Array, "n q"]
    weights: Float[Array, " n"]
    weighted: Float[Array, "n q"]
    checkpoints: int


def add(total: Total | None, part: Products) -> Total:
    """Return the sum with one more checkpoint; None is the empty sum.

    Raises:
        InvalidInputError: the checkpoint is of other numbers of training examples or queries than those before it.
    """
    if total is not None and part.products.shape != total.products.shape:
        raise InvalidInputError(
            f"{' and '.join(map(str, part.products.shape))} training examples and queries at checkpoint "
            f"{total.checkpoints}, {' and '.join(map(str, total.products.shape))} before",
            expected="the same examples and queries at each checkpoint",
            remedy="make the features of every checkpoint from the same two sources",
        )
    weighted = part.products * part.weights[:, None]
    if total is None:
        return Total(part.products, part.weights, weighted, 1)
    return Total(
        total.products + part.products, total.weights + part.weights, total.weighted + weighted, total.checkpoints + 1
    )


def mean(total: Total, *, combination: Combination = "product_of_means") -> Float[Array, "n q"]:
    """Return the scores `[source, query]` of the checkpoints summed so far.

    They are positive where weight on the source raises the query's output.  They rank: their scale is that of a linear
    model of the output, not of leave-one-out differences.

    Raises:
        InvalidInputError: there is no such combination.
    """
    check_choice("combination", combination, get_args(Combination))
    count = total.checkpoints
    if combination == "mean_of_products":
        return total.weighted / count
    return total.products / count * (total.weights[:, None] / count)


def scores(
    train: Iterable[Features],
    queries: Iterable[Float[np.ndarray, "q k"]],
    *,
    relative_damping: float = 0.0,
    rescale: bool = False,
    combination: Combination = "product_of_means",
) -> Float[Array, "n q"]:
    """Return TRAK's scores `[source, query]` from the features of one or more checkpoints; see `mean` for their sign.

    Args:
        train: the training examples' features at each checkpoint; a generator keeps one in memory at a time.
        queries: the queries' features at each checkpoint.
        relative_damping: ridge, in units of each checkpoint's `mean_eigenvalue`, so that one number serves them all.
        rescale: see `products`; with `product_of_means` and no ridge this is the package's score.
        combination: how checkpoints are combined.

    Raises:
        InvalidInputError: there is no checkpoint, features do not fit each other, or there is no such combination.
        DivergedError: a curvature is singular.

    Source: Park et al. 2023, section 3.2, steps 4 and 5, without the soft threshold (which `traker` lacks too).  The
    ridge is ours: the paper has none, the package an absolute one.
    """
    check_choice("combination", combination, get_args(Combination))
    total = None
    for checkpoint, targets in zip_longest(train, queries):
        if checkpoint is None or targets is None:
            raise InvalidInputError(
                "features of training examples at more checkpoints than of queries, or the other way round",
                expected="both at each checkpoint",
                remedy="pass two lists of one length",
            )
        damping = relative_damping * mean_eigenvalue(checkpoint.gradients)
        total = add(total, products(checkpoint, targets, damping=damping, rescale=rescale))
    if total is None:
        raise InvalidInputError("no checkpoints", expected="at least one", remedy="train one checkpoint or more")
    return mean(total, combination=combination)
