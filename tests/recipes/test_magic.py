"""The MAGIC recipe on a few real images: figures that belong together, wrong labels that are wrong, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from jattrib import recipes
from jattrib.core.errors import InvalidInputError
from jattrib.metrics import lds, mislabelled
from jattrib.recipes import experiment, magic_report, magic_stages, rundir

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "attribution" / "magic_fashion_mnist.toml"
SMALL = [
    "data.train_size=200", "data.test_size=60", "model.widths=[8]", "training.epochs=3", "training.batch_size=50",
    "method.fractions=[0.05]", "method.subsets=8", "method.cost_queries=4", "descent.validation=30", "descent.steps=2",
    "descent.heldout.kind=fashion_mnist_excerpt", "descent.heldout.test_size=60", "descent.cutoffs=[0, 0.9, 100]",
    "descent.objective=margin", "descent.runs=2",
    "descent.training.epochs=6", "descent.training.batch_size=50", "evaluation.queries=6", "evaluation.subsets=4",
    "width=9", "strategy=map",
]  # fmt: skip


def load(more=()):
    return recipes.load(CONFIG, [*SMALL, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("magic") / "run"
    recipe, config = load()
    with rundir.opened(directory, config) as opened:
        recipe.run(config, opened)
        task = experiment.prepare(config, opened)
        again = magic_stages.descend(config, task, opened.path / "resume" / "descent")
    return directory, json.loads((directory / "summary.json").read_text()), task, again


@pytest.mark.slow
def test_the_whole_job_runs_and_reports(finished):
    directory, summary, _, _ = finished
    assert summary["lds_fixed_5pct_low"] <= summary["lds_fixed_5pct"] <= summary["lds_fixed_5pct_high"]
    assert summary["lds_fixed_5pct"] > summary["lds_fixed_similarity_5pct"]
    assert summary["models_trained"] == 8 + 1 + 4 * 2
    ratio = summary["metagradient_4_queries_ms"] / summary["training_ms"]
    assert summary["trainings_per_4_queries"] == pytest.approx(ratio)
    names = {"lds_by_fraction", "predicted_actual", "descent_weights", "descent_accuracy"}
    assert {path.stem for path in directory.glob("*.png")} == names
    page = (directory / "report.html").read_text()
    assert f"{summary['lds_fixed_5pct']:.3f}" in page
    assert f"{summary['descend_auc']:.3f}" in page


@pytest.mark.slow
def test_descent_is_what_it_says(finished):
    """Weights move by the rate, where none is cut off, and what is reported follows from the weights."""
    _, summary, task, descent = finished
    wrong, labels = magic_stages.flip(task, 0.2)
    np.testing.assert_array_equal(wrong, labels != task.train.labels)
    np.testing.assert_array_equal(wrong, descent.flipped)
    assert wrong.sum() == 40
    assert len(descent.accuracies) == len(descent.losses) == 3
    assert descent.losses[descent.step] == descent.losses.min()
    accuracies = np.array([summary[f"descend_accuracy{name}"] for name in ("_flipped", "", "_clean")])
    np.testing.assert_allclose(accuracies, [descent.accuracies[0], descent.accuracy, descent.clean])
    assert descent.cutoff in {0, 0.9}  # without any image nothing is learnt
    if descent.cutoff == 0:
        assert descent.accuracy == descent.accuracies[descent.step]
    np.testing.assert_allclose(accuracies * 30, np.round(accuracies * 30), atol=1e-4)  # of 30 images
    lost, regained = accuracies[2] - accuracies[0], accuracies[1] - accuracies[0]
    assert summary["descend_recovered_fraction"] * lost == pytest.approx(regained)
    auc = mislabelled.recall(-descent.weights, wrong, key=task.keys["statistics"]).auc.value
    assert summary["descend_auc"] == pytest.approx(auc)
    assert auc > 0.55  # six epochs on 200 images: little, and more than chance


@pytest.mark.parametrize(
    ("accuracy", "words"), [(0.7, "brings back 50% of the accuracy"), (0.5, "brings back none of the accuracy")]
)
def test_descent_that_does_harm_brings_nothing_back(accuracy, words):
    config = load()[1]
    found = lds.LDS(0.5, 0.4, 0.6, np.zeros(2), np.zeros(0, int))
    descent = magic_stages.Descended(
        flipped=np.zeros(2, bool), weights=np.ones(2), step=0, losses=np.zeros(1), accuracies=np.array([0.6]), cutoff=0,
        accuracy=accuracy, clean=0.8, recall=None,
    )  # fmt: skip
    fidelity = magic_stages.Fidelity((found,), (found,), (0.1,), found, None)
    results = magic_report.Results(config, None, None, (), fidelity, magic_stages.Cost(1.0, 5.0, 4), descent)
    assert f"Descent on the images' weights {words} that 20% wrong labels took." in magic_report._lead(results)


@pytest.mark.parametrize(("name", "value"), [("descent.validation", 60), ("method.cost_queries", 61)])
def test_more_than_there_are_test_images_is_refused(name, value):
    _, config = load([f"{name}={value}"])
    with pytest.raises(InvalidInputError, match=rf"{name} = {value}(?s:.*)with 60 test examples"):
        magic_stages.check(config)


def test_validation_images_that_do_not_fit_the_model_are_refused_before_it_is_trained(tmp_path):
    recipe, config = load(["data.kind=digits"])
    with (
        rundir.opened(tmp_path / "run", config) as opened,
        pytest.raises(InvalidInputError, match=r"images of \(28, 28, 1\) and 10 classes\n.*images of \(8, 8, 1\)"),
    ):
        recipe.run(config, opened)
    assert not list((tmp_path / "run" / "resume").glob("*/"))


def test_the_cost_is_not_measured_for_more_passages_than_there_are(tmp_path):
    """Their number is in the name of a figure."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Passage {number} of some length, in words." for number in range(60)))
    file = CONFIG.with_name("magic_text.toml")
    more = ["data.train_size=40", "evaluation.queries=2", "method.fractions=[0.1]", "method.smoothness_fraction=0.1"]
    more += ["evaluation.counterfactual_fraction=0.1"]
    recipe, config = recipes.load(file, ["data.name=file", f"data.path={text}", *more])
    with (
        rundir.opened(tmp_path / "run", config) as opened,
        pytest.raises(InvalidInputError, match=r"method\.cost_queries = 64\n.*at most \d, with \d test examples"),
    ):
        recipe.run(config, opened)
