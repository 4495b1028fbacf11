"""The programs of a replay: a few steps forward, and the same steps backward for many cotangents at once.

A cotangent is what an output's derivative with respect to a carry is: a list of arrays, one for each floating-point
leaf of the carry, shaped `(blocks, queries, *reversed(leaf.shape))`.  The axes are reversed because differentiating a
linear layer twice asks for its kernel's transpose: this way pulling back all queries through it is the product of the
batch with one matrix, and nothing is transposed (on a CPU two thirds of the time of any other order, or less).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from jattrib.core import mesh as meshes
from jattrib.core.types import Batch, OutputFn, Params
from jattrib.train import loop

Optimizer = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]
"""An optax transformation, or a function that makes one of the hyper-parameters.

`lambda decay: optax.adamw(1e-3, weight_decay=decay)`, say: whatever reaches the update by arithmetic is differentiated.
"""

Output = Callable[[Any], OutputFn]
"""From a model's state to the output function: `functools.partial(Margin, model.apply)`, say.

The scalar may depend on parameters and on state (batch statistics) alike.  A query is whatever pytree the output
function takes: one example, or a whole validation set for its mean loss.
"""

Cotangent = list[Float[Array, "blocks queries ..."]]


class Program(NamedTuple):
    """What the programs are compiled for.

    Attributes:
        loss: per-example losses of a batch.
        optimizer: an optax transformation, or how to make one of the hyper-parameters.
        mesh: its first axis spreads the queries.
    """

    loss: loop.LossFn
    optimizer: Optimizer
    mesh: Mesh | None = None


class Rows(NamedTuple):
    """The steps of a segment: their numbers, their rows of the schedule, and the weights of their draws."""

    numbers: Int[Array, " steps"]
    order: loop.Schedule
    weights: Float[Array, "steps batch"]


class Total(NamedTuple):
    """Derivatives that are summed over the steps, shaped `(blocks, *shape, queries)`."""

    weights: Float[Array, "blocks n queries"] | Float[Array, "blocks steps batch queries"]
    hyper: PyTree[Float[Array, "blocks ... queries"]]


@partial(jax.jit, static_argnums=0)
def begin(program: Program, params: Params, state: Any, hyper: Any) -> loop.Carry:
    """Return the carry that a run starts from."""
    return params, state, transformation(program, hyper).init(params)


@partial(jax.jit, static_argnums=0)
def advance(program: Program, data: Batch, hyper: Any, carry: loop.Carry, rows: Rows) -> loop.Carry:
    """Return the carry after the steps of `rows`."""
    return _scan(program, data, hyper, carry, rows, keep=False)[0]


@partial(jax.jit, static_argnums=0)
def trace(program: Program, data: Batch, hyper: Any, carry: loop.Carry, rows: Rows) -> tuple[loop.Carry, PyTree[Array]]:
    """Return the carry after the steps of `rows`, and, stacked, those before each of them."""
    return _scan(program, data, hyper, carry, rows, keep=True)


@partial(jax.jit, static_argnums=0)
def read(
    program: Program, output: Output, queries: Batch, carry: loop.Carry
) -> tuple[Float[Array, "blocks queries"], Cotangent]:
    """Return the outputs of a carry, and their derivatives with respect to it.

    Args:
        program: the run's.
        output: what is differentiated.
        queries: arrays with two leading axes, blocks and queries.
        carry: parameters, model state and moments.
    """
    floating, merge = split(carry)

    def value(flipped: list[Array], query: Batch) -> Float[Array, ""]:
        params, state, _ = merge(_flip(flipped))
        return output(state)(params, query)

    def one(block: Batch) -> tuple[Array, list[Array]]:
        return jax.vmap(jax.value_and_grad(_through_stops(value)), in_axes=(None, 0))(_flip(floating), block)

    values, cotangent = _map_blocks(one, queries)
    return values, _spread(program, cotangent)


@partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def pull(
    program: Program,
    data: Batch,
    hyper: Any,
    carries: PyTree[Array],
    rows: Rows,
    cotangent: Cotangent,
    total: Total,
) -> tuple[Cotangent, Total, Float[Array, "blocks queries"]]:
    """Pull cotangents back through the steps of `rows`, last first.

    `λ_t = (∂θ_{t+1}/∂θ_t)ᵀ λ_{t+1}`, and `(∂θ_{t+1}/∂w)ᵀ λ_{t+1}` and `(∂θ_{t+1}/∂h)ᵀ λ_{t+1}` are added to `total`.

    Args:
        program: the run's.
        data: the training set.
        hyper: hyper-parameters.
        carries: the carries before each step, as `trace` returns them.
        rows: the steps.
        cotangent: with respect to the carry after the last of them.
        total: the sums so far.

    Returns:
        The cotangent with respect to the carry before the first of them, the sums, and the norm of the cotangent's
        part that belongs to the parameters.
    """

    def back(running: tuple[Cotangent, Total], step: tuple[loop.Carry, Rows]) -> tuple[tuple[Cotangent, Total], None]:
        after, total = running
        carry, row = step
        floating, merge = split(carry)

        def once(flipped: list[Array], weights: Array, hyper: Any) -> list[Array]:
            return _flip(split(_step(program, data, hyper, merge(_flip(flipped)), row._replace(weights=weights)))[0])

        with jax.numpy_dtype_promotion("standard"):  # as in training: optimisers mix counts and rates
            _, transpose = jax.vjp(_through_stops(once), _flip(floating), row.weights, hyper)
            before, weights, hyper_part = _map_blocks(jax.vmap(transpose, out_axes=(0, -1, -1)), after)
        if total.weights.ndim == 3:
            summed = total.weights.at[:, row.order.indices].add(weights)
        else:
            summed = total.weights.at[:, row.numbers].set(weights)
        new = Total(summed, jax.tree.map(jnp.add, total.hyper, hyper_part))
        return (_spread(program, before), _spread(program, new, last=True)), None

    (cotangent, total), _ = jax.lax.scan(back, (cotangent, total), (carries, rows), reverse=True)
    return cotangent, total, norm(carries[0], cotangent)


@partial(jax.jit, static_argnums=0)
def finish(
    program: Program, params: Params, state: Any, hyper: Any, cotangent: Cotangent, total: Total
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Return the derivatives with respect to initial parameters and hyper-parameters, from the first carry's."""

    def start(params: Params, hyper: Any) -> list[Array]:
        return _flip(split(begin(program, params, state, hyper))[0])

    _, transpose = jax.vjp(start, params, hyper)
    first, through = _map_blocks(jax.vmap(transpose, out_axes=-1), cotangent)
    return first, jax.tree.map(jnp.add, total.hyper, through)


