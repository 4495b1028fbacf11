"""Layers: leaves whose gradients are sums of outer products, how their entries lie in a matrix, and which share one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jattrib.core.errors import InvalidInputError
from jattrib.grads import program as programs
from jattrib.grads import sites, views
from jattrib.grads.program import Kind, Program, Site, Step
from jattrib.grads.sites import Recipe
from jattrib.grads.views import Box, Digit, View

REARRANGING = {"convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim"}


class Use(NamedTuple):
    """One use of a layer's leaf for an example.

    Attributes:
        kind: a matrix product, a convolution, a look-up of rows; of vectors, a sum or an elementwise product.
        positions: how many products of an input and an output gradient are summed.
        swapped: whether the outputs of this use are the inputs of the layer, as where one matrix embeds and unembeds.
    """

    kind: Kind
    positions: int
    swapped: bool = False


class Form(NamedTuple):
    """How the entries of a leaf's part lie in `[stack, inputs, outputs]`."""

    box: Box
    stack: tuple[Digit, ...]
    inputs: tuple[Digit, ...]
    outputs: tuple[Digit, ...]


class Layer(NamedTuple):
    """A leaf, or a part of one, whose gradient is a sum over positions of outer products; and its bias.

    Attributes:
        name: the path of the leaf, with the bounds of the part where there are several.
        path: the path of the leaf.
        bias: the path of the bias that is the last row of the matrix, with an input of 1; None without one.
        stack: how many matrices: iterations of scans, groups, batch dimensions of the product.
        inputs: rows of a matrix, its bias included.
        outputs: columns of a matrix.
        uses: of the leaf; their contributions are summed.
        whole: whether a reducer sees all that is summed at once: one use, outside scans that share the leaf.
        form: how the leaf's entries lie in the matrices.
        bias_form: how the bias's do.
    """

    name: str
    path: str
    bias: str | None
    stack: int
    inputs: int
    outputs: int
    uses: tuple[Use, ...]
    whole: bool
    form: Form
    bias_form: Form | None = None


class Plain(NamedTuple):
    """A leaf without a factored form, and why; its gradient is computed as it is."""

    path: str
    shape: tuple[int, ...]
    reason: str


class Layers(NamedTuple):
    """What becomes of every leaf."""

    layers: tuple[Layer, ...]
    plain: tuple[Plain, ...]


class Source(NamedTuple):
    """Where the factors of one use of a layer come from."""

    site: Site
    recipe: Recipe
    equation: Any | None
    swapped: bool
    bias: bool = False


class _Group(NamedTuple):
    """The uses of one part of a leaf, in one form."""

    form: Form
    sources: list[Source]


def analyse(program: Program, paths: Sequence[str]) -> tuple[Layers, dict[str, list[Source]]]:
    """Return what becomes of every leaf, and by the layer's name where its factors come from."""
    groups: dict[str, list[_Group]] = {}
    plain = []
    for path, variable, (found, reason) in zip(
        paths, program.closed.jaxpr.outvars[1:], programs.contributions(program), strict=True
    ):
        shape = variable.aval.shape
        if not reason:
            groups[path], reason = _grouped(program, found, shape)
        if reason:
            groups.pop(path, None)
            plain.append(Plain(path, tuple(shape), reason))
    biases = _attached(program, groups)
    layers, sources = [], {}
    for path in paths:
        if path in biases.values():
            continue
        for group in groups.get(path, []):
            bias = biases.get(path)
            form = groups[bias][0].form if bias is not None else None
            layer = _layer(path, group, len(groups[path]) > 1, bias, form)
            layers.append(layer)
            sources[layer.name] = [source._replace(bias=bias is not None) for source in group.sources]
    return Layers(tuple(layers), tuple(plain)), sources


def _layer(path: str, group: _Group, several: bool, bias: str | None, bias_form: Form | None) -> Layer:
    uses, whole = [], len(group.sources) == 1
    for source in group.sources:
        shared = [step.length for step in source.site.trail if step.frame == "positions"]
        whole = whole and not shared
        uses.append(Use(source.site.kind, math.prod([source.recipe.positions, *shared]), source.swapped))
    form = group.form
    bounds = ",".join(f"{at}:{at + count}" for at, count in zip(form.box.starts, form.box.sizes, strict=True))
    stack, inputs, outputs = (views.size(digits) for digits in form[1:])
    inputs += bias is not None
    name = f"{path}[{bounds}]" if several else path
    return Layer(name, path, bias, stack, inputs, outputs, tuple(uses), whole, form, bias_form)


def _grouped(program: Program, found: Sequence[Site], shape: Sequence[int]) -> tuple[list[_Group], str]:
    """Return a leaf's uses by the part of it that they use, or why they do not go together."""
    groups: list[_Group] = []
    for site in sorted(found, key=lambda site: site.kind != "embedding"):  # indices are inputs, never outputs
        equation = None if site.equation < 0 else jaxpr_at(program, site.trail).eqns[site.equation]
        recipe = sites.recipe(site, equation)
        stack = views.joined([*(digit for step in site.trail if step.frame == "stack" for digit in step.digits),
                              *recipe.stack])  # fmt: skip
        box = views.box((*stack, *recipe.inputs, *recipe.outputs), site.view.offset, shape)
        if box is None:
            return [], "it is used in part, and not in a contiguous one"
        form = Form(box, stack, recipe.inputs, recipe.outputs)
        turned = form._replace(inputs=form.outputs, outputs=form.inputs)
        for group in groups:
            if group.form in (form, turned):
                group.sources.append(Source(site, recipe, equation, group.form != form))
                break
            if not views.disjoint(group.form.box, box):
                return [], "its uses split it into inputs and outputs in different ways"
        else:
            groups.append(_Group(form, [Source(site, recipe, equation, False)]))
    return groups, ""


