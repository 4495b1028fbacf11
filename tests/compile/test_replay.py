"""A metagradient of a transformer compiles for 256 TPU chips, queries and data spread over them, and its plan fits."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from jattrib.models import gpt
from jattrib.models.outputs import LogLikelihood
from jattrib.train import budget, loop, replay
from tests.compile import topology
from tests.compile.topology import Program

CONFIG = gpt.Config(
    "gpt2", vocabulary=256, context=512, width=768, layers=12, heads=12, dtype="bfloat16", remat=True
)  # fmt: skip
CASE = "gpt2-85M-bytes-64q-1024x32x512"
EXAMPLES, STEPS, BATCH, QUERIES = 16384, 1024, 32, 64
SETTINGS = {"segment": 2, "checkpoints": "host"}
SHAPE = (64, 4)
"""Devices along queries and along the examples of a batch."""

NAMES = ("advance", "trace", "read", "pull")


def arguments():
    """Abstractly, a run of AdamW with warm-up, and queries."""
    model = gpt.decoder(CONFIG)
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    of = jax.ShapeDtypeStruct
    tokens = of((EXAMPLES, CONFIG.context), jnp.int32)
    order = loop.Schedule(of((STEPS, BATCH), jnp.int32), of((STEPS, BATCH), bool))
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-4, STEPS // 10, STEPS)
    optimizer = replay.scaled(optax.adamw(rate, eps_root=1e-8))
    run = replay.Run(loop.classification_loss(model), optimizer, (tokens, tokens), order)
    inputs = replay.Inputs(of((EXAMPLES,), jnp.float32), params, state, of((), jnp.float32))
    asked = of((QUERIES, CONFIG.context), jnp.int32)
    return partial(LogLikelihood, model.apply), run, inputs, (asked, asked)


def build(name, mesh):
    return budget.programs(*arguments(), segment=SETTINGS["segment"], mesh=mesh)[name]


PROGRAMS = [
    Program("replay", f"{CASE}-{name}", chip, True, partial(build, name), (), ("queries", "batch"), SHAPE)
    for chip in ("v5e", "v6e")
    for name in NAMES
]
PARAMETERS = [pytest.param(program, id=str(program), marks=pytest.mark.slow) for program in PROGRAMS]


@pytest.mark.parametrize("program", PARAMETERS)
def test_it_compiles_and_fits(program, tmp_path):
    row, text = topology.measure(program, tmp_path)
    topology.check(program, row, text)
    if topology.is_compiled(text):
        reads = program.case.endswith("-read")  # a query's gradient, whole on its chip
        assert ("all-reduce" in text) != reads  # the gradient of a batch, spread over four chips


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_plan_fits_a_chip(chip):
    mesh = topology.tpu(chip, pod=True, axes=("queries", "batch"), shape=SHAPE)
    plan = budget.memory(*arguments(), mesh=mesh, **SETTINGS)
    print(plan)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(arguments()[2].params))
    carry = 3 * 4 * numbers  # parameters and two moments
    assert plan.peak < topology.MEMORY[chip]
    assert plan.cotangents == pytest.approx(carry, rel=0.01)  # one query a chip
    assert plan.checkpoints + plan.trace == pytest.approx(5 * carry, rel=0.01)