def transformation(program: Program, hyper: Any) -> optax.GradientTransformation:
    """Return the optimiser at these hyper-parameters."""
    if isinstance(program.optimizer, optax.GradientTransformation):
        return program.optimizer
    return program.optimizer(hyper)


def zeros(weights: Float[Array, "..."], hyper: Any, blocks: int, queries: int) -> Total:
    """Return empty sums."""
    return jax.tree.map(
        lambda leaf: jnp.zeros((blocks, *leaf.shape, queries), leaf.dtype), Total(weights=weights, hyper=hyper)
    )


def norm(params: Params, cotangent: Cotangent) -> Float[Array, "blocks queries"]:
    """Return the Euclidean norm of a cotangent's part that belongs to the parameters."""
    parts = cotangent[: len(split(params)[0])]
    squares = [jnp.sum(jnp.square(part), axis=tuple(range(2, part.ndim))) for part in parts]
    return jnp.sqrt(sum(squares[1:], start=squares[0]))


def split(carry: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the floating-point leaves of a pytree, abstract ones too, and the function that puts others there."""
    leaves, structure = jax.tree.flatten(carry)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def merge(values: list[Any]) -> Any:
        left = iter(values)
        return structure.unflatten(next(left) if own else leaf for leaf, own in zip(leaves, floating, strict=True))

    return [leaf for leaf, own in zip(leaves, floating, strict=True) if own], merge


def _scan(
    program: Program, data: Batch, hyper: Any, carry: loop.Carry, rows: Rows, *, keep: bool
) -> tuple[loop.Carry, Any]:
    def forward(carry: loop.Carry, row: Rows) -> tuple[loop.Carry, Any]:
        return _step(program, data, hyper, carry, row), carry if keep else None

    return jax.lax.scan(forward, carry, rows)


def _step(program: Program, data: Batch, hyper: Any, carry: loop.Carry, row: Rows) -> loop.Carry:
    weights = row.weights if row.order.weights is None else row.weights * row.order.weights
    order = row.order._replace(weights=weights)
    return loop.step(program.loss, transformation(program, hyper), data, None)(carry, order)[0]


def _map_blocks(function: Callable[[Any], Any], blocks: Any) -> Any:
    """Apply a function to each of the leading axis' blocks; one block does not need a loop."""
    if jax.tree.leaves(blocks)[0].shape[0] > 1:
        return jax.lax.map(function, blocks)
    only = function(jax.tree.map(lambda leaf: leaf[0], blocks))
    return jax.tree.map(lambda leaf: leaf[None], only)


def _through_stops(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose derivative is not cut off where `function`'s is, by `jax.lax.stop_gradient`.

    What a gradient stopped at has shaped the gradients of training, which are in `function` by now, but moves with the
    parameters all the same.  Flax stops it at the running statistics of batch normalisation, for one.
    """

    def through(*arguments: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        values = jaxpr_as_fun(_unstopped(closed))(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), values)

    return through


def _unstopped(value: Any) -> Any:
    """Return a jaxpr without `stop_gradient`, or whatever of an equation's parameters holds jaxprs."""
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(_unstopped(each) for each in value)
    if isinstance(value, ClosedJaxpr):
        return ClosedJaxpr(_unstopped(value.jaxpr), value.consts)
    if not isinstance(value, Jaxpr):
        return value
    same: dict[Any, Any] = {}

    def known(variables: list[Any]) -> list[Any]:
        return [each if isinstance(each, Literal) else same.get(each, each) for each in variables]

    equations = []
    for equation in value.eqns:
        inputs = known(equation.invars)
        if equation.primitive.name == "stop_gradient":
            same[equation.outvars[0]] = inputs[0]
            continue
        custom = equation.primitive.name.startswith("custom_")  # has a derivative of its own
        inside = equation.params if custom else {name: _unstopped(each) for name, each in equation.params.items()}
        equations.append(equation.replace(invars=inputs, params=inside))
    return value.replace(eqns=equations, outvars=known(value.outvars))


def _flip(leaves: list[Array]) -> list[Array]:
    return [leaf.T for leaf in leaves]


def _spread(program: Program, value: Any, *, last: bool = False) -> Any:
    """Keep the queries, the second axis or the last, spread over the mesh's first."""
    mesh = program.mesh
    if mesh is None:
        return value

    def keep(leaf: Array) -> Array:
        return jax.lax.with_sharding_constraint(leaf, meshes.rows(mesh, axis=leaf.ndim - 1 if last else 1))

    return jax.tree.map(keep, value)
