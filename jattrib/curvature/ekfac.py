"""K-FAC and EK-FAC: the Fisher matrix of each layer as a Kronecker product, in its own eigenbasis.

A layer's gradient is `G_i = Σ_t a_t s_tᵀ` with its inputs a (and a 1 for its bias) and its output gradients s, which
`grads.taps` finds in any pure function.  With A and S the second moments of a and s over all examples and positions
and `Q_A`, `Q_S` their eigenvectors, the Fisher matrix is taken to be diagonal in the basis `Q_A ⊗ Q_S`: K-FAC's is
the outer product of the factors' eigenvalues, EK-FAC's is measured, `Λ = (1/n) Σ_i (Q_Aᵀ G_i Q_S)²`, which is the best
one in this basis.  Leaves without factors have the diagonal of their own Fisher matrix.

A side that is wider than `WIDEST`, such as that of a vocabulary, has the diagonal of its second moment alone, and then
the given basis.  On a mesh on which parameters are split, factors are split over all of it, too.

Three steps, two passes over the data: `fit`, which is `covariances`, `bases` (eigenvectors, in float64 on the host) and
`eigenvalues`; then `inverse`.

Source: Martens and Grosse 2015 (K-FAC); George et al. 2018 (EK-FAC); Grosse et al. 2023 (for influence).  With the same
settings scores are those of `kronfluence` 1.0 (`bench/results/influence.jsonl`).  They are not those of `dattri` 0.3,
which applies the transposes of the eigenvectors and cuts rows anew where a layer has a bias: its directions have a
cosine of about one half to the formula's (`bench/results/fidelity_dattri.jsonl`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float

from jattrib.core import mesh as meshes
from jattrib.core import stream, tree
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.core.types import Batch, Fold, OutputFn, Params, Source
from jattrib.curvature import diagonal
from jattrib.curvature.diagonal import RELATIVE_DAMPING
from jattrib.curvature.labels import Numbered, Observed, Sampled, empirical_fisher, true_fisher
from jattrib.curvature.products import Operator, Vectors, check_rows, check_shapes
from jattrib.grads import taps
from jattrib.grads.taps import Layer, Layers

__all__ = [
    "Bases", "Basis", "Covariances", "Factors", "bases", "covariances", "eigenvalues", "empirical_fisher", "find",
    "fit", "inverse", "moments", "squares", "true_fisher",
]  # fmt: skip

Side = Float[Array, "stack d d"] | Float[Array, "stack d"]
"""A second moment of one side of a layer, or its diagonal: of an embedding's one-hot rows that is all there is."""

WIDEST = 32_768
"""The widest side whose second moment is kept whole: its eigenvectors are as many numbers as its square."""


Rotations = dict[str, tuple[Any, Any]]
"""The eigenvectors of both sides, by layer, `[stack, d, d]` each or None; their shapes, where parameters are shapes."""


class Covariances(NamedTuple):
    """Second moments by layer, means over examples and positions.

    Attributes:
        inputs: A.
        outputs: S.
        positions: an example's positions, summed over uses.
    """

    inputs: dict[str, Side]
    outputs: dict[str, Side]
    positions: dict[str, int]


class Basis(NamedTuple):
    """Eigenvectors in columns and eigenvalues of one side; without vectors the basis is the given one."""

    vectors: Float[Array, "stack d d"] | None
    values: Float[Array, "stack d"]


class Bases(NamedTuple):
    """The eigenbases of both sides, by layer."""

    inputs: dict[str, Basis]
    outputs: dict[str, Basis]
    positions: dict[str, int]


class Factors(NamedTuple):
    """A fitted curvature.

    Attributes:
        layers: what it was found for.
        bases: the layers' eigenbases.
        eigenvalues: Λ by layer: the curvature along each pair of eigenvectors.
        plain: by path, the diagonal of the Fisher matrix of leaves without factors.
    """

    layers: Layers
    bases: Bases
    eigenvalues: dict[str, Float[Array, "stack inputs outputs"]]
    plain: dict[str, Array]


