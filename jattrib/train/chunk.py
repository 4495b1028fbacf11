"""How the models of a chunk are trained: side by side, one by one, core by core, in processes, or step by step.

Every strategy gives the same models to rounding, and with one strategy and one width a model has the same bits in
whichever place of whichever chunk it is trained.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt32

from jattrib.core import mesh as meshes
from jattrib.core.types import Batch
from jattrib.core.workers import ONE_THREAD, Workers
from jattrib.models.model import Model
from jattrib.train import loop, sideways

Strategy = Literal["vmap", "map", "threads", "processes", "steps"]
"""How a device runs the models of a chunk.

`vmap`: side by side, in one program.  `map`: one after another, in one program.  `threads`, for the CPU: as many at a
time as there are cores, each in a program of one thread, so that no core waits for another.  `processes`, for the CPU:
the same in a process a core, a tenth faster, but a few seconds to start.  `steps`: one after another, a call a step,
for programs that the compiler makes slow inside a loop (convolutions on the CPU).  The last three take no mesh.
"""

Removal = Literal["skip", "zero_weight"]
"""How a member is kept from what its mask leaves out (see `Ensemble`)."""

CALLS: tuple[Strategy, ...] = ("threads", "processes", "steps")
"""The strategies that are Python around compiled programs, not a program."""

BY_CORE: tuple[Strategy, ...] = ("threads", "processes")
"""The strategies that train as many models at a time as there are cores."""


class Ensemble(NamedTuple):
    """Everything that the members of an ensemble share.

    Attributes:
        model: initialisation and forward pass.
        optimizer: an optax transformation.
        plan: epochs, batch size, examples an epoch.
        removal: `skip`: a member passes over its own mask's examples only.  `zero_weight`: every member passes over
            all n examples, in an order that depends on its key alone, and those outside its mask weigh nothing:
            members with one key are then **paired**, alike but for what was removed.
        strategy: how a device runs the models of a chunk (see `choose`).
        width: models in a chunk, all in memory at once; when left out, as many as fit (`fit`), within reason, or as
            the directory's, where there is one.
    """

    model: Model
    optimizer: optax.GradientTransformation
    plan: loop.Plan
    removal: Removal = "skip"
    strategy: Strategy = "vmap"
    width: int | None = None


Operand = tuple[Callable[[loop.Trained], PyTree], Batch]
"""What is wanted of a trained model, and the data."""


Rows = dict[str, PyTree]
"""What is kept of members: outputs and losses, and of a chunk their names."""


@contextmanager
def trainer(ensemble: Ensemble, operand: Operand, n: int) -> Iterator[Callable[..., Rows]]:
    """Yield the function `(operand, members) -> rows` of a chunk, with the processes that it may need."""
    if ensemble.strategy != "processes":
        yield partial(train_chunk, ensemble)
        return
    mask, key = member_like(n)
    words = jax.eval_shape(jax.random.key_data, key)
    with Workers(partial(_train_by_words, ensemble), operand, (mask, words)) as workers:

        def process_by_process(operand: Operand, members: Mapping[str, Any]) -> Rows:
            del operand  # which the workers have
            rows = zip(np.asarray(members["masks"]), np.asarray(members["keys"]), strict=True)
            return {**_stack(workers.map(rows)), "names": members["names"]}

        yield process_by_process


def train_chunk(ensemble: Ensemble, operand: Operand, members: Mapping[str, Any]) -> Rows:
    """Train the members of a chunk, in this process: the rows of the pass."""
    keys = jax.random.wrap_key_data(members["keys"])
    run = {"vmap": _side_by_side, "map": _one_by_one, "threads": _core_by_core, "steps": _step_by_step}
    found = run[ensemble.strategy](ensemble, operand, jnp.asarray(members["masks"]), keys)
    return {**found, "names": members["names"]}


def row_like(ensemble: Ensemble, operand: Operand, n: int) -> dict[str, PyTree]:
    """Return shapes and dtypes of one member's rows, with their leading axis, of masks of n examples."""
    one = train_on_one_core.eval_shape(ensemble, operand, *member_like(n))
    names = jax.ShapeDtypeStruct((32,), np.uint8)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), {**one, "names": names})


