"""One progress display on standard error, shared by every long loop."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PERIOD = 5.0
"""Seconds between two lines of a loop where there is no terminal to draw on."""


class _Terminal:
    """The terminal's live display: the first loop opens it, loops inside add a line to it, the last one closes it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.users = 0
        self.display: Progress | None = None

    def enter(self, console: Console) -> Progress:
        with self.lock:
            if self.display is None:
                columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
                self.display = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
                self.display.start()
            self.users += 1
            return self.display

    def leave(self):
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.display is not None:
                self.display.stop()
                self.display = None


_terminal = _Terminal()


@contextmanager
def track(total: int, label: str, *, progress: bool = True) -> Iterator[Callable[[int], None]]:
    """Show how far a loop of `total` items has come, and give the function that advances it.

    On a terminal it is a bar, and loops inside loops share one display; elsewhere it is a line every few seconds and
    one at the end; with `progress=False` it is silent.

        with track(len(items), "training") as advance:
            for item in items:
                ...
                advance(1)
    """
    if not progress:
        yield lambda count: None
        return
    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(total, label, console) as advance:
            yield advance
    else:
        with _lines(total, label) as advance:
            yield advance


@contextmanager
def _bar(total: int, label: str, console: Console) -> Iterator[Callable[[int], None]]:
    display = _terminal.enter(console)
    task = display.add_task(label, total=total)
    nested = len(display.tasks) > 1
    try:
        yield lambda count: display.advance(task, count)
    finally:
        display.refresh()
        if nested:
            display.remove_task(task)
        _terminal.leave()


@contextmanager
def _lines(total: int, label: str) -> Iterator[Callable[[int], None]]:
    begun = printed = time.monotonic()
    done = at_start = 0

    def say():
        nonlocal printed
        printed = time.monotonic()
        spent = printed - begun
        left = f", {spent * (total - done) / (done - at_start):.0f} s left" if at_start < done < total else ""
        percent = 100.0 * done / total if total else 100.0
        print(f"{label}: {done}/{total} ({percent:.0f}%) {spent:.1f} s{left}", file=sys.stderr, flush=True)

    def advance(count: int):
        nonlocal done, at_start
        if done == 0 and time.monotonic() - begun < 0.1:
            at_start = count if count < total else 0
        done += count
        if time.monotonic() - printed > PERIOD:
            say()

    yield advance
    say()
