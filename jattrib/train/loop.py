"""One training run: a `lax.scan` over an index schedule.

With the schedule, the initial parameters and the weights fixed, training is a deterministic function of its arguments,
which is what retraining without a subset, or differentiating through training, needs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch, Params
from jattrib.models.model import Model
from jattrib.models.outputs import mean_loss


class Plan(NamedTuple):
    """The shape of a run.

    Attributes:
        epochs: passes over the examples.
        batch_size: examples a step; the last batch of an epoch is padded, and averages over its own examples.
        size: examples an epoch: as many as the largest mask includes.
    """

    epochs: int
    batch_size: int
    size: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass."""
        return -(-self.size // self.batch_size)

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.epochs * self.steps_per_epoch


class Schedule(NamedTuple):
    """Which examples each step sees; an entry that is not `valid` is padding and counts nothing.

    Attributes:
        indices: of the examples.
        valid: which entries are draws.
        weights: of single draws, in addition to those of the examples; one each when left out.
    """

    indices: Int[Array, "steps batch"]
    valid: Bool[Array, "steps batch"]
    weights: Float[Array, "steps batch"] | None = None


@runtime_checkable
class LossFn(Protocol):
    """Per-example losses of a batch in training mode, and the model state after it."""

    def __call__(self, params: Params, state: Any, batch: Batch, /) -> tuple[Float[Array, " b"], Any]:
        """Return `(losses, new_state)`."""
        ...


class Trained(NamedTuple):
    """What a run leaves: parameters, model state, and the mean loss of every epoch."""

    params: Params
    state: Any
    losses: Float[Array, "*models epochs"]


Carry = tuple[Params, Any, optax.OptState]


def classification_loss(model: Model) -> LossFn:
    """Return the cross-entropy of the model's logits on `(inputs, labels)`, in nats.

    Where labels are sequences, an example's loss is the mean over its labels that are not padding (below zero).
    """

    def loss(params: Params, state: Any, batch: Batch) -> tuple[Float[Array, " b"], Any]:
        inputs, labels = batch
        logits, state = model.apply(params, state, inputs, train=True)
        return jax.vmap(mean_loss)(logits, labels), state

    return loss


def schedule(key: Key[Array, ""], mask: Bool[Array, " n"], plan: Plan) -> Schedule:
    """Draw the order of a run: for each epoch, a fresh permutation of the examples that the mask includes.

    It depends on `key`, `mask` and `plan` alone.  Where the mask includes fewer than `plan.size`, the shortfall is
    padding at the end of each epoch, which repeats included examples: batch statistics never see an excluded one.
    """
    slots = jnp.arange(plan.steps_per_epoch * plan.batch_size)
    count = jnp.minimum(plan.size, mask.sum())
    valid = slots < count
    included = jnp.flatnonzero(mask, size=plan.size, fill_value=0)

    def epoch(key: Key[Array, ""]) -> Int[Array, " slots"]:
        draws = jax.random.bits(key, mask.shape, jnp.uint32) >> 1
        last = jnp.asarray(2**32 - 1, jnp.uint32)
        order = included[_argsort(jnp.where(jnp.arange(plan.size) < count, draws[included], last))]
        return order.at[slots % jnp.maximum(count, 1)].get(mode="promise_in_bounds")

    indices = jax.vmap(epoch)(jax.random.split(key, plan.epochs))
    shape = (plan.steps, plan.batch_size)
    return Schedule(indices.reshape(shape), jnp.broadcast_to(valid, (plan.epochs, len(valid))).reshape(shape))


def _argsort(values: UInt32[Array, " n"]) -> Int[Array, " n"]:
    """Return the stable order of random words.

    Plain words sort several times faster than pairs on the CPU: sort the high bits with the index in place of the low
    ones, then exchange neighbours, of which few are the wrong way round, until none is.
    """
    n = len(values)
    index = jnp.asarray((1 << (n - 1).bit_length()) - 1, jnp.uint32)
    packed = jnp.sort((values & ~index) | jnp.arange(n, dtype=jnp.uint32))

    def unsorted(order: Int[Array, " n"]) -> Bool[Array, ""]:
        found = values[order]
        return (found[:-1] > found[1:]).any()

    def exchange(order: Int[Array, " n"]) -> Int[Array, " n"]:
        for first in (0, 1):
            stop = first + (n - first) // 2 * 2
            pairs = order[first:stop].reshape(-1, 2)
            left, right = values[pairs[:, 0]], values[pairs[:, 1]]
            order = order.at[first:stop].set(jnp.where((left > right)[:, None], pairs[:, ::-1], pairs).reshape(-1))
        return order

    return jax.lax.while_loop(unsorted, exchange, (packed & index).astype(jnp.int32))


def take(data: Batch, indices: Int[Array, " b"]) -> Batch:
    """Return the examples at `indices`, which must be in range.

    Whole rows of a matrix are the only gather that the CPU does at the speed of a copy.
    """

    def leaf(rows: Any) -> Array:
        found = rows.reshape(len(rows), -1).at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)
        return found.reshape(len(indices), *rows.shape[1:])

    return jax.tree.map(leaf, data)


