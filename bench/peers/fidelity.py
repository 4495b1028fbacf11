# pyright: reportMissingImports=false
"""Are our attributions as true as those of `traker` 0.3.2?  The LDS of both on the same checkpoints and the same masks.

    python -m bench.peers.fidelity --out bench/results/fidelity_traker.jsonl

An ensemble of this package trains the checkpoints, on random halves of the 5,000 embedded images, and the models that
the LDS is measured on; the package gets the checkpoints' weights as PyTorch states.  Ours projects with the sketch, the
package with its own normal matrix, both to k = 1,024.  They are compared twice: as the package does it (no ridge, its
rescaling, the product of means), and with the ridge that both are the better for, a tenth of the mean eigenvalue.
Besides both LDS with their intervals each row has the interval of the difference, which is sharper: models and queries
are the same.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bench import harness
from bench.peers import traker as package
from jattrib.attribution import trak
from jattrib.core import stream
from jattrib.data import masks as subset_masks
from jattrib.data import vision
from jattrib.metrics import lds
from jattrib.models.mlp import mlp
from jattrib.models.model import Apply
from jattrib.models.outputs import Margin, margin
from jattrib.projection import sketch
from jattrib.recipes import build, config
from jattrib.train import ensemble
from jattrib.train.loop import Plan, Trained

SIZES = (784, 64, 10)
MODEL = mlp(SIZES[0], SIZES[1:-1], SIZES[-1])
DIM = 1024
CHECKPOINTS = 10
COUNTS = (1, 5, 10)
SUBSETS, SEEDS, QUERIES = 100, 2, 200
RIDGE = 0.1
BATCH = 250
ROOT = jax.random.key(0)


class Problem(NamedTuple):
    """What both sides are given, and what they are measured on."""

    train: vision.Dataset
    queries: vision.Dataset
    checkpoints: Trained
    masks: Bool[np.ndarray, "m n"]
    outputs: Float[np.ndarray, "m s q"]


def run() -> list[Mapping[str, Any]]:
    """Train, attribute with both, and compare."""
    problem = prepare()
    ours, theirs = our_scores(problem), package_scores(problem)
    return [row(problem, case, count, ours[case, count], theirs[case, count]) for case, count in ours]


def prepare() -> Problem:
    """Train the checkpoints and the models that the LDS is measured on."""
    train, test = vision.fashion_mnist_excerpt()
    queries = vision.Dataset(test.inputs[:QUERIES], test.labels[:QUERIES])
    n, training = len(train.labels), config.Training()
    plan = Plan(training.epochs, training.batch_size, n // 2)
    members = ensemble.Ensemble(MODEL, build.optimizer(training, plan.steps), plan)
    keys = jax.random.split(ROOT, 4)
    halves = subset_masks.subsets(keys[0], n, alpha=0.5, count=CHECKPOINTS)
    members_keys = ensemble.member_keys(keys[1], np.arange(CHECKPOINTS), np.zeros(CHECKPOINTS, int))
    members = members._replace(strategy=next(iter(ensemble.choose(members, tuple(train), halves, members_keys))))
    checkpoints = ensemble.train(members, tuple(train), halves, members_keys)
    masks = subset_masks.subsets(keys[2], n, alpha=0.5, count=SUBSETS)
    numbers, seeds = np.repeat(np.arange(SUBSETS), SEEDS), np.tile(np.arange(SEEDS), SUBSETS)
    outputs = ensemble.collect(
        jax.tree_util.Partial(_margins, MODEL.apply, *(jnp.asarray(each) for each in queries)), members, tuple(train),
        masks[numbers], ensemble.member_keys(keys[3], numbers, seeds),
    )  # fmt: skip
    return Problem(train, queries, checkpoints, masks, np.asarray(outputs).reshape(SUBSETS, SEEDS, -1))


def our_scores(problem: Problem) -> dict[tuple[str, int], Float[np.ndarray, "n q"]]:
    """Return our scores by case and number of checkpoints."""
    projector, train, queries = sketch.projector(DIM), [], []
    for number in range(CHECKPOINTS):
        params, state = _checkpoint(problem, number)
        output, key = Margin(MODEL.apply, state), jax.random.fold_in(ROOT, number)
        for found, data in ((train, problem.train), (queries, problem.queries)):
            source = stream.InMemory(tuple(data))
            found.append(trak.features(output, params, source, projector=projector, key=key, progress=False))
    targets = [each.gradients for each in queries]
    scores = {}
    for count in COUNTS:
        part = train[:count], targets[:count]
        as_package = trak.scores(*part, rescale=True, combination="product_of_means")
        with_ridge = trak.scores(*part, relative_damping=RIDGE)
        scores |= {("as the package", count): np.asarray(as_package), ("with a ridge", count): np.asarray(with_ridge)}
    return scores


def package_scores(problem: Problem) -> dict[tuple[str, int], Float[np.ndarray, "n q"]]:
    """Return the package's scores by case and number of checkpoints."""
    states = {number: package.state_from(_checkpoint(problem, number)[0]) for number in range(CHECKPOINTS)}
    train, queries = (list(package.batches(data, BATCH)) for data in (problem.train, problem.queries))
    scores, units = {}, []
    with tempfile.TemporaryDirectory() as folder:
        found = package.make(
            package.classifier(SIZES), Path(folder), examples=len(problem.train.labels), dim=DIM, whole_matrix=True
        )
        for number, state in states.items():
            package.featurize(found, state, number, train)
            units.append(np.square(package.stored(found, number, "grads"), dtype=np.float64).sum() / DIM)
            _check_same_model(problem, number, found.model, queries)
        for case, damping in (("as the package", 0.0), ("with a ridge", RIDGE * float(np.mean(units)))):
            package.scores(found, states, queries, name=case.replace(" ", "_"), damping=damping)
            for count in COUNTS:
                scores[case, count] = package.combined(found, range(count), case.replace(" ", "_"))
    return scores


