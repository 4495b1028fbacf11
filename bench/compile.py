"""What every kernel needs of hardware that is not here: memory of a device, registers and spills.

Run by an environment that has the compilers, from the root of the repository:

    .venv-aot/bin/python -m bench.compile [OP ...] [--out DIR] [--only PATTERN]

It compiles what the compile tests compile, and keeps `DIR/compile_OP.jsonl`, one line a program, up to date: a program
that is compiled again replaces its line, and what an interrupted run has done is there.
"""

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; the default backend stays here


def main() -> None:
    topology = importlib.import_module("tests.compile.topology")
    ops = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests" / "compile").glob("test_*.py"))
    parser = argparse.ArgumentParser(prog="bench.compile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(ops)}; all when left out")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where to write")
    parser.add_argument("--only", default="", metavar="PATTERN", help="of names, as in v5e-pod; all when left out")
    chosen = parser.parse_args()
    versions = {name: metadata.version(name) for name in ("jax", "libtpu", "jax-cuda13-plugin")}
    chosen.out.mkdir(parents=True, exist_ok=True)
    for op in chosen.ops or ops:
        programs = getattr(importlib.import_module(f"tests.compile.test_{op}"), "PROGRAMS", ())
        file = chosen.out / f"compile_{op}.jsonl"
        rows = {name_of(row): row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
        for program in programs:
            if not re.search(chosen.only, str(program)):
                continue
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                row, _ = topology.measure(program, Path(folder))
            row |= {"seconds": round(time.perf_counter() - begun, 1), "versions": versions}
            rows[name_of(row)] = row
            print(line(row), flush=True)
            names = [str(program) for program in programs]  # lines of programs that are no more are dropped
            kept = [rows[name] for name in names if name in rows]
            file.write_text("".join(f"{json.dumps(row)}\n" for row in kept))


def name_of(row: dict) -> str:
    """Return the name of the program that a row is of."""
    return f"{row['chip']}{'-pod' * (row['devices'] > 1)}-{row['case']}"


def line(row: dict) -> str:
    mib = " ".join(f"{name} {row[f'{name}_bytes'] / 2**20:,.1f}" for name in ("arguments", "outputs", "temporaries"))
    kernels = "; ".join(
        f"{kernel['name']} {kernel['registers']} registers, {kernel['spill_stores']} B spilled"
        for kernel in row.get("kernels", ())
    )
    return f"{row['op']} {row['case']:40s} {row['chip']:5s} x{row['devices']:<4d} MiB: {mib} {kernels}"


if __name__ == "__main__":
    main()
