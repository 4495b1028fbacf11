import gzip
import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.data import debian, excerpt, idx, vision


def write_fashion(folder, *, train=40, test=30, labels=None, images=None):
    """Write a small set of the same files; return its pixels and labels."""
    rng = np.random.default_rng(0)
    made = {}
    for split, n in (("train", train), ("test", test)):
        x = rng.integers(0, 256, (n, 28, 28), np.uint8) if images is None else images
        y = (np.arange(n) % 10).astype(np.uint8) if labels is None else labels
        for name, array in zip(vision.FASHION_MNIST_FILES[split], (x, y), strict=True):
            (folder / name).write_bytes(idx.pack(array))
        made[split] = x, y
    return made


def test_normalise_follows_its_formula_and_to_images_inverts_it_on_every_pixel():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    inputs = vision.normalise(pixels)
    assert inputs.dtype == np.float32
    np.testing.assert_allclose(inputs, (pixels / 255.0 - 0.2860) / 0.3530, atol=1e-6)
    np.testing.assert_array_equal(vision.to_images(inputs), pixels)


def test_to_images_of_digits_spans_the_usual_range():
    pixels = np.array([0, 8, 16], np.uint8).reshape(3, 1, 1, 1)
    inputs = vision.normalise(pixels, vision.DIGITS_PIXELS)
    np.testing.assert_array_equal(vision.to_images(inputs, vision.DIGITS_PIXELS).ravel(), [0, 128, 255])


def test_the_excerpt_is_balanced_normalised_and_has_no_image_twice():
    train, test = vision.fashion_mnist_excerpt()
    assert train.inputs.shape == (5000, 28, 28, 1)
    assert test.inputs.shape == (1000, 28, 28, 1)
    assert (train.inputs.dtype, train.labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(np.bincount(train.labels), [500] * 10)
    np.testing.assert_array_equal(np.bincount(test.labels), [100] * 10)
    # The statistics are those of the full training set: of the excerpt they are nearly so.
    assert abs(train.inputs.mean()) < 0.01
    assert abs(train.inputs.std() - 1) < 0.01
    rows = [image.tobytes() for split in (train, test) for image in split.inputs]
    assert len(set(rows)) == 6000


def test_an_altered_excerpt_is_refused_by_name(tmp_path, monkeypatch):
    shutil.copytree(vision.EXCERPT_PATH, tmp_path / "copy")
    monkeypatch.setattr(vision, "EXCERPT_PATH", tmp_path / "copy")
    vision.fashion_mnist_excerpt()
    victim = tmp_path / "copy" / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(victim.read_bytes())
    content[100] ^= 1
    victim.write_bytes(content)
    wanted = hashlib.sha256((excerpt.EXCERPT_PATH / victim.name).read_bytes()).hexdigest()
    with pytest.raises(StoreError, match=rf"t10k-labels-idx1-ubyte\.gz: SHA-256 .*\n  expected: {wanted}\n.*reinstall"):
        vision.fashion_mnist_excerpt()
    victim.unlink()
    with pytest.raises(StoreError, match="no such file"):
        vision.fashion_mnist_excerpt()


def test_the_excerpt_command_chooses_by_hash_and_is_reproducible(tmp_path, monkeypatch):
    monkeypatch.setattr(excerpt, "SIZES", {"train": 20, "test": 10})
    source = tmp_path / "source"
    source.mkdir()
    made = write_fashion(source)
    for target in ("one", "two"):
        excerpt.make(source, tmp_path / target)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    monkeypatch.setattr(vision, "EXCERPT_PATH", tmp_path / "one")
    train, _ = vision.fashion_mnist_excerpt()
    images, labels = made["train"]
    chosen = []
    for label in range(10):
        members = [i for i in range(40) if labels[i] == label]
        members.sort(key=lambda i: hashlib.sha256(f"jattrib:fashion-mnist:train:{i}".encode()).hexdigest())
        chosen += members[:2]
    np.testing.assert_array_equal(vision.to_images(train.inputs)[..., 0], images[sorted(chosen)])


def test_the_excerpt_is_a_part_of_the_full_set_where_that_is_installed():
    if not vision.DEBIAN_PATH.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    for full, part in zip(vision.fashion_mnist(), vision.fashion_mnist_excerpt(), strict=True):
        where = {image.tobytes(): i for i, image in enumerate(full.inputs)}
        rows = [where[image.tobytes()] for image in part.inputs]
        np.testing.assert_array_equal(full.labels[rows], part.labels)


def test_choose_refuses_sizes_that_cannot_be_balanced():
    with pytest.raises(InvalidInputError, match="15 examples of 10 classes, the smallest of 2"):
        excerpt.choose(np.arange(20) % 10, 15, seed="s")
    with pytest.raises(InvalidInputError, match="30 examples of 10 classes"):
        excerpt.choose(np.arange(20) % 10, 30, seed="s")


def test_fashion_mnist_reads_a_folder(tmp_path):
    made = write_fashion(tmp_path)
    for split, (images, labels) in zip(vision.fashion_mnist(tmp_path), made.values(), strict=True):
        np.testing.assert_allclose(split.inputs[..., 0], (images / 255.0 - 0.2860) / 0.3530, atol=1e-6)
        np.testing.assert_array_equal(split.labels, labels)


def test_a_missing_file_says_what_was_looked_for_and_three_remedies(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(StoreError, match="no Fashion-MNIST file t10k-images-idx3-ubyte in") as error:
        vision.fashion_mnist(tmp_path)
    message = str(error.value)
    for part in (
        str(tmp_path / "t10k-images-idx3-ubyte.gz"),
        "apt-get install dataset-fashion-mnist",
        "path=",
        "fashion_mnist_excerpt()",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"labels": np.full(40, 10, np.uint8)}, r"idx1-ubyte: label 10 of example 0\n  expected: labels from 0 to 9"),
        ({"labels": np.zeros(39, np.uint8)}, "idx1-ubyte: 40 inputs and 39 labels"),
        (
            {"labels": np.zeros((40, 1), np.uint8)},
            r"uint8 values of shape \(40, 1\)\n  expected: uint8 of shape \(n\)",
        ),
        ({"images": np.zeros((40, 27, 28), np.uint8)}, r"idx3-ubyte: uint8 values of shape \(40, 27, 28\)"),
        ({"images": np.zeros((40, 28, 28), np.float32)}, r"float32 values of shape"),
        ({"images": np.zeros((0, 28, 28), np.uint8), "labels": np.zeros(0, np.uint8)}, "0 inputs and 0 labels"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, files, message):
    write_fashion(tmp_path, test=40, **files)
    with pytest.raises(InvalidInputError, match=message):
        vision.fashion_mnist(tmp_path)


def test_digits_are_scikit_learns():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    train, test = vision.digits()
    bunch = load_digits()
    inputs = np.concatenate([train.inputs, test.inputs])[..., 0]
    np.testing.assert_allclose(inputs, (bunch.images / 16 - 0.3053) / 0.3760, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), bunch.target)
    assert abs(inputs.mean()) < 1e-3
    assert abs(inputs.std() - 1) < 1e-3
    assert len(test.labels) == 297


