"""Whether training is smooth enough for its derivative to mean anything, and what is to blame where it is not."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Array, Float, Key

from jattrib.core.errors import InvalidInputError
from jattrib.train import pullback, replay
from jattrib.train.replay import Inputs, Metagradient, Run

KINKED = {
    "max", "min", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "clamp", "abs", "sign", "sort",
    "top_k", "round", "floor", "ceil",
    "clip", "relu", "relu6", "leaky_relu", "hard_tanh", "hard_sigmoid", "hard_silu",
}  # fmt: skip
"""Operations whose derivative jumps, by their names in a jaxpr; the last line's are functions made of others."""

COLD = 0.25
"""From which part of the highest rate on the first step of a run is said to have no warm-up."""

GROWTH = 10.0
"""From how large a growth of the derivative towards the start of a run the learning rate is suspected."""


class Probe(NamedTuple):
    """What three runs on a line say: with weights w, w + v and w + 2v.

    Attributes:
        metasmoothness: how far the two halves of the line move the parameters in the same direction: 1 if every
            parameter moves on in the direction in which it set out, −1 if every one turns back.
        error: of the outputs' changes along the whole line, `‖predicted − actual‖ / ‖actual‖`, the prediction that of
            the metagradient; 0 for a linear function.
    """

    metasmoothness: float
    error: float


def metasmoothness(run: Run, inputs: Inputs, direction: Float[Array, "..."]) -> float:
    """Return the empirical metasmoothness of a run at its weights w, along v.

    `Σ_k sign(θ_k(w + v) − θ_k(w)) · sign(θ_k(w + 2v) − θ_k(w + v)) · d_k / Σ_k d_k`, with `d = |θ(w + 2v) − θ(w)|`,
    over the parameters after training; between −1 and 1.

    Args:
        run: the training run.
        inputs: its inputs, w among them.
        direction: v, of the shape of w, and as long as the step is meant to be.

    Raises:
        InvalidInputError: w or v have another shape than the run asks for, or v changes nothing.

    Source: Engstrom et al. 2025, definition 2.
    """
    first, second, third = (_trained(run, inputs, direction, steps)[0] for steps in (0, 1, 2))
    return _agreement(first, second, third)


@np.errstate(invalid="ignore")  # where a run on the line diverges, NaN is what there is to say
def probe(
    output: replay.Output, run: Run, inputs: Inputs, queries: Any, found: Metagradient, direction: Float[Array, "..."]
) -> Probe:
    """Return metasmoothness along a direction, and how well a metagradient predicts the outputs at its end.

    Args:
        output: what was differentiated.
        run: the training run.
        inputs: where.
        queries: of which outputs.
        found: the metagradient.
        direction: half of the line that the prediction is for: v.

    Raises:
        InvalidInputError: v is not of the weights' shape, or changes nothing.
    """
    second = _trained(run, inputs, direction, 1)
    third = _trained(run, inputs, direction, 2)
    values = jax.jit(lambda end: jax.vmap(lambda query: output(end[1])(end[0], query))(queries))(third)
    actual = np.asarray(values, np.float64) - np.asarray(found.values, np.float64)
    axes = tuple(range(direction.ndim))
    predicted = 2 * np.tensordot(np.asarray(direction, np.float64), np.asarray(found.weights, np.float64), (axes, axes))
    error = float(np.linalg.norm(predicted - actual) / np.maximum(np.linalg.norm(actual), np.finfo(float).tiny))
    return Probe(_agreement(found.trained[0], second[0], third[0]), error)


def removal(weights: Float[Array, "..."], fraction: float, key: Key[Array, ""]) -> Float[Array, "..."]:
    """Return the direction v at whose double a random fraction of the weights is zero, and the others as they were.

    It is drawn among the weights that are not zero already.

    Raises:
        InvalidInputError: the fraction is not between 0 and 1, or all weights are zero.
    """
    present = np.flatnonzero(weights)
    if not 0 < fraction <= 1 or len(present) == 0:
        raise InvalidInputError(
            f"a fraction of {fraction} of {len(present)} weights that are not zero",
            expected="more than 0, at most 1, of one weight or more",
            remedy="remove a few per cent of the examples: 0.05, say",
        )
    count = max(round(fraction * len(present)), 1)
    drawn = np.asarray(jax.random.permutation(key, weights.size))
    chosen = drawn[np.isin(drawn, present)][:count]
    dropped = jnp.zeros(weights.size, bool).at[chosen].set(True).reshape(weights.shape)
    return jnp.where(dropped, -weights / 2, 0)


