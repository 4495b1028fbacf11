import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jattrib import recipes
from jattrib.core.errors import DivergedError, StoreError
from jattrib.recipes import cli, config, rundir


class Config(config.Room, frozen=True, tag_field="recipe", tag="fake"):
    training: config.Training = config.Training()
    fail: str = ""
    seed: int = 0


CALLS = []


def work(settings, directory):
    """Two stages; the first leaves a file that a resumed run finds."""
    CALLS.append(settings)
    with rundir.stage(directory, "first") as folder:
        found = (folder / "done").exists()
        (folder / "done").write_text("")
    failures = {
        "interrupted": KeyboardInterrupt,
        "store": StoreError("got it", expected="another", remedy="mend [it]"),
        "diverged": DivergedError("nan", expected="a number", remedy="lower it"),
        "bug": KeyError("bug"),
    }
    if settings.fail == "forgets":
        return
    if settings.fail and not found:
        raise failures[settings.fail]
    rundir.finish(directory, {"lds_expected": 0.25 + settings.seed, "resumed": found})


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "fake", lambda: recipes.Recipe(Config, work))
    monkeypatch.setenv("COLUMNS", "300")
    CALLS.clear()
    path = tmp_path / "fake.toml"
    path.write_text('# expected: lds_expected = 0.25 ± 0.1\nrecipe = "fake"\nseed = 0\n')
    return path


def jattrib(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


def test_a_run_writes_its_summary_and_prints_its_figures(file, tmp_path, capsys):
    assert jattrib("run", file, "--out", tmp_path / "out", "training.epochs=2", "seed=1") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["lds_expected"] == 1.25
    assert summary["config"]["training"]["epochs"] == 2
    printed = capsys.readouterr()
    assert "lds_expected" in printed.out
    assert "1.25" in printed.out
    assert "0.25 ± 0.1" not in printed.out, "what is expected of the file is not expected under overrides"
    assert f"Writing into {tmp_path / 'out'}" in printed.err


def test_the_same_command_again_says_that_it_is_done(file, tmp_path, capsys):
    assert jattrib("run", file, "--out", tmp_path / "out") == 0
    first = capsys.readouterr().out
    assert "0.25 ± 0.1" in first
    before = (tmp_path / "out" / "summary.json").read_bytes()
    assert jattrib("run", file, "--out", tmp_path / "out") == 0
    assert len(CALLS) == 1
    again = capsys.readouterr().out
    assert "This run is done" in again
    assert again.endswith(first)
    assert (tmp_path / "out" / "summary.json").read_bytes() == before


def test_an_expected_figure_that_is_missing_is_shown_as_such(file, tmp_path, capsys):
    file.write_text("# expected: speed >= 3\n" + file.read_text())
    assert jattrib("run", file, "--out", tmp_path / "out") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "speed" in line]
    assert "missing" in line
    assert "≥ 3" in line


def test_an_interrupted_run_says_how_to_resume_and_does(file, tmp_path, capsys):
    arguments = ("run", file, "--out", tmp_path / "out", "fail=interrupted")
    assert jattrib(*arguments) == 130
    assert "The same command resumes" in capsys.readouterr().err
    assert jattrib(*arguments) == 0
    assert "Resuming in" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["resumed"] is True


def test_a_run_resumed_with_other_versions_says_so(file, tmp_path, capsys, monkeypatch):
    arguments = ("run", file, "--out", tmp_path / "out", "fail=interrupted")
    assert jattrib(*arguments) == 130
    now = rundir.versions()
    monkeypatch.setattr(rundir, "versions", lambda: {**now, "jax": "9.9"})
    assert jattrib(*arguments) == 0
    assert f"versions have changed: jax {now['jax']} → 9.9" in capsys.readouterr().err


def test_a_directory_of_another_config_is_refused(file, tmp_path, capsys):
    assert jattrib("run", file, "--out", tmp_path / "out") == 0
    assert jattrib("run", file, "--out", tmp_path / "out", "training.epochs=7") == 1
    error = capsys.readouterr().err
    assert "its training.epochs is 30, this run's is 7" in error
    assert "remedy:   choose another directory" in error


@pytest.mark.parametrize(
    ("arguments", "code", "messages"),
    [
        (("sed=1",), 2, ("command line: unknown key sed", "did you mean seed?")),
        (("training.epochs=no",), 2, ('training.epochs = "no"', "a whole number of at least 1")),
        (
            ("recipe=fak",),
            2,
            (
                "recipe = 'fak'",
                "one of trak, comparison, magic, magic_text, datamodels, dmm, influence, influence_text, fake",
                "did you mean fake?",
            ),
        ),
        (("fail=store",), 1, ("got it", "another", "mend [it]")),
        (("fail=diverged",), 1, ("nan", "a number", "lower it")),
    ],
)
def test_an_error_on_purpose_is_printed_and_has_its_code(file, tmp_path, capsys, arguments, code, messages):
    assert jattrib("run", file, "--out", tmp_path / "out", *arguments) == code
    error = capsys.readouterr().err
    for message in messages:
        assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) < 20


