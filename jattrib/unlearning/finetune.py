"""The one loop of unlearning: fine-tune many models at once, each on rows, targets and an order of its own.

A method is what it gives this loop: per-example losses, weights of draws (below zero they ascend), learning rates by
step, and which parameters may move.  The step is that of `train.loop`.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jattrib.core import mesh as meshes
from jattrib.core import tree
from jattrib.core.errors import DivergedError, InvalidInputError, check_choice
from jattrib.core.types import Batch, Params
from jattrib.core.workers import ONE_THREAD
from jattrib.models.model import Apply
from jattrib.train import loop, sideways


class Models(NamedTuple):
    """An ensemble: parameters and model states, stacked along a leading axis."""

    params: Params
    state: Any

    @property
    def size(self) -> int:
        """How many models there are."""
        return jax.tree.leaves(self.params)[0].shape[0]


class Problem(NamedTuple):
    """What is to be forgotten.

    Attributes:
        apply: the models' forward pass.
        data: the training set, `(inputs, labels)`; labels of sequences are below zero where they are padding.
        forget: the indices F of the examples to forget.
    """

    apply: Apply
    data: tuple[Batch, Int[np.ndarray, "n *t"]]
    forget: Int[np.ndarray, " f"]

    @property
    def retain(self) -> Int[np.ndarray, " r"]:
        """The indices R of all other examples."""
        return np.setdiff1d(np.arange(len(self.data[1])), self.forget)


class Settings(NamedTuple):
    """How long, and how fast, to fine-tune; the defaults are those of Datamodel Matching.

    Attributes:
        epochs: passes over the rows.
        batch_size: rows a step.
        learning_rate: of the first epoch.
        decay: by which the rate is multiplied from epoch to epoch.
        optimizer: `adam`, or `sgd` (with momentum .9).
    """

    epochs: int = 4
    batch_size: int = 512
    learning_rate: float = 1e-4
    decay: float = 0.95
    optimizer: Literal["adam", "sgd"] = "adam"


DEFAULT = Settings()


TOGETHER = 10
"""Models that share an order and that one core tunes side by side; the states of more outgrow its cache."""


class Steps(NamedTuple):
    """What the steps see; all arrays have a leading axis over the orders.

    There are as many orders as models, or so many times fewer, and that many consecutive models share each.  Theirs is
    one product with one batch, which is gathered once: a third faster on a CPU, and on accelerators a wide product for
    many narrow ones.  But what models owe to their order, they have in common then.

    Attributes:
        order: which rows, and the weight of each draw.
        rates: the learning rate of every step.
    """

    order: loop.Schedule
    rates: Float[Array, "orders steps"]

    @property
    def orders(self) -> int:
        """How many orders there are."""
        return self.rates.shape[0]


def problem(apply: Apply, data: tuple[Batch, Int[np.ndarray, "n *t"]], forget: Int[np.ndarray, " f"]) -> Problem:
    """Return the problem of forgetting some examples, checked.

    Raises:
        InvalidInputError: `forget` is empty, covers everything, names an example twice, or one that is not there, or is
            no row of whole numbers; or there are not as many labels as inputs.
    """
    forget, n = np.asarray(forget), len(data[1])
    lengths = {len(leaf) for leaf in jax.tree.leaves(data[0])}
    if lengths != {n}:
        raise InvalidInputError(
            f"{n} labels, and inputs of {' and '.join(map(str, sorted(lengths)))} examples",
            expected="a label for every example",
            remedy="pass inputs and labels of the same examples, in the same order",
        )
    remedy = f"give the indices of the examples to forget, each once, from 0 to {n - 1}"
    if forget.ndim != 1 or (forget.size > 0 and forget.dtype.kind not in "iu"):
        raise InvalidInputError(
            f"a forget set of {forget.dtype} of shape {forget.shape}",
            expected="one row of whole numbers",
            remedy=remedy + ": np.flatnonzero(mask), if you have a mask",
        )
    if forget.size == 0 or forget.size >= n:
        raise InvalidInputError(
            f"a forget set of {forget.size} of {n} examples",
            expected=f"from 1 to {n - 1} of them: something to forget and something to retain",
            remedy=remedy,
        )
    if forget.min() < 0 or forget.max() >= n:
        at = int(np.flatnonzero((forget < 0) | (forget >= n))[0])
        raise InvalidInputError(
            f"the forget index {forget[at]}, at place {at}", expected=f"indices from 0 to {n - 1}", remedy=remedy
        )
    numbers, counts = np.unique(forget, return_counts=True)
    if (counts > 1).any():
        raise InvalidInputError(
            f"the forget index {numbers[counts > 1][0]}, {counts.max()} times",
            expected="each index once",
            remedy=remedy,
        )
    return Problem(apply, data, forget.astype(np.int64))


def rates(settings: Settings, steps_per_epoch: int) -> Float[np.ndarray, " steps"]:
    """Return the learning rate of every step, `η d^e` in epoch e."""
    epochs = np.repeat(np.arange(settings.epochs), steps_per_epoch)
    return (settings.learning_rate * settings.decay**epochs).astype(np.float32)


def shuffled(
    keys: Key[Array, " orders"],
    count: int,
    settings: Settings,
    *,
    weights: Float[np.ndarray, " rows"] | None = None,
) -> Steps:
    """Return steps that pass over all rows in orders that each epoch draws anew.

    Args:
        keys: one an order.
        count: rows.
        settings: epochs, batch size and rates.
        weights: of the rows' draws; one each when left out.
    """
    plan = loop.Plan(settings.epochs, min(settings.batch_size, count), count)
    loop.check_plan(plan, count)
    return _shuffled(
        keys,
        None if weights is None else jnp.asarray(weights),
        jnp.asarray(rates(settings, plan.steps_per_epoch)),
        plan,
    )


@partial(jax.jit, static_argnums=3)
def _shuffled(keys: Any, weights: Any, rates: Any, plan: loop.Plan) -> Steps:
    def one(key: Key[Array, ""]) -> loop.Schedule:
        order = loop.schedule(key, jnp.ones(plan.size, bool), plan)
        return order if weights is None else order._replace(weights=weights[order.indices])

    order = jax.vmap(one)(keys)
    return Steps(order, jnp.broadcast_to(rates, (keys.shape[0], *rates.shape)))


def then(first: Steps, second: Steps) -> Steps:
    """Return the steps of one phase after those of another, with batches padded to one size."""
    size = max(first.order.indices.shape[-1], second.order.indices.shape[-1])
    orders = [_padded(each.order, size) for each in (first, second)]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *orders)
    return Steps(joined, jnp.concatenate([first.rates, second.rates], axis=1))


def beside(first: Steps, second: Steps) -> Steps:
    """Return steps whose batches are those of two passes side by side, for as long as the first one lasts.

    The second is begun again as often as needed; of one that is longer the end is left out, and with it rows.
    A step's objective is the sum of both batches' means: each keeps the weight that it has alone.
    """
    again = np.arange(first.rates.shape[1]) % second.rates.shape[1]
    orders = [_weighted(first.order), _weighted(jax.tree.map(lambda leaf: leaf[:, again], second.order))]
    kept = [each.valid.sum(axis=-1, keepdims=True, dtype=jnp.float32) for each in orders]
    total = sum(kept)
    orders = [
        each._replace(weights=each.weights * total / jnp.maximum(own, 1))
        for each, own in zip(orders, kept, strict=True)
    ]
    return Steps(jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=2), *orders), first.rates)


def _weighted(order: loop.Schedule) -> Any:
    ones = jnp.ones(order.indices.shape, jnp.float32)
    return order._replace(weights=ones if order.weights is None else order.weights.astype(jnp.float32))


def _padded(order: loop.Schedule, size: int) -> loop.Schedule:
    """Return an order whose batches are padded with their own rows again, so that batch statistics see no others."""
    width = order.indices.shape[-1]
    padded = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, 0), (0, 0), (0, size - width)]), _weighted(order))
    return padded._replace(indices=order.indices[..., np.arange(size) % width])


def tune(
    loss: loop.LossFn,
    models: Models,
    rows: Batch,
    own: PyTree,
    steps: Steps,
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
    movable: PyTree | None = None,
    mesh: jax.sharding.Mesh | None = None,
    strategy: Literal["auto", "vmap", "threads"] = "auto",
) -> Models:
    """Fine-tune every model, and return them.

    Step t moves θ by `η_t` times the optimiser's direction for `Σ_b v_tb s_tb ℓ(row_tb; θ) / Σ_b v_tb` (`loop.train`).

    Args:
        loss: per-example losses of a batch `(rows, own)`; a hashable value, for which the program is compiled.
        models: the models to start from.
        rows: what all models see: arrays with leading axis m.
        own: what each sees of its own, targets say: arrays with leading axes models, m; an empty tuple where there is
            nothing.
        steps: orders, weights and rates (`shuffled`); an order for each model, or for several.
        optimizer: `adam` or `sgd`.
        movable: a pytree like the models' parameters of factors between 0 and 1 for the updates; none when left out.
        mesh: spreads the models over its first axis: the orders, or those that share one.
        strategy: `vmap`: side by side in one program; `threads`, for the CPU: a program of one thread on each core,
            for one model at a time, or a few that share an order, without a mesh; `auto`: the latter on the CPU
            without a mesh.  Models agree to rounding.

    Raises:
        DivergedError: a model's parameters are no longer finite.
        InvalidInputError: the orders do not divide the models, or the mesh neither orders nor those that share one;
            there is no such optimiser or strategy, or threads are to share a mesh.
    """
    _check_choices(optimizer, strategy, mesh)
    sharing = models.size // max(1, steps.orders)
    if sharing * steps.orders != models.size:
        raise InvalidInputError(
            f"{steps.orders} orders for {models.size} models",
            expected="an order for each model, or a number of orders that divides the models",
            remedy="pass as many keys as models, or one for all",
        )
    rows, each = jax.tree.map(jnp.asarray, rows), (models, own, movable)
    if strategy == "threads" or (strategy == "auto" and mesh is None and jax.default_backend() == "cpu"):
        found = _tune_on_cores(loss, optimizer, rows, steps, each)
    else:
        each = jax.tree.map(lambda leaf: leaf.reshape(steps.orders, sharing, *leaf.shape[1:]), each)
        found = _tune(loss, optimizer, *_spread(rows, steps, each, mesh))
        found = jax.tree.map(lambda leaf: leaf.reshape(models.size, *leaf.shape[2:]), found)
    return checked(found)


def _check_choices(optimizer: str, strategy: str, mesh: jax.sharding.Mesh | None) -> None:
    check_choice("optimizer", optimizer, ("adam", "sgd"))
    check_choice("strategy", strategy, ("auto", "vmap", "threads"))
    if strategy == "threads" and mesh is not None:
        raise InvalidInputError(
            "strategy 'threads' on a mesh", expected="'vmap' or 'auto'", remedy="choose either, or pass no mesh"
        )


def _spread(rows: Batch, steps: Steps, each: Any, mesh: jax.sharding.Mesh | None) -> tuple[Any, ...]:
    """Return the arguments of `_tune` where a mesh has them: it cuts the orders, or the models that share one."""
    if mesh is None:
        return (rows, steps, *each)
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)  # of Auto axes: `jax.make_mesh` makes them Explicit
    across, (orders, sharing) = meshes.width(mesh), jax.tree.leaves(each)[0].shape[:2]
    if orders % across == 0:
        steps, each = jax.device_put((steps, each), meshes.rows(mesh))
    elif sharing % across == 0:
        steps, each = meshes.replicate(steps, mesh), jax.device_put(each, meshes.rows(mesh, axis=1))
    else:
        raise InvalidInputError(
            f"orders = {orders}, each of models = {sharing}, on a mesh of {across} devices",
            expected=f"a number of orders, or of models that share one, that {across} divides",
            remedy="choose another number of models or orders, or another mesh",
        )
    return (meshes.replicate(rows, mesh), steps, *each)


@partial(jax.jit, static_argnums=(0, 1))
def _tune(loss: loop.LossFn, optimizer: str, rows: Batch, steps: Steps, models: Models, own: Any, movable: Any):
    sharing = jax.vmap(partial(_tune_one, loss, optimizer, rows), in_axes=(None, 0, 0, 0))
    return jax.vmap(sharing)(steps, models, own, movable)


def _tune_one(
    loss: loop.LossFn, optimizer: str, rows: Batch, steps: Steps, model: Models, own: Any, movable: Any
) -> Models:
    rule = _optimizer(optimizer, steps.rates, movable)
    trained = loop.train(loss, rule, (model.params, model.state), (rows, own), steps.order)
    return Models(trained.params, trained.state)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=ONE_THREAD)
def _tune_on_one_core(
    loss: loop.LossFn, optimizer: str, rows: Batch, steps: Steps, models: Models, own: Any, movable: Any
) -> Models:
    def one(model: Models, own: Any, movable: Any) -> Models:
        turn = partial(sideways.turn, like=model.params)
        start = model._replace(params=turn(model.params))
        sides = None if movable is None else turn(movable)
        found = _tune_one(sideways.turned(loss, model.params), optimizer, rows, steps, start, own, sides)
        return found._replace(params=turn(found.params))

    return jax.vmap(one)(models, own, movable)


def _tune_on_cores(
    loss: loop.LossFn, optimizer: str, rows: Batch, steps: Steps, each: tuple[Models, Any, Any]
) -> Models:
    steps, each = jax.tree.map(_on_host, (steps, each))
    count, wide = each[0].size, jax.config.read("jax_enable_x64")
    sharing = count // steps.orders
    most = _together(loss, rows, each, steps.orders)

    def run(start: int) -> Models:
        order = start // sharing
        stop = min(start + most, (order + 1) * sharing)
        mine = jax.tree.map(lambda leaf: leaf[start:stop], each)
        one = jax.tree.map(lambda leaf: leaf[order], steps)
        with jax.enable_x64(wide):  # a thread has settings of its own
            return jax.block_until_ready(_tune_on_one_core(loss, optimizer, rows, one, *mine))

    starts = [first + offset for first in range(0, count, sharing) for offset in range(0, sharing, most)]
    with ThreadPoolExecutor(meshes.cores()) as pool:
        found = list(pool.map(run, starts))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)


def _on_host(leaf: Any) -> Any:
    """Return an array as NumPy's, whose parts cost nothing; typed keys, of which it knows nothing, as they are."""
    return leaf if meshes.is_key(leaf) else np.asarray(leaf)


