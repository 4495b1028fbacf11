"""Hardware that is not there: written descriptions of TPU pods and of an H200, and compilation against them.

Only the environment `.venv-aot` has the compilers (libtpu, the CUDA plugin and `ptxas`); elsewhere these tests skip.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # ask no metadata server
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to quarrel over
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TPUS = {
    "v5e": ("v5e:1x1", "v5e:16x16"),
    "v5p": ("v5p:2x2x1", "v5p:8x8x4"),
    "v6e": ("v6e:1x1", "v6e:16x16"),
    "v7x": ("tpu7x:1x1x1", "tpu7x:4x8x8"),  # two devices a chip
}
"""The smallest topology that libtpu describes, and one of 256 chips."""

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""


class Memory(NamedTuple):
    """What a compiled program holds on each device, in bytes."""

    arguments: int
    outputs: int
    temporaries: int


class Kernel(NamedTuple):
    """What `ptxas` reports of one GPU kernel."""

    name: str
    registers: int
    spill_stores: int
    spill_loads: int


def tpu(
    kind: str,
    *,
    pod: bool = False,
    axes: Sequence[str] = ("chips",),
    shape: Sequence[int] | None = None,
    slice_: str | None = None,
) -> Mesh:
    """Return a mesh of one TPU device, or of all devices of 256 chips or a slice; skips where there is no compiler."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed here: run `.venv-aot/bin/python -m pytest tests/compile`")
    devices = topologies.get_topology_desc(slice_ if pod and slice_ else TPUS[kind][pod], "tpu").devices
    devices = np.array(devices if pod else devices[:1])
    return Mesh(devices.reshape(shape or [-1] + [1] * (len(axes) - 1)), tuple(axes))


def gpu(axes: Sequence[str] = ("chips",)) -> Mesh:
    """Return a mesh of one H200; skips where there is no CUDA compiler."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None or shutil.which("ptxas") is None:
        pytest.skip("the CUDA plugin or ptxas is missing: run `.venv-aot/bin/python -m pytest tests/compile`")
    topology = topologies.get_topology_desc(topology_name="", platform="cuda", topology="1x1x1", target_config=H200)
    return Mesh(np.array(topology.devices).reshape([1] * len(axes)), tuple(axes))


def spec(mesh: Mesh, shape: Sequence[int], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
    """Return an abstract array that is sharded over `axes` of the mesh."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def lower_for(mesh: Mesh, function: Callable[..., Any], *args: jax.ShapeDtypeStruct) -> Any:
    """Lower `function` for the mesh's devices."""
    platform = "cuda" if "NVIDIA" in mesh.devices.flat[0].device_kind else "tpu"
    # The lowering asks the current mesh, not the arguments, which chip it is for.
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))


def compile_for(mesh: Mesh, function: Callable[..., Any], *args: jax.ShapeDtypeStruct, dump: Path | None = None) -> Any:
    """Compile `function` for the mesh's devices and return the executable; `dump` is a folder for the GPU's PTX."""
    return _compile(lower_for(mesh, function, *args), dump)


def _compile(lowered: Any, dump: Path | None) -> Any:
    return lowered.compile(compiler_options={"xla_dump_to": str(dump)} if dump is not None else None)


def _text(lowered: Any, compiled: Any) -> str:
    """Return the compiled program to be searched for names; where it cannot be printed, what was lowered."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # some asynchronous copies of libtpu's are more than jaxlib 0.10 can read
        return lowered.as_text(dialect="hlo", debug_info=True)


def is_compiled(text: str) -> bool:
    """Return whether a program's text is of what was compiled: in what is only lowered, no work is split yet."""
    return "is_scheduled=true" in text


def memory(compiled: Any) -> Memory:
    """Return the bytes that each device holds."""
    found = compiled.memory_analysis()
    return Memory(found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)


def kernels(dump: Path) -> list[Kernel]:
    """Return registers and spills of every kernel in a dump's PTX files, as `ptxas` for the H200 reports them."""
    found = []
    for path in sorted(dump.glob("*.ptx")):
        if ".entry" not in path.read_text():  # constants alone
            continue
        command = ["ptxas", "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        for part in report.split("Compiling entry function '")[1:]:
            patterns = (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
            numbers = [int(re.search(pattern, part)[1]) for pattern in patterns]
            found.append(Kernel(part.split("'")[0], *numbers))
    return found


MEMORY = {"v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30, "v7x": 96 * 2**30, "h200": 141 * 10**9}
"""Bytes of a device: a v7x chip has twice as much, for its two."""


class Program(NamedTuple):
    """A case of an operation, to be compiled for a chip, or for 256 of them.

    Attributes:
        op: the operation.
        case: its shapes.
        chip: `v5e`, `v5p`, `v6e`, `v7x` or `h200`.
        pod: whether it is spread over 256 chips.
        build: from a mesh to the function and its abstract arguments, or to what they are lowered to.
        own: the names of our kernels in it.
        axes: of the mesh.
        shape: of the mesh, if it has several axes.
        slice_: another topology than 256 chips, such as `v5p:4x4x8`.
    """

    op: str
    case: str
    chip: str
    pod: bool
    build: Callable[[Mesh], tuple[Callable[..., Any], Sequence[jax.ShapeDtypeStruct]] | jax.stages.Lowered]
    own: Sequence[str]
    axes: Sequence[str] = ("chips",)
    shape: Sequence[int] | None = None
    slice_: str | None = None

    def __str__(self) -> str:
        """Return a name for reports."""
        return f"{self.chip}{'-pod' * self.pod}-{self.case}"


def measure(program: Program, folder: Path) -> tuple[dict[str, Any], str]:
    """Compile a program; return what it needs of a device as a row of results, and the compiled text.

    `folder`, which should be empty, is where the GPU's PTX goes.
    """
    on_gpu = program.chip == "h200"
    if on_gpu:
        mesh = gpu(program.axes)
    else:
        mesh = tpu(program.chip, pod=program.pod, axes=program.axes, shape=program.shape, slice_=program.slice_)
    built = program.build(mesh)
    lowered = built if isinstance(built, jax.stages.Lowered) else lower_for(mesh, built[0], *built[1])
    compiled = _compile(lowered, folder if on_gpu else None)
    row = {"op": program.op, "case": program.case, "chip": program.chip, "devices": mesh.size}
    row |= {f"{name}_bytes": size for name, size in memory(compiled)._asdict().items()}
    if on_gpu:
        row["kernels"] = [kernel._asdict() for kernel in kernels(folder) if kernel.name in program.own]
    return row, _text(lowered, compiled)


def check(program: Program, row: dict[str, Any], text: str) -> None:
    """Assert that a program fits its device and runs our kernels there, without spills."""
    print(row)
    held = row["arguments_bytes"] + row["outputs_bytes"] + row["temporaries_bytes"]
    assert held < MEMORY[program.chip], f"{held:,} bytes a device"
    for name in program.own:
        assert name in text, f"{name} is not in the program"
    if program.chip == "h200":
        assert {kernel["name"] for kernel in row["kernels"]} == set(program.own)
    for kernel in row.get("kernels", ()):
        assert not kernel["spill_stores"], kernel
        assert not kernel["spill_loads"], kernel