def _attached(program: Program, groups: Mapping[str, list[_Group]]) -> dict[str, str]:
    """Return the biases by the leaf of whose layer they are the last row: those with its very output gradients."""
    single = {path: found[0].sources[0] for path, found in groups.items() if len(found) == 1
              and len(found[0].sources) == 1}  # fmt: skip
    owners = {}
    for path, source in single.items():
        if source.site.kind in ("dot", "conv"):
            owners.setdefault(_cotangent(program, source), path)
    attached: dict[str, str] = {}
    for path, source in single.items():
        if source.site.kind == "bias" and (owner := owners.get(_cotangent(program, source))) is not None:
            attached.setdefault(owner, path)
    return attached


def _cotangent(program: Program, source: Source) -> Any:
    """Return what tells a site's output gradients from all others: where they come from, and how they are arranged."""
    site, equation = source.site, source.equation
    jaxpr = jaxpr_at(program, site.trail)
    atom = site.variable if equation is None else equation.invars[0 if site.flipped else 1]
    producers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    chain = []
    while not programs.is_literal(atom) and atom in producers:
        eqn = producers[atom]
        name, sizes = eqn.primitive.name, {np.prod(each.aval.shape) for each in (*eqn.invars, *eqn.outvars)}
        if (
            name not in ("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim")
            or len(sizes) > 1
        ):
            break
        chain.append(eqn)
        atom = eqn.invars[0]
    view: View | None = views.whole(atom.aval.shape)
    for eqn in reversed(chain):
        if eqn.primitive.name == "transpose":
            view = view and views.transpose(view, eqn.params["permutation"])
        else:
            view = view and views.reshape(view, eqn.outvars[0].aval.shape)
    parts = [part for axis in source.recipe.s for part in axis]
    split = view and views.reshape(view, [part.size for part in parts])
    if split is None:
        return object()
    order = [sorted((i for i, part in enumerate(parts) if part.role == role), key=lambda i: parts[i].key)
             for role in sites.ROLES]  # fmt: skip
    arranged = tuple(views.joined(digit for i in axes for digit in split.dims[i]) for axes in order)
    frames = tuple((step.equation, step.branch, step.frame) for step in site.trail)
    return frames, atom, arranged, site.factor


def jaxpr_at(program: Program, trail: Sequence[Step]) -> Any:
    """Return the program that a trail leads to."""
    jaxpr = program.closed.jaxpr
    for step in trail:
        closed = inner(jaxpr.eqns[step.equation], step.branch)
        jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
    return jaxpr


def inner(equation: Any, branch: int) -> Any:
    """Return the program that an equation holds; of `cond`, that of a branch."""
    if equation.primitive.name == "cond":
        return equation.params["branches"][branch]
    return programs.program_of(equation)


def matrix(form: Form, leaf: Array) -> Array:
    """Return a leaf's part as `[…, stack, inputs, outputs]`; leading axes that the leaf has more stay in front."""
    lead = leaf.ndim - len(form.box.starts)
    ends = [start + count for start, count in zip(form.box.starts, form.box.sizes, strict=True)]
    part = lax.slice(leaf, [0] * lead + list(form.box.starts), [*leaf.shape[:lead], *ends])
    sizes, order = _order(form)
    part = part.reshape(*leaf.shape[:lead], *sizes)
    part = part.transpose(*range(lead), *(lead + axis for axis in order))
    return part.reshape(*leaf.shape[:lead], *(views.size(digits) for digits in form[1:]))


def unmatrix(form: Form, value: Array, shape: Sequence[int]) -> Array:
    """Return a leaf of a shape with the entries of `[…, stack, inputs, outputs]` in their places and 0 elsewhere."""
    lead = value.ndim - 3
    sizes, order = _order(form)
    value = value.reshape(*value.shape[:lead], *(sizes[axis] for axis in order))
    back = sorted(range(len(order)), key=lambda place: order[place])
    value = value.transpose(*range(lead), *(lead + axis for axis in back))
    value = value.reshape(*value.shape[:lead], *form.box.sizes)
    ends = zip(form.box.starts, form.box.sizes, shape, strict=True)
    config = [(0, 0, 0)] * lead + [(start, length - start - count, 0) for start, count, length in ends]
    return lax.pad(value, jnp.zeros((), value.dtype), config) if any(map(any, config)) else value


def _order(form: Form) -> tuple[list[int], list[int]]:
    """Return the sizes of all digits in the leaf's order, and for each digit of the matrices its place there."""
    digits = [digit for group in form[1:] for digit in group]
    by_stride = sorted(range(len(digits)), key=lambda i: -digits[i][1])
    return [digits[i][0] for i in by_stride], [by_stride.index(i) for i in range(len(digits))]


def layers_named(layers: Layers, names: Sequence[str]) -> list[Layer]:
    """Return the layers of some names.

    Raises:
        InvalidInputError: there is no layer of a name.
    """
    known = {layer.name: layer for layer in layers.layers}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidInputError(
            f"{unknown[0]!r}, which is no layer",
            expected=f"one of {', '.join(list(known)[:8])}{', …' if len(known) > 8 else ''}",
            remedy="`taps.report(layers)` says which leaves are layers, and why the others are not",
        )
    return [known[name] for name in names]
