# pyright: reportMissingImports=false
"""The cost of Datamodel Matching: models a second of `unlearning.dmm.match`, beside a PyTorch loop of the same updates.

Both sides fine-tune the same 100 classifiers (784-64-10) of the 5,000 embedded images on the same fine-tuning set
towards the same targets, in the same orders of batches and at the same rates: the weights that they end with agree, and
the note says how well.  Batches are those of the recipe, and the larger ones of the paper; models have an order each,
or ten of them share one.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import harness
from jattrib.core import mesh as meshes
from jattrib.data import vision
from jattrib.models.mlp import mlp
from jattrib.recipes.dmm_methods import BATCH
from jattrib.unlearning import dmm, finetune
from jattrib.unlearning.finetune import DEFAULT, Models, Problem, Settings

SIZES, MODELS, FORGET = (784, 64, 10), 100, 100
SHARING = (1, 10)
"""Models of an order."""

BATCHES = {"recipe": DEFAULT._replace(batch_size=BATCH), "paper": DEFAULT}
"""Settings, by whose batches they have."""


def run() -> list[harness.Row]:
    """Measure fine-tuning."""
    harness.require("torch")
    return [row for whose in BATCHES for sharing in SHARING for row in rows(whose, sharing)]


def rows(whose: str, sharing: int) -> list[harness.Row]:
    """Return the rates of both sides at those batches, where so many models share an order."""
    settings = BATCHES[whose]
    problem, models, keys = task()
    keys = keys[::sharing]
    chosen = dmm.rows(problem, jax.random.key(2))
    own = finetune.logits(problem.apply, models, problem.data[0][chosen.examples])
    shift = np.random.default_rng(0).standard_normal(own.shape[1:])
    targets = dmm.direct(own, shift)
    threads = sorted({1, meshes.cores()})
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: dmm.match(problem, models, chosen, targets, keys, settings=settings).params
    }
    each = jnp.repeat(keys, sharing)
    loops = {count: torch_loop(problem, models, chosen, targets, each, settings, count) for count in threads}
    timings = harness.compare(sides | {str(count): loop for count, loop in loops.items()}, calls=5)
    error = difference(models, sides["ours"](), loops[threads[0]]())
    note = (
        f"MLP {'-'.join(map(str, SIZES))}, {MODELS} models at once, {len(keys)} orders, {settings.epochs} epochs of "
        f"{len(chosen.draws)}, the {whose}'s batches; weights agree to {error:.1e} of their move"
    )
    name = f"batch {settings.batch_size}, " + ("an order each" if sharing == 1 else f"an order for {sharing}")
    return [
        harness.rates(
            f"Datamodel Matching, {name}", timings["ours"], timings[str(count)], work=MODELS, unit="models/s",
            other_name=f"PyTorch loop, {count} thread{'s' if count > 1 else ''}", packages=("torch",), note=note,
        )
        for count in threads
    ]  # fmt: skip


def task() -> tuple[Problem, Models, jax.Array]:
    """Return the problem of forgetting the first images, models, and the keys of their orders."""
    train, _ = vision.fashion_mnist_excerpt()
    model = mlp(SIZES[0], SIZES[1:-1], SIZES[-1])
    params, state = jax.vmap(model.init)(jax.random.split(jax.random.key(0), MODELS))
    flat = np.ascontiguousarray(train.inputs.reshape(len(train.labels), -1))
    problem = finetune.problem(model.apply, (flat, train.labels), np.arange(FORGET))
    return problem, Models(params, state), jax.random.split(jax.random.key(1), MODELS)


def torch_loop(
    problem: Problem,
    models: Models,
    chosen: dmm.Rows,
    targets: np.ndarray,
    keys: jax.Array,
    settings: Settings,
    threads: int,
) -> Callable[[], Any]:
    """Return the function that fine-tunes the same models with PyTorch."""
    from bench.peers import traker, unlearning

    steps = finetune.shuffled(keys, len(chosen.draws), settings)
    order = np.asarray(steps.order.indices).astype(np.int64), np.asarray(steps.order.valid)
    inputs = problem.data[0][chosen.examples[chosen.draws]]
    goals = targets[:, chosen.draws]
    ready = []
    for number in range(MODELS):
        model = traker.classifier(SIZES)
        model.load_state_dict(traker.state_from(jax.tree.map(lambda leaf, at=number: leaf[at], models.params)))
        ready.append(model)

    def work() -> Any:
        return unlearning.match(copy.deepcopy(ready), inputs, goals, order, np.asarray(steps.rates[0]), threads=threads)

    return work


def difference(models: Models, ours: Any, theirs: list[Any]) -> float:
    """Return how far the weights of both sides are apart, as a part of how far they have moved."""
    from bench.peers import traker

    apart = moved = 0.0
    for number, state in enumerate(theirs):
        before, after = (
            traker.state_from(jax.tree.map(lambda leaf, at=number: np.asarray(leaf[at]), each))
            for each in (models.params, ours)
        )
        apart += sum(float(((state[name] - after[name]) ** 2).sum()) for name in after)
        moved += sum(float(((before[name] - after[name]) ** 2).sum()) for name in after)
    return (apart / moved) ** 0.5


if __name__ == "__main__":
    harness.main(run, "unlearning")
