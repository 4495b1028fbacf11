"""Random projections beside the field's, beside what the machine can do at all, and streamed from a backward pass.

    jattrib bench projection --out bench/results/projection.jsonl

Three kinds of rows:

* *speed*: the same rows to the same number of features, ours and everyone else's by turns, the fastest of the others
  first.  On a CPU they are `traker`'s, `dattri`'s and scikit-learn's; on a CUDA GPU `fast_jl` and the SJLT of `dattri`,
  where they are installed (see `peers.projectors`); on both, the textbook's CountSketch in JAX.  Ours makes its matrix
  in every call.  On a CPU the sketch is called by itself, where all cores share it, and is compared with itself inside
  a jitted program, and once more with the fastest other where the rows are in no cache.
* *ceiling*: the sketch beside a copy, in bytes moved a second; dense beside a matrix product in the type in which it
  multiplies, in operations a second.  The ratio is the fraction of the ceiling.  A float32 number takes three passes of
  a GPU's bfloat16 matrix unit: there, a third is all that dense can reach.
* *memory*: features of a larger network by `projection.gradients.of_gradients`, which projects each leaf as it leaves
  the backward pass, beside the naive form, the gradients of all examples and then their projection.  `process` is the
  peak of a process, libraries included; `XLA` is what one compiled program of either form asks for beside its arguments
  and results.

A call is repeated for a fifth of a second, since some last a few milliseconds; on a GPU only the last is waited for, so
that what is timed is the card.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import harness
from jattrib.core import tree
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Margin
from jattrib.projection import sketch
from jattrib.projection.gradients import of_gradients
from jattrib_kernels.backend import Backend, resolve
from jattrib_kernels.dense_projection import dense_projection
from jattrib_kernels.sketch_projection import cases, sketch_projection
from jattrib_kernels.sketch_projection.classic import count_sketch

SIZES = (784, *[1024] * 6, 10)
BATCH = 64
DIM = 1024

ELSEWHERE = 2**30
"""Bytes that are read to empty the caches: some machines' hold a quarter of that."""


class Side(NamedTuple):
    """What is timed.

    Attributes:
        work: does it, and returns what is to be waited for.
        packages: the distributions that it comes from, beside our own.
        wait: waits for it.
    """

    work: Callable[[], Any]
    packages: Sequence[str] = ()
    wait: Callable[[Any], Any] = jax.block_until_ready


def run() -> list[harness.Row]:
    """Measure speeds and memory on what JAX computes on."""
    if jax.default_backend() == "gpu":
        return speeds(cases.LARGE, backend="auto", sustain=0.2, product=8192) + memory()
    harness.require("torch", "trak", "dattri", "sklearn")
    return speeds(cases.TIMED, backend="auto", sustain=0.2, product=2048) + memory()


def speeds(
    shapes: Sequence[cases.Case], *, backend: Backend, sustain: float, product: int, calls: int = 5
) -> list[harness.Row]:
    """Return the rows of speed and of ceilings.

    Args:
        shapes: of the rows and features.
        backend: of our operations.
        sustain: seconds for which a call is repeated; at none, it is called once.
        product: the side of the matrix product that is dense's ceiling.
        calls: how many times count.
    """
    rows = []
    for case in shapes:
        x, key = cases.operands(case)
        dense, others, absent = peers(x, case.dim)
        plain = case.copies == 1  # of several copies, nobody else has the like, and dense has none
        inside = _jitted(sketch_projection, case, backend=backend, copies=case.copies)
        alone = partial(sketch_projection, dim=case.dim, backend=backend, copies=case.copies)
        shared = jax.default_backend() == "cpu"  # where a call by itself is of all cores
        sides = {"sketch": Side(partial(alone if shared else inside, x, key)), "copy": Side(copier(x))}
        sides |= {"inside": Side(partial(inside, x, key))} if shared else {}
        if plain:
            sides["dense"] = Side(partial(_jitted(dense_projection, case, backend=backend), x, key))
            sides["product"] = Side(multiplier(product, x.dtype))
            others = {"CountSketch, scattered by XLA": Side(partial(_jitted(count_sketch, case), x, key))} | others
            sides |= dense | others
        timings = timed(sides, sustain=sustain, calls=calls)
        note = f"backend {resolve(backend)}{''.join(f'; {why}' for why in absent)}"
        size, number = x.nbytes / 1e9, case.n * case.p * case.dim
        halved = scaled(timings["copy"], 0.5)  # it writes as much as it reads
        rows.append(
            harness.rates(
                f"{case.name}: sketch {_shape(case)}, ceiling", timings["sketch"], halved, work=size, unit="GB/s",
                other_name="a copy", note=note,
            )
        )  # fmt: skip
        if shared:
            rows.append(
                harness.rates(
                    f"{case.name}: sketch {_shape(case)}, inside a program", timings["inside"], timings["sketch"],
                    work=case.n, unit="rows/s", other_name="called by itself", note=note,
                )
            )  # fmt: skip
        if not plain:
            continue
        beside = _beside(f"{case.name}: sketch {_shape(case)}", "sketch", dense | others, timings, case.n, note)
        rows += beside
        if shared:
            fastest = beside[0].other_name
            fresh = uncached({name: sides[name] for name in ("sketch", fastest)}, calls=calls)
            rows.append(
                harness.rates(
                    f"{case.name}: sketch {_shape(case)}, rows in no cache", fresh["sketch"], fresh[fastest],
                    work=case.n, unit="rows/s", other_name=fastest, packages=sides[fastest].packages, note=note,
                )
            )  # fmt: skip
        same = scaled(timings["product"], number / product**3)
        rows.append(
            harness.rates(
                f"{case.name}: dense {_shape(case)}, ceiling", timings["dense"], same, work=2 * number / 1e9,
                unit="GFLOP/s", other_name=f"a product of {product} x {product} {_unit_type(x.dtype)}", note=note,
            )
        )  # fmt: skip
        rows += _beside(f"{case.name}: dense {_shape(case)}", "dense", dense, timings, case.n, note)
    return rows


