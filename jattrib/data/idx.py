"""The IDX file format of the MNIST family: a magic number, the dimensions, the values, all big-endian."""

import gzip
import math
import struct
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from jattrib.core.errors import InvalidInputError, StoreError

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_CODES = {np.dtype(name).newbyteorder("="): code for code, name in _DTYPES.items()}
_GZIP_MAGIC = b"\x1f\x8b"
_MOST_DIMENSIONS = 64  # of NumPy's arrays
_AGAIN = "fetch the file again; it is damaged or is not an IDX file"


def read(path: str | Path) -> Shaped[np.ndarray, "..."]:
    """Read one IDX file, compressed with gzip or plain.

    The header is `0, 0, type, rank` (one byte each) followed by `rank` dimensions (32 bits each); the values follow in
    row-major order.

    Returns:
        The array, in native byte order.

    Raises:
        StoreError: there is no such file, or it cannot be read.
        InvalidInputError: the header is not that of an IDX file, values are missing, or bytes are left over.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
        with gzip.GzipFile(path) if packed else path.open("rb") as stream:
            return _parse(stream, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidInputError(
            f"{path}: damaged gzip data ({error})", expected="a whole gzip file", remedy=_AGAIN
        ) from error
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror or error}",
            expected="a readable IDX file",
            remedy="check the path and its permissions",
        ) from error


def _parse(stream: BufferedIOBase, path: Path) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or not 1 <= magic[3] <= _MOST_DIMENSIONS:
        raise InvalidInputError(
            f"{path}: magic number {magic.hex(' ') or '(empty file)'}",
            expected=f"00 00, a type among {', '.join(f'{code:02x}' for code in _DTYPES)}, and a rank of at least 01 "
            f"and at most {_MOST_DIMENSIONS:02x}",
            remedy=_AGAIN,
        )
    rank = magic[3]
    header = stream.read(4 * rank)
    if len(header) < 4 * rank:
        raise InvalidInputError(
            f"{path}: {len(header)} bytes of dimensions", expected=f"{4 * rank} bytes for rank {rank}", remedy=_AGAIN
        )
    shape = struct.unpack(f">{rank}I", header)
    dtype = np.dtype(_DTYPES[magic[2]])
    if math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
        raise InvalidInputError(f"{path}: dimensions {shape}", expected="those of an array", remedy=_AGAIN)
    size = math.prod(shape) * dtype.itemsize
    values = _values(stream, size, piece=path.stat().st_size)
    if len(values) < size:
        raise InvalidInputError(
            f"{path}: truncated, {len(values):,} bytes of values",
            expected=f"{size:,} bytes for shape {shape}",
            remedy=_AGAIN,
        )
    if stream.read(1):
        raise InvalidInputError(
            f"{path}: bytes after the last value",
            expected=f"exactly {size:,} bytes of values for shape {shape}",
            remedy=_AGAIN,
        )
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _values(stream: BufferedIOBase, size: int, *, piece: int) -> bytes:
    """Read up to `size` bytes, by pieces: what a damaged header asks for need not fit into memory."""
    pieces = []
    while size and (read := stream.read(min(size, piece))):
        pieces.append(read)
        size -= len(read)
    return b"".join(pieces)


def pack(array: Shaped[np.ndarray, "..."]) -> bytes:
    """Return `array` as the bytes of a plain IDX file; `read` is its inverse.

    Raises:
        InvalidInputError: the dtype is not one of the format's six, or the array has no dimension.
    """
    code = _CODES.get(array.dtype)
    if code is None or array.ndim == 0:
        raise InvalidInputError(
            f"an array of dtype {array.dtype} and rank {array.ndim}",
            expected=f"rank of at least 1 and a dtype among {', '.join(str(d) for d in _CODES)}",
            remedy="cast the array, to uint8 for images and labels",
        )
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(_DTYPES[code]).tobytes()