def _together(loss: loop.LossFn, rows: Batch, each: tuple[Models, Any, Any], orders: int) -> int:
    """Return how many models of one order a core tunes side by side.

    Not those that convolve: what many models convolve is a convolution by groups, which XLA's CPU compiler does at a
    seventeenth of the speed.
    """
    sharing = each[0].size // orders
    (params, state), own, _ = jax.tree.map(lambda leaf: leaf[0], each)
    few = jax.tree.map(lambda leaf: leaf[:1], (rows, own))
    if sharing == 1 or "conv_general_dilated" in str(jax.make_jaxpr(loss)(params, state, few)):
        return 1
    parts = max(meshes.cores() // orders, -(-sharing // TOGETHER), 1)
    return -(-sharing // parts)


def _optimizer(name: str, rates: Float[Array, " steps"], movable: Any) -> optax.GradientTransformation:
    direction = optax.scale_by_adam() if name == "adam" else optax.trace(decay=0.9)
    parts = [direction, optax.scale_by_schedule(lambda count: -rates[count])]
    if movable is not None:
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, movable)))
    return optax.chain(*parts)


def checked(models: Models) -> Models:
    """Return the models if all their parameters are finite.

    Raises:
        DivergedError: those of a model are not.
    """
    finite = np.all(
        [np.isfinite(meshes.fetch(leaf)).reshape(models.size, -1).all(1) for leaf in jax.tree.leaves(models.params)],
        axis=0,
    )
    if not finite.all():
        at = int((~finite).argmax())
        raise DivergedError(
            f"the parameters of model {at} are not finite ({int((~finite).sum())} of {models.size} models diverged)",
            expected="finite parameters after unlearning",
            remedy="start from finite models, lower the rate, or take fewer steps: ascent has no minimum to stop at",
        )
    return models


