"""From a site in the gradient's program to its factors: which axis of which operand is what.

A site's gradient is `Σ_positions aᵀ s`, `[stack, inputs, outputs]`.  A `Recipe` says how the axes of the operands split
into stack, positions and features, in the order of the leaf's entries; `factors` carries it out on a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from jattrib.grads import views
from jattrib.grads.program import Site
from jattrib.grads.views import Digit

Role = Literal["stack", "positions", "features"]
ROLES: tuple[Role, ...] = ("stack", "positions", "features")


class Part(NamedTuple):
    """Some consecutive indices of an axis: how many, what they are, and where they come among those of their role."""

    size: int
    role: Role
    key: tuple[int, ...]


Axes = tuple[tuple[Part, ...], ...]


class Recipe(NamedTuple):
    """How a site's factors are made.

    Attributes:
        stack: the leaf's digits that number the matrices, without those of the scans around the site.
        inputs: the digits of a matrix's rows; those of a bias are none.
        outputs: the digits of its columns.
        positions: how many products are summed, without the iterations of the scans around.
        a: the axes of the operand that gives the inputs (of a convolution: of its patches); empty for a bias.
        s: the axes of the operand that gives the output gradients.
    """

    stack: tuple[Digit, ...]
    inputs: tuple[Digit, ...]
    outputs: tuple[Digit, ...]
    positions: int
    a: Axes
    s: Axes


def recipe(site: Site, equation: Any | None) -> Recipe:
    """Return the recipe of a site; `equation` is its product."""
    if equation is None:
        return _sum(site)
    return {"dot": _dot, "conv": _conv, "embedding": _embedding}[site.kind](site, equation)


def _sum(site: Site) -> Recipe:
    axes = tuple(
        tuple(
            Part(size, "features", (-stride,)) if stride else Part(size, "positions", (axis, i))
            for i, (size, stride) in enumerate(digits)
        )
        for axis, digits in enumerate(site.view.dims)
    )
    return _made((), _features(site.view.dims), (), axes)


def _dot(site: Site, equation: Any) -> Recipe:
    (contract, batch), operands = equation.params["dimension_numbers"], equation.invars
    free = [[axis for axis in range(operand.aval.ndim) if axis not in (*contract[i], *batch[i])]
            for i, operand in enumerate(operands)]  # fmt: skip
    dims = site.view.dims
    groups = dims[: len(batch[0])], dims[len(batch[0]) :][: len(free[0])], dims[len(batch[0]) + len(free[0]) :]
    which = 0 if site.flipped else 1  # the operand that holds the cotangent: positions come in the order of its axes
    found = []
    for i, operand in enumerate(operands):
        axes: list[tuple[Part, ...]] = [()] * operand.aval.ndim
        for number, (axis, digits) in enumerate(zip(batch[i], groups[0], strict=True)):
            axes[axis] = tuple(
                Part(size, "stack", (number, j)) if stride else Part(size, "positions", (0, number, j))
                for j, (size, stride) in enumerate(digits)
            )
        for axis, other in zip(contract[i], contract[which], strict=True):
            axes[axis] = (Part(operand.aval.shape[axis], "positions", (1, other)),)
        for axis, digits in zip(free[i], groups[1 + i], strict=True):
            axes[axis] = tuple(Part(size, "features", (-stride,)) for size, stride in digits)
        found.append(tuple(axes))
    stack = tuple(digit for digits in groups[0] for digit in digits if digit[1])
    features = [_features(group) for group in groups[1:]]
    return _made(stack, features[which], features[1 - which], found[which], found[1 - which])


def _conv(site: Site, equation: Any) -> Recipe:
    """Return the recipe of a convolution that is the adjoint of one with respect to its kernel.

    The batch of its result runs over the kernel's inputs, its window over positions, its result over the window.
    """
    lhs, rhs, out = equation.params["dimension_numbers"]
    images, cotangents = (operand.aval.shape for operand in equation.invars)
    groups = equation.params["batch_group_count"]
    dims = site.view.dims
    split = views.regrouped(dims[out[1]], (groups, cotangents[rhs[0]] // groups))
    assert split is not None  # `program` has seen to it
    stack, outputs = split
    inputs = [dims[axis] for axis in (out[0], *out[2:])]
    s: list[tuple[Part, ...]] = [()] * len(cotangents)
    s[rhs[0]] = (
        *(Part(size, "stack", (i,)) for i, (size, _) in enumerate(stack)),
        *(Part(size, "features", (-stride,)) for size, stride in outputs),
    )
    for axis in rhs[1:]:
        s[axis] = (Part(cotangents[axis], "positions", (axis,)),)
    a: list[tuple[Part, ...]] = [  # the axes of `_patches`
        (
            *(Part(size, "stack", (i,)) for i, (size, _) in enumerate(stack)),
            *(Part(size, "features", (-stride,)) for size, stride in dims[out[0]]),
        ),
        (Part(images[lhs[1]], "positions", (rhs[1],)),),
    ]
    for place, offset in zip(rhs[2:], out[2:], strict=True):
        a.append((Part(cotangents[place], "positions", (place,)),))
        a.append(tuple(Part(size, "features", (-stride,)) for size, stride in dims[offset]))
    return _made(tuple(stack), _features([outputs]), _features(inputs), tuple(s), tuple(a))


def _embedding(site: Site, equation: Any) -> Recipe:
    dims, (_, indices, updates) = equation.params["dimension_numbers"], equation.invars
    (row,) = dims.scatter_dims_to_operand_dims
    others = [digits for axis, digits in enumerate(site.view.dims) if axis != row]
    s: list[tuple[Part, ...]] = [()] * updates.aval.ndim
    for axis, digits in zip(dims.update_window_dims, others, strict=True):
        s[axis] = tuple(Part(size, "features", (-stride,)) for size, stride in digits)
    places = [axis for axis in range(updates.aval.ndim) if axis not in dims.update_window_dims]
    for axis in places:
        s[axis] = (Part(updates.aval.shape[axis], "positions", (axis,)),)
    a = tuple((Part(size, "positions", (axis,)),) for size, axis in zip(indices.aval.shape, places, strict=False))
    return _made((), _features(others), _features([site.view.dims[row]]), tuple(s), a)


def _made(
    stack: tuple[Digit, ...], outputs: tuple[Digit, ...], inputs: tuple[Digit, ...], s: Axes, a: Axes = ()
) -> Recipe:
    positions = views.size((part.size, 0) for axis in s for part in axis if part.role == "positions")
    return Recipe(stack, inputs, outputs, positions, a, s)


def _features(dims: Sequence[Sequence[Digit]]) -> tuple[Digit, ...]:
    digits = sorted((digit for digits in dims for digit in digits if digit[1]), key=lambda digit: -digit[1])
    return views.joined(digits)


def factors(
    site: Site,
    equation: Any | None,
    how: Recipe,
    read: Callable[[Any], Array],
    *,
    mask: Bool[Array, " b"] | None = None,
    bias: bool = False,
) -> tuple[Array, Array]:
    """Return `(a, s)` of a batch, `[stack, b, positions, inputs]` and `[stack, b, positions, outputs]`.

    Args:
        site: the site.
        equation: its product.
        how: its recipe.
        read: gives the values of a variable, the batch leading.
        mask: which examples have a part in it at all; None is all.
        bias: whether to give the inputs a last 1.
    """
    if equation is None:
        s = arranged(read(site.variable), how.s)
        a = jnp.ones((*s.shape[:3], 1), s.dtype)
    elif site.kind == "embedding":
        a, s = _looked_up(equation, how, read)
    else:
        left, right = (read(operand) for operand in equation.invars)
        if site.kind == "conv":
            left = _patches(left, equation)
        a, s = (arranged(right, how.a), arranged(left, how.s)) if site.flipped else (
            arranged(left, how.a), arranged(right, how.s))  # fmt: skip
    if bias:
        a = jnp.concatenate([a, jnp.ones((*a.shape[:3], 1), a.dtype)], axis=3)
    if site.factor != 1:
        s = s * jnp.asarray(site.factor, s.dtype)
    if mask is not None:
        none = -1 if jnp.issubdtype(a.dtype, jnp.integer) else 0
        row = mask[None, :, None]
        a = jnp.where(row if a.ndim == 3 else row[..., None], a, jnp.asarray(none, a.dtype))
        s = jnp.where(row[..., None], s, jnp.zeros((), s.dtype))
    return a, s


def abstract(site: Site, equation: Any | None, how: Recipe, size: int, *, bias: bool = False) -> tuple[Any, Any]:
    """Return the shapes and dtypes of `factors` for a batch of `size`."""
    operands = [site.variable] if equation is None else equation.invars[-2:]
    shapes = [jax.ShapeDtypeStruct((size, *operand.aval.shape), operand.aval.dtype) for operand in operands]

    def make(values: list[Array]) -> tuple[Array, Array]:
        read = lambda atom: values[[atom is each for each in operands].index(True)]  # noqa: E731
        return factors(site, equation, how, read, bias=bias)

    return jax.eval_shape(make, shapes)


def arranged(value: Array, axes: Axes, *, features: bool = True) -> Array:
    """Return `[stack, b, positions, features]` of a value whose axes after the first are described."""
    parts = [part for axis in axes for part in axis]
    value = value.reshape(len(value), *(part.size for part in parts))
    order = {role: sorted((i for i, part in enumerate(parts, 1) if part.role == role), key=lambda i: parts[i - 1].key)
             for role in ROLES}  # fmt: skip
    value = value.transpose(*order["stack"], 0, *order["positions"], *order["features"])
    sizes = [int(np.prod([parts[i - 1].size for i in order[role]], dtype=np.int64)) for role in ROLES]
    batch = value.shape[len(order["stack"])]
    return value.reshape(sizes[0], batch, sizes[1], *([sizes[2]] if features else []))


def _looked_up(equation: Any, how: Recipe, read: Callable[[Any], Array]) -> tuple[Array, Array]:
    indices, updates = (read(operand) for operand in equation.invars[1:])
    s = arranged(updates, how.s)
    rows = arranged(indices[..., 0].astype(jnp.int32), how.a, features=False)
    last = views.size(how.inputs) - 1
    mode = equation.params["mode"]
    if mode == lax.GatherScatterMode.CLIP:
        return jnp.clip(rows, 0, last), s
    if mode == lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        return rows, s
    inside = (rows >= 0) & (rows <= last)
    return jnp.where(inside, rows, -1), jnp.where(inside[..., None], s, jnp.zeros((), s.dtype))


def _patches(images: Array, equation: Any) -> Array:
    """Return the windows that a kernel's adjoint sees: `[b, batch, feature, (position, offset) …]`.

    Its window moves by `rhs_dilation` of the kernel's adjoint from position to position, and within it by `strides`.
    """
    params = equation.params
    lhs, rhs, out = params["dimension_numbers"]
    images = images.transpose(0, *(1 + axis for axis in lhs))
    counts = [equation.invars[1].aval.shape[axis] for axis in rhs[2:]]
    widths = [equation.outvars[0].aval.shape[axis] for axis in out[2:]]
    steps = zip(params["rhs_dilation"], params["window_strides"], params["lhs_dilation"], strict=True)
    axis = 3
    for count, width, (low, _), (stride, offset, gap) in zip(counts, widths, params["padding"], steps, strict=True):
        places = np.arange(count)[:, None] * stride + np.arange(width)[None, :] * offset
        length = images.shape[axis]
        high = int(places.max()) + 1 - low - ((length - 1) * gap + 1 if length else 0)
        config = [(0, 0, 0)] * images.ndim
        config[axis] = (low, high, gap - 1)
        images = jnp.take(lax.pad(images, jnp.zeros((), images.dtype), config), places, axis=axis, mode="clip")
        axis += 2
    return images
