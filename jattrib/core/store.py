"""What is kept on disk, all of it verified when read: rows (tensorstore), and the door to parameters and JSON."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from jaxtyping import Bool, Integer, PyTree
from numpy.typing import DTypeLike

from jattrib.core import files, mesh, params, tree
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.files import read_json, write_json
from jattrib.core.params import load_params, save_params
from jattrib.core.sources import check_indices

__all__ = ["Rows", "identified", "load_params", "read_json", "row_arrays", "save_params", "write_json"]

JOURNAL, ARRAYS = params.ROWS, "arrays"

UNREADABLE = (ValueError, IndexError, RuntimeError, OSError)
"""What tensorstore raises for metadata or data that it cannot read or decode."""

RowArrays = Mapping[str, tuple[Sequence[int], DTypeLike]]
"""By name, the shape of one row and its dtype."""


def row_arrays(batch: PyTree) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return, by path, what one row of each leaf of a batch is: the `arrays` of a store for such batches.

    `batch` may be abstract (`jax.eval_shape`), and of typed keys a store has the words, as `mesh.fetch` returns them.
    """
    named = tree.to_names(
        jax.tree.map(lambda leaf: jax.eval_shape(mesh.words, leaf) if mesh.is_key(leaf) else leaf, batch)
    )
    return {name: (tuple(leaf.shape[1:]), np.dtype(leaf.dtype)) for name, leaf in named.items()}


