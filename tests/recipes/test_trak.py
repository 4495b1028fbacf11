"""The TRAK recipe, run as a user runs it: through the command line, on real images, killed and resumed."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jattrib.metrics import counterfactual, lds
from jattrib.metrics.bootstrap import Interval
from jattrib.recipes import cli, experiment, trak_report
from jattrib.recipes import config as configs
from jattrib.recipes import trak_stages as trak
from tests.distributed import ROOT, environment

CONFIG = ROOT / "configs" / "attribution" / "trak_fashion_mnist.toml"
SMALL = [
    "data.train_size=300", "data.test_size=60", "model.widths=[12]", "training.epochs=4", "training.batch_size=50",
    "method.checkpoints=3", "method.dim=64", "method.chunk=64", "evaluation.queries=20", "evaluation.subsets=12",
    "evaluation.held_out_subsets=6", "evaluation.counterfactual_queries=6", "width=4", "strategy=map",
]  # fmt: skip
PROGRAM = "from jattrib.recipes.cli import main; main()"


def start(directory, *overrides):
    command = [sys.executable, "-c", PROGRAM, "run", str(CONFIG), "--out", str(directory), *SMALL, *overrides]
    settings = environment(JAX_PLATFORMS="cpu", XLA_FLAGS="")
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()  # closes its pipes
    assert process.returncode == -signal.SIGKILL


def figures(directory):
    summary = json.loads((directory / "summary.json").read_text())
    apart = ("config", "versions", "device")
    return {name: value for name, value in summary.items() if name not in apart and not name.startswith("seconds")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    process = start(directory)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return directory, errors


def test_the_whole_job_runs_and_reports(finished):
    directory, errors = finished
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["lds_expected_low"] < summary["lds_expected"] < summary["lds_expected_high"]
    assert 0 < summary["lds_ceiling"] <= 1
    assert abs(summary["lds_random"]) < 0.1
    assert summary["lds_expected"] > summary["lds_null_high"]  # 300 images are enough to beat chance
    assert summary["lds_expected"] == summary["lds_expected_3_checkpoints"]
    assert summary["margin_drop_difference_nats"] > 0
    assert summary["images_left_out"] == 30
    assert summary["models_trained"] == 3 + (12 + 6) * 2 + 6 * 2 + 1
    assert summary["config"]["method"]["dim"] == 64
    pictures = {"attributions", "counterfactual", "lds_by_checkpoints", "predicted_actual", "ridge"}
    assert {path.stem for path in directory.glob("*.png")} == pictures
    page = (directory / "report.html").read_text()
    assert f"{summary['lds_expected']:.3f}" in page
    for stage in ("training checkpoints", "featurizing", "retraining", "choosing the ridge", "attributing"):
        assert stage in errors  # progress is visible throughout


def test_a_run_killed_at_four_stages_ends_with_the_same_figures(finished, tmp_path):
    directory = tmp_path / "killed"
    stages = ("checkpoints/models/journal.jsonl", "features/train_0001", "subsets/margins", "counterfactual/margins")
    for stage in stages:
        process = start(directory)
        deadline = time.monotonic() + 240
        while not (directory / "resume" / stage).exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        kill(process)
        assert not (directory / "summary.json").exists()
    process = start(directory)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert figures(directory) == figures(finished[0])


def invoke(capsys, directory, *overrides):
    """Run in this process; return the exit code and what a user sees."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(CONFIG), "--out", str(directory), *SMALL, *overrides])
    seen = capsys.readouterr().err
    assert len(seen.splitlines()) < 40  # one screen
    return stopped.value.code, " ".join(seen.replace("│", " ").split())


def test_a_finished_run_says_so_and_keeps_its_figures(finished, capsys):
    before = (finished[0] / "summary.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(CONFIG), "--out", str(finished[0]), *SMALL])
    assert stopped.value.code in (None, 0)
    assert "done" in " ".join(capsys.readouterr()).lower()
    assert (finished[0] / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.dim=100000"], ["dim = 100000 for 9550 parameters", "dim <= 9550"]),
        (["training.learning_rate=1e30"], ["the loss of model 0 is", "lower the learning rate"]),
        (["evaluation.queries=61"], ["evaluation.queries = 61", "at most the 60 test images"]),
        (["evaluation.alpha=0.0001"], ["subsets of 0 of 300 examples", "choose alpha"]),
        (["evaluation.alpha=0.9999"], ["subsets of 300 of 300 examples", "choose alpha"]),
        (["method.dims=64"], ["unknown key method.dims", "did you mean method.dim"]),
        (["data.kind=fashion_mnist", "data.path=/nowhere"], ["/nowhere", "dataset-fashion-mnist"]),
    ],
)
def test_what_cannot_be_run_is_refused_on_one_screen(overrides, words, tmp_path, capsys):
    code, seen = invoke(capsys, tmp_path / "run", *overrides)
    assert code != 0
    for each in words:
        assert each in seen
    assert not (tmp_path / "run" / "summary.json").exists()