def step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    data: Batch,
    weights: Float[Array, " n"] | None,
) -> Callable[[Carry, Schedule], tuple[Carry, Float[Array, ""]]]:
    """Return one optimiser step as a function `(carry, its row of the schedule) -> (carry, loss)`."""

    def objective(params: Params, state: Any, row: Schedule) -> tuple[Float[Array, ""], Any]:
        losses, state = loss(params, state, take(data, row.indices))
        kept = row.valid.astype(losses.dtype)
        weighted = kept if weights is None else kept * weights[row.indices].astype(losses.dtype)
        weighted = weighted if row.weights is None else weighted * row.weights.astype(losses.dtype)
        return jnp.vdot(weighted, losses) / jnp.maximum(kept.sum(), 1), state

    def advance(carry: Carry, row: Schedule) -> tuple[Carry, Float[Array, ""]]:
        params, state, moments = carry
        (value, state), gradient = jax.value_and_grad(objective, has_aux=True)(params, state, row)
        with jax.numpy_dtype_promotion("standard"):  # optax raises decay rates to the power of an integer count
            updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), state, moments), value

    return advance


def train(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    initial: tuple[Params, Any],
    data: Batch,
    order: Schedule,
    *,
    weights: Float[Array, " n"] | None = None,
    epochs: int = 1,
) -> Trained:
    """Train from `initial` along `order`.

    Step t descends `Σ_b v_tb s_tb w[i_tb] ℓ(z[i_tb]; θ) / Σ_b v_tb`, with v the schedule's `valid` and s its `weights`.
    It is linear in the data weights w: a weight of zero removes an example, and every other draw stays where it was.

    Args:
        loss: per-example losses of a batch.
        optimizer: an optax transformation; its own schedule counts the steps of `order`.
        initial: parameters and model state to start from.
        data: the whole training set, arrays with leading axis n.
        order: the schedule.
        weights: data weights; one each when left out.
        epochs: into how many equal parts the reported losses are averaged.
    """
    carry: Carry = (*initial, optimizer.init(initial[0]))
    (params, state, _), values = jax.lax.scan(step(loss, optimizer, data, weights), carry, order)
    return Trained(params, state, values.reshape(epochs, -1).mean(axis=1))


def check_plan(plan: Plan, n: int) -> None:
    """Refuse a plan that cannot be carried out on n examples.

    Raises:
        InvalidInputError: a number of the plan is below one, or an epoch is larger than the data.
    """
    for name, value in plan._asdict().items():
        if value < 1:
            raise InvalidInputError(
                f"plan.{name} = {value}", expected="a whole number of at least 1", remedy=f"set {name} to 1 or more"
            )
    if plan.size > n:
        raise InvalidInputError(
            f"plan.size = {plan.size} examples an epoch",
            expected=f"at most the {n} examples of the data",
            remedy="set plan.size to the number of examples that the largest mask includes",
        )
