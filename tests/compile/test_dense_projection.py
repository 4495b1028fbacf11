"""The dense projection compiles for TPUs, alone and spread over 256 chips in every way, and for an H200."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jattrib_kernels.dense_projection import cases, dense_projection, dense_projection_transpose
from jattrib_kernels.dense_projection.reference import ROWS
from tests.compile import topology
from tests.compile.topology import Program

COLUMNS = 8  # shares of the columns; the other axis of that mesh takes rows
WAYS = {"rows": ("chips",), "coordinates": ("chips",), "columns": ("chips", "columns")}


def forth(case, backend, x, key, *, dim=None, block=0, col=0):
    where = {"block_offset": block, "col_offset": col, "distribution": case.distribution, "backend": backend}
    return dense_projection(x, key, dim or case.dim, **where)


def undo(case, backend, y, key, *, size=None, block=0, col=0):
    where = {"block_offset": block, "col_offset": col, "distribution": case.distribution, "backend": backend}
    return dense_projection_transpose(y, key, size or case.p, **where)


def alone(case, backend, back, mesh):
    width, dtype = (case.dim, jnp.float32) if back else (case.p, case.dtype)
    rows = topology.spec(mesh, (case.n, width), dtype)
    return partial(undo if back else forth, case, backend), [rows, topology.spec(mesh, (2,), jnp.uint32)]


def spread(case, way, back, mesh):
    """Rows by rows, rows of R with a sum, columns of R: each from its own offset."""
    to, fro = (partial(f, case, "pallas_tpu") for f in (forth, undo))
    share, part = case.p // mesh.shape["chips"], case.dim // COLUMNS

    def block():
        return lax.axis_index("chips") * (share // ROWS)

    def col():
        return lax.axis_index("columns") * part

    function, inside, outside = {
        ("rows", False): (to, P("chips"), P("chips")),
        ("rows", True): (fro, P("chips"), P("chips")),
        ("coordinates", False): (lambda x, key: lax.psum(to(x, key, block=block()), "chips"), P(None, "chips"), P()),
        ("coordinates", True): (lambda y, key: fro(y, key, size=share, block=block()), P(), P(None, "chips")),
        ("columns", False): (lambda x, key: to(x, key, dim=part, col=col()), P("chips"), P("chips", "columns")),
        ("columns", True): (
            lambda y, key: lax.psum(fro(y, key, col=col()), "columns"),
            P("chips", "columns"),
            P("chips"),
        ),
    }[way, back]
    n = case.n if way == "coordinates" else case.n * mesh.shape["chips"]
    width, dtype = (case.dim, jnp.float32) if back else (case.p, case.dtype)
    rows = topology.spec(mesh, (n, width), dtype, *inside)
    function = jax.shard_map(function, mesh=mesh, in_specs=(inside, P()), out_specs=outside)
    return function, [rows, topology.spec(mesh, (2,), jnp.uint32)]


def programs():
    for case in cases.LARGE:
        for back in (False, True):
            own = ("dense_projection_transpose",) if back else ("dense_projection",)
            name = f"{case.name.replace(' ', '-')}{'-transpose' * back}"
            yield Program("dense_projection", name, "h200", False, partial(alone, case, "pallas_gpu", back), own)
            for chip in topology.TPUS:
                yield Program("dense_projection", name, chip, False, partial(alone, case, "pallas_tpu", back), own)
                for way, axes in WAYS.items():
                    shape = (-1, COLUMNS) if way == "columns" else None
                    build = partial(spread, case, way, back)
                    yield Program("dense_projection", f"{name}-{way}", chip, True, build, own, axes, shape)


PROGRAMS = list(programs())
SUMS = (*(f"{case.name.replace(' ', '-')}-coordinates" for case in cases.LARGE), "transpose-columns")


def quick(program):
    """On every chip, there and back, alone and spread in every way, one case; all cases on one TPU and on the H200."""
    smallest = program.case in (
        "mlp",
        "mlp-transpose",
        *(f"mlp-{way}" for way in WAYS),
        *(f"mlp-transpose-{way}" for way in WAYS),
    )
    return smallest or (not program.pod and program.chip in ("v5e", "h200"))


PARAMETERS = [
    pytest.param(program, id=str(program), marks=() if quick(program) else pytest.mark.slow) for program in PROGRAMS
]


@pytest.mark.parametrize("program", PARAMETERS)
def test_it_compiles_and_fits(program, tmp_path):
    row, text = topology.measure(program, tmp_path)
    topology.check(program, row, text)
    # R, whose bits alone would be p·k/8 bytes, is nowhere.
    case = next(case for case in cases.LARGE if program.case.startswith(case.name.replace(" ", "-")))
    # What is summed over devices, as long as the result, is there before and after.
    sums = 2.2 * row["outputs_bytes"] if program.case.endswith("transpose-columns") else 0
    assert row["temporaries_bytes"] < max(case.p * case.dim / 16, 2**26) + sums
    assert ("all-reduce" in text) == program.case.endswith(SUMS)
    assert not any(name in text for name in ("all-gather", "all-to-all", "reduce-scatter"))


def test_every_chip_is_among_the_quick_programs():
    some = [program for program in PROGRAMS if quick(program)]
    for pod in (False, True):
        assert {program.chip for program in some if program.pod == pod} >= set(topology.TPUS)
    assert {program.case for program in some if program.chip == "h200"} == {
        f"{case.name.replace(' ', '-')}{'-transpose' * back}" for case in cases.LARGE for back in (False, True)
    }


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("back", [False, True])
def test_one_row_of_half_precision_compiles(back, distribution):
    """One example's gradient of a leaf that does not fill its last tile."""
    mesh, case = topology.tpu("v5e"), cases.Case("one row", 1, 1000, 300, "bfloat16", distribution)
    rows = topology.spec(mesh, (1, 300 if back else 1000), "bfloat16")
    key = topology.spec(mesh, (2,), jnp.uint32)
    text = topology.compile_for(mesh, partial(undo if back else forth, case, "pallas_tpu"), rows, key).as_text()
    assert "dense_projection" in text
