"""Projections in factored form: of a layer's gradient `G = Σ_positions aᵀ s`, the features `P_iᵀ G P_o`, never G.

Each matrix is projected on both sides, `φ = Σ_positions (P_iᵀ a) (P_oᵀ s)ᵀ`, from the factors that `grads.taps` finds:
two thin products a layer in place of a gradient of the layer's size.  With independent P of mean 0 and variance `1/k`,
inner products of features are unbiased, `E⟨φ, φ'⟩ = ⟨G, G'⟩`, layer by layer and in sum.

Source: Choe et al. 2024, "What is your data worth to GPT?", section 3 (LoGra); Hu et al. 2025, "GraSS", section 3.3
(FactGraSS).  LoGra leaves out what is no linear layer; here vectors and plain leaves are projected too, unless `plan`
is told otherwise.
"""

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError, check_choice
from jattrib.core.types import Batch, Key, OutputFn, Params, Projector
from jattrib.grads import taps
from jattrib.grads.taps import Layer, Layers, Plain
from jattrib.projection import leaves
from jattrib_kernels.backend import Backend
from jattrib_kernels.dense_projection import dense_projection
from jattrib_kernels.dense_projection.reference import ROWS, signs
from jattrib_kernels.random import Stream, fold_in, threefry2x32
from jattrib_kernels.sketch_projection import sketch_projection

Sides = Literal["signs", "mask"]
"""How a side is projected: by random signs, or by a random choice of its coordinates."""

Pair = tuple[Float[Array, "stack inputs ki"], Float[Array, "stack outputs ko"]]


class Plan(NamedTuple):
    """What is projected to what; hashable.

    Attributes:
        found: the layers of the model.
        layers: those that are projected, and their ranks: features of the inputs and of the outputs.
        plain: leaves without a factored form that are projected, and to how many features.
        sides: how sides are projected.
        sketch: the number of features to which those of all layers are sketched; None keeps them apart.
        backend: of the sketch, and of the projection of plain leaves.
    """

    found: Layers
    layers: tuple[tuple[Layer, int, int], ...]
    plain: tuple[tuple[Plain, int], ...]
    sides: Sides
    sketch: int | None
    backend: Backend

    @property
    def width(self) -> int:
        """Features of all layers together, before the sketch."""
        return sum(layer.stack * rows * columns for layer, rows, columns in self.layers) + sum(k for _, k in self.plain)

    @property
    def dim(self) -> int:
        """Features of an example."""
        return self.width if self.sketch is None else self.sketch


class State(NamedTuple):
    """What fixes the projection: the words of a key, and bases that stand in for random matrices, by layer."""

    words: leaves.KeyWords
    bases: dict[str, Pair]


def plan(
    layers: Layers,
    *,
    rank: int | tuple[int, int] = 16,
    select: Sequence[str] | None = None,
    sides: Sides = "signs",
    sketch: int | None = None,
    backend: Backend = "auto",
) -> Plan:
    """Return what to project to what.

    Args:
        layers: what `taps.find` found.
        rank: features of the inputs and of the outputs of each matrix, `rank²` for each; a side that has no more
            entries is kept as it is.  A plain leaf has as many features as a matrix.
        select: shell patterns of the layers and plain leaves to project; None is all of them.
        sides: `signs`; or `mask`, FactGraSS's, which is cheaper and can lose half of the fidelity.
        sketch: features in all, by the block-rotated sign sketch of those of all layers.
        backend: of the sketch, and of the projection of plain leaves.

    Raises:
        InvalidInputError: a pattern matches nothing, nothing is chosen, a number is below 1, or `sides` is not known.
    """
    check_choice("sides", sides, get_args(Sides))
    rows, columns = (rank, rank) if isinstance(rank, int) else rank
    leaves.check_dim(min(rows, columns))
    if sketch is not None:
        leaves.check_dim(sketch)
    names = [layer.name for layer in layers.layers] + [leaf.path for leaf in layers.plain]
    for pattern in select or ():
        if not any(_matches(name, pattern) for name in names):
            raise InvalidInputError(
                f"the pattern {pattern!r}, which matches no layer",
                expected=f"a pattern of {', '.join(names[:8])}{', …' if len(names) > 8 else ''}",
                remedy="`taps.report(layers)` lists them",
            )

    def chosen(name: str) -> bool:
        return select is None or any(_matches(name, pattern) for pattern in select)

    own = tuple((layer, min(rows, layer.inputs), min(columns, layer.outputs)) for layer in layers.layers
                if chosen(layer.name))  # fmt: skip
    rest = tuple((leaf, min(rows * columns, math.prod(leaf.shape))) for leaf in layers.plain
                 if chosen(leaf.path) and math.prod(leaf.shape))  # fmt: skip
    if not own and not rest:
        raise InvalidInputError(
            f"select = {select!r}, which chooses no layer with an entry",
            expected="one layer or leaf at least",
            remedy="leave `select` out for all of them; `taps.report(layers)` lists them",
        )
    return Plan(layers, own, rest, sides, sketch, backend)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + "/*")


