import json
import subprocess
import sys

import numpy as np
import pytest

from bench import harness
from jattrib.core.errors import InvalidInputError


def test_sides_take_turns_and_first_calls_do_not_count(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def side(name, seconds):
        durations = iter(seconds)

        def work():
            order.append(name)
            clock[0] += next(durations)

        return work

    found = harness.compare({"a": side("a", [9, 1, 2, 3]), "b": side("b", [5, 10, 10, 40])}, calls=3)
    assert order == ["a", "b"] * 4
    assert found["a"] == harness.Timing(median=2, low=1.5, high=2.5, first=9, calls=3)
    assert found["b"] == harness.Timing(median=10, low=10, high=25, first=5, calls=3)


def test_what_comes_before_a_call_is_not_timed(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def taking(name, seconds):
        def work():
            order.append(name)
            clock[0] += seconds

        return work

    found = harness.compare({"a": taking("a", 1), "b": taking("b", 2)}, calls=2, before=taking("-", 100))
    assert order == ["a", "b"] + ["-", "a", "-", "b"] * 2
    assert (found["a"][:4], found["b"][:4]) == ((1, 1, 1, 1), (2, 2, 2, 2))


def test_rates_are_work_over_time_and_their_ratio_is_ours_to_the_other():
    ours, other = harness.Timing(2, 1, 4, 9, 5), harness.Timing(10, 8, 20, 7, 5)
    row = harness.rates("case", ours, other, work=40, unit="examples/s", other_name="them", packages=("rich",))
    assert (row.ours, row.other, row.ratio) == (20, 4, 5)
    assert (row.ours_spread, row.other_spread) == ((10, 40), (2, 5))
    assert (row.ours_first_s, row.other_first_s) == (9, 7)
    assert {"jattrib", "jax", "rich"} <= row.versions.keys()


def test_rows_are_json_lines_with_the_keys_that_readers_rely_on(tmp_path):
    row = harness.memories("case", harness.Peak(100, 50), harness.Peak(400, 60), other_name="them", note="what")
    harness.write([row, {**row._asdict(), "difference": np.float64(0.5)}], tmp_path / "rows.jsonl")
    one, two = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert list(one)[:8] == ["case", "ours", "other", "other_name", "ratio", "unit", "device", "versions"]
    assert (one["ours"], one["other"], one["ratio"], one["unit"]) == (100, 400, 0.25, "MiB")
    assert one["note"] == "before the work began: 50 and 60 MiB; what"
    assert two == {**one, "difference": 0.5}


def test_peak_outlives_the_array():
    script = (
        "import numpy as np; from bench import harness; before = harness.resident_peak(); "
        "np.ones(64 * 2**17).sum(); print(harness.resident_peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=harness.ROOT)
    assert 50 < float(done.stdout) < 100


def test_what_is_not_installed_is_named():
    with pytest.raises(InvalidInputError, match=r"no module no_such_peer[\s\S]*peers"):
        harness.require("json", "no_such_peer")
