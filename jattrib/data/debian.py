"""Files out of Debian packages: those installed here, or fetched with `apt-get download`, which needs no root."""

import gzip
import os
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from jattrib.core.errors import InvalidInputError, StoreError

SYSTEM = Path("/")
SECONDS = 300
"""How long a download may take."""

CACHE = "JATTRIB_CACHE"
"""The environment variable that names the cache."""


def cache(path: str | Path | None = None) -> Path:
    """Return the folder where what was fetched is kept: `path`, what `JATTRIB_CACHE` names, or `~/.cache/jattrib`."""
    if path is not None:
        return Path(path)
    named = os.environ.get(CACHE)
    return Path(named) if named else Path.home() / ".cache" / "jattrib"


def fetch(package: str, patterns: Sequence[str], *, remedy: str) -> list[bytes]:
    """Return the contents of a package's files, those of `.gz` files unpacked.

    Args:
        package: its name.
        patterns: the files' paths from the root, with shell patterns; files come pattern by pattern, sorted by path.
        remedy: what the user can do without the package, for the error.

    Raises:
        StoreError: the package is not installed and cannot be fetched, or has no such file.
        InvalidInputError: a `.gz` file is damaged.
    """
    if found := _find(SYSTEM, patterns):
        return found
    with tempfile.TemporaryDirectory(prefix="jattrib-") as temporary:
        folder = Path(temporary)
        _run(["apt-get", "download", package], folder, package, remedy)
        archive = next(iter(folder.glob("*.deb")), None)
        if archive is None:
            raise _unavailable(package, "apt-get left no package behind", remedy)
        _run(["dpkg", "-x", archive.name, "unpacked"], folder, package, remedy)
        if found := _find(folder / "unpacked", patterns):
            return found
    raise _unavailable(package, f"it has no file {' or '.join(patterns)}", remedy)


def _find(root: Path, patterns: Sequence[str]) -> list[bytes]:
    """Return the contents, or nothing where a pattern matches nothing."""
    files = [sorted(path for path in root.glob(pattern) if path.is_file()) for pattern in patterns]
    return [_read(path) for each in files for path in each] if all(files) else []


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInputError(
            f"{path}: {error}", expected="a file as it was packaged", remedy="install or fetch its package again"
        ) from error


def _run(command: Sequence[str], folder: Path, package: str, remedy: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError as error:
        raise _unavailable(package, f"there is no {command[0]} on this machine", remedy) from error
    except subprocess.TimeoutExpired as error:
        raise _unavailable(package, f"{command[0]} took more than {SECONDS} seconds", remedy) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise _unavailable(package, f"{' '.join(command[:2])}: {said[0] if said else done.returncode}", remedy)


def _unavailable(package: str, reason: str, remedy: str) -> StoreError:
    return StoreError(
        f"Debian's package {package} is not installed and could not be fetched: {reason}",
        expected="Debian or Ubuntu with its package lists (`apt-get update`) and a network, or the package installed",
        remedy=remedy,
    )