@functools.cache
def projector(plan: Plan) -> Projector:
    """Return the projector of a plan: `direct` makes features from factors, `apply` from gradients that exist.

    The matrices are a pure function of the key, of the layer's name and of the coordinate, on every backend and mesh.

    Raises:
        InvalidInputError: from `init`, the parameters are not those of the plan's layers, or the key is of another
            generator than Threefry.
    """

    def init(key: Key, params: Params) -> State:
        _check_params(plan, params)
        return State(leaves.key_words(key), {})

    def apply(state: State, gradients: Params) -> Float[Array, "n dim"]:
        whole, plain = taps.matrices(plan.found, gradients)
        parts = {}
        for layer, rows, columns in plan.layers:
            sides = _pair(plan, state, layer, (rows, columns), jnp.arange(layer.stack), state.bases.get(layer.name))
            product = jnp.moveaxis(whole[layer.name], 0, 1)  # [stack, n, inputs, outputs]
            product = _times(jnp.swapaxes(_times(product, sides[1], lead=1), 2, 3), sides[0], lead=1)
            parts[layer.name] = jnp.transpose(product, (1, 0, 3, 2)) * (sides[0].scale * sides[1].scale)
        return _joined(plan, state, parts, plain)

    def direct(state: State, output: OutputFn, params: Params, batch: Batch) -> tuple[Array, Array]:
        values, parts, plain = taps.reduce(
            plan.found, output, params, batch, reducers=_reducers(plan, state, keep=False), plain=bool(plan.plain)
        )
        return values, _joined(plan, state, {name: jnp.moveaxis(part, 0, 1) for name, part in parts.items()}, plain)

    return Projector(plan.dim, init, apply, direct)


def from_bases(plan: Plan, state: State, bases: Mapping[str, Pair]) -> State:
    """Return the state in which some layers are projected on given bases: LoGra's, eigenvectors of K-FAC's factors.

    Args:
        plan: the plan.
        state: the random state, for all other layers.
        bases: by layer the columns for the inputs and for the outputs, `[stack, inputs, rank]`; taken as they are.

    Raises:
        InvalidInputError: a name is no layer's, or a basis has another shape.
    """
    known = {layer.name: (layer, rows, columns) for layer, rows, columns in plan.layers}
    for name, pair in bases.items():
        if name not in known:
            raise InvalidInputError(
                f"bases for {name!r}", expected=f"a layer of the plan, such as {next(iter(known))!r}",
                remedy="see `plan.layers`",
            )  # fmt: skip
        layer, rows, columns = known[name]
        wanted = (layer.stack, layer.inputs, rows), (layer.stack, layer.outputs, columns)
        got = tuple(jnp.shape(each) for each in pair)
        if got != wanted:
            raise InvalidInputError(
                f"bases of the shapes {got[0]} and {got[1]} for {name!r}", expected=f"{wanted[0]} and {wanted[1]}",
                remedy="take as many leading eigenvectors as the plan's rank",
            )  # fmt: skip
    return state._replace(bases=state.bases | {name: (pair[0], pair[1]) for name, pair in bases.items()})


