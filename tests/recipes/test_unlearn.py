"""`jattrib unlearn` on a small saved classifier: what it leaves, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from jattrib.core import params
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.recipes import build, classifier, cli, unlearn
from jattrib.recipes import config as configs
from jattrib.train import chunk, ensemble
from jattrib.train.loop import Plan

DESCRIPTION = classifier.Description(
    configs.FashionMnistExcerpt(train_size=200, test_size=50),
    configs.Mlp((8,)),
    configs.Training(epochs=8, batch_size=50, learning_rate=0.05),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    train, _ = build.load_data(DESCRIPTION.data)
    model = build.build_model(DESCRIPTION.model, train.inputs.shape[1:], 10)
    plan = Plan(8, 50, 200)
    members = ensemble.Ensemble(model, build.optimizer(DESCRIPTION.training, plan.steps), plan, width=1)
    keys = ensemble.member_keys(jax.random.key(0), np.zeros(1, int), np.zeros(1, int))
    trained = ensemble.train(members, tuple(train), np.ones((1, 200), bool), keys)
    one, state = jax.tree.map(lambda leaf: leaf[0], (trained.params, trained.state))
    labels = train.labels.copy()
    labels[7] = (labels[7] + 1) % 10
    classifier.save(path, DESCRIPTION, one, state, labels)
    return path


@pytest.fixture
def forget(tmp_path):
    path = tmp_path / "forget.txt"
    path.write_text("3\n5 8\n7\n")
    return path


def run(arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["unlearn", *map(str, arguments)])
    return ended.value.code


def test_a_classifier_comes_back_as_it_was_saved(saved):
    found = classifier.load(saved)
    train, test = build.load_data(DESCRIPTION.data)
    assert found.description == DESCRIPTION
    np.testing.assert_array_equal(np.flatnonzero(found.train.labels != train.labels), [7])
    np.testing.assert_array_equal(found.test.labels, test.labels)
    logits, _ = found.model.apply(found.params, found.state, found.train.inputs)
    assert (np.asarray(logits).argmax(axis=1) == found.train.labels).mean() > 0.5


@pytest.mark.slow
def test_matching_goes_where_the_subset_models_say(saved, forget, tmp_path, monkeypatch):
    """A threshold of nothing and many steps: the forgotten margins reach what is predicted, most of the way."""
    monkeypatch.setattr(unlearn, "THRESHOLD", 0.0)
    monkeypatch.setattr(unlearn, "MATCHING", unlearn.Settings(150, 50, 2e-3))
    out = tmp_path / "out"
    assert run(["--model", saved, "--forget", forget, "--out", out, "--subset-models", 16]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["method"], summary["forgotten"]) == ("dmm", 4)
    goal, before = summary["margin_forgotten_predicted"], summary["margin_forgotten_before"]
    assert abs(goal - before) > 0.3
    assert abs(summary["margin_forgotten_after"] - goal) < 0.5 * abs(goal - before)
    found, first = classifier.load(out), classifier.load(saved)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found.params, first.params)
    assert max(jax.tree.leaves(moved)) > 0
    np.testing.assert_array_equal(found.train.labels, first.train.labels)
    # The trained halves are kept: the same command trains none.
    monkeypatch.setattr(chunk, "_core_by_core", None)
    again = unlearn.unlearn(saved, forget, out, subset_models=16)
    assert again["margin_forgotten_after"] == pytest.approx(summary["margin_forgotten_after"], abs=1e-4)


@pytest.mark.parametrize("method", ["ascent_descent", "ssd", "newton_step", "first_order"])
def test_baselines_move_the_weights(saved, forget, tmp_path, method):
    figures = unlearn.unlearn(saved, forget, tmp_path / "out", method=method)
    assert figures["weights_moved"] > 1e-5
    assert figures["method"] == method
    assert "margin_forgotten_predicted" not in figures


def test_every_baseline_has_its_settings():
    assert set(unlearn.SETTINGS) == set(unlearn.methods()) - {"dmm"}


def test_indices_are_read_from_text_and_npy(forget, tmp_path):
    np.save(tmp_path / "forget.npy", np.array([3, 5, 8, 7], np.int32))
    for path in (forget, tmp_path / "forget.npy"):
        np.testing.assert_array_equal(unlearn.read_indices(path), [3, 5, 8, 7])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("3.5\n", "invalid literal"),
        ("a b", "invalid literal"),
        (" \n", "it holds no index"),
        ("3\n99999999999999999999999\n", "too large"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, content, reason):
    path = tmp_path / "forget.txt"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=f"{reason}.*\n.*one a line, or an NPY file"):
        unlearn.read_indices(path)
    np.save(tmp_path / "forget.npy", np.ones((2, 2)))
    with pytest.raises(InvalidInputError, match=r"float64 of shape \(2, 2\)"):
        unlearn.read_indices(tmp_path / "forget.npy")
    np.save(tmp_path / "forget.npy", np.array([3, 2**63], np.uint64))
    with pytest.raises(InvalidInputError, match="9223372036854775808 is too large"):
        unlearn.read_indices(tmp_path / "forget.npy")
    np.save(tmp_path / "forget.npy", np.zeros(0, np.int64))
    with pytest.raises(InvalidInputError, match="it holds no index"):
        unlearn.read_indices(tmp_path / "forget.npy")
    np.savez(tmp_path / "two.npz", np.arange(3))
    (tmp_path / "two.npz").rename(tmp_path / "two.npy")
    with pytest.raises(InvalidInputError, match="magic string"):
        unlearn.read_indices(tmp_path / "two.npy")
    with pytest.raises(InvalidInputError, match="No such file"):
        unlearn.read_indices(tmp_path / "none.txt")


def test_the_command_line_says_what_is_wrong(saved, forget, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["--model", saved, "--forget", forget, "--out", out, "--method", "scrubb"]) == 2
    assert "did you mean scrub?" in capsys.readouterr().err
    assert run(["--model", tmp_path / "none", "--forget", forget, "--out", out]) == 1
    assert "holds no classifier" in capsys.readouterr().err
    assert run(["--model", saved, "--forget", forget, "--out", saved]) == 2
    assert "which is the model itself" in capsys.readouterr().err
    forget.write_text("3 200")
    assert run(["--model", saved, "--forget", forget, "--out", out]) == 2
    assert "the forget index 200, at place 1" in capsys.readouterr().err


def test_what_is_in_a_directory_is_not_written_over(saved, forget, tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "arrays-7").mkdir(parents=True)
    (foreign / "arrays-7" / "precious.txt").write_text("mine")
    (foreign / "summary.json").write_text("{}")
    with pytest.raises(InvalidInputError, match=r"holds arrays-7, summary\.json and no run"):
        unlearn.unlearn(saved, forget, foreign, method="ssd")
    assert (foreign / "arrays-7" / "precious.txt").read_text() == "mine"
    assert (foreign / "summary.json").read_text() == "{}"
    out = tmp_path / "out"
    first = unlearn.unlearn(saved, forget, out, method="ssd")
    assert unlearn.unlearn(saved, forget, out, method="ssd") == first
    with pytest.raises(StoreError, match="its method is 'ssd', this run's is 'first_order'"):
        unlearn.unlearn(saved, forget, out, method="first_order")
    forget.write_text("9\n")
    with pytest.raises(StoreError, match="its forget is"):
        unlearn.unlearn(saved, forget, out, method="ssd")
    assert json.loads((out / "summary.json").read_text()) == first


def test_data_that_have_changed_are_refused(saved, monkeypatch):
    load = build.load_data

    def turned(data):
        train, test = load(data)
        return train._replace(inputs=train.inputs[::-1]), test

    monkeypatch.setattr(build, "load_data", turned)
    with pytest.raises(StoreError, match=r"are not those that the classifier in .* was trained on"):
        classifier.load(saved)


def test_parameters_of_another_shape_are_refused(saved, tmp_path):
    found = classifier.load(saved)
    wider = classifier.Description(DESCRIPTION.data, configs.Mlp((9,)), DESCRIPTION.training)
    classifier.save(tmp_path / "wider", wider, found.params, found.state)
    with pytest.raises(StoreError, match=r"holds another model.*has float32\[8\]"):
        classifier.load(tmp_path / "wider")
    params.save_params(tmp_path / "bare", found.params, {})
    with pytest.raises(StoreError, match="holds parameters, but no classifier"):
        classifier.load(tmp_path / "bare")
    with pytest.raises(InvalidInputError, match=r"labels of shape \(3,\)"):
        classifier.save(tmp_path / "few", DESCRIPTION, found.params, found.state, np.zeros(3, np.int32))


def test_a_seed_that_no_key_has_is_refused(saved, forget, tmp_path, capsys):
    out = ["--model", saved, "--forget", forget, "--out", tmp_path / "out", "--seed", 2**63]
    assert run(out) == 2
    assert "--seed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