def fit(
    loss: Sampled | Observed,
    params: Params,
    source: Source,
    *,
    corrected: bool = True,
    chunk: int = 256,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Factors:
    """Return the factored curvature of a mean loss, from two passes over the source.

    Args:
        loss: `true_fisher(...)` or `empirical_fisher(...)`.
        params: the parameters.
        source: the n examples.
        corrected: EK-FAC; without, K-FAC, one pass if every leaf has factors.
        chunk: examples differentiated at once.
        mesh: spreads the examples over its first axis.
        progress: whether to show it.

    Raises:
        InvalidInputError: no parameter is used linearly, the loss is not one number, or the source is empty.
        DivergedError: a second moment is not finite.
    """
    layers, settings = find(loss, params, source), {"chunk": chunk, "mesh": mesh, "progress": progress}
    found = bases(covariances(layers, loss, params, source, **settings))
    if corrected or layers.plain:
        values, plain = eigenvalues(layers, found, loss, params, source, **settings)
    else:
        values, plain = {}, {}
    if not corrected:
        values = {layer.name: _outer(found, layer.name) for layer in layers.layers}
    return Factors(layers, found, values, plain)


def find(loss: Sampled | Observed, params: Params, source: Source) -> Layers:
    """Return the layers of a loss, from the shapes of the source's first example; see `taps.find`.

    Raises:
        InvalidInputError: the source is empty, or what `taps.find` says.
    """
    if not len(source):
        raise InvalidInputError(
            "a source of 0 examples",
            expected="one example or more",
            remedy="check the path and the selection that made the source",
        )
    return taps.find(loss, params, _shapes(Numbered(source).take(np.zeros(1, np.int64)), drop=1))


def covariances(
    layers: Layers, loss: Sampled | Observed, params: Params, source: Source, *, chunk: int = 256,
    mesh: jax.sharding.Mesh | None = None, progress: bool = True,
) -> Covariances:  # fmt: skip
    """Return `A = Σ a aᵀ / n_tok` and `S = Σ s sᵀ / n_tok` of every layer, in one pass; see `fit`."""
    statistic = moments(layers, loss, params, *_first(source))
    sums = stream.fold(statistic, Numbered(source), chunk=chunk, mesh=mesh, label="covariances", progress=progress)
    counts = {layer.name: sum(use.positions for use in layer.uses) for layer in layers.layers}
    means = [{name: each[side] / (counts[name] * len(source)) for name, each in sums.items()} for side in (0, 1)]
    return Covariances(means[0], means[1], counts)


def moments(layers: Layers, loss: Sampled | Observed, params: Params, numbered: Batch, valid: Any) -> Fold:
    """Return the sums of `covariances` as a statistic, of a batch of such shapes; its arrays may be abstract."""
    return _sum(jax.tree_util.Partial(_moments, layers, loss, params), numbered, valid)


def bases(found: Covariances) -> Bases:
    """Return the eigenvectors and eigenvalues of all second moments, computed in float64 on the host.

    Raises:
        DivergedError: a second moment is not finite.
    """
    sides = [{name: _basis(name, each) for name, each in side.items()} for side in (found.inputs, found.outputs)]
    return Bases(sides[0], sides[1], found.positions)


def eigenvalues(
    layers: Layers, found: Bases, loss: Sampled | Observed, params: Params, source: Source, *, chunk: int = 256,
    mesh: jax.sharding.Mesh | None = None, progress: bool = True,
) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """Return `Λ = (1/n) Σ_i (Q_Aᵀ G_i Q_S)²` of every layer and `(1/n) Σ_i g_i²` of every other leaf, in one pass."""
    statistic = squares(layers, _rotations(found), loss, params, *_first(source))
    total = stream.fold(statistic, Numbered(source), chunk=chunk, mesh=mesh, label="eigenvalues", progress=progress)
    return tree.scale(1 / len(source), total)


def squares(
    layers: Layers, rotations: Rotations, loss: Sampled | Observed, params: Params, numbered: Batch, valid: Any
) -> Fold:
    """Return the sums of `eigenvalues` as a statistic; see `moments`.  Rotations are both sides' eigenvectors."""
    return _sum(jax.tree_util.Partial(_squares, layers, loss, params, rotations), numbered, valid)


def inverse(
    factors: Factors, *, damping: float | int | None = None, relative_damping: float | int = RELATIVE_DAMPING
) -> Operator:
    """Return the preconditioner `G ↦ Q_A [(Q_Aᵀ G Q_S) / (Λ + λ)] Q_Sᵀ` in each layer, and `g / (d + λ)` elsewhere.

    Args:
        factors: the curvature.
        damping: λ; when left out, each matrix has its own, `relative_damping` times the mean of its eigenvalues.
        relative_damping: see there.  One tenth is Grosse et al.'s; the package `kronfluence` takes 1e-8, absolute,
            unless told to do this.

    Raises:
        InvalidInputError: damped eigenvalues are not positive and finite.

    Source: Grosse et al. 2023, equation 20.
    """

    def damped(name: str, values: Array, axes: tuple[int, ...]) -> Array:
        ridge = relative_damping * jnp.mean(values, axis=axes, keepdims=True) if damping is None else damping
        total = values + jnp.asarray(ridge, values.dtype)
        wrong = ~((total > 0) & jnp.isfinite(total))
        if wrong.any():
            raise InvalidInputError(
                f"an eigenvalue of {float(total[wrong][0]):g} in the layer {name!r}",
                expected="positive, finite eigenvalues after damping",
                remedy="give a positive, finite `damping`: where it is 0, no gradient reaches some of these parameters",
            )
        return total

    values = {name: damped(name, each, (-2, -1)) for name, each in factors.eigenvalues.items()}
    plain = {name: damped(name, each, tuple(range(each.ndim))) for name, each in factors.plain.items()}
    operator = jax.tree_util.Partial(_precondition, factors.layers, _rotations(factors.bases), values, plain)
    return tree.callable_tree(operator)


def _rotations(found: Bases) -> Rotations:
    return {name: (found.inputs[name].vectors, found.outputs[name].vectors) for name in found.inputs}


def _first(source: Source) -> tuple[Any, Any]:
    return _shapes(Numbered(source).take(np.zeros(1, np.int64))), jax.ShapeDtypeStruct((1,), bool)


def _shapes(batch: Any, drop: int = 0) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[drop:], leaf.dtype), batch)


