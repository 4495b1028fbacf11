import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from jattrib.core import files
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.recipes import config, rundir


class Fake(config.Room, frozen=True, tag_field="recipe", tag="fake"):
    model: config.Model = config.Mlp()
    seed: int = 0


def test_a_finished_run_has_its_figures_and_what_made_them(tmp_path):
    path = tmp_path / "deep" / "run"
    with rundir.opened(path, Fake(seed=4)) as directory:
        assert not rundir.is_done(directory)
        with rundir.stage(directory, "work") as folder:
            (folder / "part").write_text("1")
        rundir.finish(directory, {"lds": 0.5, "models": 3, "note": "fine", "missing": None})
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["lds"], summary["models"], summary["note"], summary["missing"]) == (0.5, 3, "fine", None)
    assert summary["config"] == {
        "recipe": "fake",
        "model": {"kind": "mlp", "widths": [64], "activation": "relu"},
        "seed": 4,
    }
    assert set(summary["versions"]) == {"jattrib", "python", "jax", "jaxlib", "flax", "optax", "numpy"}
    assert re.fullmatch(r"cpu \(\d+ cores as 8 devices\)", summary["device"])
    assert 0 <= summary["seconds_work"] <= summary["seconds"]
    with rundir.opened(path, Fake(seed=4)) as directory:
        assert rundir.is_done(directory)
        assert rundir.read_summary(directory) == summary


def test_stages_survive_and_their_seconds_add_up(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(rundir.time, "monotonic", lambda: clock[0])
    for spent in (3.0, 4.5):
        with rundir.opened(tmp_path, Fake()) as directory:
            with rundir.stage(directory, "work") as folder:
                (folder / f"{spent}").write_text("")
                clock[0] += spent
            clock[0] += 1
    assert sorted(file.name for file in folder.iterdir()) == ["3.0", "4.5"]
    with rundir.opened(tmp_path, Fake()) as directory:
        assert rundir.seconds(directory) == {"total": 9.5, "work": 7.5}
        clock[0] += 1
        rundir.finish(directory, {})
        assert rundir.read_summary(directory)["seconds"] == 10.5
        assert rundir.read_summary(directory)["seconds_work"] == 7.5


def test_a_disk_that_is_full_for_a_while_hides_neither_the_time_nor_another_error(tmp_path, monkeypatch):
    write, full = files.write_atomic, threading.Event()
    failed, went_on = threading.Event(), threading.Event()

    def sometimes(path, content):
        if full.is_set():
            failed.set()
            raise StoreError("no space", expected="space", remedy="free some")
        write(path, content)
        if failed.is_set():
            went_on.set()

    monkeypatch.setattr(files, "write_atomic", sometimes)
    monkeypatch.setattr(rundir, "HEARTBEAT", 0.01)
    with rundir.opened(tmp_path, Fake()):
        full.set()
        assert failed.wait(60)
        full.clear()
        assert went_on.wait(60)

    def fail():
        full.set()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), rundir.opened(tmp_path, Fake()):
        fail()
    full.clear()
    with pytest.raises(StoreError, match="no space"), rundir.opened(tmp_path, Fake()):
        full.set()