def peers(x: jax.Array, dim: int) -> tuple[dict[str, Side], dict[str, Side], list[str]]:
    """Return others' dense and sparse projections on what JAX computes on, by name, and why some are absent."""
    if importlib.util.find_spec("torch") is None:
        return {}, {}, ["torch is not installed"]
    from bench.peers import projectors

    if jax.default_backend() == "gpu":
        *found, absent = projectors.on_gpu(x, dim)
    else:
        found, absent = projectors.on_cpu(np.array(x), dim), []
    dense, others = ({name: Side(*peer, projectors.wait) for name, peer in some.items()} for some in found)
    return dense, others, absent


def memory(sizes: Sequence[int] = SIZES, batch: int = BATCH, dim: int = DIM) -> list[harness.Row]:
    """Return the rows of memory, and of the speed of both forms."""
    forms = {form: gradients(form, sizes, batch, dim) for form in ("streamed", "naive")}
    count = tree.size(mlp(sizes[0], sizes[1:-1], sizes[-1]).init(jax.random.key(0))[0])
    case, note = f"{batch} examples, {count:,} parameters", f"MLP {'-'.join(map(str, sizes))}, sketch, k = {dim}"
    other = "gradients, then projected"
    rows = []
    if jax.default_backend() == "cpu":
        peaks = [harness.peak_memory("bench.projection:gradients", form, sizes, batch, dim) for form in forms]
        rows.append(harness.memories(f"{case}: memory, process", *peaks, other_name=other, note=note))
    asked = [temporaries(form, sizes, batch, dim) for form in forms]
    rows.append(
        harness.Row(
            f"{case}: memory, XLA", asked[0], asked[1], other, asked[0] / asked[1], "MiB", harness.device(),
            harness.versions(()), note=f"{note}; the gradients alone are {batch * count * 4 / 2**20:,.0f} MiB",
        )
    )  # fmt: skip
    timings = harness.compare(forms, calls=3)
    rows.append(
        harness.rates(
            f"{case}: speed", timings["streamed"], timings["naive"], work=batch, unit="examples/s", other_name=other,
            note=note,
        )
    )  # fmt: skip
    return rows


def gradients(form: str, sizes: Sequence[int], batch: int, dim: int) -> Callable[[], jax.Array]:
    """Return the function that makes features of a batch, `streamed` or `naive`: in two programs, as one would."""
    forward, arguments = _program("streamed", sizes, batch, dim)
    if form == "streamed":
        return partial(jax.jit(forward), *arguments)
    output, params, examples, words = arguments
    first = jax.jit(lambda output, params, examples: jax.vmap(jax.grad(output), (None, 0))(params, examples))
    second = jax.jit(sketch.projector(dim).apply)
    return lambda: second(words, first(output, params, examples))


def temporaries(form: str, sizes: Sequence[int], batch: int, dim: int) -> float:
    """Return the MiB that XLA allots to one program of a form, beside its arguments and results."""
    function, arguments = _program(form, sizes, batch, dim)
    found = jax.jit(function).lower(*arguments).compile().memory_analysis()
    if found is None:
        raise RuntimeError(f"XLA reports no memory on {harness.device()}")
    return found.temp_size_in_bytes / 2**20