def member_like(n: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a member's mask of n examples and of its key."""
    return jax.ShapeDtypeStruct((n,), bool), jax.eval_shape(lambda: jax.random.key(0))


def _side_by_side(ensemble: Ensemble, operand: Operand, masks: Bool[Array, "w n"], keys: Key[Array, " w"]) -> Rows:
    return jax.vmap(partial(_train_member, ensemble, operand))(masks, keys)


def _one_by_one(ensemble: Ensemble, operand: Operand, masks: Bool[Array, "w n"], keys: Key[Array, " w"]) -> Rows:
    return jax.lax.map(lambda member: _train_member(ensemble, operand, *member), (masks, keys))


def _core_by_core(ensemble: Ensemble, operand: Operand, masks: Bool[Array, "w n"], keys: Key[Array, " w"]) -> Rows:
    operand = jax.tree.map(jnp.asarray, operand)
    one = train_on_one_core.lower(ensemble, operand, masks[0], keys[0]).compile()  # threads have settings of their own

    def row(mask: Bool[Array, " n"], key: Key[Array, ""]) -> Rows:
        return jax.block_until_ready(one(operand, mask, key))

    with ThreadPoolExecutor(meshes.cores()) as pool:
        return _stack(pool.map(row, masks, keys))


def _step_by_step(ensemble: Ensemble, operand: Operand, masks: Bool[Array, "w n"], keys: Key[Array, " w"]) -> Rows:
    outputs, data = operand
    found = []
    for mask, key in zip(masks, keys, strict=True):
        start = _start_jitted(ensemble, mask, key)
        carry: loop.Carry = (*start.initial, ensemble.optimizer.init(start.initial[0]))
        values = []
        for row in range(ensemble.plan.steps):
            order = jax.tree.map(lambda leaf, row=row: leaf[row], start.order)
            carry, value = _one_step(ensemble, data, start.weights, carry, order)
            values.append(value)
        losses = jnp.stack(values).reshape(ensemble.plan.epochs, -1).mean(axis=1)
        found.append(_finish_jitted(outputs, loop.Trained(carry[0], carry[1], losses)))
    return _stack(found)


def _stack(rows: Iterable[Rows]) -> Rows:
    return jax.tree.map(lambda *leaves: np.stack([*map(meshes.fetch, leaves)]), *rows)


class _Start(NamedTuple):
    """What a member's training starts from."""

    initial: tuple[Any, Any]
    order: loop.Schedule
    weights: Float[Array, " n"] | None


def _start(ensemble: Ensemble, mask: Bool[Array, " n"], key: Key[Array, ""]) -> _Start:
    init_key, order_key = jax.random.split(key)
    initial = ensemble.model.init(init_key)
    if ensemble.removal == "skip":
        return _Start(initial, loop.schedule(order_key, mask, ensemble.plan), None)
    return _Start(initial, loop.schedule(order_key, jnp.ones_like(mask), ensemble.plan), mask.astype(jnp.float32))


_start_jitted = jax.jit(_start, static_argnums=0)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _one_step(ensemble: Ensemble, data: Batch, weights: Any, carry: loop.Carry, row: loop.Schedule):
    return loop.step(loop.classification_loss(ensemble.model), ensemble.optimizer, data, weights)(carry, row)


def _train_member(ensemble: Ensemble, operand: Operand, mask: Bool[Array, " n"], key: Key[Array, ""]) -> Rows:
    outputs, data = operand
    start = _start(ensemble, mask, key)
    train = sideways.train if ensemble.strategy in BY_CORE else loop.train
    trained = train(
        loop.classification_loss(ensemble.model), ensemble.optimizer, start.initial, data, start.order,
        weights=start.weights, epochs=ensemble.plan.epochs,
    )  # fmt: skip
    return _finish(outputs, trained)


train_on_one_core = jax.jit(_train_member, static_argnums=0, compiler_options=ONE_THREAD)


def _train_by_words(ensemble: Ensemble, operand: Operand, mask: Bool[Array, " n"], words: UInt32[Array, " k"]) -> Rows:
    return jax.tree.map(meshes.words, _train_member(ensemble, operand, mask, jax.random.wrap_key_data(words)))


def _finish(outputs: Callable[[loop.Trained], PyTree], trained: loop.Trained) -> Rows:
    return {"outputs": outputs(trained), "losses": trained.losses}


_finish_jitted = jax.jit(_finish)
