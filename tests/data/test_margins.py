import struct

import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.data import margins


def folder(path, names, points=3):
    path.mkdir()
    for row, name in enumerate(names):
        np.save(path / name, np.full(points, row, np.float32))
    return path


def test_a_file_holds_models_by_points(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    values[0, 0] = np.inf
    np.save(tmp_path / "all.npy", values)
    found = margins.read(tmp_path / "all.npy")
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, values)
    assert margins.read(str(tmp_path / "all.npy"), models=1).tolist() == [[np.inf, 1, 2]]


@pytest.mark.parametrize("pattern", ["id_{}_epoch_23.npy", "val_margins_{}.npy", "resnet9-{}.npy"])
def test_a_folder_holds_a_file_a_model_in_the_order_of_their_numbers(tmp_path, pattern):
    numbers = [10, 9, 2, 100]
    path = folder(tmp_path / "margins", [pattern.format(number) for number in numbers])
    (path / "README.md").write_text("not an array")
    assert margins.read(path)[:, 0].tolist() == [2, 1, 0, 3]
    assert margins.read(path, models=2).shape == (2, 3)


def test_refuses_by_name(tmp_path):
    with pytest.raises(StoreError, match="nothing: no such file or folder"):
        margins.read(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="empty: a folder without NPY files"):
        margins.read(tmp_path / "empty")
    alike = folder(tmp_path / "alike", ["a_1.npy", "b_1.npy"])
    with pytest.raises(InvalidInputError, match=r"a_1\.npy and others, which no number tells apart"):
        margins.read(alike)
    uneven = folder(tmp_path / "uneven", ["1.npy", "2.npy"])
    np.save(uneven / "3.npy", np.zeros(4))
    with pytest.raises(InvalidInputError, match=r"3\.npy: margins of 4 points\n.*3, as in 1\.npy"):
        margins.read(uneven)
    with pytest.raises(InvalidInputError, match=r"margins of 2 models\n.*5 of them"):
        margins.read(folder(tmp_path / "few", ["1.npy", "2.npy"]), models=5)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"float64 of shape \(3,\)\n.*\[model, point\]"),
        (np.zeros((2, 0)), r"shape \(2, 0\)"),
        (np.array([["a"]]), "<U1"),
        (np.array([[1.0, np.nan]]), "1 of 2 margins are NaN"),
        (np.array([[None]], dtype=object), "allow_pickle=False"),
    ],
)
def test_refuses_arrays_that_are_no_margins(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InvalidInputError, match=message):
        margins.read(tmp_path / "a.npy")


def test_refuses_files_that_are_no_arrays(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00")
    with pytest.raises(InvalidInputError, match=r"a\.npy: .*\n.*an NPY file"):
        margins.read(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"b\.npy: "):
        margins.read(tmp_path / "b.npy")
    np.savez(tmp_path / "c.npz", np.zeros((2, 2)))
    (tmp_path / "c.npz").rename(tmp_path / "c.npy")
    with pytest.raises(InvalidInputError, match=r"c\.npy: the magic string is not correct"):
        margins.read(tmp_path / "c.npy")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (2,",
        b"{'descr': '<f8', 'fortran_order': False, [1]: (2,)}",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,)}",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999,)}",
    ],
)
def test_refuses_damaged_headers_by_name(tmp_path, header):
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header + b"\n" + b"\0" * 16
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"a\.npy: .*(.|\n)*an NPY file"):
        margins.read(tmp_path / "a.npy")


def test_a_path_that_cannot_be_looked_at_is_refused(tmp_path):
    with pytest.raises(StoreError, match="File name too long"):
        margins.read(tmp_path / ("x" * 300))


@pytest.mark.parametrize("models", [0, -1])
def test_refuses_to_read_no_models(tmp_path, models):
    np.save(tmp_path / "id_0.npy", np.zeros(2))
    for path in (tmp_path, tmp_path / "id_0.npy"):
        with pytest.raises(InvalidInputError, match=f"models = {models}"):
            margins.read(path, models=models)