def matrices(plan: Plan, state: State) -> dict[str, Pair]:
    """Return the matrices of every layer, `(P_i, P_o)`, as a check or to look at: features never need them whole."""
    found = {}
    for layer, rows, columns in plan.layers:
        sides = _pair(plan, state, layer, (rows, columns), jnp.arange(layer.stack), state.bases.get(layer.name))
        sizes = layer.inputs, layer.outputs
        found[layer.name] = tuple(
            jnp.tile(jnp.eye(size), (layer.stack, 1, 1))
            if side.matrix is None
            else side.matrix.astype(jnp.result_type(float)) * side.scale
            for side, size in zip(sides, sizes, strict=True)
        )
    return found


def token_features(
    plan: Plan, state: State, output: OutputFn, params: Params, batch: Batch
) -> Float[Array, "n positions dim"]:
    """Return `P_oᵀ s_t ⊗ P_iᵀ a_t` of every position t, whose sum over t are the features of the example.

    A position is a token where each layer has one product a token: a layer's uses are added position by position.

    Raises:
        InvalidInputError: layers have different numbers of positions, or a plain leaf is to be projected.
    """
    if plan.plain:
        raise InvalidInputError(
            f"features by position of {plan.plain[0][0].path!r}, which has no factors",
            expected="layers alone", remedy="`plan(layers, select=...)` without it",
        )  # fmt: skip
    reducers = _reducers(plan, state, keep=True)
    reduced = taps.reduce(plan.found, output, params, batch, reducers=reducers, plain=False)
    parts, counts = {}, {}
    for name, uses in reduced.layers.items():
        counts[name] = {use.shape[2] for use in uses}
        parts[name] = uses
    every = sorted(set().union(*counts.values()))
    if len(every) != 1:
        odd = next(name for name, found in counts.items() if found != {every[-1]})
        raise InvalidInputError(
            f"{sorted(counts[odd])} positions at {odd!r}, {every[-1]} elsewhere",
            expected="as many positions in every layer and use",
            remedy="`plan(layers, select=...)` with the layers that see one token a position",
        )
    rows = {name: jnp.moveaxis(sum(uses[1:], start=uses[0]), 0, 2) for name, uses in parts.items()}
    n, positions = next(iter(rows.values())).shape[:2]
    flat = {name: each.reshape(n * positions, *each.shape[2:]) for name, each in rows.items()}
    return _joined(plan, state, flat, {}).reshape(n, positions, plan.dim)


def _reducers(plan: Plan, state: State, *, keep: bool) -> dict[str, taps.Reducer]:
    def reducer(layer: Layer, ranks: tuple[int, int]) -> taps.Reducer:
        def function(here: dict[str, Any], a: Array, s: Array) -> Array:
            inputs, outputs = _pair(plan, state, layer, ranks, here["number"], here.get("bases"))
            if a.ndim == 3 and inputs.matrix is None:
                a = taps.dense(layer, a, jnp.float32)
            u, v = _times(a, inputs, lead=1), _times(s, outputs, lead=1)
            dtype = taps.accumulator(u, v)
            pattern = "lbpk,lbpm->lbpkm" if keep else "lbpk,lbpm->lbkm"
            product = jnp.einsum(pattern, u.astype(dtype), v.astype(dtype), precision=lax.Precision.HIGHEST)
            return product * (inputs.scale * outputs.scale)

        numbers = {"number": jnp.arange(layer.stack)}
        bases = {"bases": state.bases[layer.name]} if layer.name in state.bases else {}
        return taps.Reducer(function, numbers | bases, keep)

    return {layer.name: reducer(layer, (rows, columns)) for layer, rows, columns in plan.layers}


class _Side(NamedTuple):
    """A matrix for each of a stack, times a number; None is the identity.  Entries of ±1 and 0 are exact everywhere."""

    matrix: Float[Array, "stack size rank"] | None
    scale: float
    exact: bool