def test_digits_without_scikit_learn_name_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InvalidInputError, match=r"digits, without scikit-learn(.|\n)*pip install scikit-learn"):
        vision.digits()


def test_npz_keeps_floats_scales_bytes_and_takes_names(tmp_path):
    floats, labels = np.linspace(-1, 1, 6).reshape(3, 2), np.array([0, 2, 1])
    pixels = np.array([[0], [51], [255]], np.uint8)
    np.savez(tmp_path / "a.npz", inputs=floats, pixels=pixels, labels=labels)
    dataset = vision.npz(tmp_path / "a.npz", classes=3)
    np.testing.assert_array_equal(dataset.inputs, floats)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert (dataset.inputs.dtype, dataset.labels.dtype) == (np.float64, np.int32)
    scaled = vision.npz(tmp_path / "a.npz", inputs="pixels").inputs
    np.testing.assert_array_equal(scaled, np.array([[0], [0.2], [1]], np.float32))


@pytest.mark.parametrize(("kept", "native"), [(">f2", "f2"), (">f4", "f4"), (">f8", "f8"), ("g", "f8"), (">g", "f8")])
def test_npz_makes_inputs_native(tmp_path, kept, native):
    values = np.array([[-1.5], [0.0], [1 / 3]], native)
    np.savez(tmp_path / "a.npz", inputs=values.astype(kept), labels=np.array([0, 2, 1], ">u8"))
    inputs, labels = vision.npz(tmp_path / "a.npz")
    assert inputs.dtype == np.dtype(native)
    assert inputs.dtype.isnative
    np.testing.assert_array_equal(inputs, values)
    np.testing.assert_array_equal(labels, [0, 2, 1])


