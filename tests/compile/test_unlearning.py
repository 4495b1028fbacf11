"""Datamodel Matching of 256 ResNet-9 models on 256 chips: one a chip, each towards targets of its own."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.models.resnet import resnet9
from jattrib.train import loop
from jattrib.unlearning import dmm, finetune
from tests.compile import topology
from tests.compile.topology import Program

MODELS, FORGET, RETAIN, CLASSES = 256, 500, 10_000, 10
DRAWS = dmm.FORGET_REPEATS * FORGET + RETAIN
SETTINGS = finetune.DEFAULT


def build(mesh):
    model, axis = resnet9((32, 32, 3), CLASSES), mesh.axis_names[0]
    steps = SETTINGS.epochs * -(-DRAWS // SETTINGS.batch_size)

    def spread(shape, dtype):
        return topology.spec(mesh, (MODELS, *shape), dtype, axis)

    def stacked(leaf):
        return spread((1, *leaf.shape), leaf.dtype)

    params, state = jax.tree.map(stacked, jax.eval_shape(model.init, jax.random.key(0)))
    batches = (steps, SETTINGS.batch_size)
    order = loop.Schedule(spread(batches, np.int32), spread(batches, np.bool_))
    moves = finetune.Steps(order, spread((steps,), jnp.float32))
    rows = topology.spec(mesh, (DRAWS, 32, 32, 3), jnp.float32)
    targets = spread((1, DRAWS, CLASSES), jnp.float32)

    def run(rows, moves, models, targets):
        return finetune._tune(dmm._Matching(model.apply), SETTINGS.optimizer, rows, moves, models, targets, None)

    each = jax.shard_map(
        run, mesh=mesh, in_specs=(jax.P(), jax.P(axis), jax.P(axis), jax.P(axis)), out_specs=jax.P(axis),
        check_vma=False,
    )  # fmt: skip
    return each, (rows, moves, finetune.Models(params, state), targets)


PROGRAMS = [Program("unlearning", f"resnet9-{MODELS}-models", "v6e", True, build, ())]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_one_model_a_chip(program, tmp_path):
    row, text = topology.measure(program, Path(tmp_path))
    topology.check(program, row, text)
    assert row["devices"] == MODELS
    assert row["arguments_bytes"] >= 4 * 32 * 32 * 3 * DRAWS
    assert "all-reduce" not in text  # models never wait for one another
