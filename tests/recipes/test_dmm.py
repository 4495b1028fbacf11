"""The unlearning recipe on a few real images: run, interrupted, resumed, refused; and what it chooses and counts."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jattrib import recipes
from jattrib.core.errors import InvalidInputError
from jattrib.metrics.bootstrap import Interval
from jattrib.recipes import classifier, dmm_measures, dmm_methods, dmm_report, dmm_stages, dmm_tuning, rundir

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "unlearning" / "dmm_fashion_mnist.toml"
SMALL = [
    "data.train_size=300", "data.test_size=40", "model.widths=[8]", "training.epochs=3", "training.batch_size=50",
    "evaluation.queries=20", "width=20", "strategy=vmap", "method.models=20", "method.oracles=20",
    "method.retrained=20", "method.tuning_oracles=8", "method.tuned_models=20", "method.mean_models=2",
    "method.paired_models=2", "method.subset_models=20",
    "method.forget=20", "method.mislabelled=0.0667",
    "method.retained=20", "method.compute=0.6", "method.trak_models=2", "method.dim=32", "method.influence_models=1",
    "method.iterations=2", "method.replays=1", "method.thresholds=[0.0, 1.0]",
]  # fmt: skip
FEW = ['method.baselines=["nothing", "first_order"]', 'method.attributions=["difference", "paired"]']


def run(directory, more=()):
    recipe, config = recipes.load(CONFIG, [*SMALL, *more])
    with rundir.opened(directory, config) as opened:
        recipe.run(config, opened)
    return json.loads((directory / "summary.json").read_text())


def figures(summary):
    apart = ("config", "versions", "device")
    return {name: value for name, value in summary.items() if name not in apart and not name.startswith("seconds")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dmm") / "run"
    return directory, run(directory, FEW)


@pytest.mark.slow
def test_the_whole_job_runs_and_reports(finished):
    directory, summary = finished
    for name in dmm_stages.SETS:
        for method in ("nothing", "first_order", "dmm_difference", "direct_paired", "floor"):
            value, low, high = (summary[f"klom_p95_{name}_{method}{end}"] for end in ("", "_low", "_high"))
            assert low < value < high
            parts = [summary[f"klom_p95_{name}_{method}_{part}"] for part in dmm_stages.PARTS]
            assert value == pytest.approx(np.mean(parts))
        assert summary[f"compute_{name}_nothing"] == 0
        assert summary[f"compute_{name}_direct_paired"] == 2
        assert 0 < summary[f"compute_{name}_dmm_difference"] <= 0.6
        assert summary[f"prepared_trainings_{name}_dmm_difference"] == 10
        assert -1 <= summary[f"group_lds_{name}_difference"] <= 1
    assert summary["models_trained"] == 20 + 3 * 42 + 20 + 2
    assert 0 < summary["ridge_steps_oracle_matching"] < 3000
    assert summary["ridge_steps_descent_on_the_rest"] == summary["ridge_steps_ascent_and_descent"] == -1
    page = (directory / "report.html").read_text()
    assert f"{summary['klom_p95_random_dmm_difference']:.2f}" in page
    assert len(list(directory.glob("*.png"))) == 8
    assert not (directory / "resume" / "subsets").exists()
    kept = classifier.load(directory / "classifier")
    assert (kept.train.labels != recipes.build.load_data(kept.description.data)[0].labels).sum() == 20


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_figures(finished, tmp_path, monkeypatch):
    _, whole = finished
    tune, done = dmm_tuning._tune, []

    def interrupted(*arguments):
        done.append(arguments[1])
        if done == ["random", "random", "random"]:
            raise KeyboardInterrupt
        return tune(*arguments)

    monkeypatch.setattr(dmm_tuning, "_tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", FEW)
    assert not (tmp_path / "run" / "summary.json").exists()
    again = run(tmp_path / "run", FEW)
    assert done.count("random") == 5  # the two that were finished were kept
    assert figures(again) == figures(whole)


@pytest.mark.slow
def test_every_method_runs(tmp_path):
    summary = run(tmp_path / "run")
    for name in dmm_stages.SETS:
        for method in dmm_stages.BASELINES:
            assert np.isfinite(summary[f"klom_p95_{name}_{method}"])
            assert summary[f"compute_{name}_{method}"] <= 0.6 or method == "newton_step"  # one iteration is more, here
        for attribution in dmm_stages.ATTRIBUTIONS:
            assert np.isfinite(summary[f"group_lds_{name}_{attribution}"])
            assert f"klom_p95_{name}_dmm_{attribution}" in summary


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    _, config = recipes.load(CONFIG, SMALL)
    with rundir.opened(tmp_path_factory.mktemp("setup") / "run", config) as opened:
        return config, dmm_stages.prepare(config, opened)


def test_forget_sets_are_what_they_are_called(setup):
    config, made = setup
    random, coherent, wrong = (made.problems[name].forget for name in dmm_stages.SETS)
    truth = recipes.build.load_data(config.data)[0].labels
    labels = made.task.train.labels
    assert len(random) == len(coherent) == len(wrong) == 20
    np.testing.assert_array_equal(np.flatnonzero(labels != truth), wrong)
    assert len(np.unique(labels[coherent])) == 1
    assert len(np.unique(labels[random])) > 3
    every = np.concatenate([random, coherent, wrong, made.retained])
    assert len(np.unique(every)) == 80
    flat = made.task.train.inputs.reshape(300, -1)
    alike = np.linalg.norm(flat[coherent] - flat[coherent].mean(0), axis=1).mean()
    peers = flat[labels == labels[coherent[0]]]
    assert alike < np.linalg.norm(peers - peers.mean(0), axis=1).mean()


def test_every_method_has_as_many_trials_within_its_compute(setup):
    config, made = setup
    budget = config.method.compute * dmm_methods.retraining(config, made)
    every = dmm_methods.baseline_unlearners(config, made, "random", 0.1)
    every["dmm"] = dmm_methods.matching(config, made, "random", "", np.zeros((320, 10)))
    for name, method in every.items():
        assert len(method.trials) == (1 if name == "nothing" else dmm_methods.TRIALS)
        for trial in method.trials if name != "newton_step" else ():  # one iteration is more, here
            assert method.passes(trial) <= budget


def test_passes_are_counted(setup):
    config, made = setup
    every = dmm_methods.baseline_unlearners(config, made, "random", 0.1)
    budget = 0.6 * 3 * 300
    assert every["retain_descent"].passes({"part": 0.2}) == int(budget / 56) * 56
    assert every["gradient_ascent"].passes({"epochs": 5}) == 5 * 20
    assert every["scrub"].passes({"part": 0.4}) == 132 / 3 + int((budget - 44) / 132) * 132
    matching = dmm_methods.matching(config, made, "random", "", np.zeros((320, 10)))
    assert matching.passes({"ratio": 10}) == 220 / 3 + 1 * 300
    assert every["short"].passes({}) == 300


def reported(baseline, matched):
    """What is reported of a baseline and a matching with these figures, where retraining has 0.7."""

    def measured(value):
        parts = dict.fromkeys(dmm_stages.PARTS, value)
        return dmm_measures.Measured(Interval(value, value - 0.1, value + 0.1), parts, 0.1, 0.5)

    methods = {"first_order": measured(baseline), "dmm_paired": measured(matched)}
    one = Interval(0.5, 0.4, 0.6)
    measures = dmm_measures.Measures(methods, measured(0.7), {"paired": one}, one, 0.6)
    left = {key: dmm_tuning.Unlearned(key, np.zeros((2, 3)), 0.1, values=(1.0,)) for key in methods}
    results = dmm_tuning.Results(np.zeros((2, 3)), np.zeros((2, 3)), {}, {}, left)
    setup = SimpleNamespace(task=SimpleNamespace(members=SimpleNamespace(strategy="vmap")))
    _, config = recipes.load(CONFIG, SMALL)
    every = [dict.fromkeys(dmm_stages.SETS, each) for each in (results, measures)]
    found = dmm_report.Everything(config, setup, *every, {})
    return dmm_report.figures(found), dmm_report._ratio_figure(found, "random").value


def test_the_ratio_of_distances_from_the_floor_is_left_out_where_there_is_none(shapes_unchecked):
    """It is that of 1.5 − 0.7 and 0.9 − 0.7; at the floor, or below, it would be infinite or negative."""
    figures, shown = reported(1.5, 0.9)
    assert figures["excess_ratio_random"] == pytest.approx(4)
    assert shown == pytest.approx(4)
    for matched in (0.7, 0.69):
        figures, shown = reported(1.5, matched)
        assert "excess_ratio_random" not in figures
        assert figures["klom_p95_random_dmm_paired"] == matched
        assert shown == "none: Datamodel Matching is at the floor"
    figures, shown = reported(0.7, 0.9)
    assert "excess_ratio_random" not in figures
    assert shown == "none: the best baseline is at the floor"


def test_choices_score_the_average_of_parts():
    random = np.random.default_rng(0)
    oracles = random.standard_normal((20, 60))
    parts = {"a": np.arange(30), "b": np.arange(30, 60)}
    near, far = random.standard_normal((10, 60)), random.standard_normal((10, 60))
    far[:, :30] += 100
    assert dmm_tuning.score(near, oracles, parts) < 2
    other = dmm_tuning.score(near, oracles, {"b": parts["b"]})
    assert dmm_tuning.score(far, oracles, {"a": parts["a"]}) == pytest.approx(np.log(1e5))
    far[:, 0] = -1e6  # clipped in all models: as far as can be, not an error
    assert dmm_tuning.gaussian(far, oracles)[0] == pytest.approx(np.log(1e5))
    assert dmm_tuning.score(far[:, :30], oracles[:, :30], {"a": parts["a"]}) > other


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.paired_models=30", "method.paired_models = 30 of 20 models"),
        ("method.oracles=10", "method.oracles = 10.*\n.*for KLoM's 20 bins"),
        ("method.mean_models=15", "method.tuning_oracles \\+ method.mean_models = 23"),
        ("method.trak_models=30", "method.trak_models = 30"),
        ('method.baselines=["scrubb"]', "method.baselines\\[0\\] = 'scrubb'\n.*scrub_rewind"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(override, message):
    _, config = recipes.load(CONFIG, [*SMALL, override])
    with pytest.raises(InvalidInputError, match=message):
        dmm_stages.check(config)
