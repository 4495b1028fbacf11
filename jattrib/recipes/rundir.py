"""The directory of one run: whose it is, what is needed to resume it, what it cost, and its summary.

    DIR/summary.json   the figures; its presence says that the run is done
    DIR/report.html    and pictures, as PNG
    DIR/resume/        the config that the run belongs to, its stages, their seconds; of no use once the run is done

One process at a time works in a directory.  Seconds are kept every few seconds, so that a kill loses hardly any.
"""

import platform
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import jattrib
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.recipes import config as configs

SUMMARY = "summary.json"
RESUME = "resume"
HEARTBEAT = 5.0
"""Seconds between two records of the time spent."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
RESERVED = ("config", "versions", "device", "seconds")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class RunDir(NamedTuple):
    """An open run.

    Attributes:
        path: the directory.
        config: the whole config as plain tables, defaults included.
        before: the seconds that earlier processes spent on the run.
        begun: when this one opened it, on the monotonic clock.
    """

    path: Path
    config: dict[str, Any]
    before: float
    begun: float


@contextmanager
def opened(path: Path, config: configs.Room) -> Iterator[RunDir]:
    """Open `path` for the run of `config`, new or begun or done, and count the time until it is closed again.

    Raises:
        InvalidInputError: the directory holds files, but no run.
        StoreError: it cannot be written, holds a run of another config, or another process works in it.
    """
    from jattrib.core import files

    total = path / RESUME / "total.seconds"
    with files.writing(path):  # a place that this process may not even look at
        done, before = (path / SUMMARY).exists(), _recorded(total)
    directory = RunDir(path, configs.plain(config), before, time.monotonic())
    if done:
        _check_same(path, directory.config, read_summary(directory).get("config"))
        yield directory
        return
    with claimed(path, directory.config), _timed(total):
        yield directory


@contextmanager
def claimed(path: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Hold a directory, new, empty or of the same config before, for this process alone.

    Until a stage has begun or there is a summary, it is still anybody's: a first mistake may be corrected.

    Raises:
        InvalidInputError: the directory holds files, but no run.
        StoreError: it cannot be written, is of another config, or another process works in it.
    """
    from jattrib.core import files

    lock = path / RESUME / "run.json"
    _check_is_run(path, lock)
    with files.writing(path):
        (path / RESUME).mkdir(parents=True, exist_ok=True)
        guard = (path / RESUME / "lock").open("ab")
    with guard:
        _claim(guard, path)
        has_begun = (path / SUMMARY).exists() or any(entry.is_dir() for entry in (path / RESUME).iterdir())
        if lock.exists() and has_begun:
            _check_same(path, config, files.read_manifest(lock).get("config"))
        if not lock.exists() or not has_begun:
            files.write_manifest(lock, {"config": dict(config), "versions": versions()})
        yield


@contextmanager
def stage(directory: RunDir, name: str) -> Iterator[Path]:
    """Give a stage its folder, which outlives a kill, and count the seconds spent in it over all resumes."""
    _check_name(name, taken=("total", "lock"))
    folder = directory.path / RESUME / name
    from jattrib.core import files

    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _timed(folder.with_name(f"{name}.seconds")):
        yield folder


def seconds(directory: RunDir) -> dict[str, float]:
    """Return the seconds that each stage has taken, and `total`, those of resumed runs included.

    A stage that is not closed yet counts up to its last record.
    """
    files = sorted((directory.path / RESUME).glob("*.seconds"))
    total = directory.before + time.monotonic() - directory.begun
    return {file.stem: _recorded(file) for file in files} | {"total": total}


def begun_with(directory: RunDir) -> dict[str, str]:
    """Return the versions that the run was begun with: a resumed one may have newer ones."""
    from jattrib.core import files

    return files.read_manifest(directory.path / RESUME / "run.json")["versions"]


