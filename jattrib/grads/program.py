"""The gradient's own program, and the walk back through it from a leaf's gradient to the products that make it.

`trace` gives the jaxpr of `(f, ∇_θ f)` for one example.  What JAX's rules of differentiation put between a product
`aᵀ s` and the leaf is the adjoint of what was between the leaf and its use: transposes, reshapes, casts, sums over
broadcasts, paddings of slices, sums over uses.  `contributions` undoes these one by one.  So whatever has a derivative
has one here, whoever wrote it (`custom_vjp`), and nothing that is found depends on how the forward pass looks.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Example, OutputFn, Params
from jattrib.grads import views
from jattrib.grads.per_example import check_floating
from jattrib.grads.views import Digit, View

Kind = Literal["dot", "conv", "embedding", "bias", "scale"]
Frame = Literal["stack", "positions"]

SAME = {"copy", "copy_p", "convert_element_type", "reduce_precision", "sharding_constraint", "optimization_barrier"}
SHAPES = SAME | {"transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "reduce_sum"}
INLINE = {"jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "core_call", "custom_jvp_call"} | {
    "custom_vjp_call", "custom_vjp_call_jaxpr"}  # fmt: skip


class Step(NamedTuple):
    """The way into an equation that holds a program: its number, and of `cond` the branch, of `scan` the frame."""

    equation: int
    branch: int = 0
    frame: Frame | None = None
    length: int = 1
    digits: tuple[Digit, ...] = ()


class Site(NamedTuple):
    """One product, or one sum over positions, that contributes to a leaf's gradient.

    Attributes:
        kind: what it is.
        trail: where: the equations that hold its program, the outermost first.
        equation: the number of the product's equation; of a sum, -1.
        variable: what the equation gives, or what is summed.
        view: how its entries are the leaf's.
        factor: of the contribution: a number that a literal in the program multiplied it with.
        flipped: whether the cotangent is the equation's first operand.
    """

    kind: Kind
    trail: tuple[Step, ...]
    equation: int
    variable: Any
    view: View
    factor: float
    flipped: bool = False


class Program(NamedTuple):
    """The jaxpr of `(f, ∇_θ f)`; its inputs are the leaves of the parameters and of the example, and a 1."""

    closed: Any
    leaves: int
    inputs: int


class _NoSiteError(Exception):
    """There is no product behind a gradient; the argument says what there is."""


def trace(output: OutputFn, params: Params, example: Example) -> Program:
    """Return the program of the output of one example and of its gradient.

    Raises:
        InvalidInputError: a leaf is not floating, or the output is not one.
    """
    check_floating(params)
    leaves, structure = jax.tree.flatten(params)
    if not leaves:
        raise InvalidInputError(
            "parameters without a leaf",
            expected="floating-point leaves, which have gradients",
            remedy="pass the trainable arrays alone and close over the others",
        )
    shapes, rows = (jax.tree.map(_abstract, each) for each in (leaves, example))
    value = jax.eval_shape(lambda leaves, example: output(structure.unflatten(leaves), example), shapes, rows)
    if not isinstance(value, jax.ShapeDtypeStruct) or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        shown = f"{value.dtype}{list(value.shape)}" if isinstance(value, jax.ShapeDtypeStruct) else str(value)
        raise InvalidInputError(
            f"an output that is {shown}",
            expected="one floating-point number for one example",
            remedy="sum or average over tokens and outputs in `output`, and take the batch axis away: callers add it",
        )

    def program(leaves: list[Any], example: Example, seed: Any) -> tuple[Any, list[Any]]:
        value, pull = jax.vjp(lambda leaves: output(structure.unflatten(leaves), example), leaves)
        return value, pull(seed)[0]

    closed = jax.make_jaxpr(program)(shapes, rows, jax.ShapeDtypeStruct((), value.dtype))
    return Program(closed, len(leaves), len(jax.tree.leaves(rows)))


def contributions(program: Program) -> list[tuple[list[Site], str]]:
    """Return for each leaf the sites whose sum is its gradient; without any, why there is none."""
    jaxpr = program.closed.jaxpr
    cotangent = [False] * (len(jaxpr.invars) - 1) + [True]
    example = [False] * program.leaves + [True] * program.inputs + [False]
    whole = _Scope(jaxpr, cotangent, example)
    found = []
    for variable in jaxpr.outvars[1:]:
        if not variable.aval.size:
            found.append(([], "it is empty"))
            continue
        whole.shape = variable.aval.shape
        try:
            own = list(_walk(whole, variable, views.whole(whole.shape), 1.0))
        except _NoSiteError as reason:
            found.append(([], str(reason)))
        else:
            found.append((own, "" if own else "the output does not depend on it"))
    return found


class _Scope:
    """A program and where it stands in those around it."""

    def __init__(
        self,
        jaxpr: Any,
        cotangent: list[bool],
        example: list[bool],
        shape: tuple[int, ...] = (),
        outer: "_Scope | None" = None,
        trail: tuple[Step, ...] = (),
        operands: dict[Any, Any] | None = None,
    ):
        self.jaxpr, self.shape, self.outer, self.trail, self.operands = jaxpr, shape, outer, trail, operands
        self.producers = {out: i for i, eqn in enumerate(jaxpr.eqns) for out in eqn.outvars}
        self.of_cotangent, self.of_example = _reached(jaxpr, cotangent), _reached(jaxpr, example)
        reads = [atom for eqn in jaxpr.eqns for atom in eqn.invars] + list(jaxpr.outvars)
        self.readers = Counter(atom for atom in reads if not is_literal(atom))
        self.total: _Total | None = None

    def depends(self, atom: Any) -> bool:
        """Return whether a value depends on the cotangent of the output."""
        return not is_literal(atom) and atom in self.of_cotangent

    def varies(self, atom: Any) -> bool:
        """Return whether a value depends on the example."""
        return not is_literal(atom) and atom in self.of_example


class _Total:
    """The carry of a scan in which a leaf's gradient grows by a contribution an iteration."""

    def __init__(self, variable: Any, view: View, factor: float):
        self.start = variable, view, factor
        self.hits = 0