def _sum(update: jax.tree_util.Partial, numbered: Batch, valid: Any) -> Fold:
    """Return the statistic that adds up what `update` makes of such batches; its own arrays may be abstract."""
    add = tree.callable_tree(update)
    shapes = jax.eval_shape(lambda add, *batch: add(*batch), add, numbered, valid)
    return Fold(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), update, lambda total: total
    )


def _moments(
    layers: Layers, loss: OutputFn, params: Params, batch: Batch, valid: Bool[Array, " b"]
) -> dict[str, tuple[Array, Array]]:
    def both(layer: Layer, _: Any, a: Array, s: Array) -> tuple[Array, Array]:
        kind = taps.accumulator(a, s)
        inputs = _second_moment(a, valid, layer.inputs, kind, _looked_up(layer, swapped=False))
        return inputs, _second_moment(s, valid, layer.outputs, kind, _looked_up(layer, swapped=True))

    reducers = {layer.name: taps.Reducer(partial(both, layer)) for layer in layers.layers}
    return taps.reduce(layers, loss, params, batch, reducers=reducers, plain=False).layers


def _looked_up(layer: Layer, *, swapped: bool) -> bool:
    """Whether rows of the layer's matrix are looked up, or columns if swapped.

    Their second moment is diagonal, and too large otherwise.
    """
    return any(use.kind == "embedding" and use.swapped == swapped for use in layer.uses)


def _second_moment(each: Array, valid: Bool[Array, " b"], size: int, kind: Any, diagonal_only: bool) -> Array:
    if each.ndim == 3:  # indices
        kept = valid.astype(kind)[None, :, None]
        counts = jax.vmap(lambda rows, weight: jnp.zeros(size, kind).at[rows].add(weight, mode="drop"))
        rows = jnp.where(each < 0, size, each).reshape(len(each), -1)
        return counts(rows, jnp.broadcast_to(kept, each.shape).reshape(len(each), -1))
    kept = valid.astype(each.dtype)[None, :, None, None]
    if diagonal_only or size > WIDEST:
        return jnp.sum(jnp.square(each.astype(kind)) * kept.astype(kind), axis=(1, 2))
    rows = (each * kept).reshape(len(each), -1, size)
    return jnp.einsum("lri,lrj->lij", rows, each.reshape(rows.shape), precision="highest", preferred_element_type=kind)


def _basis(name: str, moment: Side) -> Basis:
    exact = np.asarray(meshes.fetch(moment), np.float64)
    if not np.isfinite(exact).all():
        raise DivergedError(
            f"second moments of the layer {name!r} that are not finite",
            expected="finite inputs and gradients",
            remedy="look for NaN or overflow: a diverged checkpoint, an input, gradients in half precision",
        )
    if exact.ndim == 2:
        return Basis(None, moment)
    values, vectors = np.linalg.eigh((exact + exact.swapaxes(1, 2)) / 2)
    kind = np.dtype(moment.dtype)
    vectors, values = vectors.astype(kind), jnp.asarray(np.maximum(values, 0).astype(kind))
    where = moment.sharding
    if not isinstance(where, NamedSharding):
        return Basis(jnp.asarray(vectors), values)
    return Basis(jax.make_array_from_callback(vectors.shape, where, lambda index: vectors[index]), values)


