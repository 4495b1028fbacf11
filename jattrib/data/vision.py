"""Image data sets: Fashion-MNIST and the excerpt of it that is embedded here, digits, NPZ files."""

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num, UInt8

from jattrib.core import files
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.data import debian, idx

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
DEBIAN_PACKAGE, DEBIAN_PATH = "dataset-fashion-mnist", Path("/usr/share/datasets/fashion-mnist")
EXCERPT_PATH = Path(__file__).parent / "fashion_mnist_excerpt"


class Dataset(NamedTuple):
    """Examples, row by row, and their labels: class indices, or real targets in a regression.

    `len(dataset.labels)` is the number of examples (`len` of a pair is 2); `core.sources.InMemory` makes it a `Source`.
    """

    inputs: Num[np.ndarray, "n ..."]
    labels: Num[np.ndarray, " n"]


class Pixels(NamedTuple):
    """How pixels become inputs: `(pixel / top − mean) / std`."""

    mean: float
    std: float
    top: int = 255


FASHION_MNIST_PIXELS = Pixels(0.2860, 0.3530)
DIGITS_PIXELS = Pixels(0.3053, 0.3760, 16)


def normalise(
    images: UInt8[np.ndarray, "n h w c"], pixels: Pixels = FASHION_MNIST_PIXELS
) -> Float[np.ndarray, "n h w c"]:
    """Return images as float32 inputs of about zero mean and unit variance, `(pixel / top − mean) / std`."""
    scale = np.float32(1 / (pixels.top * pixels.std))
    return images.astype(np.float32) * scale - np.float32(pixels.mean / pixels.std)


def to_images(
    inputs: Float[np.ndarray, "n h w c"], pixels: Pixels = FASHION_MNIST_PIXELS
) -> UInt8[np.ndarray, "n h w c"]:
    """Return the pixels that `normalise` made into `inputs`, as 0 to 255 whatever `pixels.top`: for plots."""
    return np.clip(np.rint((inputs * pixels.std + pixels.mean) * 255), 0, 255).astype(np.uint8)


def check(dataset: Dataset, *, name: str, classes: int | None = None) -> Dataset:
    """Return a classification set if it is sound.

    It has as many labels as inputs, and one at least; inputs are finite; labels are integers in `[0, classes)` and
    fit int32.

    Raises:
        InvalidInputError: it is not; the message begins with `name`.
    """
    inputs, labels = dataset
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InvalidInputError(
            f"{name}: labels of dtype {labels.dtype} and shape {labels.shape}",
            expected="one integer an example",
            remedy="give class indices, not one-hot rows or names",
        )
    if inputs.ndim == 0 or len(inputs) != len(labels) or len(labels) == 0:
        rows = len(inputs) if inputs.ndim else "no rows of"
        raise InvalidInputError(
            f"{name}: {rows} inputs and {len(labels)} labels",
            expected="one label for each input, and at least one of them",
            remedy="check that both come from the same split",
        )
    top = 2**31 if classes is None else min(classes, 2**31)
    if labels.min() < 0 or labels.max() >= top:
        at = int(np.flatnonzero((labels < 0) | (labels >= top))[0])
        raise InvalidInputError(
            f"{name}: label {labels[at]} of example {at}",
            expected="labels of at least 0 that fit int32" if classes is None else f"labels from 0 to {top - 1}",
            remedy="number the classes from 0, or name the right number of classes",
        )
    if np.issubdtype(inputs.dtype, np.inexact) and not np.isfinite(inputs).all():
        at = int(np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(1))[0])
        raise InvalidInputError(
            f"{name}: NaN or infinity in example {at}", expected="finite inputs", remedy="drop or repair such examples"
        )
    return dataset


def fashion_mnist(path: str | Path | None = None) -> tuple[Dataset, Dataset]:
    """Read Fashion-MNIST, 60,000 training and 10,000 test images, from its four IDX files (plain or `.gz`).

    Args:
        path: the folder that holds the files; without it, where Debian's package `dataset-fashion-mnist` puts them, or
            where they are kept once they were fetched from there (30 MB; `data.debian.cache`).

    Returns:
        `(train, test)`: inputs are float32, `(n, 28, 28, 1)`, normalised by the training set's mean .2860 and standard
        deviation .3530; labels are int32.  Any sizes are accepted, so that a folder may hold a part of the data.

    Raises:
        StoreError: a file is missing, or the package is not installed and cannot be fetched.
        InvalidInputError: a file is damaged, or images and labels do not fit each other.

    Source: Xiao et al. 2017, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms".
    """
    folder = _fetched() if path is None else Path(path)
    return _fashion_split(folder, "train"), _fashion_split(folder, "test")


def fashion_mnist_excerpt() -> tuple[Dataset, Dataset]:
    """Read the embedded excerpt of Fashion-MNIST: 5,000 training and 1,000 test images, class-balanced.

    Returns:
        `(train, test)`, as `fashion_mnist` does, in the order in which the images stand in the full sets.

    Raises:
        StoreError: a file is missing, or is not the one that was packaged.
    """
    for line in (EXCERPT_PATH / "SHA256SUMS").read_text().splitlines():
        wanted, name = line.split()
        file = EXCERPT_PATH / name
        got = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "(no such file)"
        if got != wanted:
            raise StoreError(
                f"{file}: SHA-256 {got}", expected=wanted, remedy="reinstall jattrib, the embedded file was altered"
            )
    return fashion_mnist(EXCERPT_PATH)


