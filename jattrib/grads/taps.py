"""Factored per-example gradients of any pure function: layer inputs `a` and output gradients `s`, without modules.

The gradient of a matrix that is used in products is `Σ_positions aᵀ s`.  Both factors are operands of a product in the
gradient's own program, which JAX writes; `find` reads it, `reduce` and `factors` run it on a batch without the product.
So parameters may be shared, scanned, rematerialised, cast, transposed, sliced; may be used in branches, under custom
derivatives, in convolutions or look-ups; and what has no such form keeps its plain gradient, with a reason.

A layer's factors are `a: [stack, b, positions, inputs]` and `s: [stack, b, positions, outputs]`:

* stack: iterations of a scan over stacked parameters, groups of a convolution, batch dimensions of the product;
* positions: tokens, pixels, iterations of a scan that shares the parameters;
* inputs: with a last 1 where the layer has a bias; of an embedding, `a` holds the integer indices of rows
  (`[stack, b, positions]`, −1 for none), not one-hot rows; of a vector on its own (a scale), inputs is 1 and a is 1.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch, Example, OutputFn, Params
from jattrib.grads import layers as forms
from jattrib.grads import program as programs
from jattrib.grads import rerun
from jattrib.grads.layers import Layer, Layers, Plain, Use

__all__ = [
    "Factors", "Layer", "Layers", "LeafReport", "Plain", "Reduced", "Reducer", "Use", "dense", "factors", "find",
    "from_matrices", "gradients", "matrices", "outer", "reduce", "report",
]  # fmt: skip


class Reducer(NamedTuple):
    """What to make of a layer's factors where they appear in the backward pass.

    Attributes:
        function: `function(state, a, s)`, a pytree of arrays with a leading stack axis; it may see a part of the stack
            at a time (an iteration of a scan), so it must treat each matrix of the stack alike.
        state: a pytree of arrays with a leading axis of `layer.stack`, of which it sees the same part.
        keep_positions: without, results are summed over uses and over iterations that share the leaf; with it they are
            `[stack, b, positions, …]`, and each use's is kept apart.
    """

    function: Callable[[PyTree, Array, Array], PyTree]
    state: PyTree = ()
    keep_positions: bool = False


class Reduced(NamedTuple):
    """One pass over a batch.

    Attributes:
        values: the outputs f.
        layers: by layer what its reducer made; where positions are kept, a tuple with an entry a use.
        plain: by path the plain gradients `[b, *shape]` of leaves that have no factored form.
    """

    values: Float[Array, " b"]
    layers: dict[str, PyTree]
    plain: dict[str, Array]


class Factors(NamedTuple):
    """The factors of a batch: by layer a pair `(a, s)` for each use; and what `Reduced` has."""

    values: Float[Array, " b"]
    layers: dict[str, tuple[tuple[Array, Array], ...]]
    plain: dict[str, Array]


class LeafReport(NamedTuple):
    """What becomes of a leaf: the layer that it belongs to and the kinds of its uses, or the reason why it is plain."""

    path: str
    layer: str | None
    kinds: tuple[str, ...]
    stack: int
    positions: int
    inputs: int
    outputs: int
    reason: str


def find(output: OutputFn, params: Params, example: Example) -> Layers:
    """Return the layers of an output: what is static about them.  Nothing is computed.

    Args:
        output: the output f, of one example.
        params: the parameters, or their shapes (`jax.eval_shape`).
        example: one example, without a batch axis, or its shapes.

    Raises:
        InvalidInputError: the output is not one number, a leaf is not floating, or no leaf has a factored form.
    """
    return _analyse(output, params, example)[1]


def _analyse(output: OutputFn, params: Params, example: Example) -> tuple[programs.Program, Layers, dict[str, Any]]:
    program = programs.trace(output, params, example)
    layers, sources = forms.analyse(program, tree.paths(params))
    if not layers.layers:
        reasons = "; ".join(f"{leaf.path}: {leaf.reason}" for leaf in layers.plain[:4])
        raise InvalidInputError(
            f"an output in which no parameter is used linearly ({reasons})",
            expected="a parameter that is multiplied with something that depends on the example, or added to it",
            remedy="use `grads.per_example`, whose gradients need no form",
        )
    return program, layers, sources


def report(layers: Layers) -> list[LeafReport]:
    """Return what becomes of each leaf: no leaf is missing."""
    found = []
    for layer in layers.layers:
        kinds, positions = tuple(use.kind for use in layer.uses), sum(use.positions for use in layer.uses)
        found.append(LeafReport(layer.path, layer.name, kinds, layer.stack, positions, layer.inputs, layer.outputs, ""))
        if layer.bias is not None:
            found.append(LeafReport(layer.bias, layer.name, ("bias",), layer.stack, positions, 1, layer.outputs, ""))
    return found + [LeafReport(leaf.path, None, (), 1, 0, 0, 0, leaf.reason) for leaf in layers.plain]


def reduce(
    layers: Layers, output: OutputFn, params: Params, batch: Batch, *, reducers: Mapping[str, Reducer],
    plain: bool = True,
) -> Reduced:  # fmt: skip
    """Return what reducers make of the layers' factors on a batch, in one forward and one backward pass.

    A reducer runs where its layer's output gradient appears, inside the scan over layers if there is one: the factors
    of the whole model are never in memory together.

    Args:
        layers: what `find` found.
        output: the output f.
        params: the parameters.
        batch: examples with a leading axis.
        reducers: by the layer's name; layers without one are left out.
        plain: whether to give the gradients of leaves that have no factored form.

    Raises:
        InvalidInputError: a name is no layer's, or the layers are those of another model.
    """
    forms.layers_named(layers, list(reducers))
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), batch)
    program, here, sources = _analyse(output, params, example)
    _check_same(layers, here)
    jobs, owners = [], []
    for name, reducer in reducers.items():
        for source in sources[name]:
            jobs.append(rerun.Job(source, *reducer))
            owners.append(name)
    paths = tree.paths(params)
    rest = [paths.index(leaf.path) for leaf in layers.plain] if plain else []
    leaves, rows = ([jnp.asarray(leaf) for leaf in jax.tree.leaves(each)] for each in (params, batch))
    values, gradients, results = rerun.run(program, leaves, rows, jobs, rest)
    found: dict[str, PyTree] = {}
    for number, name in enumerate(owners):
        if reducers[name].keep_positions:
            found[name] = (*found.get(name, ()), results[number])
        else:
            found[name] = jax.tree.map(jnp.add, found[name], results[number]) if name in found else results[number]
    return Reduced(values, found, {paths[number]: each for number, each in zip(sorted(rest), gradients, strict=True)})


def _check_same(layers: Layers, here: Layers) -> None:
    """Refuse layers that were found in another model; the number of positions may be another."""

    def shown(all_: Layers) -> dict[str, Any]:
        uses = {layer.name: tuple((use.kind, use.swapped) for use in layer.uses) for layer in all_.layers}
        own = {layer.name: (layer._replace(uses=()), uses[layer.name]) for layer in all_.layers}
        return own | {leaf.path: leaf.shape for leaf in all_.plain}

    was, now = shown(layers), shown(here)
    differing = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    if differing:
        raise InvalidInputError(
            f"layers that were found in another model: they differ at {differing[0]!r}",
            expected="the layers of this output and these parameters",
            remedy="call `taps.find(output, params, example)` anew for this model",
        )


def factors(layers: Layers, output: OutputFn, params: Params, batch: Batch) -> Factors:
    """Return the layers' inputs and output gradients on a batch, `∇_W f = Σ_uses Σ_positions aᵀ s`; see `reduce`."""
    both = Reducer(lambda _, a, s: (a, s), keep_positions=True)
    return Factors(*reduce(layers, output, params, batch, reducers={layer.name: both for layer in layers.layers}))