def _outer(found: Bases, name: str) -> Array:
    """Return K-FAC's eigenvalues: of the sum over positions that are taken to be independent."""
    inputs, outputs = found.inputs[name].values, found.outputs[name].values
    return inputs[:, :, None] * outputs[:, None, :] * found.positions[name]


def _rotated(matrix: Array, rotation: tuple[Array | None, Array | None]) -> Array:
    """Return `Q_Aᵀ G Q_S` of matrices `[…, stack, inputs, outputs]`."""
    left, right = rotation
    matrix = matrix if left is None else jnp.einsum("lij,...lio->...ljo", left, matrix, precision="highest")
    return matrix if right is None else jnp.einsum("...ljo,lok->...ljk", matrix, right, precision="highest")


def _squares(
    layers: Layers, loss: OutputFn, params: Params, rotations: Rotations, batch: Batch, valid: Bool[Array, " b"]
) -> tuple[dict[str, Array], dict[str, Array]]:
    names = {layer.name: layer for layer in layers.layers}
    at_once = {
        name for name, layer in names.items() if layer.whole and "embedding" not in {use.kind for use in layer.uses}
    }

    def whole(layer: Layer, rotation: Any, a: Array, s: Array) -> Array:
        kept = valid.astype(taps.accumulator(a, s))
        if a.shape[2] == 1:  # one outer product: its square is that of the squares
            a, s = _turn(a, rotation[0])[:, :, 0], _turn(s, rotation[1])[:, :, 0]
            return jnp.einsum("lbi,lbo->lio", jnp.square(a) * kept[None, :, None], jnp.square(s), precision="highest")
        positions, rows, columns = a.shape[2], layer.inputs, layer.outputs
        if positions * (rows**2 + columns**2) < rows * columns * (rows + columns):
            gradients = taps.outer(layer, _turn(a, rotation[0]), _turn(s, rotation[1]))
        else:
            gradients = _rotated(taps.outer(layer, a, s), rotation)
        return jnp.einsum("b,blio->lio", kept, jnp.square(gradients), precision="highest")

    def later(layer: Layer, _: Any, a: Array, s: Array) -> Array:
        return jnp.swapaxes(taps.outer(layer, a, s), 0, 1)

    reducers = {
        name: taps.Reducer(partial(whole, layer), rotations[name]) if name in at_once
        else taps.Reducer(partial(later, layer))
        for name, layer in names.items()
    }  # fmt: skip
    found = taps.reduce(layers, loss, params, batch, reducers=reducers)
    values = dict(found.layers)
    for name in names.keys() - at_once:
        gradients = _rotated(jnp.swapaxes(values[name], 0, 1), rotations[name])
        values[name] = jnp.einsum("b,blio->lio", valid.astype(gradients.dtype), jnp.square(gradients))
    return values, diagonal.squares(found.plain, valid)


def _turn(rows: Array, vectors: Array | None) -> Array:
    rows = rows.astype(taps.accumulator(rows))
    return rows if vectors is None else jnp.einsum("lbpi,lij->lbpj", rows, vectors, precision="highest")


def _transposed(vectors: Array | None) -> Array | None:
    return None if vectors is None else jnp.swapaxes(vectors, 1, 2)


def _check_vectors(layers: Layers, vectors: Vectors) -> None:
    shapes: dict[str, tuple[int | None, ...]] = {leaf.path: leaf.shape for leaf in layers.plain}
    for layer in layers.layers:
        shapes[layer.path] = (None,) * len(layer.form.box.starts)
        if layer.bias is not None and layer.bias_form is not None:
            shapes[layer.bias] = (None,) * len(layer.bias_form.box.starts)
    check_shapes(shapes, vectors)
    check_rows(vectors)


@partial(jax.jit, static_argnums=0)
def _precondition(
    layers: Layers, rotations: Rotations, values: dict[str, Array], plain: dict[str, Array], vectors: Vectors
) -> Vectors:
    _check_vectors(layers, vectors)
    matrices, rest = taps.matrices(layers, vectors)
    solved = {}
    for name, matrix in matrices.items():
        left, right = rotations[name]
        back = _transposed(left), _transposed(right)
        matrix = matrix.astype(values[name].dtype)
        solved[name] = _rotated(_rotated(matrix, (left, right)) / values[name][None], back)
    others = {path: leaf.astype(plain[path].dtype) / plain[path][None] for path, leaf in rest.items()}
    return taps.from_matrices(layers, solved, others, _shapes(vectors, drop=1))
