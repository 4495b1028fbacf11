"""The influence recipes, run through the command line on images and on a text; what a passage's shades say."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.attribution import influence as influences
from jattrib.core.stream import InMemory
from jattrib.models.outputs import Logits, Loss
from jattrib.recipes import cli, experiment, influence, report
from jattrib.recipes import influence_text_stages as stages
from jattrib.recipes.comparison_base import Attributor

CONFIGS = Path(__file__).parents[2] / "configs" / "attribution"
IMAGES = [
    "data.train_size=300", "data.test_size=60", "model.widths=[8]", "training.epochs=4", "training.batch_size=50",
    "method.dampings=[0.1,1]", "method.curvature_examples=100", "method.arnoldi_steps=20", "method.logra_rank=8",
    "evaluation.queries=12", "evaluation.subsets=8", "evaluation.held_out_subsets=4", "evaluation.fixed_subsets=7",
    "evaluation.fixed_held_out_subsets=3", "evaluation.fixed_fraction=0.05", "evaluation.counterfactual_queries=3",
    "width=4", "strategy=map",
]  # fmt: skip
TEXT = [
    "data.name=file", "data.length=16", "data.train_size=60", "model.width=8", "model.layers=1", "training.epochs=4",
    "training.batch_size=20", "training.learning_rate=0.03", "method.rank=4", "method.dampings=[0.1,1]",
    "method.fraction=0.1", "method.subsets=6", "method.held_out_subsets=3", "evaluation.queries=6",
    "evaluation.counterfactual_queries=3", "evaluation.counterfactual_fraction=0.1", "width=4",
]  # fmt: skip


def run(name, directory, overrides):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(CONFIGS / f"{name}.toml"), "--out", str(directory), *overrides])
    assert stopped.value.code in (None, 0)
    return json.loads((directory / "summary.json").read_text()), (directory / "report.html").read_text()


def check(summary, page, methods):
    for each in methods:
        for protocol in ("lds_expected", "lds_fixed_5pct"):
            value = summary[f"{protocol}_{each.name}"]
            assert summary[f"{protocol}_{each.name}_low"] < value < summary[f"{protocol}_{each.name}_high"]
        assert f"{summary[f'lds_expected_{each.name}']:.3f}".replace("-", "\N{MINUS SIGN}") in page
    assert "damping_expected_similarity" not in summary
    assert summary["agreement_with_cg_cg"] == pytest.approx(1)
    assert summary["images_left_out"] == 30
    assert summary["models_trained"] == 1 + (8 + 4) * 2 + 7 + 3 + 2 + 2 * 3 + 1


@pytest.mark.slow
def test_curvatures_are_measured_and_their_images_left_out(tmp_path, monkeypatch):
    """Two attributors whose compilation is short: similarity, and as candidates for a damping, both its signs."""

    def signs(context):
        scores = experiment.similarity(context.task)
        return {0.1: scores, 1.0: -scores}

    some = (Attributor("cg", "CG", signs, runs=1), influence.ATTRIBUTORS[-1])
    monkeypatch.setattr(influence, "ATTRIBUTORS", some)
    summary, page = run("influence_fashion_mnist", tmp_path / "run", IMAGES)
    check(summary, page, some)
    assert summary["damping_expected_cg"] == 0.1  # helpful images look like the query, so the sign is right
    assert summary["lds_expected_cg"] == summary["lds_expected_similarity"]
    assert summary["margin_drop_difference_nats"] > 0
    names = {"attributions", "counterfactual", "lds_by_damping", "predicted_actual"}
    assert {path.stem for path in (tmp_path / "run").glob("*.png")} == names


@pytest.mark.slow
def test_every_curvature_is_measured(tmp_path):
    summary, page = run("influence_fashion_mnist", tmp_path / "run", IMAGES)
    check(summary, page, influence.ATTRIBUTORS)
    for name in ("ekfac", "cg", "arnoldi", "datainf", "logra", "gradient_dot"):
        assert summary[f"lds_expected_{name}"] > 0.05
        assert summary[f"agreement_with_cg_{name}"] > 0.1


def passages(path):
    """Lines of two kinds of words, of which some come again and again."""
    random = np.random.default_rng(0)
    kinds = ("abcde", "vwxyz")
    lines = ["".join(random.choice(list(kinds[i % 2]), 14)) for i in range(80)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_passages_are_attributed_by_character_and_left_out(tmp_path):
    summary, page = run("influence_text", tmp_path / "run", [*TEXT, f"data.path={passages(tmp_path / 'text')}"])
    for name in ("ekfac", "logra", "gradient_dot", "similarity"):
        value = summary[f"lds_fixed_10pct_{name}"]
        assert summary[f"lds_fixed_10pct_{name}_low"] < value < summary[f"lds_fixed_10pct_{name}_high"]
    assert summary["damping_ekfac"] in (0.1, 1)
    assert summary["passages_left_out"] == 6
    assert summary["models_trained"] == 6 + 3 + 2 * 3 + 4
    assert summary["likelihood_drop_difference_millinats"] > 0
    assert summary["likelihood_drop_predicted_millinats"] > 0
    assert {path.stem for path in (tmp_path / "run").glob("*.png")} == {"counterfactual", "lds", "predicted_actual"}
    assert '<mark class="up"' in page
    assert (tmp_path / "run" / "resume" / "attributing" / "features" / "manifest.json").exists()


def bigrams(params, state, x, /, *, train=False):
    """The logits of each character after another, from a table."""
    return params["table"][x], state


def test_characters_parts_add_up_to_the_scores_of_the_passages_shown():
    """Of a model of bigrams; padding has no part, and the mean of a short passage is over what it has."""
    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)}
    inputs, labels = (rng.integers(0, 4, (9, 5)).astype(np.int32) for _ in range(2))
    labels[4, 2:] = -1
    directions = {"table": jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32)}
    loss, train = Loss(bigrams, {}), InMemory((inputs, labels))
    scores = influences.scores(loss, params, train, directions, progress=False)
    here = stages.Setting(loss, loss, Logits(bigrams, {}), params, train, train, directions, np.zeros(3))
    found = stages.by_token(here, stages.Measured("a", "A", None, None, scores, directions))
    for end, parts in ((found.helpful, found.of_helpful), (found.harmful, found.of_harmful)):
        assert parts.shape == (3, stages.NEIGHBOURS, 5)
        np.testing.assert_allclose(parts.sum(axis=2), end.scores, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(found.helpful.indices, np.argsort(-scores.T, axis=1)[:, : stages.NEIGHBOURS])
    short = np.argwhere(found.helpful.indices == 4)
    short = short if len(short) else np.argwhere(found.harmful.indices == 4)
    rows = found.of_helpful if (found.helpful.indices == 4).any() else found.of_harmful
    assert len(short)
    assert not rows[tuple(short[0])][2:].any()
    p = np.exp(params["table"][inputs[4, 0]])
    gradient = np.zeros((4, 4))
    gradient[inputs[4, 0]] = p / p.sum() - np.eye(4)[labels[4, 0]]
    query = short[0][0]
    wanted = -np.sum(gradient * np.asarray(directions["table"])[query]) / 2 / 9
    assert rows[tuple(short[0])][0] == pytest.approx(wanted, rel=1e-4)


def test_too_many_counterfactual_queries_are_refused(tmp_path, capsys):
    overrides = [*TEXT, f"data.path={passages(tmp_path / 'text')}", "evaluation.counterfactual_queries=7"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(CONFIGS / "influence_text.toml"), "--out", str(tmp_path / "run"), *overrides])
    assert stopped.value.code not in (None, 0)
    assert "evaluation.counterfactual_queries = 7" in " ".join(capsys.readouterr().err.split())


def test_shades_are_rounded_joined_and_escaped():
    plain = report.Quotation("n", "a<bcd")
    shaded = plain._replace(shades=(0.52, 0.5, -2.0, 0.01))
    assert "<blockquote>a&lt;bcd</blockquote>" in report._quotation(plain)
    wanted = '<mark class="up" style="--shade:50%">a&lt;</mark><mark class="down" style="--shade:100%">b</mark>cd'
    assert f"<blockquote>{wanted}</blockquote>" in report._quotation(shaded)
