"""Factored features of billions of parameters, compiled for pods that are not here, and for one H200."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jattrib.core import tree
from jattrib.grads import taps
from jattrib.models import gpt
from jattrib.models.gpt_sharding import partition
from jattrib.models.outputs import Loss
from jattrib.projection import factored
from tests.compile import topology
from tests.compile.topology import Program

LLAMA_1B = gpt.Config(
    "llama", 128_256, 8192, 2048, 16, 32, hidden=8192, kv_heads=8, theta=5e5, epsilon=1e-5, dtype="bfloat16", remat=True
)
LLAMA_8B = LLAMA_1B._replace(width=4096, layers=32, hidden=14_336, tied=False)
LENGTH, RANK = 2048, 64
AXES = ("data", "model")


def build(config, batch, mesh):
    """Features of every linear layer, of a batch that is spread over `data`, of parameters spread over both axes."""
    model = gpt.decoder(config)
    like, state = jax.eval_shape(model.init, jax.random.key(0))
    output = Loss(model.apply, state)
    row = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
    plan = factored.plan(taps.find(output, like, (row, row)), rank=RANK, select=["layers/*/kernel"])
    projector = factored.projector(plan)
    specs = tree.to_names(partition(like, mesh))
    params = tree.from_names(like, {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, specs[path]))
        for path, leaf in tree.to_names(like).items()
    })  # fmt: skip

    def features(words, params, inputs, labels):
        _, found = projector.direct(factored.State(words, {}), output, params, (inputs, labels))
        return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, jax.P("data")))

    tokens = topology.spec(mesh, (batch, LENGTH), jnp.int32, "data")
    return features, [topology.spec(mesh, (2,), jnp.uint32), params, tokens, tokens]


PROGRAMS = [
    Program("factored", "llama-8b", "v5p", True, partial(build, LLAMA_8B, 128), (), AXES, (16, 8), "v5p:4x4x8"),
    Program("factored", "llama-8b", "v6e", True, partial(build, LLAMA_8B, 128), (), AXES, (32, 8)),
    Program("factored", "llama-1b", "h200", False, partial(build, LLAMA_1B, 8), (), AXES),
]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_it_fits_each_chip(program, tmp_path):
    row, text = topology.measure(program, tmp_path)
    topology.check(program, row, text)
    total = 1.24e9 if "1b" in program.case else 8.03e9
    assert row["arguments_bytes"] < 1.1 * 4 * total / row["devices"] + 2**27  # parameters are split, not copied