def causes(run: Run, inputs: Inputs, found: Metagradient) -> tuple[str, ...]:
    """Return what may make training rough: kinks, clipping, no warm-up, a growing derivative, Adam's division."""
    told = []
    bends = kinks(run, inputs)
    if bends:
        told.append(
            f"the loss has kinks ({', '.join(bends)}): use gelu or silu instead of relu, means instead of maxima"
        )
    bends = optimizer_kinks(run, inputs)
    if bends:
        told.append(
            f"the optimiser clips gradients, or has other kinks ({', '.join(bends)}): leave clipping out, or raise its "
            "bound until no step reaches it"
        )
    grown = growth(found)
    if grown > GROWTH:
        told.append(
            f"the derivative grows {grown:.3g}-fold towards the start of training: lower the learning rate, lengthen "
            "its warm-up, or enlarge the batch"
        )
    first = first_rate(run, inputs)
    if first > COLD:
        told.append(
            f"the rate of the first step is already {first:.0%} of the highest: let a warm-up of a tenth of the steps "
            "lead up to it"
        )
    if any(hasattr(part, "nu") for part in jax.tree.leaves(_moments(run, inputs), is_leaf=_is_adam)):
        told.append(
            "Adam divides by the root of its second moment, so that its step depends on little but signs: raise its eps"
        )
    return tuple(told)


def kinks(run: Run, inputs: Inputs) -> tuple[str, ...]:
    """Return the operations of the loss with a jump in their derivative that the parameters go through, by name."""
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype), run.data)
    traced = jax.make_jaxpr(run.loss)(inputs.params, inputs.state, batch).jaxpr
    count = len(jax.tree.leaves(inputs.params))
    return tuple(sorted(set(_kinks(traced, [number < count for number in range(len(traced.invars))]))))


def optimizer_kinks(run: Run, inputs: Inputs) -> tuple[str, ...]:
    """Return the operations of the optimiser with a jump in their derivative that gradients go through, by name."""
    update = pullback.transformation(pullback.Program(run.loss, run.optimizer), inputs.hyper).update
    with jax.numpy_dtype_promotion("standard"):  # as in training
        traced = jax.make_jaxpr(update)(inputs.params, _moments(run, inputs), inputs.params).jaxpr
    count = len(jax.tree.leaves(inputs.params))
    return tuple(sorted(set(_kinks(traced, [number < count for number in range(len(traced.invars))]))))


def first_rate(run: Run, inputs: Inputs) -> float:
    """Return how large the first step is, of the largest of the run, where all gradients are alike and moments empty.

    What is left then of an optimiser is its schedule.  It is tried on one number for each array of parameters.
    """
    optimizer = pullback.transformation(pullback.Program(run.loss, run.optimizer), inputs.hyper)
    small = jax.tree.map(lambda leaf: jnp.ones((1,) * jnp.ndim(leaf), leaf.dtype), inputs.params)
    empty = optimizer.init(small)

    def step(moments: Any, _: None) -> tuple[Any, Float[Array, ""]]:
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(small, moments, small)
        lengths = [jnp.abs(leaf).sum().astype(float) for leaf in jax.tree.leaves(updates)]
        kept = jax.tree.map(lambda old, new: old if jnp.issubdtype(old.dtype, jnp.floating) else new, empty, moments)
        return kept, jnp.stack(lengths).sum()

    lengths = np.asarray(jax.lax.scan(step, empty, None, length=run.order.indices.shape[0])[1])
    return float(lengths[0] / max(lengths.max(), np.finfo(lengths.dtype).tiny))