def _fetched() -> Path:
    """Return the folder of all of Fashion-MNIST: the package's, or that in the cache, which is filled if need be."""
    folder = debian.cache() / "fashion-mnist"
    with files.writing(folder):
        for place in (DEBIAN_PATH, folder):
            if place.is_dir():
                return place
    names = [name for pair in FASHION_MNIST_FILES.values() for name in pair]
    inside = DEBIAN_PATH.relative_to("/")
    contents = debian.fetch(
        DEBIAN_PACKAGE, [f"{inside}/{name}.gz" for name in names],
        remedy="name the folder of the four IDX files: fashion_mnist(FOLDER), or data.path in a config",
    )  # fmt: skip
    with files.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fashion-mnist-", dir=folder.parent) as temporary:
            whole = Path(temporary) / "whole"
            for name, content in zip(names, contents, strict=True):
                files.write_atomic(whole / name, content)
            try:
                os.replace(whole, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    return folder


def fashion_mnist_raw(folder: Path, split: str) -> tuple[UInt8[np.ndarray, "n 28 28"], UInt8[np.ndarray, " n"]]:
    """Return the pixels and labels of one split, `"train"` or `"test"`, as they are in the files.

    Raises:
        StoreError: a file is missing.
        InvalidInputError: a file is damaged, or images and labels do not fit each other.
    """
    files = [_find(folder, name) for name in FASHION_MNIST_FILES[split]]
    images, labels = (idx.read(file) for file in files)
    for file, array, tail in zip(files, (images, labels), ((28, 28), ()), strict=True):
        if array.dtype != np.uint8 or array.shape[1:] != tail:
            raise InvalidInputError(
                f"{file}: {array.dtype} values of shape {array.shape}",
                expected=f"uint8 of shape ({', '.join(map(str, ('n', *tail)))})",
                remedy="check that images and labels are not exchanged and are Fashion-MNIST's",
            )
    check(Dataset(images, labels), name=str(files[1]), classes=len(FASHION_MNIST_CLASSES))
    return images, labels


def _fashion_split(folder: Path, split: str) -> Dataset:
    images, labels = fashion_mnist_raw(folder, split)
    return Dataset(normalise(images[..., None]), labels.astype(np.int32))


def _find(folder: Path, name: str) -> Path:
    candidates = [folder / f"{name}.gz", folder / name]
    for file in candidates:
        if files.is_there(file):
            return file
    raise StoreError(
        f"no Fashion-MNIST file {name} in {folder}",
        expected=" or ".join(str(file) for file in candidates),
        remedy="`apt-get install dataset-fashion-mnist`; or, without root, `apt-get download dataset-fashion-mnist`, "
        "`dpkg -x dataset-fashion-mnist_*.deb DIR` and path=DIR/usr/share/datasets/fashion-mnist; or path= the folder "
        "that holds the four IDX files; or use the embedded excerpt, fashion_mnist_excerpt()",
    )


def digits() -> tuple[Dataset, Dataset]:
    """Return scikit-learn's 8×8 handwritten digits: the first 1,500 as training set, the last 297 as test set.

    Returns:
        `(train, test)`: inputs are float32, `(n, 8, 8, 1)`, normalised by mean .3053 and standard deviation .3760 of
        pixels in [0, 1]; labels are int32.

    Raises:
        InvalidInputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InvalidInputError(
            "digits, without scikit-learn",
            expected="scikit-learn, which carries this data set",
            remedy="`pip install scikit-learn`, or use fashion_mnist_excerpt(), which needs nothing",
        ) from error
    bunch = load_digits()
    inputs = normalise(bunch.images[..., None].astype(np.uint8), DIGITS_PIXELS)  # pyright: ignore[reportAttributeAccessIssue]
    labels = bunch.target.astype(np.int32)  # pyright: ignore[reportAttributeAccessIssue]
    return Dataset(inputs[:1500], labels[:1500]), Dataset(inputs[1500:], labels[1500:])


def npz(path: str | Path, *, inputs: str = "inputs", labels: str = "labels", classes: int | None = None) -> Dataset:
    """Read one data set from two arrays of an NPZ file.

    Floating inputs are returned as they are, but in native byte order and in float64 where they were wider; uint8 ones
    as float32 in [0, 1]; labels become int32.

    Args:
        path: the file, as written by `numpy.savez`.
        inputs: the name of the array of inputs.
        labels: the name of the array of labels.
        classes: the number of classes, if labels are to be checked against it.

    Raises:
        StoreError: there is no such file, or it is not an NPZ file.
        InvalidInputError: an array is missing or is not what `check` accepts.
    """
    try:
        with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            if missing := [name for name in (inputs, labels) if name not in archive]:
                raise InvalidInputError(
                    f"{path}: no array named {', '.join(missing)}; it has {', '.join(archive.files) or 'none'}",
                    expected=f"arrays {inputs} and {labels}",
                    remedy="numpy.savez(path, inputs=..., labels=...), or name them: npz(path, inputs=NAME)",
                )
            x, y = archive[inputs], archive[labels]
    except InvalidInputError:
        raise
    except Exception as error:  # zip, pickle and format errors of many types
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        if not isinstance(error, OSError) and not zipfile.is_zipfile(path):
            reason = "not an NPZ file"  # NumPy takes it for a pickle, and says how to load that
        raise StoreError(
            f"{path}: {reason}",
            expected="a readable NPZ file of plain arrays",
            remedy="check the path, or write the file again",
        ) from error
    if np.issubdtype(x.dtype, np.floating):
        with np.errstate(over="ignore"):  # `check` finds what is infinite in float64
            x = x.astype(np.float64 if x.itemsize > 8 else x.dtype.newbyteorder("="), copy=False)
    check(Dataset(x, y), name=str(path), classes=classes)
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / np.float32(255)
    if not np.issubdtype(x.dtype, np.floating):
        raise InvalidInputError(
            f"{path}: inputs of dtype {x.dtype}", expected="floating point, or uint8 pixels", remedy="cast the inputs"
        )
    return Dataset(x, y.astype(np.int32))
