import io

import pytest
from rich.console import Console

from jattrib.core import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=100, color_system=None)
    )
    return screen


def test_lines_where_there_is_no_terminal(capsys):
    with progress.track(3, "counting") as advance:
        for _ in range(3):
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("counting: 3/3 (100%) ")
    assert err.count("\n") == 1


def test_a_line_every_few_seconds(capsys, monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.track(4, "slow") as advance:
        for _ in range(4):
            advance(1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) > 2
    assert said[0].startswith("slow: 1/4 (25%)")
    assert "left" in said[0]
    assert said[-1].startswith("slow: 4/4 (100%)")


def test_silent_when_told(capsys):
    with progress.track(2, "quiet", progress=False) as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")


def test_loops_in_loops_share_one_display(terminal):
    with progress.track(2, "outer") as outer:
        for number in range(2):
            with progress.track(3, f"inner {number}") as inner:
                inner(3)
            outer(1)
    screen = terminal.getvalue()
    for label in ("outer", "inner 0", "inner 1"):
        assert label in screen
    assert "2/2" in screen
    assert progress._terminal.display is None


def test_a_label_is_shown_as_it_is(terminal):
    with progress.track(1, "rows [train] of [/x]"):
        pass
    assert "rows [train] of [/x]" in terminal.getvalue()


def test_an_error_closes_the_display(terminal):
    def fail():
        with progress.track(2, "failing") as advance:
            advance(1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert progress._terminal.display is None
    with progress.track(1, "next") as advance:
        advance(1)
    assert "next" in terminal.getvalue()


def test_an_error_ends_the_lines_too(capsys):
    def fail():
        with progress.track(2, "failing"):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert "100%" not in capsys.readouterr().err
