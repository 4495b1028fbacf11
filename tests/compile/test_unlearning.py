"""Datamodel Matching: 256 ResNet-9 models on 256 chips, one a chip, and 100 small ones of one device in step.

Each goes towards targets of its own.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.models.mlp import mlp
from jattrib.models.resnet import resnet9
from jattrib.train import loop
from jattrib.unlearning import dmm, finetune
from tests.compile import topology
from tests.compile.topology import Program

MODELS, FORGET, RETAIN, CLASSES = 256, 500, 10_000, 10
SMALL = 100
"""Models of one device."""

DRAWS = dmm.FORGET_REPEATS * FORGET + RETAIN
SETTINGS = finetune.DEFAULT


def tuning(mesh, model, shape, draws, orders, sharing, *axis):
    """Return Datamodel Matching on images of a shape, its models' orders spread over an axis, and its arguments."""
    spec, steps = partial(topology.spec, mesh), SETTINGS.epochs * -(-draws // SETTINGS.batch_size)

    def stacked(leaf):
        return spec((orders, sharing, *leaf.shape), leaf.dtype, *axis)

    params, state = jax.tree.map(stacked, jax.eval_shape(model.init, jax.random.key(0)))
    batches = (orders, steps, SETTINGS.batch_size)
    order = loop.Schedule(spec(batches, np.int32, *axis), spec(batches, np.bool_, *axis))
    moves = finetune.Steps(order, spec((orders, steps), jnp.float32, *axis))
    targets = spec((orders, sharing, draws, CLASSES), jnp.float32, *axis)

    def run(rows, moves, models, targets):
        return finetune._tune(dmm._Matching(model.apply), SETTINGS.optimizer, rows, moves, models, targets, None)

    return run, (spec((draws, *shape), jnp.float32), moves, finetune.Models(params, state), targets)


def build(mesh):
    axis, shape = mesh.axis_names[0], (32, 32, 3)
    run, arguments = tuning(mesh, resnet9(shape, CLASSES), shape, DRAWS, MODELS, 1, axis)
    each = jax.shard_map(
        run, mesh=mesh, in_specs=(jax.P(), jax.P(axis), jax.P(axis), jax.P(axis)), out_specs=jax.P(axis),
        check_vma=False,
    )  # fmt: skip
    return each, arguments


def build_small(orders, mesh):
    return tuning(mesh, mlp(784, (64,), CLASSES), (784,), 2500, orders, SMALL // orders)


LARGE = Program("unlearning", f"resnet9-{MODELS}-models", "v6e", True, build, ())
IN_STEP = {
    (chip, orders): Program(
        "unlearning", f"mlp-{SMALL}-models-{orders}-orders", chip, False, partial(build_small, orders), ()
    )
    for chip in ("v5e", "v6e", "h200")
    for orders in (SMALL, 1)
}
PROGRAMS = [LARGE, *IN_STEP.values()]


@pytest.mark.parametrize("chip", ["v5e", "v6e", "h200"])
def test_models_that_share_an_order_share_its_batches(chip, tmp_path):
    temporaries = {}
    for orders in (SMALL, 1):
        program = IN_STEP[chip, orders]
        row, text = topology.measure(program, Path(tmp_path) / str(orders))
        topology.check(program, row, text)
        temporaries[orders] = row["temporaries_bytes"]
    saved = 4 * 784 * SETTINGS.batch_size * (SMALL - 1)  # the other models' batches
    assert temporaries[SMALL] - temporaries[1] > 0.9 * saved


@pytest.mark.slow
def test_one_model_a_chip(tmp_path):
    row, text = topology.measure(LARGE, Path(tmp_path))
    topology.check(LARGE, row, text)
    assert row["devices"] == MODELS
    assert row["arguments_bytes"] >= 4 * 32 * 32 * 3 * DRAWS
    assert "all-reduce" not in text  # models never wait for one another
