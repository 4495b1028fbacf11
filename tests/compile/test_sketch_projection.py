"""The sketch compiles for TPUs, alone and spread over 256 chips in every way, and for an H200."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jattrib_kernels.sketch_projection import cases, sketch_projection, sketch_projection_transpose
from tests.compile import topology
from tests.compile.topology import Program

COLUMNS = 8  # shares of the buckets; the other axis of that mesh takes rows
WAYS = {"rows": ("chips",), "coordinates": ("chips",), "columns": ("chips", "columns")}


def forth(case, backend, x, key, *, block=0):
    return sketch_projection(x, key, case.dim, block_offset=block, copies=case.copies, backend=backend)


def undo(case, backend, y, key, *, size=None, block=0):
    where = {"block_offset": block, "copies": case.copies, "backend": backend}
    return sketch_projection_transpose(y, key, size or case.p, **where)


def alone(case, backend, back, mesh):
    width, dtype = (case.dim, jnp.float32) if back else (case.p, case.dtype)
    rows = topology.spec(mesh, (case.n, width), dtype)
    return partial(undo if back else forth, case, backend), [rows, topology.spec(mesh, (2,), jnp.uint32)]


def spread(case, way, back, mesh):
    """Rows by rows; coordinates with a sum; buckets by scattering that sum, since a rotation crosses their bounds."""
    to, fro = (partial(f, case, "pallas_tpu") for f in (forth, undo))
    axis = "columns" if way == "columns" else "chips"
    share = case.p // mesh.shape[axis]

    def block():
        return lax.axis_index(axis) * (share // case.dim)

    def scattered(x, key):
        return lax.psum_scatter(to(x, key, block=block()), axis, scatter_dimension=1, tiled=True)

    def gathered(y, key):
        return fro(lax.all_gather(y, axis, axis=1, tiled=True), key, size=share, block=block())

    function, inside, outside = {
        ("rows", False): (to, P("chips"), P("chips")),
        ("rows", True): (fro, P("chips"), P("chips")),
        ("coordinates", False): (lambda x, key: lax.psum(to(x, key, block=block()), axis), P(None, "chips"), P()),
        ("coordinates", True): (lambda y, key: fro(y, key, size=share, block=block()), P(), P(None, "chips")),
        ("columns", False): (scattered, P("chips", "columns"), P("chips", "columns")),
        ("columns", True): (gathered, P("chips", "columns"), P("chips", "columns")),
    }[way, back]
    n = case.n if way == "coordinates" else case.n * mesh.shape["chips"]
    width, dtype = (case.dim, jnp.float32) if back else (case.p, case.dtype)
    rows = topology.spec(mesh, (n, width), dtype, *inside)
    function = jax.shard_map(function, mesh=mesh, in_specs=(inside, P()), out_specs=outside)
    return function, [rows, topology.spec(mesh, (2,), jnp.uint32)]


def programs():
    for case in cases.LARGE:
        for back in (False, True):
            own = ("sketch_projection_transpose",) if back else ("sketch_projection",)
            name = f"{case.name.replace(' ', '-')}{'-transpose' * back}"
            yield Program("sketch_projection", name, "h200", False, partial(alone, case, "pallas_gpu", back), own)
            for chip in topology.TPUS:
                yield Program("sketch_projection", name, chip, False, partial(alone, case, "pallas_tpu", back), own)
                for way, axes in WAYS.items():
                    shape = (-1, COLUMNS) if way == "columns" else None
                    build = partial(spread, case, way, back)
                    yield Program("sketch_projection", f"{name}-{way}", chip, True, build, own, axes, shape)


PROGRAMS = list(programs())


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
    # No copy of the rows and no table of a sign for each coordinate: temporaries do not grow with p.
    assert row["temporaries_bytes"] < 2**27
    collective = {
        "coordinates": "all-reduce",
        "columns": "all-gather" if "transpose" in program.case else "reduce-scatter",
    }.get(program.case.rsplit("-", 1)[-1])
    if "transpose-coordinates" in program.case:
        collective = None
    others = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"} - {collective}
    assert collective is None or collective in text
    # The compiler may name a reduce-scatter after the all-reduce that it fuses.
    assert collective == "reduce-scatter" or not any(name in text for name in others)


def test_every_chip_is_among_the_quick_programs():
    some = [program for program in PROGRAMS if quick(program)]
    for pod in (False, True):
        assert {program.chip for program in some if program.pod == pod} >= set(topology.TPUS)
    assert {program.case for program in some if program.chip == "h200"} == {
        f"{case.name.replace(' ', '-')}{'-transpose' * back}" for case in cases.LARGE for back in (False, True)
    }


@pytest.mark.parametrize("back", [False, True])
def test_many_buckets_compile(back):
    """Tiles of sixteen rows, the fewest, are then larger than what a kernel has of vector memory unless it asks."""
    mesh, case = topology.tpu("v5e"), cases.Case("many buckets", 16, 300_000, 65_536)
    function, arguments = alone(case, "pallas_tpu", back, mesh)
    assert "sketch_projection" in topology.compile_for(mesh, function, *arguments).as_text()
