import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.data import safetensors

W = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]}
VALUES = struct.pack("<6fq", 1, 2, 3, 4, 5, 6, -7)


def write(path, header, values):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
    return path


def test_reads_bytes_written_by_hand(tmp_path):
    arrays = safetensors.read(write(tmp_path / "a", {"__metadata__": {"by": "hand"}, "b": B, "w": W}, VALUES))
    assert set(arrays) == {"w", "b"}
    np.testing.assert_array_equal(arrays["w"], np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    np.testing.assert_array_equal(arrays["b"], np.array([-7]))
    assert not arrays["w"].flags.writeable


def test_scalars_empty_arrays_and_bfloat16(tmp_path):
    header = {
        "half": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]},
        "none": {"dtype": "F64", "shape": [0, 4], "data_offsets": [2, 2]},
    }
    arrays = safetensors.read(write(tmp_path / "a", header, b"\xc0\x3f"))
    assert arrays["half"].dtype == jnp.bfloat16
    assert float(arrays["half"]) == 1.5
    assert arrays["none"].shape == (0, 4)
    assert safetensors.read(write(tmp_path / "b", {}, b"")) == {}


@pytest.mark.parametrize(
    ("header", "values", "message"),
    [
        ({"w": W, "b": B}, VALUES[:-1], "31 bytes of values\n  expected: 32, as the header says"),
        ({"w": W, "b": B}, VALUES + b"\0", "33 bytes of values"),
        (
            {"w": W, "b": B | {"data_offsets": [20, 28]}},
            VALUES,
            "an array at bytes 20 to 28\n  expected: one that begins at 24",
        ),
        ({"b": B}, VALUES, "an array at bytes 24 to 32\n  expected: one that begins at 0"),
        ({"w": W | {"shape": [2, 2]}}, VALUES[:24], r"24 bytes of w\n  expected: 16 for shape \(2, 2\)"),
        ({"w": W | {"dtype": "F4"}}, VALUES[:24], "dtype F4 of w\n  expected: one of F64, F32"),
        ({"w": W | {"shape": [-2, -3]}}, VALUES[:24], "an unreadable header .negative or fractional sizes"),
        ({"w": {"dtype": "F32"}}, VALUES, "an unreadable header"),
        (b"{", VALUES, "an unreadable header"),
        (b"[]", VALUES, "an unreadable header"),
        (b'{"w":' + b"[" * 100_000, VALUES, "an unreadable header"),
        ({"w": W | {"dtype": ["F32"]}}, VALUES[:24], "an unreadable header .*a dtype that is no text"),
        ({"w": W | {"dtype": 4}}, VALUES[:24], "an unreadable header .*a dtype that is no text"),
        ({"w": W | {"shape": {}, "data_offsets": [0, 4]}}, VALUES[:4], "an unreadable header .a shape that is no list"),
        ({"w": W | {"shape": [True, 6]}}, VALUES[:24], "an unreadable header .negative or fractional sizes"),
        ({"w": W | {"data_offsets": [False, 24]}}, VALUES[:24], "an unreadable header .negative or fractional sizes"),
        ({"w": W | {"shape": [0, 2**64], "data_offsets": [0, 0]}}, b"", "an unreadable header .more or larger dim"),
        ({"w": W | {"shape": [2**62] * 64}}, VALUES[:24], "an unreadable header .more or larger dim"),
        ({"w": W | {"shape": [2**62] * 400}}, VALUES[:24], "an unreadable header .more or larger dim"),
        ({"w": W | {"shape": [6] + [1] * 64}}, VALUES[:24], "an unreadable header .more or larger dim"),
        ({"w": W | {"shape": [2**59]}}, VALUES[:24], "24 bytes of w\n  expected: 2,305,843,009,213,693,952 for"),
    ],
)
def test_unsound_files_are_refused_with_what_is_wrong(tmp_path, header, values, message):
    with pytest.raises(InvalidInputError, match=message) as error:
        safetensors.read(write(tmp_path / "a", header, values))
    assert str(tmp_path / "a") in error.value.got


def test_a_header_longer_than_its_file_is_not_read(tmp_path):
    (tmp_path / "a").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(InvalidInputError, match="a header of 1,152,921,504,606,846,976 bytes in a file of 10"):
        safetensors.read(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\0")
    with pytest.raises(InvalidInputError, match="in a file of 1"):
        safetensors.read(tmp_path / "b")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(StoreError, match="none: No such file"):
        safetensors.read(tmp_path / "none")


def test_what_is_written_is_what_the_format_says(tmp_path):
    arrays = {"w": np.array([[1, 2, 3], [4, 5, 6]], np.float32), "b": np.array([-7]), "e": np.zeros((0, 2), np.int8)}
    path = tmp_path / "new" / "a"
    safetensors.write(path, {**arrays, "t": arrays["w"].T}, metadata={"format": "pt"})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt"}
    assert header["b"] == {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}
    assert header["w"]["data_offsets"] == [32, 56]
    assert content[8 + length + 32 :] == struct.pack("<6f", 1, 2, 3, 4, 5, 6)
    again = safetensors.read(path)
    np.testing.assert_array_equal(again["t"], arrays["w"].T)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
    with pytest.raises(InvalidInputError, match="c of dtype complex64"):
        safetensors.write(path, {"c": np.zeros(1, np.complex64)})
    assert path.read_bytes() == content
    assert [each.name for each in path.parent.iterdir()] == ["a"]
