"""Every figure that needs a GPU, in one command of less than eight minutes.

    python -m bench.gpu --out bench/results          # one CUDA card
    python -m bench.gpu --smoke --out DIR            # no card: the same path with small sizes, to see that it runs

First it sees that the card's kernels make the matrices that the specification makes, bit for bit.  Then it measures
`projection` (dense beside the bfloat16 matrix product and `fast_jl`, the sketch beside a copy and `dattri`'s SJLT,
memory) and `kernel_inverse` (k of 4,096 to 16,384 beside `jax.scipy.linalg.cho_solve`), and writes each to
`gpu_NAME_CARD.jsonl`.  What is done is on disk if a limit of time cuts off the rest.  At the end it says which of the
goals below were met; a goal whose opponent is not installed is reported as not measured.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# PyTorch's kernels share the card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from bench import harness, kernel_inverse, projection
from jattrib.core.errors import InvalidInputError
from jattrib_kernels.backend import Backend
from jattrib_kernels.dense_projection import dense_projection, dense_projection_transpose
from jattrib_kernels.kernel_inverse import cases as systems
from jattrib_kernels.sketch_projection import cases, sketch_projection, sketch_projection_transpose

SMOKE = (cases.Case("mlp", 16, 4096, 256), cases.Case("copies", 16, 4096, 256, copies=4))


class Goal(NamedTuple):
    """What a row has to show: a ratio of at least `least`, where a case and an opponent match."""

    name: str
    case: str
    other: str
    least: float


GOALS = (
    Goal("dense, of the bfloat16 matrix ceiling", r"bfloat16: dense .*ceiling", "a product", 0.6),
    Goal("dense, beside fast_jl", "dense", "fast_jl", 5.0),
    Goal("sketch, of the copy bandwidth", "sketch .*ceiling", "a copy", 0.8),
    Goal("sketch, beside dattri's SJLT", "sketch", "SJLT", 5.0),
    Goal("kernel inverse, beside cuSOLVER", r"k (4096|8192|16384),", "cho_solve", 1.0),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, write, and compare with the goals."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--smoke", action="store_true", help="small sizes on a CPU, with the reference's backend")
    chosen = parser.parse_args(arguments)
    begun, card = time.monotonic(), require_card(chosen.smoke)
    print(f"{card}, {len(jax.devices())} device(s); jax {jax.__version__}", flush=True)
    rows: list[harness.Result] = []
    for name, run in plan(chosen.smoke).items():
        part = run()
        seconds = time.monotonic() - begun
        harness.show(part, f"{name}, {seconds:.0f} s since the start")
        harness.write(part, chosen.out / f"gpu_{name}_{re.sub('[^a-z0-9]+', '_', card.lower())}.jsonl")
        rows += part
    print("\n".join(verdicts(rows)))


def require_card(smoke: bool) -> str:
    """Return the name of the card.

    Raises:
        InvalidInputError: there is none, or there is one and a smoke test was asked for.
    """
    platform = jax.default_backend()
    if (platform == "gpu") == smoke:
        raise InvalidInputError(
            f"JAX computes on {platform} ({jax.devices()[0].device_kind})",
            expected="a CPU for --smoke" if smoke else "a CUDA GPU",
            remedy="leave out --smoke"
            if smoke
            else "run on a machine with a card, with `pip install -e '.[cuda,peers]'`; --smoke tries the path on a CPU",
        )
    return jax.devices()[0].device_kind


def plan(smoke: bool) -> dict[str, Callable[[], Sequence[harness.Result]]]:
    """Return what to measure, by name, the most telling first."""
    if smoke:
        small = partial(projection.speeds, SMOKE, backend="reference", sustain=0.0, product=128, calls=2)
        return {
            "matrix": partial(same_matrix, "reference"),
            "projection": lambda: small() + projection.memory((32, 16, 10), 4, 64),
            "kernel_inverse": lambda: kernel_inverse.measure(128),
        }
    return {
        "matrix": partial(same_matrix, "pallas_gpu"),
        "projection": projection.run,
        "kernel_inverse": lambda: [row for k in systems.TIMED if k >= 4096 for row in kernel_inverse.measure(k)],
    }


def same_matrix(backend: Backend) -> list[dict[str, Any]]:
    """Compare matrices on the card with the specification's, from unit vectors and back.

    Raises:
        AssertionError: an entry differs.
    """
    p, dim, key = 70_000, 512, jax.random.key_data(jax.random.key(7))
    unit = jax.nn.one_hot(jnp.linspace(0, p - 1, 64).astype(jnp.int32), p)
    rows = []
    for name, forth, back in (
        ("dense", dense_projection, dense_projection_transpose),
        ("sketch", sketch_projection, sketch_projection_transpose),
    ):
        checked = 0
        for operand, function, size in ((unit, forth, dim), (jnp.eye(dim), back, p)):
            for dtype in ("float32", "bfloat16"):
                made, wanted = (
                    np.asarray(function(operand.astype(dtype), key, size, block_offset=5, backend=each))
                    for each in (backend, "reference")
                )
                np.testing.assert_array_equal(made, wanted, err_msg=f"{name} on {jax.devices()[0].device_kind}")
                checked += made.size
        row = harness.Row(
            f"{name}: entries equal to the specification's", checked, checked, "reference", 1.0, "entries",
            harness.device(), harness.versions(()), note=f"backend {backend}",
        )  # fmt: skip
        rows.append(row._asdict())
    return rows


def verdicts(rows: Sequence[harness.Result]) -> list[str]:
    """Return a line a goal: met or missed, with the worst and the best ratio, or not measured."""
    plain = [row._asdict() if isinstance(row, harness.Row) else row for row in rows]
    lines = []
    for goal in GOALS:
        found = [
            row["ratio"]
            for row in plain
            if re.search(goal.case, row["case"]) and re.search(goal.other, row["other_name"])
        ]
        if found:
            word = "met" if min(found) >= goal.least else "met in part" if max(found) >= goal.least else "missed"
            lines.append(f"{goal.name}: {word}: {min(found):.2f} to {max(found):.2f}, of {goal.least:g} or more")
        else:
            lines.append(f"{goal.name}: not measured")
    return lines


if __name__ == "__main__":
    try:
        main()
    except InvalidInputError as error:
        sys.exit(f"error: {error}")
