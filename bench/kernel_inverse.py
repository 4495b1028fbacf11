"""The kernel inverse beside `jax.scipy.linalg.cho_solve` (LAPACK on a CPU, cuSOLVER on a GPU), in float32.

Two comparisons for each size: a factorisation and two substitutions on both sides, and `kernel_inverse` as it is used,
which adds a step of refinement and a residual in twice the precision.  Rates count `k³/3 + 2k²q` operations on either
side.  The ceiling is the rate of a `k × k` matrix product of full float32 precision, by turns with the rest.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bench import harness
from jattrib_kernels.backend import resolve
from jattrib_kernels.kernel_inverse import cases, factorize, kernel_inverse, solve
from jattrib_kernels.kernel_inverse.refine import residual

COLUMNS = 256
OTHER = "jax.scipy.linalg.cho_solve"


def run() -> list[dict[str, Any]]:
    """Measure the sizes that the device solves in a moment."""
    largest = 2048 if jax.default_backend() == "cpu" else max(cases.TIMED)
    return [row for k in cases.TIMED if k <= largest for row in measure(k)]


def measure(k: int) -> list[dict[str, Any]]:
    """Time one size; a Gram matrix of 2k rows of normal numbers, whose condition number is 34."""
    rows_key, targets_key = jax.random.split(jax.random.key(k))
    features = jax.random.normal(rows_key, (2 * k, k))
    gram = jnp.matmul(features.T, features, precision=jax.lax.Precision.HIGHEST) / (2 * k)
    targets = jax.random.normal(targets_key, (k, COLUMNS))
    sides = {
        "unrefined": partial(jax.jit(lambda gram, targets: solve(factorize(gram), targets)), gram, targets),
        "whole": partial(jax.jit(kernel_inverse), gram, targets),
        "other": partial(jax.jit(cho_solve), gram, targets),
        "ceiling": partial(jax.jit(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)), gram, gram),
    }
    timings = harness.compare(sides, calls=5)
    ceiling = 2 * k**3 / timings["ceiling"].median / 1e9
    solutions = {"unrefined": sides["unrefined"](), "whole": sides["whole"]()[0], "other": sides["other"]()}
    left = {name: _relative(gram, solution, targets) for name, solution in solutions.items()}
    results = []
    for name, what in (("unrefined", "factor and solve"), ("whole", "factor, solve, refine and report")):
        row = harness.rates(
            f"k {k}, {COLUMNS} columns: {what}", timings[name], timings["other"],
            work=(k**3 / 3 + 2 * k**2 * COLUMNS) / 1e9, unit="GFLOP/s", other_name=OTHER,
            note=f"backend {resolve('auto')}",
        )  # fmt: skip
        extra = {"ceiling": ceiling, "fraction": row.ours / ceiling, "other_fraction": row.other / ceiling}
        results.append(row._asdict() | extra | {"residual": left[name], "other_residual": left["other"]})
    return results


def cho_solve(gram: jax.Array, targets: jax.Array) -> jax.Array:
    """Solve as one would without the kernels."""
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram, lower=True), targets)


def _relative(gram: jax.Array, solution: jax.Array, targets: jax.Array) -> float:
    rows, zero = jnp.arange(gram.shape[0]), jnp.float32(0)
    left = residual(gram, solution, targets, damping=zero, rows=rows, operand=jnp.dtype(jnp.float32))
    return float(jnp.linalg.norm(left) / jnp.linalg.norm(targets))


if __name__ == "__main__":
    harness.main(run, "kernel_inverse")