def _walk(scope: _Scope, atom: Any, view: View, factor: float) -> Iterator[Site]:
    """Yield the sites behind a value whose entries are those of `view`, times `factor`, of a leaf's gradient."""
    while True:
        if is_literal(atom):
            if np.any(np.asarray(atom.val)):
                raise _NoSiteError("a part of its gradient is a constant")
            return
        if atom not in scope.producers:
            total = scope.total
            if total is not None and atom is total.start[0]:
                if (view, factor) != total.start[1:]:
                    raise _NoSiteError("its gradient changes from one iteration of a scan to the next")
                total.hits += 1
                return
            one_use = _is_vector(scope, view) and (_is_repeated(view) or scope.readers[atom] > 1)
            if scope.operands is None or atom not in scope.operands or one_use:
                yield _sum_site(scope, atom, view, factor)
                return
            scope, atom = scope.outer, scope.operands[atom]  # type: ignore[assignment]
            continue
        number = scope.producers[atom]
        equation = scope.jaxpr.eqns[number]
        if _is_one_use(scope, atom, view, equation):
            yield _sum_site(scope, atom, view, factor)
            return
        through = _undo(equation, atom, view, factor)
        if through is None:
            yield from _stop(scope, number, atom, view, factor)
            return
        for operand, before, times in through[1:]:
            yield from _walk(scope, operand, before, times)
        if not through:
            return
        atom, view, factor = through[0]


def _undo(equation: Any, atom: Any, view: View, factor: float) -> list[tuple[Any, View, float]] | None:
    """Return the operands that an equation sums or rearranges, with their views; None where it does something else."""
    name, params, operands = equation.primitive.name, equation.params, equation.invars
    if name in SAME:
        return [(operands[equation.outvars.index(atom)], view, factor)]
    if name in ("add", "add_any"):
        return [(operand, view, factor) for operand in operands]
    if name == "sub":
        return [(operands[0], view, factor), (operands[1], view, -factor)]
    if name == "neg":
        return [(operands[0], view, -factor)]
    if name in ("mul", "div"):
        for which in (1, 0)[: 1 if name == "div" else 2]:
            if is_literal(operands[which]) and not np.ndim(operands[which].val):
                number = float(operands[which].val)
                return [(operands[1 - which], view, factor * number if name == "mul" else factor / number)]
        return None
    if name == "transpose":
        inverse = np.argsort(params["permutation"])
        return [(operands[0], views.transpose(view, [int(axis) for axis in inverse]), factor)]
    if name == "reduce_sum":
        for axis in sorted(params["axes"]):
            view = views.repeat(view, axis, operands[0].aval.shape[axis])
        return [(operands[0], view, factor)]
    before = _undo_shape(name, params, operands, view)
    return None if before is None else [(operand, each, factor) for operand, each in before]


