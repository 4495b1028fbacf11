"""4,096 ResNet-9 models on halves of 50,000 colour images, on 256 chips: every chip trains 16 and holds the data."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattrib.core import tree
from jattrib.models.outputs import margin
from jattrib.models.resnet import resnet9
from jattrib.train import chunk, loop
from tests.compile import topology
from tests.compile.topology import Program

MODELS, EXAMPLES, QUERIES, EPOCHS, BATCH = 4096, 50_000, 500, 24, 512


def margins(model, queries, trained):
    logits, _ = model.apply(trained.params, trained.state, queries[0])
    return jax.vmap(margin)(logits, queries[1])


def build(mesh):
    model = resnet9((32, 32, 3), 10)
    plan = loop.Plan(EPOCHS, BATCH, EXAMPLES // 2)
    optimizer = optax.sgd(optax.linear_schedule(0.4, 0.0, plan.steps), momentum=0.9)
    group = chunk.Ensemble(model, optimizer, plan, strategy="map")
    axis = mesh.axis_names[0]

    def run(queries, data, members):
        outputs = tree.callable_tree(partial(margins, model, queries))
        return chunk.train_chunk(group, (outputs, data), members)

    spread = jax.shard_map(
        run, mesh=mesh, in_specs=(jax.P(), jax.P(), jax.P(axis)), out_specs=jax.P(axis), check_vma=False
    )

    def images(count):
        whole = topology.spec(mesh, (count, 32, 32, 3), jnp.float32)
        return whole, topology.spec(mesh, (count,), jnp.int32)

    members = {
        "masks": topology.spec(mesh, (MODELS, EXAMPLES), np.bool_, axis),
        "keys": topology.spec(mesh, (MODELS, 2), np.uint32, axis),
        "names": topology.spec(mesh, (MODELS, 32), np.uint8, axis),
    }
    return spread, (images(QUERIES), images(EXAMPLES), members)


PROGRAMS = [Program("ensemble", f"resnet9-{MODELS}-models", chip, True, build, ()) for chip in ("v5e", "v6e")]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_it_fits_each_chip(program, tmp_path):
    row, text = topology.measure(program, Path(tmp_path))
    topology.check(program, row, text)
    images = 4 * 32 * 32 * 3 * (EXAMPLES + QUERIES)
    assert row["devices"] == 256
    assert row["arguments_bytes"] >= images + MODELS // 256 * EXAMPLES
    assert row["outputs_bytes"] >= MODELS // 256 * 4 * (QUERIES + EPOCHS)
    assert "all-reduce" not in text  # models never wait for one another