def output_shape(problem: Problem, models: Models) -> tuple[int, ...]:
    """Return the shape of a model's logits of one example; nothing is computed."""
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], problem.data[0])
    return jax.eval_shape(partial(_logits, problem.apply), models, one).shape[2:]


def logits(apply: Apply, models: Models, inputs: Batch, *, chunk: int = 4096) -> Float[np.ndarray, "models q *t c"]:
    """Return every model's logits of some inputs, on the host."""
    count = len(jax.tree.leaves(inputs)[0])
    parts = [
        np.asarray(_logits(apply, models, jax.tree.map(lambda leaf, at=at: jnp.asarray(leaf[at : at + chunk]), inputs)))
        for at in range(0, count, chunk)
    ]
    return np.concatenate(parts, axis=1)


@partial(jax.jit, static_argnums=0)
def _logits(apply: Apply, models: Models, inputs: Batch) -> Float[Array, "models q *t c"]:
    return jax.vmap(lambda params, state: apply(params, state, inputs, train=False)[0])(models.params, models.state)


def moved(before: Models, after: Models) -> Float[np.ndarray, " models"]:
    """Return how far each model has moved, `‖θ' − θ‖ / ‖θ‖`."""
    change = tree.axpy(-1, before.params, after.params)
    return np.asarray(jnp.sqrt(jax.vmap(tree.dot)(change, change) / jax.vmap(tree.dot)(before.params, before.params)))