def test_labels_out_of_range_are_refused(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 4, 4, 1)).astype(np.float32)
    labels = rng.integers(0, 3, 40)
    path = tmp_path / "data.npz"
    bad = labels.copy()
    bad[7] = 5
    np.savez(path, train_inputs=images, train_labels=labels, test_inputs=images, test_labels=bad)
    code, seen = invoke(capsys, tmp_path / "run", "data.kind=npz", f"data.path={path}")
    assert code != 0
    assert "label 5 of example 7" in seen
    assert "labels from 0 to 2" in seen


def test_an_altered_store_is_refused_by_name(tmp_path, capsys):
    """One bit of a finished chunk of the retrained models' margins flips between two runs."""
    directory = tmp_path / "run"
    process = start(directory)
    journal = directory / "resume" / "subsets" / "margins" / "journal.jsonl"
    while not (journal.exists() and journal.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    kill(process)
    outputs = directory / "resume" / "subsets" / "margins"
    files = [path for path in (outputs / "arrays").rglob("*") if path.is_file()]
    finished = max(files, key=lambda path: (path.stat().st_size, -path.stat().st_mtime_ns))  # the kill may cut a later
    content = bytearray(finished.read_bytes())
    content[-3] ^= 1
    finished.write_bytes(content)
    code, seen = invoke(capsys, directory)
    assert code != 0
    assert "damaged" in seen
    assert "subsets/margins" in seen.replace(" ", "")


@pytest.mark.parametrize(("p_value", "words"), [(0.002, "well"), (0.03, "no better than chance")])
def test_permuted_models_say_whether_scores_are_better_than_chance(p_value, words):
    """Intervals of the LDS and of chance that overlap say nothing of it."""
    best, fall = lds.LDS(0.39, 0.11, 0.62, np.zeros(2), np.zeros(0, int)), Interval(2.0, 1.0, 3.0)
    found = trak.Found(
        scores=np.zeros((4, 2), np.float32), counts=(3,), by_checkpoints=(best,), random=Interval(0, -0.1, 0.1),
        similarity=best._replace(mean=0.2), null=lds.Null(0, 0.1, -0.2, 0.25, p_value),
        ceiling=lds.Ceiling(0.6, 0.3, np.zeros(0, int)),
    )  # fmt: skip
    left_out = experiment.LeftOut(30, 3, counterfactual.Effect(fall, fall, fall, 1.0))
    lead = trak_report._lead(trak_report.Results(None, None, None, found, None, left_out))
    assert f"predicts retrained models {words}, with a linear datamodeling score of 0.39" in lead


def test_the_ridge_that_was_chosen_is_the_bar_in_colour():
    choice = trak.Choice((0.03, 0.1, 0.3), (0.2, 0.4, 0.3), 0.1)
    figure, _, caption = trak_report._ridge_picture(trak_report.Results(None, None, choice, None, None, None))
    colours = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert colours[0] == colours[2] != colours[1]
    assert caption.startswith("The ridge (0.1 × the mean eigenvalue)")


def test_checkpoint_counts_end_with_all():
    assert trak.checkpoint_counts(20) == (1, 2, 5, 10, 20)
    assert trak.checkpoint_counts(7) == (1, 2, 5, 7)
    assert trak.checkpoint_counts(1) == (1,)


def test_the_shipped_config_fits_its_model():
    """The config's model takes its data, and the features have its dimension: evaluated abstractly."""
    config = configs.convert(configs.read(CONFIG), trak.Config)
    from jattrib.models.outputs import Margin
    from jattrib.recipes import build

    train, _ = build.load_data(config.data)
    model = build.build_model(config.model, train.inputs.shape[1:], build.classes(train))
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    example = (train.inputs[0], train.labels[0])
    gradient = jax.eval_shape(jax.grad(Margin(model.apply, state)), params, example)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape), leaf.dtype), gradient)
    features = jax.eval_shape(trak.projector(config).apply, jax.random.key_data(jax.random.key(0)), batch)
    assert features.shape == (4, config.method.dim)