def gradients(layers: Layers, found: Factors, params: Params) -> Params:
    """Return the per-example gradients that factors stand for: what `grads.per_example` gives."""
    whole = {}
    for layer in layers.layers:
        parts = [outer(layer, a, s) for a, s in found.layers[layer.name]]
        whole[layer.name] = sum(parts[1:], start=parts[0])
    return from_matrices(layers, whole, found.plain, params)


def outer(layer: Layer, a: Array, s: Array) -> Float[Array, "b stack inputs outputs"]:
    """Return `Σ_positions aᵀ s` of one use of a layer, for each example; sums of half precision are in single."""
    if jnp.issubdtype(s.dtype, jnp.integer):
        return jnp.swapaxes(outer(layer._replace(inputs=layer.outputs, outputs=layer.inputs), s, a), 2, 3)
    if a.ndim == 3:
        s = s.astype(accumulator(s))
        rows = jax.vmap(
            jax.vmap(lambda i, g: jnp.zeros((layer.inputs, g.shape[-1]), g.dtype).at[i].add(g, mode="drop"))
        )
        return jnp.moveaxis(rows(jnp.where(a < 0, layer.inputs, a), s), 0, 1)
    kind = accumulator(a, s)
    return jnp.einsum("lbpi,lbpo->blio", a.astype(kind), s.astype(kind), precision=lax.Precision.HIGHEST)