def finish(directory: RunDir, figures: Mapping[str, Any]) -> None:
    """Write `summary.json`: the figures, `seconds_*` of every stage, config, versions, device and total seconds.

    Args:
        directory: the run.
        figures: numbers, truths or text by name, the unit in the name (`peak_memory_mib`).

    Raises:
        InvalidInputError: a name is not snake case or is taken, or a number is not finite.
        StoreError: the directory cannot be written.
    """
    from jattrib.core import files

    for name in figures:
        _check_name(name, taken=RESERVED)
    spent = {name: round(value, 3) for name, value in seconds(directory).items()}
    total = spent.pop("total")
    summary = {
        **figures,
        **{f"seconds_{name}": value for name, value in spent.items()},
        "seconds": total,
        "device": device(),
        "versions": versions(),
        "config": directory.config,
    }
    files.write_json(directory.path / SUMMARY, summary)


def is_done(directory: RunDir) -> bool:
    """Say whether the run has its summary."""
    return (directory.path / SUMMARY).exists()


def read_summary(directory: RunDir) -> dict[str, Any]:
    """Read what `finish` wrote.

    Raises:
        StoreError: the file is missing or damaged.
    """
    from jattrib.core import files

    path = directory.path / SUMMARY
    summary = files.read_json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("config"), dict):
        raise files.altered(path, "it is not the summary of a run")
    return summary


def versions() -> dict[str, str]:
    """Return the versions of what computes the figures."""
    found = {"jattrib": jattrib.__version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in PACKAGES}


def device() -> str:
    """Say in words what JAX computes on, as in `cpu (2 cores)` or `4 x NVIDIA H200`."""
    import jax

    from jattrib.core.mesh import cores

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"cpu ({cores()} cores)" if len(devices) == 1 else f"cpu ({cores()} cores as {len(devices)} devices)"
    return devices[0].device_kind if len(devices) == 1 else f"{len(devices)} x {devices[0].device_kind}"


def _check_is_run(path: Path, lock: Path) -> None:
    if not path.is_dir() or lock.exists():
        return
    others = sorted(entry.name for entry in path.iterdir() if entry.name != RESUME)
    if others:
        raise InvalidInputError(
            f"{path} holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} and no run",
            expected="a new or empty directory, or that of a run to resume",
            remedy=f"choose another, for example --out {path / 'run'}",
        )


def _check_same(path: Path, asked: Mapping[str, Any], held: Any) -> None:
    from jattrib.core import files

    files.check_identity(path, dict(configs.flatten(held or {})), dict(configs.flatten(dict(asked))))


def _claim(guard: IO[bytes], path: Path) -> None:
    """Hold the directory for this process until `guard` is closed, which a kill does too."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: two processes are then the user's to avoid
        return
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(
            f"another process is working in {path}",
            expected="one process at a time in a directory",
            remedy="wait for it or end it, or choose another --out",
        ) from error
    except OSError:  # a file system without locks
        return


@contextmanager
def _timed(file: Path) -> Iterator[None]:
    from jattrib.core import files

    before, begun = _recorded(file), time.monotonic()
    stopped = threading.Event()

    def record() -> None:
        files.write_atomic(file, f"{before + time.monotonic() - begun:.3f}\n".encode())

    def beat() -> None:
        while not stopped.wait(HEARTBEAT):
            with suppress(StoreError):  # a disk that is full for a while; the last record tells of one that stays so
                record()

    def end() -> None:
        stopped.set()
        heart.join()

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    except BaseException:
        end()
        with suppress(StoreError):  # what came first is what is to be told
            record()
        raise
    end()
    record()


def _recorded(file: Path) -> float:
    if not file.exists():
        return 0.0
    try:
        return float(file.read_text())
    except ValueError as error:
        raise StoreError(
            f"{file} holds no number",
            expected="the seconds that a stage has taken so far",
            remedy="delete the file: seconds then count from here",
        ) from error


def _check_name(name: str, taken: tuple[str, ...] = ()) -> None:
    if not _NAME.fullmatch(name) or name in taken or name.startswith("seconds_"):
        raise InvalidInputError(
            f"a figure or a stage named {name!r}",
            expected=f"snake case, and none of {', '.join((*taken, 'seconds_*'))}",
            remedy="choose another name",
        )
