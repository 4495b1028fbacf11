"""Narrow matrices on their side, for programs of one core.

The gradient of a matrix W of few columns, `XᵀG`, does not fill the registers of a core; `GᵀX`, of its transpose, is a
third faster.  Training may hold `Wᵀ` in place of W wherever the optimiser moves every entry by itself.
"""

from typing import Any

import jax
import optax
from jax.extend.core import Literal
from jaxtyping import Array, Float, PyTree

from jattrib.core.types import Batch, Params
from jattrib.train import loop

NARROW = 64
"""Columns up to which a matrix is narrow."""

BY_ENTRY = frozenset({
    "abs", "add", "and", "cbrt", "clamp", "convert_element_type", "copy", "div", "eq", "exp", "exp2", "expm1",
    "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne",
    "neg", "not", "or", "pow", "rsqrt", "select_n", "sign", "sqrt", "square", "stop_gradient", "sub", "tanh",
})  # fmt: skip
"""JAX's names of what is computed entry by entry."""

CALLS = frozenset({"cond", "custom_jvp_call", "custom_vjp_call", "jit", "pjit"})
"""Its names of what passes its operands on, as they are, to programs of its own."""

WHOLE = frozenset({"reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum"})
"""Its names of what has no order among all entries."""


def turn(tree: PyTree, like: Params) -> PyTree:
    """Return a tree with every matrix transposed that is narrow in `like`: parameters on their side, or back again."""
    return jax.tree.map(lambda leaf, whole: leaf.T if _is_narrow(whole) else leaf, tree, like)


def turned(loss: loop.LossFn, like: Params) -> loop.LossFn:
    """Return the loss as a function of parameters on their side; they are shaped as `like` when they are not."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)

    def over(params: Params, state: Any, batch: Batch) -> tuple[Float[Array, " b"], Any]:
        return loss(turn(params, like), state, batch)

    return over


def train(
    loss: loop.LossFn,
    optimizer: optax.GradientTransformation,
    initial: tuple[Params, Any],
    data: Batch,
    order: loop.Schedule,
    *,
    weights: Float[Array, " n"] | None = None,
    epochs: int = 1,
) -> loop.Trained:
    """Train as `loop.train` does, with narrow matrices on their side if the optimiser moves entry by entry."""
    params, state = initial
    if not by_entry(optimizer, params):
        return loop.train(loss, optimizer, initial, data, order, weights=weights, epochs=epochs)
    start = (turn(params, params), state)
    found = loop.train(turned(loss, params), optimizer, start, data, order, weights=weights, epochs=epochs)
    return found._replace(params=turn(found.params, params))


def by_entry(optimizer: optax.GradientTransformation, params: Params) -> bool:
    """Return whether an optax transformation moves each entry of a matrix by its own past and by sums over all alone.

    It reads the operations of an update: those that know rows from columns (a product, a norm by column, an array of
    factors in a closure) tell that it does not.  So does an update of other operations or numbers where narrow matrices
    are on their side: it has read shapes.
    """

    def update(params: Params) -> PyTree:
        with jax.numpy_dtype_promotion("standard"):  # as in training
            return optimizer.update(params, optimizer.init(params), params)

    upright = jax.make_jaxpr(update)(params)
    if not _by_entry(upright):
        return False
    try:
        on_side = jax.make_jaxpr(update)(turn(params, params))
    except Exception:  # whatever an optimiser raises that asks for shapes of its own
        return False
    return _by_entry(on_side) and _told(upright) == _told(on_side)


def _by_entry(closed: Any) -> bool:
    jaxpr = getattr(closed, "jaxpr", closed)
    return not any(var.aval.ndim for var in jaxpr.constvars) and all(map(_keeps_entries_apart, jaxpr.eqns))


def _keeps_entries_apart(equation: Any) -> bool:
    name = equation.primitive.name
    if name in CALLS:
        held = [each for value in equation.params.values() for each in (value if isinstance(value, tuple) else [value])]
        return all(_by_entry(each) for each in held if hasattr(each, "jaxpr") or hasattr(each, "eqns"))
    ranks = {var.aval.ndim for var in equation.invars}
    result = max((var.aval.ndim for var in equation.outvars), default=0)
    if max(ranks | {result}) < 2 or (name in WHOLE and result == 0):
        return True
    return ranks <= {0} if name == "broadcast_in_dim" else name in BY_ENTRY and ranks <= {0, result}


def _told(closed: Any) -> list[Any]:
    """Return the equations of a program, variables by number, alike for matrices upright and on their side."""
    jaxpr, numbers = getattr(closed, "jaxpr", closed), {}

    def variable(var: Any) -> tuple[Any, ...]:
        kind = var.aval
        name = repr(var.val) if isinstance(var, Literal) else numbers.setdefault(var, len(numbers))
        return name, str(kind.dtype), kind.weak_type, sorted(kind.shape)

    def setting(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return sorted(value) if name == "shape" else [setting(name, each) for each in value]
        if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
            return _told(value)
        return None if callable(value) else repr(value)

    equations = [
        (
            equation.primitive.name,
            [variable(var) for var in (*equation.invars, *equation.outvars)],
            {name: setting(name, value) for name, value in equation.params.items()},
        )
        for equation in jaxpr.eqns
    ]
    constants = [repr(each) for each in getattr(closed, "consts", ())]
    return [constants, equations, [variable(var) for var in (*jaxpr.constvars, *jaxpr.invars, *jaxpr.outvars)]]


def _is_narrow(leaf: Any) -> bool:
    return leaf.ndim == 2 and leaf.shape[1] <= NARROW