def accumulator(*arrays: Array) -> Any:
    """Return the type in which products of arrays are summed: float64 if one is of that type, else float32."""
    return jnp.dtype(jnp.float64 if any(array.dtype == jnp.float64 for array in arrays) else jnp.float32)


def dense(layer: Layer, a: Array, dtype: Any) -> Float[Array, "stack b positions inputs"]:
    """Return the inputs of a layer as rows: those of an embedding, one-hot; others as they are."""
    return jax.nn.one_hot(a, layer.inputs, dtype=dtype) if a.ndim == 3 else a.astype(dtype)


def matrices(layers: Layers, leaves: Params) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return parameters or gradients as matrices `[…, stack, inputs, outputs]` by layer, and the plain leaves by path.

    Leading axes that the leaves have beyond the parameters' (a batch) stay in front.  A bias is the last row.
    """
    named, found = {name: jnp.asarray(leaf) for name, leaf in tree.to_names(leaves).items()}, {}
    for layer in layers.layers:
        value = forms.matrix(layer.form, named[layer.path])
        if layer.bias is not None and layer.bias_form is not None:
            row = forms.matrix(layer.bias_form, named[layer.bias])
            value = jnp.concatenate([value, row.astype(value.dtype)], axis=-2)
        found[layer.name] = value
    return found, {leaf.path: named[leaf.path] for leaf in layers.plain}


def from_matrices(layers: Layers, found: Mapping[str, Array], plain: Mapping[str, Array], like: Params) -> Params:
    """Return the pytree of `like`'s structure, shapes (but for leading axes) and dtypes that `matrices` took apart.

    Parts of a leaf that no layer holds are 0.
    """
    shapes = {name: (jnp.shape(leaf), jnp.result_type(leaf)) for name, leaf in tree.to_names(like).items()}
    named: dict[str, Array] = {name: jnp.asarray(leaf, shapes[name][1]) for name, leaf in plain.items()}
    for layer in layers.layers:
        value = found[layer.name]
        if layer.bias is not None and layer.bias_form is not None:
            shape, dtype = shapes[layer.bias]
            named[layer.bias] = forms.unmatrix(layer.bias_form, value[..., -1:, :], shape).astype(dtype)
            value = value[..., :-1, :]
        shape, dtype = shapes[layer.path]
        part = forms.unmatrix(layer.form, value, shape).astype(dtype)
        named[layer.path] = named[layer.path] + part if layer.path in named else part
    return tree.from_names(like, named)