CHILD = """
import sys, time
from pathlib import Path
from jattrib.recipes import config, rundir
class Fake(config.Room, frozen=True, tag_field="recipe", tag="fake"):
    model: config.Model = config.Mlp()
    seed: int = 0
rundir.HEARTBEAT = 0.05
with rundir.opened(Path(sys.argv[1]), Fake()) as directory, rundir.stage(directory, "work"):
    time.sleep(0.5)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_kill_loses_neither_the_directory_nor_its_seconds(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        wanted = r"another process is working in .*\n.*one process.*\n.*another --out"
        with pytest.raises(StoreError, match=wanted), rundir.opened(tmp_path, Fake()):
            pass
    finally:
        child.kill()
        child.communicate()
    with rundir.opened(tmp_path, Fake()) as directory:
        spent = rundir.seconds(directory)
        assert 0.3 < spent["work"] < 30
        assert 0.3 < spent["total"] < 30


def test_where_no_directory_can_be_is_said(tmp_path):
    with (
        pytest.raises(StoreError, match="cannot be written: File name too long"),
        rundir.opened(tmp_path / ("x" * 300), Fake()),
    ):
        pass


def test_before_a_stage_begins_a_mistake_may_be_corrected(tmp_path):
    with pytest.raises(KeyError), rundir.opened(tmp_path, Fake(seed=1)):
        raise KeyError  # the data are not there, say
    with rundir.opened(tmp_path, Fake(seed=2)) as directory, rundir.stage(directory, "first"):
        pass
    with (
        pytest.raises(StoreError, match="its seed is 2, this run's is 1"),
        rundir.opened(tmp_path, Fake(seed=1)),
    ):
        pass


def test_a_directory_of_another_config_is_refused_by_the_key_that_differs(tmp_path):
    with rundir.opened(tmp_path, Fake()) as directory, rundir.stage(directory, "first"):
        pass
    wanted = r"its seed is 0, this run's is 1\n.*\n.*remedy:   choose another directory"
    with pytest.raises(StoreError, match=wanted), rundir.opened(tmp_path, Fake(seed=1)):
        pass
    with rundir.opened(tmp_path, Fake()) as directory:
        rundir.finish(directory, {})
    with (
        pytest.raises(StoreError, match=r"its model.activation is 'relu', this run's is 'gelu'"),
        rundir.opened(tmp_path, Fake(model=config.Mlp(activation="gelu"))),
    ):
        pass


def test_a_directory_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(InvalidInputError, match=r"holds thesis.tex and no run\n.*\n.*--out .*/run"),
        rundir.opened(tmp_path, Fake()),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == ["thesis.tex"]


def test_a_directory_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match=r"file/run cannot be written: Not a directory\n.*\n.*choose another directory"),
        rundir.opened(tmp_path / "file" / "run", Fake()),
    ):
        pass


def test_what_was_damaged_is_refused_by_name(tmp_path):
    with rundir.opened(tmp_path, Fake()) as directory, rundir.stage(directory, "work"):
        pass
    (tmp_path / "resume" / "work.seconds").write_text("much\n")
    with (
        pytest.raises(StoreError, match=r"work.seconds holds no number\n.*\n.*delete the file"),
        rundir.opened(tmp_path, Fake()) as directory,
        rundir.stage(directory, "work"),
    ):
        pass
    lock = tmp_path / "resume" / "run.json"
    lock.write_text(lock.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(StoreError, match=r"run.json is damaged or was altered"), rundir.opened(tmp_path, Fake()):
        pass
    (tmp_path / "summary.json").write_text('{"lds": 0.')
    with pytest.raises(StoreError, match=r"summary.json cannot be read"), rundir.opened(tmp_path, Fake()):
        pass
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(StoreError, match=r"summary.json is damaged"), rundir.opened(tmp_path, Fake()):
        pass


@pytest.mark.parametrize("name", ["LDS", "lds expected", "seconds", "config", "seconds_x", "2nd"])
def test_figures_need_names_of_their_own(tmp_path, name):
    with (
        rundir.opened(tmp_path, Fake()) as directory,
        pytest.raises(InvalidInputError, match=rf"named '{name}'\n.*snake case"),
    ):
        rundir.finish(directory, {name: 1.0})
    assert not (tmp_path / "summary.json").exists()


def test_a_stage_may_not_be_named_like_the_bookkeeping(tmp_path):
    with (
        rundir.opened(tmp_path, Fake()) as directory,
        pytest.raises(InvalidInputError, match="named 'total'"),
        rundir.stage(directory, "total"),
    ):
        pass


def test_a_figure_that_is_not_finite_is_refused(tmp_path):
    with (
        rundir.opened(tmp_path, Fake()) as directory,
        pytest.raises(InvalidInputError, match="lds = nan"),
    ):
        rundir.finish(directory, {"lds": float("nan")})
    assert not rundir.is_done(directory)


def test_an_error_passes_through_and_time_is_recorded(tmp_path):
    def fail():
        time.sleep(0.02)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), rundir.opened(tmp_path, Fake()):
        fail()
    assert float((tmp_path / "resume" / "total.seconds").read_text()) >= 0.02
