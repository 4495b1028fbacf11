"""What a metagradient costs: peak memory against the number of steps by what is kept, and seconds in trainings.

    jattrib bench replay --out bench/results/replay.jsonl

Memory: an MLP 784-128-10 (SGD with momentum, batches of 50 of 5,000 images), one query, T steps.  What is measured is
the growth of a fresh process above what it held when the programs were compiled and the data in place, and `carries`
is how many times the run's carry (parameters and momentum) that is.  The ways of keeping carries are

    all: every step's, nothing is run twice;              √T: those of √T segments, and of one segment's steps;
    disk: the same, the segments' on disk;                log T: about log₂ T, the others computed again.

Seconds: the classifier of the recipe `magic_fashion_mnist` (784-64-10, batches of 250) for some numbers of queries,
beside plain training over the same steps, and beside as many replays of one query.
"""

import ctypes
import gc
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bench import harness
from jattrib.data import vision
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Margin
from jattrib.train import loop, replay
from jattrib.train.ensemble import Ensemble

LENGTHS = (256, 1024, 4096)
KEPT = ("all", "√T", "disk", "log T")
MEMORY = (128, 50)
"""Hidden width and batch of the runs whose memory is measured."""

SECONDS = (64, 250)
"""The same of those that are timed."""

TIMED, TIMED_KEPT = 100, 1024
"""Steps of the runs that are timed: by queries, and by what is kept."""

QUERIES = (1, 16, 64)


class Case(NamedTuple):
    """A run, and a query or more."""

    run: replay.Run
    inputs: replay.Inputs
    output: replay.Output
    queries: tuple[jax.Array, jax.Array]

    @property
    def carry_bytes(self) -> int:
        """Bytes of parameters and momentum."""
        return 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(self.inputs.params))


def run() -> list[harness.Result]:
    """Measure memory by steps, and seconds by what is kept and by queries."""
    return [*memory_rows(), *kept_rows(), *query_rows()]


def memory_rows() -> list[harness.Result]:
    """Return the growth of memory of each way of keeping carries, and how it goes with the number of steps."""
    carry = case(1, 1, *MEMORY).carry_bytes / 2**20
    grown: dict[tuple[str, int], float] = {}
    rows: list[harness.Result] = []
    for steps in LENGTHS:
        for kept in KEPT:
            peak = harness.peak_memory("bench.replay:replayed", kept, steps)
            grown[kept, steps] = peak.peak - peak.before
        for kept in KEPT:
            note = f"carry of {carry:.2f} MiB; {counted(kept, steps)} of them are kept at a time"
            told = row(f"memory, {steps} steps, {kept}", grown[kept, steps], grown["all", steps], "all", "MiB", note)
            rows.append({**told._asdict(), "carries": grown[kept, steps] / carry})
    short, long = LENGTHS[0], LENGTHS[-1]
    for kept in KEPT:
        factor, root = grown[kept, long] / grown[kept, short], (long / short) ** 0.5
        case_ = f"memory, {long} steps over {short}, {kept}"
        rows.append(row(case_, factor, root, "√T", "times", f"T grows {long // short} times"))
    return rows


def kept_rows() -> list[harness.Result]:
    """Return the seconds of each way of keeping carries, in trainings."""
    made = case(TIMED_KEPT, 1, *MEMORY)
    sides: dict[str, Callable[[], Any]] = {"training": lambda: replay.train(made.run, made.inputs)}
    sides |= {kept: partial(metagradient, made, kept) for kept in KEPT}
    timings = harness.compare(sides, calls=3)
    note = f"{TIMED_KEPT} steps, one query; seconds of a metagradient over those of the training"
    return [
        row(
            f"cost, {TIMED_KEPT} steps, {kept}", timings[kept].median, timings["training"].median, "training", "s", note
        )
        for kept in KEPT
    ]


def query_rows() -> list[harness.Result]:
    """Return the seconds of a metagradient by queries, in trainings and beside as many replays of one query."""
    made = case(TIMED, max(QUERIES), *SECONDS)
    asked = {f"{count}": jax.tree.map(lambda leaf, count=count: leaf[:count], made.queries) for count in QUERIES}
    sides: dict[str, Callable[[], Any]] = {"training": lambda: replay.train(made.run, made.inputs)}
    sides |= {name: partial(metagradient, made._replace(queries=some), "√T") for name, some in asked.items()}
    timings = harness.compare(sides, calls=5)
    rows: list[harness.Result] = []
    for count in QUERIES:
        ours, training, single = timings[f"{count}"], timings["training"], timings["1"].median
        case_, note = f"cost, {count} queries", f"{TIMED} steps; seconds of a metagradient over those of the training"
        rows.append(row(case_, ours.median, training.median, "training", "s", note))
        if count > 1:
            rows.append(row(case_, ours.median, count * single, "a replay a query", "s", f"{count} times one of one"))
    return rows


def replayed(kept: str, steps: int) -> Callable[[], Any]:
    """Return the function that replays; what it compiles is compiled by now, as far as its length does not matter."""
    made = case(steps, 1, *MEMORY)
    size = 1 if kept == "all" else segment(kept, steps)
    short = jax.tree.map(lambda leaf: leaf[: 2 * size], made.run.order)
    replay.metagradient(made.output, made.run._replace(order=short), made.inputs, made.queries, segment=size,
                        progress=False)  # fmt: skip
    replay.train(made.run, made.inputs)
    forget_peak()
    return partial(metagradient, made, kept)


def metagradient(made: Case, kept: str) -> Any:
    """Return the metagradient, carries kept in one of the ways."""
    steps = len(made.run.order.indices)
    with tempfile.TemporaryDirectory() as folder:
        return replay.metagradient(
            made.output, made.run, made.inputs, made.queries, segment=segment(kept, steps),
            checkpoints="recompute" if kept == "log T" else "device",
            directory=Path(folder) / "replay" if kept == "disk" else None, progress=False,
        )[:4]  # fmt: skip


def segment(kept: str, steps: int) -> int:
    """Return the steps of a segment."""
    return {"all": steps, "log T": 1}[kept] if kept in ("all", "log T") else round(steps**0.5)


def counted(kept: str, steps: int) -> int:
    """Return how many carries are in memory at a time, at most."""
    size = segment(kept, steps)
    outer = {"disk": 1, "log T": (steps - 1).bit_length() + 1}.get(kept, steps // size)
    return outer + size


def case(steps: int, queries: int, width: int, batch: int) -> Case:
    """Return a run of so many steps on the embedded images, from the first seed."""
    train, test = vision.fashion_mnist_excerpt()
    n = len(train.labels)
    model = mlp(train.inputs[0].size, (width,), 10, activation="gelu")
    group = Ensemble(model, optax.sgd(0.01, momentum=0.9), loop.Plan(-(-steps * batch // n), batch, n))
    made, inputs = replay.member(group, tuple(train), jax.random.key(0))
    made = made._replace(order=jax.tree.map(lambda leaf: leaf[:steps], made.order))
    asked = jnp.asarray(test.inputs[:queries]), jnp.asarray(test.labels[:queries])
    return Case(made, inputs, partial(Margin, model.apply), asked)


def row(name: str, ours: float, other: float, other_name: str, unit: str, note: str) -> harness.Row:
    """Return a row of the results."""
    return harness.Row(
        case=name, ours=ours, other=other, other_name=other_name, ratio=ours / other, unit=unit,
        device=harness.device(), versions=harness.versions(()), note=note,
    )  # fmt: skip


def forget_peak() -> None:
    """Give memory back, and let the peak that the kernel remembers of this process begin here (Linux alone can)."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    harness.main(run, "replay")
