import gzip
import struct

import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.data import idx

PLAIN = bytes([0, 0, 0x08, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_reads_bytes_written_by_hand(tmp_path, compress):
    file = tmp_path / "named-as-it-likes"
    file.write_bytes(compress(PLAIN))
    np.testing.assert_array_equal(idx.read(file), [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("code", "letter", "dtype"),
    [(8, "B", "u1"), (9, "b", "i1"), (0x0B, "h", "i2"), (0x0C, "i", "i4"), (0x0D, "f", "f4"), (0x0E, "d", "f8")],
)
def test_every_type_is_big_endian_in_the_file_and_native_in_memory(tmp_path, code, letter, dtype):
    values = [1, 2, 100]
    content = bytes([0, 0, code, 1, 0, 0, 0, 3]) + struct.pack(f">3{letter}", *values)
    (tmp_path / "a").write_bytes(content)
    array = idx.read(tmp_path / "a")
    assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(array, values)
    assert idx.pack(array) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a: magic number \(empty file\)"),
        (b"\0\0\x08", "magic number 00 00 08"),
        (b"\1" + PLAIN[1:], "magic number 01 00 08 02"),
        (b"\0\0\x07" + PLAIN[3:], "magic number 00 00 07 02\n  expected: 00 00, a type among 08, 09"),
        (b"\0\0\x08\0", "magic number 00 00 08 00"),
        (b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"\1", "magic number 00 00 08 ff\n.* 01 and at most 40"),
        (
            PLAIN[:4] + b"\0\1\0\0" * 2 + PLAIN[12:],
            r"truncated, 6 bytes of values\n  expected: 4,294,967,296 bytes for shape \(65536, 65536\)",
        ),
        (
            gzip.compress(PLAIN[:4] + b"\x7f\0\0\0" * 2 + PLAIN[12:], mtime=0),
            r"truncated, 6 bytes of values\n  expected: 4,539,909,899,366,170,624 bytes",
        ),
        (PLAIN[:4] + b"\xff" * 8 + PLAIN[12:], r"dimensions \(4294967295, 4294967295\)\n  expected: those of an array"),
        (PLAIN[:3] + b"\3\0\0\0\0" + b"\xff" * 8, r"dimensions \(0, 4294967295, 4294967295\)"),
        (PLAIN[:9], "5 bytes of dimensions\n  expected: 8 bytes for rank 2"),
        (PLAIN[:-1], r"truncated, 5 bytes of values\n  expected: 6 bytes for shape \(2, 3\)"),
        (PLAIN + b"\0", "bytes after the last value\n  expected: exactly 6 bytes"),
        (gzip.compress(PLAIN, mtime=0)[:-9], "damaged gzip data"),
        (gzip.compress(PLAIN, mtime=0)[:-8] + b"\0" * 8, "damaged gzip data"),
        (gzip.compress(PLAIN[:-1], mtime=0), "truncated, 5 bytes"),
        (gzip.compress(PLAIN + b"\0", mtime=0), "bytes after the last value"),
    ],
)
def test_a_damaged_file_is_refused_by_name_with_a_remedy(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InvalidInputError, match=message) as error:
        idx.read(tmp_path / "a")
    assert str(tmp_path / "a") in error.value.got
    assert "fetch the file again" in error.value.remedy


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(StoreError, match=r"nothing-here: No such file.*\n.*\n.*check the path"):
        idx.read(tmp_path / "nothing-here")
    with pytest.raises(StoreError, match="Is a directory"):
        idx.read(tmp_path)


def test_pack_refuses_what_the_format_has_no_code_for():
    with pytest.raises(InvalidInputError, match="dtype int64 and rank 1"):
        idx.pack(np.arange(3))
    with pytest.raises(InvalidInputError, match="rank 0"):
        idx.pack(np.array(3, np.uint8))
