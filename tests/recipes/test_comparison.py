"""The comparison recipe, run through the command line on real images; and its parts, by hand."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats

from jattrib.core.errors import InvalidInputError
from jattrib.data.vision import Dataset
from jattrib.recipes import cli, comparison_methods, comparison_report, comparison_stages
from jattrib.recipes import config as configs
from jattrib.recipes.comparison_base import Attributor, Config
from jattrib.recipes.comparison_stages import Prices, Truths
from jattrib.recipes.experiment import FixedTruth, Task, Truth

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "attribution" / "comparison_fashion_mnist.toml"
SMALL = [
    "data.train_size=300", "data.test_size=60", "model.widths=[8]", "training.epochs=4", "training.batch_size=50",
    "method.checkpoints=4", "method.counts=[1,4]", "method.dim=64", "method.chunk=64", "method.dampings=[0.1,1]",
    'method.brittle=["trak_4","random"]', "evaluation.queries=12", "evaluation.subsets=8",
    "evaluation.held_out_subsets=4", "evaluation.fixed_subsets=7", "evaluation.fixed_held_out_subsets=3",
    "evaluation.fixed_fraction=0.05", "evaluation.counterfactual_queries=3", "evaluation.counterfactual_fraction=0.02",
    "method.datamodels=20", "method.lissa_steps=20", "method.arnoldi_steps=20", "method.logra_rank=8",
    "method.curvature_examples=100", "width=4", "strategy=map",
]  # fmt: skip


def load(*overrides):
    return configs.convert(configs.read(CONFIG, overrides), Config)


def run(directory):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(CONFIG), "--out", str(directory), *SMALL])
    assert stopped.value.code in (None, 0)
    return json.loads((directory / "summary.json").read_text()), (directory / "report.html").read_text()


def check(summary, page, methods):
    """Hold every method's figures against one another, and look for them in the report."""
    for method in methods:
        for protocol in ("lds_expected", "lds_fixed_5pct"):
            value = summary[f"{protocol}_{method.name}"]
            assert summary[f"{protocol}_{method.name}_low"] < value < summary[f"{protocol}_{method.name}_high"]
        trained = 0.5 * method.subset_models + method.runs
        assert method.replays or summary[f"cost_trainings_{method.name}"] == trained
        assert summary[f"cost_seconds_{method.name}"] > 0
        assert method.title in page
        assert f"{summary[f'lds_expected_{method.name}']:.3f}".replace("-", "\N{MINUS SIGN}") in page


@pytest.mark.slow
def test_methods_are_measured_in_both_protocols_with_their_cost(tmp_path, monkeypatch):
    every = comparison_methods.attributors(load(*SMALL))
    some = tuple(method for method in every if method.name in ("random", "similarity", "trak_4"))
    monkeypatch.setattr(comparison_methods, "attributors", lambda config: some)
    summary, page = run(tmp_path / "run")
    check(summary, page, some)
    assert summary["choice_expected_trak_4"] in (0.1, 1)
    assert "choice_expected_similarity" not in summary
    assert 0 <= summary["flipped_1pct_random"] <= summary["flipped_2pct_random"] <= 1
    assert 0 < summary["lds_expected_ceiling"] <= 1
    assert {path.stem for path in (tmp_path / "run").glob("*.png")} == {
        "lds_expected_by_cost", "lds_fixed_by_cost", "brittleness"
    }  # fmt: skip
    assert not (tmp_path / "run" / "resume" / "features").exists()


@pytest.mark.slow
def test_every_method_is_measured_and_most_beat_chance(tmp_path):
    methods = comparison_methods.attributors(load(*SMALL))
    summary, page = run(tmp_path / "run")
    check(summary, page, methods)
    # The signs are right: each method that uses gradients of the one run ranks what the run does without 5%.
    for name in ("tracin", "ekfac", "datainf", "logra", "arnoldi", "cg", "lissa", "magic", "gradient_dot"):
        assert summary[f"lds_fixed_5pct_{name}"] > 0.05
    assert summary["lds_fixed_5pct_magic"] == max(summary[f"lds_fixed_5pct_{method.name}"] for method in methods)


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