@pytest.mark.parametrize("label", [2**31, 2**32, 2**63])
def test_npz_refuses_labels_that_int32_does_not_hold(tmp_path, label):
    np.savez(tmp_path / "a.npz", inputs=np.ones((3, 1)), labels=np.array([0, 2**31 - 1, label], np.uint64))
    for classes in (None, 2**40):
        with pytest.raises(InvalidInputError, match=f"label {label} of example 2\n"):
            vision.npz(tmp_path / "a.npz", classes=classes)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.ones((2, 1))}, "no array named labels; it has inputs"),
        (
            {"inputs": np.ones((2, 1)), "labels": np.array([0, 3])},
            "label 3 of example 1\n  expected: labels from 0 to 2",
        ),
        ({"inputs": np.ones((2, 1)), "labels": np.array([-1, 0])}, "label -1 of example 0"),
        ({"inputs": np.ones((2, 1)), "labels": np.eye(2)}, r"labels of dtype float64 and shape \(2, 2\)"),
        ({"inputs": np.ones((2, 1)), "labels": np.array([0.0, 1])}, "labels of dtype float64"),
        ({"inputs": np.ones((3, 1)), "labels": np.array([0, 1])}, "3 inputs and 2 labels"),
        ({"inputs": np.array([[1.0], [np.nan]]), "labels": np.array([0, 1])}, "NaN or infinity in example 1"),
        (
            {"inputs": np.array([[1], [np.longdouble("1e400")]], np.longdouble), "labels": np.array([0, 1])},
            "NaN or infinity in example 1",
        ),
        ({"inputs": np.ones((2, 1), int), "labels": np.array([0, 1])}, "inputs of dtype int64"),
        ({"inputs": np.float32(1), "labels": np.array([0, 1])}, "no rows of inputs and 2 labels"),
    ],
)
def test_npz_refuses_unsound_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InvalidInputError, match=message) as error:
        vision.npz(tmp_path / "a.npz", classes=3)
    assert "a.npz" in error.value.got


def test_npz_refuses_files_that_are_none(tmp_path):
    with pytest.raises(StoreError, match=r"missing\.npz: No such file or directory\n.*a readable NPZ file"):
        vision.npz(tmp_path / "missing.npz")
    (tmp_path / "t.npz").write_text("1 2 3\n")
    with pytest.raises(StoreError, match=r"t\.npz: not an NPZ file\n"):
        vision.npz(tmp_path / "t.npz")
    (tmp_path / "a.npz").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(StoreError, match=r"a\.npz"):
        vision.npz(tmp_path / "a.npz")
    np.save(tmp_path / "c.npy", np.ones(3))
    with pytest.raises(StoreError, match=r"c\.npy(.|\n)*a readable NPZ file"):
        vision.npz(tmp_path / "c.npy")
    np.savez(tmp_path / "b.npz", inputs=np.array([{}, {}], object), labels=np.array([0, 1]))
    with pytest.raises(StoreError, match="plain arrays"):
        vision.npz(tmp_path / "b.npz")


def test_all_of_fashion_mnist_is_fetched_once_and_kept(tmp_path, monkeypatch):
    """The excerpt's files stand in for the package's."""
    files = [name for pair in vision.FASHION_MNIST_FILES.values() for name in pair]
    asked = []

    def fetch(package, patterns, *, remedy):
        asked.append((package, tuple(patterns)))
        return [gzip.decompress((vision.EXCERPT_PATH / f"{name}.gz").read_bytes()) for name in files]

    monkeypatch.setattr(vision, "DEBIAN_PATH", Path("/nowhere/fashion-mnist"))
    monkeypatch.setenv(debian.CACHE, str(tmp_path / "kept"))
    monkeypatch.setattr(debian, "fetch", fetch)
    for _ in range(2):
        for found, expected in zip(vision.fashion_mnist(), vision.fashion_mnist_excerpt(), strict=True):
            np.testing.assert_array_equal(found.inputs, expected.inputs)
            np.testing.assert_array_equal(found.labels, expected.labels)
    assert asked == [("dataset-fashion-mnist", tuple(f"nowhere/fashion-mnist/{name}.gz" for name in files))]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["fashion-mnist"]  # nothing half-written beside it
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv(debian.CACHE, str(tmp_path / "file" / "kept"))
    with pytest.raises(StoreError, match=r"fashion-mnist cannot be written: Not a directory"):
        vision.fashion_mnist()


def test_without_the_package_and_a_network_the_remedy_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "DEBIAN_PATH", Path("/nowhere/fashion-mnist"))
    monkeypatch.setenv(debian.CACHE, str(tmp_path / "kept"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StoreError, match=r"(?s)no apt-get on this machine.*remedy: .*fashion_mnist\(FOLDER\)"):
        vision.fashion_mnist()
    assert not (tmp_path / "kept").exists()
