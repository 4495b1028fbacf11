"""The kernel inverse compiles for TPUs, alone and spread over 256 chips, and for an H200, and fits their memory."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jattrib_kernels.kernel_inverse import cases, kernel_inverse, sharded
from tests.compile import topology
from tests.compile.topology import Program

OWN = ("cholesky_update", "cholesky_diagonal", "cholesky_panel")


def alone(case, backend, mesh):
    arguments = [topology.spec(mesh, shape, jnp.float32) for shape in ((case.k, case.k), (case.k, case.columns))]
    return partial(kernel_inverse, damping=1.0, backend=backend), arguments


def ensemble(backend, mesh):
    count, case = cases.ENSEMBLE
    shapes = ((count, case.k, case.k), (count, case.k, case.columns))
    return jax.vmap(partial(kernel_inverse, backend=backend)), [topology.spec(mesh, x, jnp.float32) for x in shapes]


def spread(case, mesh):
    shapes = ((case.k, case.k), (case.k, case.columns))
    arguments = [topology.spec(mesh, shape, jnp.float32, "chips") for shape in shapes]
    return partial(sharded.kernel_inverse, mesh=mesh, axis="chips", damping=1.0, backend="pallas_tpu"), arguments


PROGRAMS = [
    *(
        Program("kernel_inverse", str(case), chip, False, partial(alone, case, "pallas_tpu"), OWN)
        for case in cases.COMPILED
        for chip in topology.TPUS
    ),
    *(
        Program("kernel_inverse", str(case), chip, True, partial(spread, case), OWN)
        for case in cases.POD
        for chip in topology.TPUS
    ),
    *(
        Program("kernel_inverse", str(case), "h200", False, partial(alone, case, "pallas_gpu"), OWN)
        for case in cases.COMPILED
    ),
]
PROGRAMS += [
    Program("kernel_inverse", "ensemble-k512", chip, False, partial(ensemble, backend), OWN)
    for chip, backend in [*((chip, "pallas_tpu") for chip in topology.TPUS), ("h200", "pallas_gpu")]
]
QUICK = ("v5e-ensemble", "h200-ensemble", "v5e-pod-k32768-", "h200-k4096-", "v5p-k1024-", "v6e-k1024-", "v7x-k1024-")
PARAMETERS = [
    pytest.param(program, id=str(program), marks=() if str(program).startswith(QUICK) else pytest.mark.slow)
    for program in PROGRAMS
]


@pytest.mark.parametrize("program", PARAMETERS)
def test_it_compiles_and_fits(program, tmp_path):
    row, text = topology.measure(program, tmp_path)
    topology.check(program, row, text)
    if program.case.startswith("ensemble"):
        return
    k = int(program.case.split("-")[0][1:])
    matrix = 4 * k * k
    if program.pod:
        # K, the factor and their rearrangement are spread; a block row of the factor, sent to all, is not.
        assert row["temporaries_bytes"] < 6 * matrix / row["devices"] + 2**30
        assert "all-reduce" in text
    else:
        assert row["temporaries_bytes"] < 1.1 * matrix + 2**28  # the factor, and no second copy of the matrix
