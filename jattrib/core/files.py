"""Small files that are either wholly there or not at all: JSON, sealed manifests, journals."""

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jattrib.core import mesh
from jattrib.core.errors import InvalidInputError, StoreError

MANIFEST = "manifest.json"
FORMAT = 1

SEAL = "sha256"
"""The key of a manifest that holds the checksum of its other keys."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into an error that names the remedy."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror or error}",
            expected="a directory that exists or can be made, with room and the right to write",
            remedy="choose another directory, free some space, or change its permissions",
        ) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that whoever looks, and whenever the process dies, sees the old content or the new one.

    Raises:
        StoreError: the directory cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(path)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync_directory(path.parent)


def is_there(path: Path) -> bool:
    """Return whether there is such a file; true where this process may not look: reading it says why."""
    try:
        return path.is_file()
    except OSError:
        return True


def beside(path: Path) -> Path:
    """Return a name next to `path` that no process uses, for what is to be renamed to `path` when it is complete."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; NumPy and JAX numbers and arrays, and paths, are written as plain ones.

    Typed keys are written as their words.

    Raises:
        InvalidInputError: a number is not finite (JSON has no word for it), or a value is of another kind.
        StoreError: the directory cannot be written.
    """
    write_atomic(Path(path), (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StoreError: it is missing, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}",
            expected="a JSON file",
            remedy="run again what writes it, or correct the path",
        ) from error


def plain(value: Any, where: str = "") -> Any:
    """Return `value` in JSON's own terms, or say which key of it cannot be so written."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = np.asarray(mesh.words(value)).tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}/{key}" if where else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}/{index}" if where else str(index)) for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and np.isfinite(value)):
        return value
    raise InvalidInputError(
        f"{where or 'a value'} = {value!r}",
        expected="finite numbers, strings, lists and dictionaries of them",
        remedy="look for where the number left the finite ones, or write it as a string",
    )


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with a checksum of itself."""
    manifest = plain(manifest)
    write_json(path, {**manifest, SEAL: _seal(manifest)})


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest and verify its checksum.

    Raises:
        StoreError: it is missing, is not JSON, or was altered.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.pop(SEAL, None) != _seal(manifest):
        raise altered(path, "the checksum in it does not match what it says")
    return manifest


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def altered(path: Path, how: str) -> StoreError:
    """Return the error for a file that is not what was written."""
    return StoreError(
        f"{path} is damaged or was altered: {how}",
        expected="the file as it was written",
        remedy=f"delete {path.parent} and run again, or restore it from a copy",
    )


def check_identity(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse what belongs to another run.

    Raises:
        StoreError: an entry differs; the first such key is named, with both values.
    """
    asked = plain(asked)
    for key in sorted(stored.keys() | asked.keys()):
        if key not in stored or key not in asked or stored[key] != asked[key]:
            has = repr(stored[key]) if key in stored else "nothing"
            wants = repr(asked[key]) if key in asked else "nothing"
            raise StoreError(
                f"{path} belongs to another run: its {key} is {has}, this run's is {wants}",
                expected=f"a store whose {key} is {wants}",
                remedy=f"choose another directory, delete {path}, or go back to the settings that wrote it",
            )


def append_journal(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append records, one line each, durably; a line that an earlier process left unfinished is cut off first."""
    lines = [json.dumps(record, sort_keys=True) for record in records]
    content = "".join(f"{zlib.crc32(line.encode()):08x} {line}\n" for line in lines).encode()
    with writing(path), path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read the records whose lines are finished.

    Raises:
        StoreError: a finished line was altered.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise altered(path, f"it cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if line[:9] != f"{zlib.crc32(line[9:]):08x} ".encode():
            raise altered(path, f"line {number} does not match its checksum")
    return [json.loads(line[9:]) for line in lines]
