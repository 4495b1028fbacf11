"""The Gram matrix compiles for TPUs, alone and spread over 256 chips in every way, and for an H200."""

from functools import partial

import pytest

from jattrib_kernels.gram import cases, gram, sharded
from tests.compile import topology
from tests.compile.topology import Program

OWN = ("gram",)
SPREADS = {"n": (256, 1), "k": (1, 256), "n-and-k": (16, 16)}


def alone(case, backend, mesh):
    rows = topology.spec(mesh, (case.n, case.k), case.dtype)
    return partial(gram, compensated=case.compensated, backend=backend), [rows]


def spread(case, mesh):
    rows = topology.spec(mesh, (case.n, case.k), case.dtype, "rows", "columns")
    function = partial(sharded.gram, mesh=mesh, rows="rows", columns="columns")
    return partial(function, compensated=case.compensated, backend="pallas_tpu"), [rows]


def pod_shape(chip, shape):
    """Twice the rows where a chip has two devices."""
    return (shape[0] * 2, shape[1]) if chip == "v7x" else shape


PROGRAMS = [
    *(
        Program("gram", str(case), chip, False, partial(alone, case, "pallas_tpu"), OWN)
        for case in cases.COMPILED
        for chip in topology.TPUS
    ),
    *(
        Program(
            "gram", f"{case}-{way}", chip, True, partial(spread, case), OWN, ("rows", "columns"), pod_shape(chip, shape)
        )
        for case in cases.POD
        for chip in topology.TPUS
        for way, shape in SPREADS.items()
    ),
    *(Program("gram", str(case), "h200", False, partial(alone, case, "pallas_gpu"), OWN) for case in cases.COMPILED),
]


def quick(program):
    """On every chip, alone, the smaller cases; over 256, one spread on every chip and the others on one."""
    if not program.pod:
        return "k1024" in program.case
    return program.case.endswith("-n-and-k") or (program.chip == "v5e" and "compensated" not in program.case)


PARAMETERS = [
    pytest.param(program, id=str(program), marks=() if quick(program) else pytest.mark.slow) for program in PROGRAMS
]


@pytest.mark.parametrize("program", PARAMETERS)
def test_it_compiles_and_fits(program, tmp_path):
    row, text = topology.measure(program, tmp_path)
    topology.check(program, row, text)
    k = int(program.case.split("-")[1][1:])
    parts = 2 if "compensated" in program.case else 1
    columns = program.shape[1] if program.pod else 1
    assert row["outputs_bytes"] < 1.01 * parts * 4 * k * k / columns + 2**16
    if program.pod:
        sums, gathers = "all-reduce" in text, "all-gather" in text
        if program.shape[0] == 1:
            # Nothing is summed, but some chips gather by a sum: of two results, each in its own way.
            assert sums != gathers if parts == 1 else sums or gathers
        else:
            assert sums
            # A gather over one device is there before it is compiled.
            assert gathers == (columns > 1) if topology.is_compiled(text) else gathers or columns == 1