def _undo_shape(name: str, params: Any, operands: list[Any], view: View) -> list[tuple[Any, View]] | None:
    shape = np.shape(operands[0].val) if is_literal(operands[0]) else operands[0].aval.shape
    if name == "broadcast_in_dim" and is_literal(operands[0]) and not np.any(np.asarray(operands[0].val)):
        return []
    if name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
        same = np.prod(shape) == np.prod(view.shape) and params.get("dimensions" if name == "reshape" else "") is None
        before = views.reshape(view, shape) if same else None
        return None if before is None else [(operands[0], before)]
    if name == "pad" and is_literal(operands[1]) and not operands[1].val:
        part: View | None = view
        for axis, (low, _, interior) in enumerate(params["padding_config"]):
            part = part and views.cut(part, axis, low, shape[axis], interior + 1)
        return None if part is None or part.shape != tuple(shape) else [(operands[0], part)]
    if name == "concatenate":
        start, found = 0, []
        for operand in operands:
            count = operand.aval.shape[params["dimension"]]
            part = views.cut(view, params["dimension"], start, count)
            if part is None:
                return None
            found.append((operand, part))
            start += count
        return found
    return None


def _stop(scope: _Scope, number: int, atom: Any, view: View, factor: float) -> Iterator[Site]:
    """Yield the sites of an equation that neither sums nor rearranges."""
    equation = scope.jaxpr.eqns[number]
    name = equation.primitive.name
    if name in INLINE:
        inner = program_of(equation)
        within = _enter(scope, number, inner, Step(number), passes=True)
        yield from _walk(within, inner.outvars[equation.outvars.index(atom)], view, factor)
    elif name == "cond":
        place = equation.outvars.index(atom)
        for branch, closed in enumerate(equation.params["branches"]):
            within = _enter(scope, number, closed.jaxpr, Step(number, branch), operands=equation.invars[1:])
            yield from _walk(within, closed.jaxpr.outvars[place], view, factor)
    elif name == "scan":
        yield from _scan(scope, number, atom, view, factor)
    elif name == "scatter-add" and (site := _embedding(scope, number, view, factor)) is not None:
        yield site
        yield from _walk(scope, equation.invars[0], view, factor)
    elif (
        name in ("dot_general", "conv_general_dilated") and (site := _product(scope, number, view, factor)) is not None
    ):
        yield site
    else:
        yield _sum_site(scope, atom, view, factor)


def _scan(scope: _Scope, number: int, atom: Any, view: View, factor: float) -> Iterator[Site]:
    """Yield the sites in a scan: of an output that is stacked, or of a sum that is carried along."""
    equation = scope.jaxpr.eqns[number]
    params, inner = equation.params, equation.params["jaxpr"].jaxpr
    place, carries, consts = equation.outvars.index(atom), params["num_carry"], params["num_consts"]
    length = params["length"]
    if place >= carries:
        digits, rest = view.dims[0], view._replace(dims=view.dims[1:])
        moving = [stride for _, stride in digits]
        if any(moving) and not all(moving):
            raise _NoSiteError("it is shared by some iterations of a scan and not by others")
        frame: Frame = "stack" if any(moving) or length == 1 else "positions"
        step = Step(number, frame=frame, length=length, digits=digits)
        yield from _walk(_enter(scope, number, inner, step), inner.outvars[place], rest, factor)
        return
    start = equation.invars[consts + place]
    within = _enter(scope, number, inner, Step(number, frame="positions", length=length))
    total = within.total = _Total(inner.invars[consts + place], view, factor)
    found = list(_walk(within, inner.outvars[place], view, factor))
    if total.hits != 1:
        raise _NoSiteError("its gradient is the state of a scan, not a sum over its iterations")
    yield from found
    yield from _walk(scope, start, view, factor)


def _enter(
    scope: _Scope, number: int, jaxpr: Any, step: Step, *, operands: list[Any] | None = None, passes: bool = False
) -> _Scope:
    equation = scope.jaxpr.eqns[number]
    given = equation.invars if operands is None else operands
    cotangent, example = [scope.depends(operand) for operand in given], [scope.varies(operand) for operand in given]
    if equation.primitive.name == "scan":
        cotangent, example = (_carried(equation, inputs) for inputs in (cotangent, example))
    outward = dict(zip(jaxpr.invars, given, strict=True)) if passes else None
    return _Scope(jaxpr, cotangent, example, scope.shape, scope, (*scope.trail, step), outward)


def _carried(equation: Any, inputs: list[bool]) -> list[bool]:
    """Return which inputs of a scan's program depend on something: what it carries may come to, from a start of 0."""
    jaxpr, first, count = equation.params["jaxpr"].jaxpr, equation.params["num_consts"], equation.params["num_carry"]
    while True:
        reached = _reached(jaxpr, inputs)
        after = [not is_literal(var) and var in reached for var in jaxpr.outvars[:count]]
        more = [a or b for a, b in zip(inputs[first : first + count], after, strict=True)]
        if more == inputs[first : first + count]:
            return inputs
        inputs = [*inputs[:first], *more, *inputs[first + count :]]


