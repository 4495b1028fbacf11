"""Factored features (LoGra's) of a small transformer beside plain training steps, and beside whole gradients, sketched.

    jattrib bench factored --out bench/results/factored.jsonl

All sides work on one batch: a decoder in the style of GPT-2 (4 layers of width 256, 128 tokens, vocabulary 1,024,
3.4 million parameters), float32, 16 sequences.  A training step is the gradient of the mean loss and `θ − η g`, the
cheapest there is.  Features have rank 16 on each side of a matrix; whole gradients are made for every example and
sketched leaf by leaf (`projection.gradients`), to as many features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import harness
from jattrib.grads import taps
from jattrib.models import gpt
from jattrib.models.outputs import Loss
from jattrib.projection import factored, gradients, sketch

CONFIG = gpt.Config("gpt2", vocabulary=1024, context=128, width=256, layers=4, heads=4)
BATCH = 16
RANK = 16
LINEAR = ("layers/*/kernel",)
STEP, WHOLE = "plain training step", "whole gradients, sketched"
SIDES = {"linear layers": LINEAR, "every leaf": None}


def run() -> list[harness.Row]:
    """Measure tokens a second and memory."""
    sides = {name: work(name) for name in (STEP, *SIDES, "by token", WHOLE)}
    timings = harness.compare(sides, calls=5)
    peaks = {name: harness.peak_memory("bench.factored:work", name) for name in (STEP, "linear layers", WHOLE)}
    note = f"decoder of {CONFIG.layers} layers, width {CONFIG.width}, {BATCH} sequences of {CONFIG.context} tokens, "
    note += f"rank {RANK}: {features('linear layers')[0].dim} features of linear layers"
    tokens = BATCH * CONFIG.context
    rows = []
    for name, other in (
        ("linear layers", STEP), ("every leaf", STEP), ("by token", STEP), ("linear layers", WHOLE), (WHOLE, STEP),
    ):  # fmt: skip
        rows.append(
            harness.rates(
                f"features, {name}", timings[name], timings[other], work=tokens, unit="tokens/s", other_name=other,
                note=note,
            )
        )  # fmt: skip
    return rows + [
        harness.memories(
            "features, linear layers, peak memory", peaks["linear layers"], peaks[other], other_name=other, note=note
        )
        for other in (STEP, WHOLE)
    ]


def work(name: str) -> Callable[[], Any]:
    """Return the function that does one side's work on the batch."""
    output, params, batch = setting()
    if name == STEP:
        return step(output, params, batch)
    if name == WHOLE:
        projector = sketch.projector(features("linear layers")[0].dim)
        state = projector.init(jax.random.key(1), params)
        call = jax.jit(lambda params, batch: gradients.of_gradients(
            output, params, batch, projector=projector, state=state))  # fmt: skip
        return partial(call, params, batch)
    plan, projector = features("linear layers" if name == "by token" else name)
    state = projector.init(jax.random.key(1), params)
    if name == "by token":
        call = jax.jit(lambda params, batch: factored.token_features(plan, state, output, params, batch))
    else:
        call = jax.jit(lambda params, batch: gradients.of_gradients(
            output, params, batch, projector=projector, state=state))  # fmt: skip
    return partial(call, params, batch)


def step(output: Loss, params: Any, batch: Any) -> Callable[[], Any]:
    """Return the function that takes a training step, each from the parameters of the one before."""

    @partial(jax.jit, donate_argnums=0)
    def update(params: Any, batch: Any) -> Any:
        gradient = jax.grad(lambda p: jax.vmap(output, (None, 0))(p, batch).mean())(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)

    held = [jax.tree.map(jnp.array, params)]

    def take() -> Any:
        held[0] = update(held[0], batch)
        return held[0]

    return take


def features(name: str) -> tuple[factored.Plan, Any]:
    """Return the plan and the projector of a side."""
    output, params, batch = setting()
    layers = taps.find(output, params, jax.tree.map(lambda leaf: leaf[0], batch))
    plan = factored.plan(layers, rank=RANK, select=SIDES[name])
    return plan, factored.projector(plan)


def setting() -> tuple[Loss, Any, Any]:
    """Return the output, its parameters and the batch."""
    model = gpt.decoder(CONFIG)
    params, state = model.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocabulary, (BATCH, CONFIG.context + 1))
    return Loss(model.apply, state), params, (jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))


if __name__ == "__main__":
    harness.main(run, "factored")
