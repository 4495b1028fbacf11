"""The comparison recipe, run through the command line on real images; and its parts, by hand."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats

from jattrib.attribution.trak import Features
from jattrib.core.errors import InvalidInputError
from jattrib.recipes import cli, comparison_methods, comparison_report, comparison_stages
from jattrib.recipes import config as configs
from jattrib.recipes.comparison_methods import Attributor, Config, Context
from jattrib.recipes.comparison_stages import Prices, Truths
from jattrib.recipes.experiment import FixedTruth, Task, Truth
from jattrib.recipes.trak_stages import Checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "attribution" / "comparison_fashion_mnist.toml"
SMALL = [
    "data.train_size=300", "data.test_size=60", "model.widths=[8]", "training.epochs=4", "training.batch_size=50",
    "method.checkpoints=4", "method.counts=[1,4]", "method.dim=64", "method.chunk=64", "method.dampings=[0.1,1]",
    'method.brittle=["trak_4","random"]', "evaluation.queries=12", "evaluation.subsets=8",
    "evaluation.held_out_subsets=4", "evaluation.fixed_subsets=7", "evaluation.fixed_held_out_subsets=3",
    "evaluation.fixed_fraction=0.05", "evaluation.counterfactual_queries=3", "evaluation.counterfactual_fraction=0.02",
    "width=4", "strategy=map",
]  # fmt: skip


def load(*overrides):
    return configs.convert(configs.read(CONFIG, overrides), Config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("comparison") / "run"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(CONFIG), "--out", str(directory), *SMALL])
    assert stopped.value.code in (None, 0)
    return directory


def test_every_attributor_is_measured_in_both_protocols_with_its_cost(finished):
    summary = json.loads((finished / "summary.json").read_text())
    methods = comparison_methods.attributors(load(*SMALL))
    for method in methods:
        for protocol in ("lds_expected", "lds_fixed_5pct"):
            value = summary[f"{protocol}_{method.name}"]
            assert summary[f"{protocol}_{method.name}_low"] < value < summary[f"{protocol}_{method.name}_high"]
        assert summary[f"cost_trainings_{method.name}"] > 0.5 * method.subset_models + method.runs
        assert summary[f"cost_seconds_{method.name}"] > 0
    assert summary["damping_expected_trak_4"] in (0.1, 1)
    assert "damping_expected_similarity" not in summary
    assert 0 <= summary["flipped_1pct_random"] <= summary["flipped_2pct_random"] <= 1
    assert 0 < summary["lds_expected_ceiling"] <= 1
    assert {path.stem for path in finished.glob("*.png")} == {
        "lds_expected_by_cost", "lds_fixed_by_cost", "brittleness"
    }  # fmt: skip
    page = (finished / "report.html").read_text()
    for method in methods:
        assert method.title in page
        assert f"{summary[f'lds_expected_{method.name}']:.3f}".replace("-", "\N{MINUS SIGN}") in page
    assert not (finished / "resume" / "features").exists()


def truths():
    random = np.random.default_rng(0)
    masks = [np.argsort(random.random((m, 30)), axis=1) < 15 for m in (12, 9, 11, 8)]
    outputs = [random.standard_normal((12, 2, 4)), random.standard_normal((9, 2, 4))]
    fixed = [random.standard_normal((11, 4)), random.standard_normal((8, 4))]
    whole = np.zeros(4)
    return Truths(
        Truth(masks[0], outputs[0]), Truth(masks[1], outputs[1]),
        FixedTruth(masks[2], fixed[0], whole), FixedTruth(masks[3], fixed[1], whole),
    )  # fmt: skip


def by_hand(scores, masks, outputs):
    predicted = masks.astype(float) @ scores
    return np.mean([scipy.stats.spearmanr(a, b).statistic for a, b in zip(predicted.T, outputs.T, strict=True)])


def test_choices_are_made_on_held_out_models_and_measured_on_others():
    found, random = truths(), np.random.default_rng(1)
    candidates = {damping: random.standard_normal((30, 4)) for damping in (0.1, 1.0, 10.0, 100.0)}
    task = Task(*[None] * 6, keys={"statistics": jax.random.key(0)}, identity={})
    measured, ranking = comparison_stages.measure(task, found, Attributor("a", "A", lambda _: candidates), candidates)
    expected, fixed = found.expected_held_out, found.fixed_held_out
    best = max(candidates, key=lambda d: by_hand(candidates[d], expected.masks, expected.outputs.mean(axis=1)))
    best_fixed = max(candidates, key=lambda d: by_hand(candidates[d], fixed.masks, fixed.outputs))
    assert (measured.expected_choice, measured.fixed_choice) == (best, best_fixed)
    assert ranking is candidates[best_fixed]
    truth = found.expected
    value = by_hand(candidates[best], truth.masks, truth.outputs.mean(axis=1))
    assert measured.expected.mean == pytest.approx(value)
    value = by_hand(candidates[best_fixed], found.fixed.masks, found.fixed.outputs)
    assert measured.fixed.mean == pytest.approx(value)
    alone, _ = comparison_stages.measure(
        task, found, Attributor("a", "A", lambda _: candidates), {0.0: candidates[1.0]}
    )
    assert (alone.expected_choice, alone.fixed_choice) == (None, None)


def test_cost_counts_models_by_their_part_and_everything_else_by_its_time():
    method = Attributor("a", "A", lambda _: {}, subset_models=10, runs=1, features=10)
    task = Task(*[None] * 6, keys={"statistics": jax.random.key(0)}, identity={})
    found, _ = comparison_stages.measure(
        task, truths(), method, {0.0: np.random.default_rng(2).standard_normal((30, 4))}
    )
    charged = comparison_stages.charge(found, Prices(subset_model=2.0, run=4.0, features=0.5, alpha=0.5), 3.0)
    assert charged.trainings == pytest.approx(10 * 0.5 + 1 + (10 * 0.5 + 3) / 4)
    assert charged.seconds == pytest.approx(10 * 2 + 4 + 10 * 0.5 + 3)


def test_gradient_attributors_by_hand():
    random = np.random.default_rng(3)
    phi, queries, weights = random.standard_normal((6, 5)), random.standard_normal((2, 5)), random.random(6)
    own = Checkpoint(Features(phi, weights), Features(queries, weights[:2]))
    context = Context(*[None] * 4, own=own)
    dot, cosine = (
        next(iter(each(context).values()))
        for each in (comparison_methods.gradient_dot, comparison_methods.gradient_cosine)
    )
    for i in range(6):
        for q in range(2):
            product = sum(phi[i, k] * queries[q, k] for k in range(5))
            assert dot[i, q] == pytest.approx(weights[i] * product)
            lengths = np.sqrt(sum(phi[i] ** 2) * sum(queries[q] ** 2))
            assert cosine[i, q] == pytest.approx(product / lengths)


def test_names_of_parts():
    assert [comparison_report.percent(part) for part in (0.01, 0.002, 0.2)] == ["1pct", "0_2pct", "20pct"]


def test_refuses_what_it_has_not_got():
    config = load("method.counts=[1,60]")
    with pytest.raises(InvalidInputError, match=r"method\.counts up to 60\n.*at most method\.checkpoints = 50"):
        comparison_stages.check(config, comparison_methods.attributors(config))
    config = load('method.brittle=["majic"]')
    with pytest.raises(InvalidInputError, match=r"method\.brittle with 'majic'\n.*some of random, similarity"):
        comparison_stages.check(config, comparison_methods.attributors(config))