def _times(x: Array, side: _Side, *, lead: int = 0) -> Array:
    """Return `x P` without the scale, summed in float32 at least; x has `lead` axes between stack and rows.

    Integers stand for one-hot rows.
    """
    matrix = side.matrix
    if jnp.issubdtype(x.dtype, jnp.integer):
        assert matrix is not None  # an identity is given to look-ups as a matrix
        rows = jax.vmap(lambda table, index: table[jnp.maximum(index, 0)])(matrix, x)
        return jnp.where((x >= 0)[..., None], rows, 0)
    dtype = taps.accumulator(x) if matrix is None else taps.accumulator(x, matrix)
    if matrix is None:
        return x.astype(dtype)
    own = x.dtype if side.exact else dtype
    matrix = jnp.expand_dims(matrix, tuple(range(1, 1 + lead)))
    return jnp.matmul(x.astype(own), matrix.astype(own), precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


def _pair(
    plan: Plan, state: State, layer: Layer, ranks: tuple[int, int], numbers: Array, bases: Pair | None
) -> tuple[_Side, _Side]:
    """Return both sides of a layer for some numbers in its stack."""
    if bases is not None:
        return _Side(bases[0], 1.0, False), _Side(bases[1], 1.0, False)
    inputs, outputs = (
        _side(plan.sides, _key(state.words, f"{layer.name}\0{side}"), size, rank, numbers)
        for side, size, rank in zip(("inputs", "outputs"), (layer.inputs, layer.outputs), ranks, strict=True)
    )
    return inputs, outputs


def _side(sides: Sides, key: leaves.KeyWords, size: int, rank: int, numbers: Array) -> _Side:
    """Return matrices with `scale² E P Pᵀ = I`, each of the stack from words of its own."""
    if rank == size:
        return _Side(None, 1.0, True)
    if sides == "signs":
        words = fold_in((key[0], key[1]), int(Stream.DENSE_SIGNS))
        blocks = -(-size // ROWS)

        def matrix(number: Array) -> Array:
            first = number.astype(jnp.uint32) * jnp.uint32(blocks)
            return signs(words, first, jnp.uint32(0), blocks=blocks, cols=rank)[:size]

        return _Side(jax.vmap(matrix)(numbers), 1 / math.sqrt(rank), True)

    def choice(number: Array) -> Array:
        counter = jnp.arange(size, dtype=jnp.uint32)
        hashed, _ = threefry2x32((key[0], key[1]), (jnp.full_like(counter, number.astype(jnp.uint32)), counter))
        chosen = jnp.argsort(hashed, stable=True)[:rank]
        return jax.nn.one_hot(chosen, size, dtype=jnp.float32).T

    return _Side(jax.vmap(choice)(numbers), math.sqrt(size / rank), True)


def _joined(plan: Plan, state: State, parts: Mapping[str, Array], plain: Mapping[str, Array]) -> Float[Array, "n dim"]:
    """Return the features of all layers in a row, sketched if the plan says so."""
    rows = [parts[layer.name].reshape(len(parts[layer.name]), -1) for layer, _, _ in plan.layers]
    for leaf, k in plan.plain:
        flat = plain[leaf.path].reshape(len(plain[leaf.path]), -1)
        if k < flat.shape[1]:
            key = _key(state.words, leaf.path)
            flat = dense_projection(flat, key, k, backend=plan.backend) * (1 / math.sqrt(k))
        rows.append(flat)
    dtype = taps.accumulator(*rows)
    whole = jnp.concatenate([each.astype(dtype) for each in rows], axis=1)
    if plan.sketch is None:
        return whole
    return sketch_projection(whole, _key(state.words, "\0sketch"), plan.sketch, backend=plan.backend)


def _key(words: leaves.KeyWords, name: str) -> leaves.KeyWords:
    """Return the key of a name: words folded with 64 bits of its hash."""
    digest = hashlib.sha256(name.encode()).digest()
    key = (words[0], words[1])
    for start in (0, 4):
        key = fold_in(key, jnp.uint32(int.from_bytes(digest[start : start + 4], "little")))
    return jnp.stack(key)


def _check_params(plan: Plan, params: Params) -> None:
    named = tree.to_names(params)
    paths = {leaf.path for leaf, _ in plan.plain} | {layer.path for layer, _, _ in plan.layers}
    paths |= {layer.bias for layer, _, _ in plan.layers if layer.bias is not None}
    missing = sorted(paths - named.keys())
    if missing:
        raise InvalidInputError(
            f"parameters without {missing[0]!r}, which the plan projects",
            expected="the parameters whose layers were found",
            remedy="call `taps.find` on this model, and plan anew",
        )
