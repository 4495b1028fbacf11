"""The LASSO's rounds for 512 targets a device compile for TPUs, alone and over 256 chips, and for an H200."""

from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from jattrib.attribution import elastic_net, surrogate
from tests.compile import topology
from tests.compile.topology import Program

MASKS, COLUMNS, PENALTIES = 2_000, 5_000, 50
DESIGN_BYTES = 4 * MASKS * COLUMNS


def build(mesh):
    count, axis, rule = surrogate.CHUNK * mesh.size, mesh.axis_names[0], elastic_net.Rule(1e-6)
    f32 = partial(topology.spec, mesh, dtype=jnp.float32)
    problem = elastic_net.Problem(f32((MASKS, COLUMNS)), None, None, f32((0, COLUMNS)), f32(()), f32((COLUMNS,)))
    each = {
        "outputs": (MASKS,), "correlation": (COLUMNS,), "energy": (), "held_out": (0,), "alpha": (PENALTIES,),
        "beta": (PENALTIES,), "start": (COLUMNS,),
    }  # fmt: skip
    targets = elastic_net.Targets(
        **{name: topology.spec(mesh, (count, *shape), jnp.float32, axis) for name, shape in each.items()}
    )
    with mock.patch.object(jax, "default_backend", return_value=mesh.devices.flat[0].platform):
        lanes = jax.tree.map(
            lambda leaf: topology.spec(mesh, leaf.shape, leaf.dtype, axis),
            jax.eval_shape(partial(elastic_net._begin_here, rule), problem, targets),
        )
        run = elastic_net._spread(partial(elastic_net._advance_here, rule), mesh, 2, 2)
        least = topology.spec(mesh, (), jnp.int32)
        return topology.lower_for(mesh, run, problem, least, targets, lanes)


PROGRAMS = [
    *(
        Program("surrogate", "lasso-2000x5000", chip, pod, build, ("by_rows",))
        for chip in ("v5e", "v6e")
        for pod in (False, True)
    ),
    Program("surrogate", "lasso-2000x5000", "h200", False, build, ()),
]


def quick(program):
    return program.chip != "v6e" and not program.pod


PARAMETERS = [
    pytest.param(program, id=str(program), marks=() if quick(program) else pytest.mark.slow) for program in PROGRAMS
]


@pytest.mark.parametrize("program", PARAMETERS)
def test_targets_go_in_step_and_never_wait_for_other_devices(program, tmp_path):
    row, text = topology.measure(program, Path(tmp_path))
    topology.check(program, row, text)
    assert row["arguments_bytes"] >= DESIGN_BYTES
    assert "all-reduce" not in text
    assert "all-gather" not in text