def copier(x: jax.Array) -> Callable[[], jax.Array]:
    """Return a function that reads x and writes as much, into memory that it keeps: fresh pages would cost a CPU more.

    The sign is turned on the way, since a plain copy may be made without one.
    """
    step = jax.jit(lambda old, x: -x, donate_argnums=0, keep_unused=True)
    held = [jnp.zeros_like(x)]

    def work() -> jax.Array:
        held[0] = step(held[0], x)
        return held[0]

    return work


def multiplier(side: int, dtype: Any) -> Callable[[], jax.Array]:
    """Return a function that multiplies two square matrices in the type in which dense multiplies rows of a type."""
    a, b = (
        jax.random.normal(key, (side, side)).astype(_unit_type(dtype)) for key in jax.random.split(jax.random.key(0))
    )
    return partial(jax.jit(jnp.matmul), a, b)


def timed(sides: Mapping[str, Side], *, sustain: float, calls: int) -> dict[str, harness.Timing]:
    """Time sides by turns, each repeated to last `sustain` seconds; `first` is of one call, compilation included."""
    first, repeats = {}, {}
    for name, side in sides.items():
        first[name] = _seconds(side)
        repeats[name] = int(np.clip(sustain / _seconds(side), 1, 50))
    found = harness.compare({name: partial(_repeat, side, repeats[name]) for name, side in sides.items()}, calls=calls)
    return {name: scaled(found[name], 1 / repeats[name])._replace(first=first[name]) for name in sides}


def uncached(sides: Mapping[str, Side], *, calls: int) -> dict[str, harness.Timing]:
    """Time single calls of sides by turns, each after other memory has been through the caches."""
    elsewhere = np.ones(ELSEWHERE // 4, np.float32)
    return harness.compare({name: partial(_repeat, side, 1) for name, side in sides.items()}, calls=calls,
                           before=elsewhere.sum)  # fmt: skip


def scaled(timing: harness.Timing, factor: float) -> harness.Timing:
    """Return the timing of a multiple of the work."""
    median, low, high = (factor * each for each in timing[:3])
    return timing._replace(median=median, low=low, high=high)


def _beside(
    case: str, ours: str, others: Mapping[str, Side], timings: Mapping[str, harness.Timing], work: int, note: str
) -> list[harness.Row]:
    order = sorted(others, key=lambda name: timings[name].median)
    return [
        harness.rates(
            f"{case}, {'the fastest other' if place == 0 else 'others'}", timings[ours], timings[name], work=work,
            unit="rows/s", other_name=name, packages=others[name].packages, note=note,
        )
        for place, name in enumerate(order)
    ]  # fmt: skip


def _program(form: str, sizes: Sequence[int], batch: int, dim: int) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """Return a form as one function, and its arguments."""
    model, projector = mlp(sizes[0], sizes[1:-1], sizes[-1]), sketch.projector(dim)
    params, state = model.init(jax.random.key(0))
    inputs = jax.random.uniform(jax.random.key(1), (batch, sizes[0]))
    examples = inputs, jnp.arange(batch, dtype=jnp.int32) % sizes[-1]
    words = projector.init(jax.random.key(2), params)

    def streamed(output: Margin, params: Any, examples: Any, words: jax.Array) -> jax.Array:
        return of_gradients(output, params, examples, projector=projector, state=words)

    def naive(output: Margin, params: Any, examples: Any, words: jax.Array) -> jax.Array:
        return projector.apply(words, jax.vmap(jax.grad(output), (None, 0))(params, examples))

    return {"streamed": streamed, "naive": naive}[form], (Margin(model.apply, state), params, examples, words)


def _jitted(function: Callable[..., jax.Array], case: cases.Case, **static: Any) -> Callable:
    return jax.jit(lambda x, key: function(x, key, case.dim, **static))


def _unit_type(dtype: Any) -> str:
    """Return the type in which the matrix unit multiplies rows of a type: a GPU's gets float32 as bfloat16 parts."""
    return "bfloat16" if jax.default_backend() != "cpu" else str(jnp.dtype(dtype))


def _shape(case: cases.Case) -> str:
    return f"{case.n} x {case.p:,} to {case.dim}"


def _repeat(side: Side, times: int) -> None:
    for number in range(times):
        made = side.work()
        if number + 1 == times or jax.default_backend() == "cpu":  # where calls must not overlap
            side.wait(made)


def _seconds(side: Side) -> float:
    begun = time.perf_counter()
    _repeat(side, 1)
    return time.perf_counter() - begun


if __name__ == "__main__":
    harness.main(run, "projection")