def row(
    problem: Problem, case: str, count: int, ours: Float[np.ndarray, "n q"], theirs: Float[np.ndarray, "n q"]
) -> Mapping[str, Any]:
    """Return the results of one case."""
    key, actual = jax.random.fold_in(ROOT, 1000), problem.outputs.mean(axis=1)
    one, two = (lds.predict(scores, problem.masks) for scores in (ours, theirs))
    mine, others = (lds.lds(each, actual, key=key) for each in (one, two))
    gain = lds.difference(one, two, actual, key=key)
    ceiling = lds.noise_ceiling(problem.outputs).value
    common = harness.Row(
        case=f"LDS, {case}, {count} checkpoint{'s' if count > 1 else ''}", ours=mine.mean, other=others.mean,
        other_name="traker", ratio=mine.mean / others.mean, unit="LDS", device=harness.device(),
        versions=harness.versions(("torch", "traker")), ours_spread=(mine.low, mine.high),
        other_spread=(others.low, others.high),
        note=f"{SUBSETS} half-subsets of {SEEDS} seeds, {QUERIES} queries; spreads are 95% intervals",
    )  # fmt: skip
    difference = {"difference": gain.value, "difference_low": gain.low, "difference_high": gain.high}
    return common._asdict() | difference | {"ceiling": ceiling}


def _margins(apply: Apply, inputs: Array, labels: Array, trained: Trained) -> Float[Array, " q"]:
    logits, _ = apply(trained.params, trained.state, inputs, train=False)
    return jax.vmap(margin)(logits, labels)


def _checkpoint(problem: Problem, number: int) -> tuple[Any, Any]:
    return jax.tree.map(lambda leaf: leaf[number], (problem.checkpoints.params, problem.checkpoints.state))


def _check_same_model(problem: Problem, number: int, model: Any, queries: list[Any]) -> None:
    """Refuse to compare other models: the logits of both sides must agree to rounding."""
    params, state = _checkpoint(problem, number)
    ours, _ = MODEL.apply(params, state, jnp.asarray(problem.queries.inputs))
    theirs = np.concatenate([model(inputs).detach().numpy() for inputs, _ in queries])
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    harness.main(run, "fidelity")