def identified(found: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return one identity of what was found out and what a caller gives, who cannot say otherwise of what was found.

    >>> identified({"data": "3f2a"}, {"data": "CIFAR", "model": "wide"})
    {'data': '3f2a', 'identity.data': 'CIFAR', 'model': 'wide'}
    """
    return {**found, **{f"identity.{name}" if name in found else name: each for name, each in (given or {}).items()}}


class Rows:
    """Named arrays of rows on disk, written chunk by chunk in any order; a `Source` of dictionaries, too.

    A chunk counts as complete once its data and then its checksum are durably written, so a process killed at any
    moment leaves it complete or not at all.  Whatever is read is verified.  Several processes of one machine may open
    a store; only one should write to it.

    Attributes:
        path: the directory.
        length: rows in each array.
        chunk: rows written, recorded and verified together.
        arrays: by name, the shape of one row and its dtype.
        identity: what the rows were computed from (digests, seeds, settings).
    """

    def __init__(self, path: Path):
        self.path = path.absolute()  # or a change of directory would lead elsewhere
        self.refresh()

    @classmethod
    def create(
        cls, path: Path, *, arrays: RowArrays, length: int, chunk: int, identity: Mapping[str, Any] | None = None
    ) -> "Rows":
        """Make an empty store.

        Raises:
            InvalidInputError: a name, `length` or `chunk` will not do.
            StoreError: the directory is taken, or cannot be written.
        """
        path = Path(path)
        _check_layout(arrays, length, chunk)
        described = {name: {"shape": list(s), "dtype": np.dtype(d).name} for name, (s, d) in arrays.items()}
        with _writing(path):
            target = path.resolve()  # of a link, the directory that it names
            partial = files.beside(target)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise StoreError(
                    f"{path} exists and is not empty",
                    expected="a directory for a new store",
                    remedy="choose another directory, or open the store that is there",
                )
            try:
                partial.mkdir(parents=True)
                for name, each in described.items():
                    _open_array(partial, name, length, chunk, each, create=True)
                (partial / JOURNAL).touch()
                manifest = {"format": files.FORMAT, "length": length, "chunk": chunk, "arrays": described}
                files.write_manifest(partial / files.MANIFEST, {**manifest, "identity": dict(identity or {})})
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            files.sync_directory(target.parent)
        return cls(path)

    @classmethod
    def open(cls, path: Path, *, identity: Mapping[str, Any] | None = None) -> "Rows":
        """Open a store, and refuse it if `identity` is given and is not the store's.

        Raises:
            StoreError: there is none, it was altered, or it belongs to another run.
        """
        path = Path(path)
        if not files.is_there(path / files.MANIFEST):
            raise StoreError(
                f"{path} holds no store: it has no {files.MANIFEST}",
                expected="a directory that `Rows.create` made",
                remedy="correct the path, or run again what writes it",
            )
        rows = cls(path)
        if identity is not None:
            files.check_identity(path, rows.identity, identity)
        return rows

    @classmethod
    def create_or_open(
        cls, path: Path, *, arrays: RowArrays, length: int, chunk: int, identity: Mapping[str, Any] | None = None
    ) -> "Rows":
        """Open the store, made or extended to `length` if need be; several processes may call it at once.

        Raises:
            InvalidInputError: a name, `length` or `chunk` will not do.
            StoreError: it holds other arrays, is longer, was altered, or belongs to another run.
        """
        path = Path(path)
        if not files.is_there(path / files.MANIFEST):
            try:
                return cls.create(path, arrays=arrays, length=length, chunk=chunk, identity=identity)
            except StoreError:
                if not files.is_there(path / files.MANIFEST):  # else another process was faster
                    raise
        rows = cls.open(path, identity=identity or {})
        files.check_identity(path, _layout(rows.chunk, rows.arrays), _layout(chunk, arrays))
        if length < rows.length:
            raise StoreError(
                f"{path} has {rows.length} rows, this run has {length}",
                expected=f"a store of at most {length} rows",
                remedy="choose another directory, or open the longer store and read its first rows",
            )
        rows.extend(length)
        return rows

    def refresh(self) -> None:
        """Look again at what is on disk: another process may have written."""
        manifest = files.read_manifest(self.path / files.MANIFEST)
        if manifest.get("format") != files.FORMAT:
            raise StoreError(
                f"{self.path} has the format {manifest.get('format')}",
                expected=f"the format {files.FORMAT}",
                remedy="read it with the version of jattrib that wrote it, or delete it and run again",
            )
        if "length" not in manifest:
            raise StoreError(
                f"{self.path} holds parameters, no rows",
                expected="a directory that `Rows.create` made",
                remedy="correct the path, or load them with `load_params`",
            )
        self.length, self.chunk, self.identity = manifest["length"], manifest["chunk"], manifest["identity"]
        self.arrays = {name: (tuple(each["shape"]), np.dtype(each["dtype"])) for name, each in
                       manifest["arrays"].items()}  # fmt: skip
        self._handles: dict[str, tensorstore.TensorStore] = {}
        self._recorded: dict[int, tuple[int, dict[str, str]]] = {}
        self._record(files.read_journal(self.path / JOURNAL))

    def _record(self, records: Sequence[Mapping[str, Any]]) -> None:
        for each in records:
            if each["stop"] > each["start"]:
                self._recorded[each["start"]] = each["stop"], each["sha256"]
            else:
                self._recorded.pop(each["start"], None)

    def __len__(self) -> int:
        return self.length

    @property
    def completed(self) -> Bool[np.ndarray, " chunks"]:
        """Which chunks are complete; a last one that was short before an extension is not."""
        starts = range(0, self.length, self.chunk)
        return np.array([self._stop(start) == min(start + self.chunk, self.length) for start in starts], bool)

    def _stop(self, start: int) -> int:
        return self._recorded.get(start, (start, {}))[0]

    def write(self, start: int, rows: Mapping[str, np.ndarray]) -> None:
        """Write whole chunks of all the arrays from row `start` on; the last chunk of the store may be short.

        Raises:
            InvalidInputError: the rows are not whole chunks of these arrays.
            StoreError: the directory cannot be written.
        """
        rows = {name: _native(each) for name, each in rows.items()}
        stop = start + self._check_rows(start, rows)
        handles = {name: self._handle(name) for name in rows}
        with _writing(self.path):
            pending = [handles[name][start:stop].write(each) for name, each in rows.items()]
            for each in pending:
                each.result()
        bounds = [(first, min(first + self.chunk, stop)) for first in range(start, stop, self.chunk)]
        sums = [{name: _sha256(rows[name][a - start : b - start]) for name in self.arrays} for a, b in bounds]
        self._journal([{"start": a, "stop": b, "sha256": each} for (a, b), each in zip(bounds, sums, strict=True)])

    def _journal(self, records: list[dict[str, Any]]) -> None:
        files.append_journal(self.path / JOURNAL, records)
        self._record(records)

    def discard(self, start: int, stop: int) -> None:
        """Forget the chunks that hold any of the rows, and delete their data: they are then to be computed again.

        Raises:
            StoreError: the directory cannot be written.
        """
        start, stop = max(start, 0), min(stop, self.length)
        firsts = range(start // self.chunk * self.chunk, stop, self.chunk) if start < stop else ()
        self._journal([{"start": first, "stop": first, "sha256": {}} for first in firsts])
        with files.writing(self.path):
            for name, (shape, _) in self.arrays.items():
                for first in firsts:  # left there, a truncated last chunk would be read to be filled up
                    place = [str(first // self.chunk), *("0" for _ in shape)]
                    _array_path(self.path, name).joinpath("c", *place).unlink(missing_ok=True)

    def extend(self, length: int) -> None:
        """Make the store longer; a last chunk that was short can still be read, but is no longer complete.

        Raises:
            InvalidInputError: `length` is less than what it has.
            StoreError: the directory cannot be written.
        """
        self.refresh()
        if length < self.length:
            raise InvalidInputError(
                f"length = {length}", expected=f"at least the {self.length} rows of {self.path}",
                remedy="make another store for fewer rows",
            )  # fmt: skip
        if length == self.length:
            return
        handles = {name: self._handle(name) for name in self.arrays}
        with _writing(self.path):
            for name, (shape, _) in self.arrays.items():
                if handles[name].shape[0] < length:  # it is longer where an extension was killed
                    resized = handles[name].resize(exclusive_max=[length, *shape], expand_only=True)
                    self._handles[name] = resized.result()
        manifest = files.read_manifest(self.path / files.MANIFEST)
        files.write_manifest(self.path / files.MANIFEST, {**manifest, "length": length})
        self.length = length

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the rows of one array, verified.

        Raises:
            InvalidInputError: there is no such array, or no such rows.
            StoreError: some rows are not complete, are missing, truncated or altered.
        """
        stop = int(self.length if stop is None else stop)
        if name not in self.arrays or not 0 <= start <= stop <= self.length:
            raise InvalidInputError(
                f"rows {start}:{stop} of {name!r}",
                expected=f"rows within 0:{self.length} of one of {', '.join(map(repr, self.arrays))}",
                remedy=f"see what {self.path} holds: `Rows.arrays`, `Rows.length`",
            )
        shape, dtype = self.arrays[name]
        rows = np.empty((stop - start, *shape), dtype)
        for first in range(start // self.chunk * self.chunk, stop, self.chunk):
            low, high = max(first, start), min(first + self.chunk, stop)
            if self._stop(first) < high:
                raise StoreError(
                    f"rows {self._stop(first)}:{high} of {name!r} in {self.path} are not there",
                    expected="rows that were computed",
                    remedy="run again what writes them: it goes on from where it stopped",
                )
            rows[low - start : high - start] = self._chunk(name, first)[low - first : high - first]
        return rows

    def _chunk(self, name: str, start: int) -> np.ndarray:
        """Return one chunk, as far as it was recorded, verified."""
        stop, sums = self._recorded[start]
        handle = self._handle(name)
        try:
            rows = np.asarray(handle[start:stop].read().result())
            how = "" if _sha256(rows) == sums[name] else "they do not match their checksum"
        except UNREADABLE as error:
            rows, how = None, str(error).splitlines()[0]
        if rows is None or how:
            forget = f"`Rows.open(path).discard({start}, {stop})`"
            raise StoreError(
                f"rows {start}:{stop} of {name!r} in {self.path} are damaged: {how}",
                expected="rows as they were written, with the checksums of the journal",
                remedy=f"delete {self.path}, or {forget}, and run again to recompute them",
            )
        return rows

    def array(self, name: str) -> np.ndarray:
        """Return the whole of one array, verified; it raises what `read` raises."""
        return self.read(name)

    def take(self, indices: Integer[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        """Return the rows at `indices` of every array, by name; it raises what `read` raises."""
        indices = np.asarray(indices)
        check_indices(indices)
        taken = {name: np.empty((len(indices), *shape), dtype) for name, (shape, dtype) in self.arrays.items()}
        for number in np.unique(indices // self.chunk):
            here = indices // self.chunk == number
            first = int(number) * self.chunk
            wanted = indices[here] - first
            for name in self.arrays:
                taken[name][here] = self.read(name, first, first + int(wanted.max()) + 1)[wanted]
        return taken

    def _handle(self, name: str) -> tensorstore.TensorStore:
        if name not in self._handles:
            shape, dtype = self.arrays[name]
            each = {"shape": list(shape), "dtype": dtype.name}
            try:
                self._handles[name] = _open_array(self.path, name, self.length, self.chunk, each, create=False)
            except UNREADABLE as error:
                raise files.altered(self.path / ARRAYS, f"the array {name!r} cannot be opened: {error}") from error
        return self._handles[name]

    def _check_rows(self, start: int, rows: Mapping[str, np.ndarray]) -> int:
        counts = {name: len(each) for name, each in rows.items() if each.ndim}
        count = next(iter(counts.values()), 0)
        got = {name: (each.shape[1:], each.dtype) for name, each in rows.items()}
        if got != self.arrays or set(counts.values()) != {count}:
            described = [f"{each.dtype.name}{list(each.shape)} {name!r}" for name, each in rows.items()]
            wanted = [f"{dtype.name}{[count, *shape]} {name!r}" for name, (shape, dtype) in self.arrays.items()]
            raise InvalidInputError(
                f"the rows {', '.join(described)} for {self.path}",
                expected=", ".join(wanted),
                remedy="write the arrays that the store was created for, in their dtypes",
            )
        end = start + count
        if (
            start < 0
            or start % self.chunk
            or end > self.length
            or (end % self.chunk and end != self.length)
            or not count
        ):
            raise InvalidInputError(
                f"rows {start}:{end} for {self.path}",
                expected=f"whole chunks of {self.chunk} of {self.length} rows",
                remedy="write from a multiple of the chunk to another, or to the end",
            )
        return count


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    with files.writing(path):
        try:
            yield
        except InvalidInputError:
            raise
        except (ValueError, RuntimeError) as error:  # what tensorstore makes of the operating system's refusals
            raise OSError(str(error).splitlines()[0]) from error


def _native(array: np.ndarray) -> np.ndarray:
    dtype = np.asarray(array).dtype.newbyteorder("=")
    return np.ascontiguousarray(array, dtype).reshape(np.shape(array))


def _layout(chunk: int, arrays: RowArrays) -> dict[str, Any]:
    rows = {f"row of {name!r}": f"{np.dtype(dtype).name}{list(shape)}" for name, (shape, dtype) in arrays.items()}
    return {"chunk": chunk, **rows}


def _check_layout(arrays: RowArrays, length: int, chunk: int) -> None:
    good = all(name.strip(".") and "\0" not in name for name in arrays)
    if not arrays or not good or length < 1 or chunk < 1:
        raise InvalidInputError(
            f"a store of the arrays {list(arrays)}, length {length}, chunk {chunk}",
            expected="at least one array, each with a name, one row or more, and a chunk of one row or more",
            remedy="check what is to be stored: an empty source, perhaps",
        )
    for name, (_, dtype) in arrays.items():
        if not _is_storable(np.dtype(dtype)):
            raise InvalidInputError(
                f"a store of {np.dtype(dtype)} rows {name!r}",
                expected="numbers or truths",
                remedy="store numbers that stand for them, or write them with `core.store.write_json`",
            )


def _is_storable(dtype: np.dtype) -> bool:
    try:
        tensorstore.dtype(dtype.name)
    except (TypeError, ValueError):
        return False
    return True


def _array_path(path: Path, name: str) -> Path:
    return path.absolute() / ARRAYS / name.replace("%", "%25").replace("/", "%2F")


def _open_array(
    path: Path, name: str, length: int, chunk: int, described: Mapping[str, Any], *, create: bool
) -> tensorstore.TensorStore:
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(_array_path(path, name))},
        "metadata": {
            "data_type": described["dtype"],
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [chunk, *(max(1, size) for size in described["shape"])]},
            },
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "store_data_equal_to_fill_value": True,
        "open": not create,
        "create": create,
    }
    if create:
        spec["metadata"]["shape"] = [length, *described["shape"]]
    return tensorstore.open(spec).result()


def _sha256(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data).hexdigest()