def _sum_site(scope: _Scope, atom: Any, view: View, factor: float) -> Site:
    """Return the site of a vector's gradient, the sum of a value over positions, or raise where it is no vector's."""
    number = scope.producers.get(atom)
    name = "an input" if number is None else f"`{scope.jaxpr.eqns[number].primitive.name}`"
    if not _is_vector(scope, view):
        raise _NoSiteError(f"its gradient comes out of {name}, which is no product of inputs and output gradients")
    scaled = name == "`mul`" and scope.readers[atom] == 1  # a cotangent has other readers
    return Site("scale" if scaled else "bias", scope.trail, -1, atom, view, factor)


def _is_vector(scope: _Scope, view: View) -> bool:
    moving = [digit for digits in view.dims for digit in digits if digit[1]]
    part = views.box(moving, view.offset, scope.shape)
    return part is not None and sum(size > 1 for size in part.sizes) <= 1


def _is_one_use(scope: _Scope, atom: Any, view: View, equation: Any) -> bool:
    """Return whether a value is the cotangent of one use of a vector, and not a sum over its uses.

    It is where positions are still to be summed, and where others read it too.
    """
    summed = _is_repeated(view) and equation.primitive.name not in SHAPES
    read = scope.readers[atom] > 1 and not all(is_literal(operand) for operand in equation.invars)
    return (summed or read) and _is_vector(scope, view)


def _is_repeated(view: View) -> bool:
    return any(not stride for digits in view.dims for _, stride in digits)


def _embedding(scope: _Scope, number: int, view: View, factor: float) -> Site | None:
    """Return the site of the adjoint of a look-up of whole rows, or None where it is another scatter."""
    equation = scope.jaxpr.eqns[number]
    dims, (operand, indices, updates) = equation.params["dimension_numbers"], equation.invars
    axes = dims.scatter_dims_to_operand_dims
    batching = (*dims.operand_batching_dims, *dims.scatter_indices_batching_dims)
    if batching or len(axes) != 1 or tuple(dims.inserted_window_dims) != tuple(axes) or indices.aval.shape[-1:] != (1,):
        return None
    others = [length for axis, length in enumerate(operand.aval.shape) if axis != axes[0]]
    if [updates.aval.shape[axis] for axis in dims.update_window_dims] != others:
        return None
    rows = [stride for _, stride in view.dims[axes[0]]]
    if _is_repeated(view) or rows != sorted(rows, reverse=True):  # an index counts rows in the leaf's own order
        return None
    return Site("embedding", scope.trail, number, equation.outvars[0], view, factor)


def _product(scope: _Scope, number: int, view: View, factor: float) -> Site | None:
    """Return the site of a product of something that depends on the example and of a cotangent, or None.

    The adjoint of a convolution with respect to its kernel has the images on the left, and no groups of features.
    """
    equation = scope.jaxpr.eqns[number]
    dot = equation.primitive.name == "dot_general"
    left, right = (scope.depends(operand) for operand in equation.invars[:2])
    varies = scope.varies(equation.invars[1 if left else 0])
    if left == right or not varies:
        return None
    if dot:
        batch = len(equation.params["dimension_numbers"][1][0])
        sound = not _is_repeated(view._replace(dims=view.dims[batch:]))
    else:
        (_, rhs, out), groups = equation.params["dimension_numbers"], equation.params["batch_group_count"]
        features = equation.invars[1].aval.shape[rhs[0]]
        split = views.regrouped(view.dims[out[1]], (groups, features // groups))
        sound = right and equation.params["feature_group_count"] == 1 and not _is_repeated(view) and split is not None
    kind: Kind = "dot" if dot else "conv"
    return Site(kind, scope.trail, number, equation.outvars[0], view, factor, flipped=left) if sound else None


def _reached(jaxpr: Any, inputs: list[bool]) -> set[Any]:
    found = {variable for variable, flag in zip(jaxpr.invars, inputs, strict=True) if flag}
    for equation in jaxpr.eqns:
        if any(not is_literal(operand) and operand in found for operand in equation.invars):
            found.update(equation.outvars)
    return found


def program_of(equation: Any) -> Any:
    """Return the open jaxpr that an equation of `INLINE` calls."""
    held = equation.params.get("jaxpr", equation.params.get("call_jaxpr", equation.params.get("fun_jaxpr")))
    return getattr(held, "jaxpr", held)


def is_literal(atom: Any) -> bool:
    """Return whether an operand is a number in the program and no variable."""
    return isinstance(atom, jex.Literal)


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))
