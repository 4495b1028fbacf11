"""What every benchmark shares: timing sides by turns, peak memory of a fresh process, rows and their table.

A benchmark is a module with `run() -> list[Row]`, started by `jattrib bench NAME --out FILE` or
`python -m bench.NAME --out FILE`.

Sides are timed by turns in one process, ours and the others', so that whatever else the machine does falls on all.  The
first call of each side, which compiles, is timed apart and not counted.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jattrib.core import files
from jattrib.core.errors import InvalidInputError
from jattrib.recipes import rundir

ROOT = Path(__file__).resolve().parents[1]


class Timing(NamedTuple):
    """Seconds of one side of a comparison.

    Attributes:
        median: of the calls that count.
        low: their lower quartile.
        high: their upper quartile.
        first: of the first call, compilation included.
        calls: how many count.
    """

    median: float
    low: float
    high: float
    first: float
    calls: int


class Row(NamedTuple):
    """One line of a benchmark's results.

    Attributes:
        case: what was measured.
        ours: our figure, from the median time.
        other: the other's.
        other_name: who that is.
        ratio: `ours / other`, whatever the unit: of rates, larger is better; of seconds or memory, smaller.
        unit: of both figures.
        device: what it ran on.
        versions: of everything that took part.
        ours_spread: our figure at the quartiles of the time, low and high; None where it was measured once.
        other_spread: the other's.
        ours_first_s: seconds of our first call, compilation included.
        other_first_s: of the other's.
        note: what else there is to know.
    """

    case: str
    ours: float
    other: float
    other_name: str
    ratio: float
    unit: str
    device: str
    versions: dict[str, str]
    ours_spread: tuple[float, float] | None = None
    other_spread: tuple[float, float] | None = None
    ours_first_s: float | None = None
    other_first_s: float | None = None
    note: str = ""


Result = Row | Mapping[str, Any]
"""A row, or a mapping with a row's keys and others."""


class Peak(NamedTuple):
    """Memory of a process, in MiB: its peak, and what it had reached before the work began."""

    peak: float
    before: float


def compare(
    sides: Mapping[str, Callable[[], Any]], *, calls: int = 5, before: Callable[[], Any] | None = None
) -> dict[str, Timing]:
    """Time functions by turns; JAX arrays that they return are waited for.

    Args:
        sides: what to time, by name.
        calls: how many calls of each count; one more comes before, and is reported as `first`.
        before: called before each call that counts, and not timed.
    """
    first = [_seconds(side) for side in sides.values()]
    taken = np.array([[_seconds(side, before) for side in sides.values()] for _ in range(calls)])
    return {name: _timing(taken[:, column], first[column]) for column, name in enumerate(sides)}


def rates(
    case: str,
    ours: Timing,
    other: Timing,
    *,
    work: float,
    unit: str,
    other_name: str,
    other_work: float | None = None,
    packages: Sequence[str] = (),
    note: str = "",
) -> Row:
    """Return the row of a comparison of speeds.

    Args:
        case: what was measured.
        ours: our time for a call.
        other: the other's.
        work: how many units one call does.
        unit: of the rate, as in `examples/s`.
        other_name: who the other is.
        other_work: how many units one call of the other does, where that is not `work`.
        packages: the distributions that took part beside ours, for their versions.
        note: what else there is to know.
    """
    done = work if other_work is None else other_work
    rate, other_rate = work / ours.median, done / other.median
    return Row(
        case=case, ours=rate, other=other_rate, other_name=other_name, ratio=rate / other_rate, unit=unit,
        device=device(), versions=versions(packages),
        ours_spread=(work / ours.high, work / ours.low), other_spread=(done / other.high, done / other.low),
        ours_first_s=ours.first, other_first_s=other.first, note=note,
    )  # fmt: skip


def memories(
    case: str, ours: Peak, other: Peak, *, other_name: str, packages: Sequence[str] = (), note: str = ""
) -> Row:
    """Return the row of a comparison of peak memory of whole processes; libraries, data and model count in both."""
    return Row(
        case=case, ours=ours.peak, other=other.peak, other_name=other_name, ratio=ours.peak / other.peak, unit="MiB",
        device=device(), versions=versions(packages),
        note=f"before the work began: {ours.before:.0f} and {other.before:.0f} MiB{note and f'; {note}'}",
    )  # fmt: skip


def device() -> str:
    """Say in words what this runs on."""
    return rundir.device()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of our own dependencies and of some distributions."""
    return rundir.versions() | {name: metadata.version(name) for name in packages}


def require(*modules: str) -> None:
    """Refuse to begin without the packages that a benchmark compares with.

    Raises:
        InvalidInputError: one is not installed.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInputError(
            f"no module {', '.join(missing)}",
            expected="the packages to compare with",
            remedy="pip install -e '.[peers]', or make bench",
        )


def peak_memory(target: str, *arguments: Any) -> Peak:
    """Return the memory of a fresh process that does some work.

    Args:
        target: `module:function`.  The function prepares the work and returns a function that does it.
        arguments: of the function; numbers and strings.
    """
    command = [sys.executable, "-m", "bench.harness", target, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def resident_peak() -> float:
    """Return the most memory that this process has held, in MiB.

    Linux gives a child the peak of the parent that started it as the start of its `ru_maxrss`; `VmHWM` is its own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def show(rows: Sequence[Result], title: str) -> None:
    """Print rows as a table: what is compared, both figures with their spread, the ratio."""
    plain = [_plain(row) for row in rows]
    named = ", ".join(f"{name} {version}" for name, version in plain[0]["versions"].items())
    table = Table(title=title, caption=f"{plain[0]['device']}; {named}")
    for name in ("case", "ours", "other", "who", "ratio", "unit"):
        table.add_column(name, justify="right" if name in ("ours", "other", "ratio") else "left")
    for row in plain:
        ours, other = (_figure(row[side], row.get(f"{side}_spread")) for side in ("ours", "other"))
        table.add_row(row["case"], ours, other, row["other_name"], f"{row['ratio']:.2f}", row["unit"])
    Console().print(table)


def write(rows: Sequence[Result], out: Path) -> None:
    """Write rows as JSON lines."""
    plain = [files.plain(_plain(row)) for row in rows]
    files.write_atomic(out, "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in plain).encode())


def main(run: Callable[[], Sequence[Result]], title: str) -> None:
    """Run a benchmark as a program: print its table, and write its rows if `--out` says where to."""
    parser = argparse.ArgumentParser(prog=title)
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON lines")
    out = parser.parse_args().out
    rows = run()
    if out is not None:
        write(rows, out)
    show(rows, title)


def _plain(row: Result) -> Mapping[str, Any]:
    return row._asdict() if isinstance(row, Row) else row


def _seconds(function: Callable[[], Any], before: Callable[[], Any] | None = None) -> float:
    if before is not None:
        jax.block_until_ready(before())
    begun = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begun


def _timing(seconds: np.ndarray, first: float) -> Timing:
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Timing(float(median), float(low), float(high), first, len(seconds))


def _figure(value: float, spread: tuple[float, float] | None) -> str:
    return f"{value:,.4g}" if spread is None else f"{value:,.4g} ({spread[0]:,.4g} to {spread[1]:,.4g})"


def _child(target: str, arguments: Sequence[Any]) -> None:
    module, name = target.split(":")
    work = getattr(importlib.import_module(module), name)(*arguments)
    before = resident_peak()
    jax.block_until_ready(work())
    print(json.dumps([resident_peak(), before]))


if __name__ == "__main__":
    _child(sys.argv[1], json.loads(sys.argv[2]))