def test_a_terminal_gets_the_error_in_a_frame(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert jattrib("run", file, "--out", tmp_path / "out", "fail=store") == 1
    error = capsys.readouterr().err
    assert "╭─ error" in error
    assert "mend [it]" in error


def test_an_unwritable_directory(file, tmp_path, capsys):
    assert jattrib("run", file, "--out", file / "out") == 1
    error = capsys.readouterr().err
    assert "cannot be written: Not a directory" in error
    assert "choose another directory" in error


def test_paths_are_printed_as_they_are(file, tmp_path, capsys):
    for name in ("[lr=0.1]", "a[/b]"):
        assert jattrib("run", file, "--out", tmp_path / name) == 0
        printed = capsys.readouterr()
        assert f"Report: {tmp_path / name}" in printed.out
        assert f"Writing into {tmp_path / name}" in printed.err


def test_a_config_that_has_no_name(tmp_path, capsys):
    for name in (".", "", "/"):
        assert jattrib("run", name, "--out", tmp_path) == 2
        assert "or one that comes with the package" in capsys.readouterr().err


def test_a_config_that_is_not_there(tmp_path, capsys):
    assert jattrib("run", "trak_fashion_mnist.tml", "--out", tmp_path) == 2
    assert "attribution/trak_fashion_mnist.toml" in capsys.readouterr().err


def test_a_bug_stays_a_traceback(file, tmp_path):
    with pytest.raises(KeyError, match="bug"):
        cli.main(["run", str(file), "--out", str(tmp_path / "out"), "fail=bug"])


def test_a_recipe_that_ends_without_a_summary_is_a_bug(file, tmp_path):
    with pytest.raises(RuntimeError, match="recipe fake ended without a summary"):
        cli.main(["run", str(file), "--out", str(tmp_path / "out"), "fail=forgets"])


def test_help_and_version_come_quickly_and_without_jax(capsys):
    assert jattrib("--version") == 0
    assert capsys.readouterr().out.startswith("jattrib 0.")
    begun = time.monotonic()
    code = (
        "import sys\nfrom jattrib.recipes.cli import main\ntry: main(['--help'])\nfinally: print('jax' in sys.modules)"
    )
    root = Path(recipes.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.endswith("False\n")
    assert all(command in done.stdout for command in ("run", "list", "bench"))
    assert time.monotonic() - begun < 30, "an import that hangs"


def checkout(tmp_path, monkeypatch):
    (tmp_path / "jattrib" / "recipes").mkdir(parents=True)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "jattrib" / "recipes" / "cli.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_benchmark_prints_a_table_and_writes_lines(tmp_path, monkeypatch, capsys):
    checkout(tmp_path, monkeypatch)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "bench" / "peers").mkdir(parents=True)
    (tmp_path / "bench" / "own.py").write_text(
        "from typing import NamedTuple\n\nclass Row(NamedTuple):\n    name: str\n    examples_per_second: float\n\n"
        "def run():\n    "
        "return [Row('sketch', 1234.5), {'name': 'dense', 'examples_per_second': 10.0, 'mebibytes': 77}]\n"
    )
    (tmp_path / "bench" / "peers" / "theirs.py").write_text("\ndef run():\n    return []\n")
    (tmp_path / "bench" / "helper.py").write_text("run = 3\n")
    out = tmp_path / "results" / "own.jsonl"
    assert jattrib("bench", "own", "--out", out) == 0
    assert "examples_per_second" in (printed := capsys.readouterr().out)
    assert "1234" in printed
    assert "mebibytes" in printed
    assert "77" in printed
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["name"], line["examples_per_second"]) for line in lines] == [("sketch", 1234.5), ("dense", 10.0)]
    assert all(line["device"].startswith("cpu") and "jax" in line["versions"] for line in lines)
    assert jattrib("bench", "own", "--out", tmp_path) == 2
    assert "which is a directory" in capsys.readouterr().err
    assert jattrib("bench", "peers/theirs") == 0
    assert jattrib("bench", "helper") == 2
    error = capsys.readouterr().err
    assert "no benchmark helper" in error
    assert "one of own, peers/theirs" in error


def test_a_benchmark_needs_a_checkout(tmp_path, monkeypatch, capsys):
    checkout(tmp_path, monkeypatch)
    assert jattrib("bench", "trak") == 2
    error = capsys.readouterr().err
    assert "a checkout: benchmarks are no part of the installed package" in error
    assert "clone the repository" in error
