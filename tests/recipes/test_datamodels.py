"""The datamodels recipe on a few real images: run, interrupted, resumed, refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jattrib import recipes
from jattrib.core.errors import InvalidInputError
from jattrib.recipes import datamodels_stages, rundir

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "attribution" / "datamodels_fashion_mnist.toml"
SMALL = [
    "data.train_size=200", "data.test_size=40", "model.widths=[8]", "training.epochs=4", "training.batch_size=50",
    "method.models=[40]", "method.checkpoints_of=[3]", "method.checkpoints=3", "method.dim=32",
    "method.path_count=5", "method.dampings=[0.1, 1.0]", "evaluation.queries=10", "evaluation.subsets=12", "width=12",
    "strategy=vmap",
]  # fmt: skip
TWICE = ["method.models=[24, 60]", "method.checkpoints_of=[2, 3]"]
METHODS = ("lasso", "ridge", "difference", "trak", "guided")


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
    directory = tmp_path_factory.mktemp("datamodels") / "run"
    return directory, run(directory)


@pytest.mark.slow
def test_the_whole_job_runs_and_reports(finished):
    directory, summary = finished
    for name in METHODS:
        value, low, high = (summary[f"lds_{name}_40_models{end}"] for end in ("", "_low", "_high"))
        assert low < value < high
    assert summary["lds_expected"] == summary["lds_lasso_40_models"]
    assert summary["lds_expected_of"] == "lasso_40_models"
    for name in ("ridge", "trak"):  # of which no query's predictions are constant
        gain = summary["lds_guided_40_models"] - summary[f"lds_{name}_40_models"]
        assert summary[f"lds_gain_over_{name}_40_models"] == pytest.approx(gain, abs=1e-9)
    assert summary["lds_guided_40_models"] > 3 * abs(summary["lds_random"])
    assert 0 < summary["guided_prior_share_40_models"] < 1
    assert summary["models_trained"] == 40 + 3 + 12 * 2
    assert {path.stem for path in directory.glob("*.png")} == {
        "lds_by_models", "lds_of_regressions", "predicted_actual",
    }  # fmt: skip
    page = (directory / "report.html").read_text()
    assert f"{summary['lds_guided_40_models']:.3f}" in page
    assert not (directory / "resume" / "features").exists()


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_scores_and_ends_with_the_same_figures(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", TWICE)
    scored, score = [], datamodels_stages.score

    def interrupted(config, task, features, models):
        scored.append(len(models.masks))
        if scored == [24, 60]:
            raise KeyboardInterrupt
        return score(config, task, features, models)

    monkeypatch.setattr(datamodels_stages, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", TWICE)
    assert not (tmp_path / "run" / "summary.json").exists()
    again = run(tmp_path / "run", TWICE)
    assert scored == [24, 60, 60]  # the first numbers' were kept
    assert figures(again) == figures(whole)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.models=[300, 100]", "method.checkpoints_of=[10, 10]"],
        ["method.models=[100]", "method.checkpoints_of=[10, 20]"],
        ["method.models=[100]", "method.checkpoints_of=[60]"],
        ["method.models=[12]", "method.checkpoints_of=[11]"],
    ],
)
def test_numbers_that_do_not_fit_are_refused(overrides):
    _, config = recipes.load(CONFIG, overrides)
    with pytest.raises(InvalidInputError, match="ascending numbers of models"):
        datamodels_stages.check(config)


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 1), (0.95, 10)])
def test_one_model_to_choose_on_or_to_fit_is_refused(fraction, count):
    """Correlations over models, by which the threshold is chosen, take two."""
    models = ["method.models=[10, 30]", "method.checkpoints_of=[3, 5]", f"method.held_out_fraction={fraction}"]
    _, config = recipes.load(CONFIG, models)
    with pytest.raises(InvalidInputError, match=rf"{fraction} of 10 models, which is {count}\n.*two models or more"):
        datamodels_stages.check(config)
    datamodels_stages.check(recipes.load(CONFIG, [*models, "method.held_out_fraction=0.2"])[1])


def test_the_combination_beats_both_where_each_knows_half():
    """A prior that knows some sources' scores and models that tell of the others: ridge with it is above either."""
    from jattrib.attribution import datamodels
    from jattrib.data import masks as subset_masks
    from jattrib.metrics import lds

    rng = np.random.default_rng(0)
    truth = rng.normal(size=(100, 12))
    prior = np.where(np.arange(100)[:, None] < 50, truth, 0.0)
    masks = subset_masks.subsets(jax.random.key(0), 100, alpha=0.5, count=90)
    outputs = masks @ truth + rng.normal(size=(90, 12))
    fresh = subset_masks.subsets(jax.random.key(1), 100, alpha=0.5, count=60)
    actual = fresh @ truth
    alone = datamodels.estimate(masks, outputs, regression="ridge").scores
    both = datamodels.estimate(masks, outputs, regression="ridge", prior=prior).scores
    predicted = [lds.predict(each, fresh) for each in (both, alone, prior)]
    for other in predicted[1:]:
        assert lds.difference(predicted[0], other, actual, key=jax.random.key(2), resamples=200).low > 0
