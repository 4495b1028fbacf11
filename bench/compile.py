"""What every kernel needs of hardware that is not here: memory of a device, registers and spills.

Run by an environment that has the compilers, from the root of the repository:

    .venv-aot/bin/python -m bench.compile [OP ...] [--out DIR]

It compiles what the compile tests compile, and writes `DIR/compile_OP.jsonl`, one line a program.
"""

import argparse
import importlib
import json
import os
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
    chosen = parser.parse_args()
    versions = {name: metadata.version(name) for name in ("jax", "libtpu", "jax-cuda13-plugin")}
    for op in chosen.ops or ops:
        rows = []
        for program in importlib.import_module(f"tests.compile.test_{op}").PROGRAMS:
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                row, _ = topology.measure(program, Path(folder))
            rows.append(row | {"seconds": round(time.perf_counter() - begun, 1), "versions": versions})
            print(line(rows[-1]), flush=True)
        chosen.out.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (chosen.out / f"compile_{op}.jsonl").write_text(text)


def line(row: dict) -> str:
    mib = " ".join(f"{name} {row[f'{name}_bytes'] / 2**20:,.1f}" for name in ("arguments", "outputs", "temporaries"))
    kernels = "; ".join(
        f"{kernel['name']} {kernel['registers']} registers, {kernel['spill_stores']} B spilled"
        for kernel in row.get("kernels", ())
    )
    return f"{row['op']} {row['case']:40s} {row['chip']:5s} x{row['devices']:<4d} MiB: {mib} {kernels}"


if __name__ == "__main__":
    main()