def _moments(run: Run, inputs: Inputs) -> Any:
    begin = partial(pullback.begin, pullback.Program(run.loss, run.optimizer))
    return jax.eval_shape(begin, inputs.params, inputs.state, inputs.hyper)[2]


def _is_adam(part: Any) -> bool:
    return hasattr(part, "nu")


def growth(found: Metagradient) -> float:
    """Return how many times longer the derivative by the parameters is at its longest than at the end: the median."""
    ends = np.maximum(found.norms[-1], np.finfo(found.norms.dtype).tiny)
    return float(np.median(found.norms.max(axis=0) / ends))


def _trained(run: Run, inputs: Inputs, direction: Float[Array, "..."], steps: int) -> tuple[Any, Any]:
    if direction.shape != jnp.shape(inputs.weights) or not bool(jnp.any(direction != 0)):
        raise InvalidInputError(
            f"a direction of shape {direction.shape}, {int(jnp.count_nonzero(direction))} of it not zero",
            expected=f"one that changes weights of shape {jnp.shape(inputs.weights)}",
            remedy="make one with `removal(weights, 0.05, key)`",
        )
    return replay.train(run, inputs._replace(weights=inputs.weights + steps * direction))


@np.errstate(invalid="ignore")
def _agreement(first: Any, second: Any, third: Any) -> float:
    a, b, c = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(each)])
        for each in (first, second, third)
    )
    variation = np.abs(c - a)
    total = variation.sum()
    return 0.0 if total == 0 else float(np.sum(np.sign(b - a) * np.sign(c - b) * variation) / total)


def _kinks(jaxpr: Any, depends: list[bool]) -> Iterator[str]:
    """Yield the kinked operations that what depends on the parameters goes through, unless it is then held constant."""
    varying = {var for var, on in zip(jaxpr.invars, depends, strict=True) if on}
    moving = _moving(jaxpr)
    for equation in jaxpr.eqns:
        inputs = [not isinstance(var, Literal) and var in varying for var in equation.invars]
        if not any(inputs) or equation.primitive.name == "stop_gradient" or moving.isdisjoint(equation.outvars):
            continue
        varying.update(equation.outvars)
        name = _name(equation)
        if equation.primitive.name == "select_n":
            if inputs[0]:  # the condition
                yield "where"
        elif name in KINKED:
            if jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
                yield name.replace("reduce_window_max", "max_pool")
        else:
            for inner, held in _inside(equation, inputs):
                yield from _kinks(inner, held if len(held) == len(inner.invars) else [True] * len(inner.invars))


def _inside(equation: Any, inputs: list[bool]) -> list[tuple[Any, list[bool]]]:
    """Return the programs that an equation runs on what it is given, and which of their inputs vary."""
    given = equation.params
    if equation.primitive.name == "cond":  # the first input chooses the branch
        return [(branch.jaxpr, inputs[1:]) for branch in given["branches"]]
    if equation.primitive.name == "while":  # the condition's constants, the body's, and what goes around
        start, stop = given["cond_nconsts"], given["cond_nconsts"] + given["body_nconsts"]
        return [(given["body_jaxpr"].jaxpr, inputs[start:stop] + [True] * len(inputs[stop:]))]
    inside = given.get("jaxpr")
    return [] if inside is None else [(getattr(inside, "jaxpr", inside), inputs)]


def _name(equation: Any) -> str:
    """Return what an equation is called: the function's name, if it is one, compiled or with its own derivative.

    What the latter is made of says nothing about its derivative: `logaddexp` takes a maximum, and is smooth.
    """
    inside = equation.params.get("call_jaxpr")
    if equation.primitive.name.startswith("custom_jvp") and inside is not None:
        return inside.jaxpr.debug_info.func_name
    return equation.params.get("name") or equation.primitive.name


def _moving(jaxpr: Any) -> set[Any]:
    """Return the variables that reach a result other than through `stop_gradient`."""
    moving = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for equation in reversed(jaxpr.eqns):
        if equation.primitive.name != "stop_gradient" and not moving.isdisjoint(equation.outvars):
            moving.update(var for var in equation.invars if not isinstance(var, Literal))
    return moving