def test_scores_that_are_all_zero_are_not_chosen_and_are_refused_by_name():
    """As those of a difference of means are where a threshold leaves nothing."""
    task = Task(*[None] * 6, keys={"statistics": jax.random.key(0)}, identity={})
    method, some, none = Attributor("lasso", "LASSO", lambda _: {}), np.zeros((30, 4)), np.zeros((30, 4))
    held_out = truths().expected_held_out
    some[:15] = 1e-3 * np.linalg.lstsq(held_out.masks[:, :15] - 0.5, held_out.outputs.mean(axis=1))[0]
    measured, _ = comparison_stages.measure(task, truths(), method, {4.0: none, 0.0: some})
    assert measured.expected_choice == 0.0
    with pytest.raises(InvalidInputError, match=r"^LASSO: predictions or outputs that are the same for all models"):
        comparison_stages.measure(task, truths(), method, {0.0: none})


def test_a_query_of_which_nothing_is_predicted_counts_as_zero():
    """Or a threshold that leaves one query's scores, the best, would be chosen for all queries."""
    truth = truths().expected_held_out
    outputs = truth.outputs.mean(axis=1)
    some = np.linalg.lstsq(truth.masks - 0.5, outputs)[0]  # predicts them all
    half = np.where(np.arange(4) < 2, some, 0)
    found = comparison_stages.by_choice({0.0: some, 2.0: half, 4.0: 0 * some}, truth.masks, outputs)
    assert found == pytest.approx({0.0: 1.0, 2.0: 0.5, 4.0: -1.0})


def test_cost_counts_models_by_their_part_and_replays_by_their_time():
    task = Task(*[None] * 6, keys={"statistics": jax.random.key(0)}, identity={})
    method = Attributor("a", "A", lambda _: {}, subset_models=10, runs=1, features=10)
    scores = {0.0: np.random.default_rng(2).standard_normal((30, 4))}
    found, _ = comparison_stages.measure(task, truths(), method, scores)
    price = Prices(subset_model=2.0, run=4.0, features=0.5, alpha=0.5)
    charged = comparison_stages.charge(found, price, 3.0)
    assert charged.trainings == pytest.approx(10 * 0.5 + 1)
    assert charged.seconds == pytest.approx(10 * 2 + 4 + 10 * 0.5 + 3)
    replay = comparison_stages.charge(
        found._replace(method=Attributor("b", "B", lambda _: {}, replays=True)), price, 3.0
    )
    assert replay.trainings == pytest.approx(3 / 4)
    assert replay.seconds == pytest.approx(3)


def test_names_of_parts():
    assert [comparison_report.percent(part) for part in (0.01, 0.002, 0.2)] == ["1pct", "0_2pct", "20pct"]


@pytest.mark.parametrize(
    ("most", "sizes"), [(0.001, {0.001: 1}), (0.015, {0.002: 2, 0.005: 5, 0.01: 10, 0.015: 15}), (0.02, {0.02: 20})]
)
def test_flips_are_counted_up_to_the_most_that_is_removed(most, sizes):
    """However little that is: of no size there is no last one."""
    config = load(f"evaluation.counterfactual_fraction={most}")
    task = Task(Dataset(np.zeros((1000, 1)), np.zeros(1000, int)), *[None] * 7)
    flips = comparison_stages.Flips((0,), round(1000 * most), {}, 1)
    counted = comparison_report._sizes(comparison_report.Results(config, task, (), None, flips))
    assert list(counted.items())[-len(sizes) :] == list(sizes.items())


def test_refuses_what_it_has_not_got():
    config = load("method.counts=[1,60]")
    with pytest.raises(InvalidInputError, match=r"method\.counts up to 60\n.*at most method\.checkpoints = 50"):
        comparison_stages.check(config, comparison_methods.attributors(config))
    config = load('method.brittle=["majic"]')
    with pytest.raises(InvalidInputError, match=r"method\.brittle with 'majic'\n.*some of random, similarity"):
        comparison_stages.check(config, comparison_methods.attributors(config))
