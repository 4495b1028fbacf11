"""Arrays from and to safetensors files: a JSON header with each array's dtype, shape and bytes, then the bytes.

Source: the format's description in the repository huggingface/safetensors, README, "Format".
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jattrib.core import files
from jattrib.core.errors import InvalidInputError, StoreError

_DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip
_LONGEST_HEADER = 100_000_000
_MOST_DIMENSIONS = 64  # of NumPy's arrays
_AGAIN = "fetch the file again; it is damaged or is not a safetensors file"


def read(path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return the arrays of a safetensors file by name, mapped into memory and read-only.

    Raises:
        StoreError: there is no such file, or it cannot be read.
        InvalidInputError: the header is unsound, a dtype is unknown, or the arrays do not fill the file exactly.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise _unsound(
                    path, f"a header of {length:,} bytes in a file of {size:,}", "a header that fits the file"
                )
            header = stream.read(length)
        data = np.memmap(path, np.uint8, mode="r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror or error}",
            expected="a readable safetensors file",
            remedy="check the path and its permissions",
        ) from error
    entries = _entries(path, header)
    _check_cover(path, entries, len(data))
    return {name: _array(path, name, entry, data) for name, entry in entries.items()}


def write(
    path: str | Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays, in the order of their names; what was there before stays until the new file is complete.

    Raises:
        InvalidInputError: an array has a dtype that the format does not know.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    known = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(arrays):
        array = arrays[name]
        if array.dtype.newbyteorder("<") not in known:
            raise InvalidInputError(
                f"{name} of dtype {array.dtype}", expected=f"one of {', '.join(_DTYPES)}", remedy="cast it"
            )
        begin, end = end, end + array.nbytes
        kind = known[array.dtype.newbyteorder("<")]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = files.beside(path)
        try:
            with partial.open("wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                for name in sorted(arrays):
                    little = np.ascontiguousarray(arrays[name]).astype(arrays[name].dtype.newbyteorder("<"), copy=False)
                    stream.write(little.reshape(-1).view(np.uint8).data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _entries(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for entry in entries.values():
            (begin, end), shape = entry["data_offsets"], entry["shape"]
            if not (isinstance(shape, list) and isinstance(entry["dtype"], str)):
                raise TypeError("a shape that is no list, or a dtype that is no text")
            if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
                raise ValueError("negative or fractional sizes")
            if len(shape) > _MOST_DIMENSIONS or math.prod(n or 1 for n in shape) >= 2**60:
                raise ValueError("more or larger dimensions than an array has")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unsound(
            path, f"an unreadable header ({error})", "JSON with dtype, shape and data_offsets an array"
        ) from error
    return entries


def _check_cover(path: Path, entries: dict[str, Any], size: int) -> None:
    at = 0
    for begin, end in sorted(entry["data_offsets"] for entry in entries.values()):
        if begin != at or end < begin:
            raise _unsound(
                path, f"an array at bytes {begin} to {end}", f"one that begins at {at}, without gap or overlap"
            )
        at = end
    if at != size:
        raise _unsound(path, f"{size:,} bytes of values", f"{at:,}, as the header says")


def _array(path: Path, name: str, entry: dict[str, Any], data: np.ndarray) -> np.ndarray:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise _unsound(path, f"dtype {entry['dtype']} of {name}", f"one of {', '.join(_DTYPES)}")
    begin, end = entry["data_offsets"]
    if (wanted := math.prod(entry["shape"]) * dtype.itemsize) != end - begin:
        raise _unsound(path, f"{end - begin:,} bytes of {name}", f"{wanted:,} for shape {tuple(entry['shape'])}")
    return data[begin:end].view(dtype).reshape(entry["shape"])


def _unsound(path: Path, got: str, expected: str) -> InvalidInputError:
    return InvalidInputError(f"{path}: {got}", expected=expected, remedy=_AGAIN)
