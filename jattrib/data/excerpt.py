"""Make the embedded excerpt of Fashion-MNIST: `python -m jattrib.data.excerpt --source DIR`.

The choice depends on a hash of each image's position alone, and the files carry no time stamp, so the command gives the
same bytes on every machine whose zlib compresses alike, and the same images on all.
"""

import argparse
import gzip
import hashlib
import io
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from jattrib.core.errors import InvalidInputError
from jattrib.data import idx
from jattrib.data.vision import DEBIAN_PATH, EXCERPT_PATH, FASHION_MNIST_FILES, fashion_mnist_raw

SIZES = {"train": 5000, "test": 1000}


def choose(labels: Integer[np.ndarray, " n"], size: int, *, seed: str) -> Int[np.ndarray, " m"]:
    """Return `size` positions, equally many of each class, in increasing order.

    Within a class those with the smallest SHA-256 of `"seed:position"` are chosen.

    Raises:
        InvalidInputError: `size` is not a multiple of the number of classes, or a class has too few examples.
    """
    classes = np.unique(labels)
    each, rest = divmod(size, len(classes))
    fewest = min(int(np.sum(labels == c)) for c in classes)
    if rest or fewest < each:
        raise InvalidInputError(
            f"{size} examples of {len(classes)} classes, the smallest of {fewest} examples",
            expected="a multiple of the number of classes, and enough examples in each",
            remedy="give the full data set as --source",
        )
    rank = np.array([hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in range(len(labels))])
    chosen = [members[np.argsort(rank[members])[:each]] for members in (np.flatnonzero(labels == c) for c in classes)]
    return np.sort(np.concatenate(chosen))


def make(source: Path, target: Path) -> None:
    """Write the excerpt's four IDX files and their checksums into the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    sums = []
    for split, size in SIZES.items():
        images, labels = fashion_mnist_raw(source, split)
        rows = choose(labels, size, seed=f"jattrib:fashion-mnist:{split}")
        for name, array in zip(FASHION_MNIST_FILES[split], (images, labels), strict=True):
            packed = _compress(idx.pack(array[rows]))
            (target / f"{name}.gz").write_bytes(packed)
            sums.append(f"{hashlib.sha256(packed).hexdigest()}  {name}.gz\n")
    (target / "SHA256SUMS").write_text("".join(sums))


def _compress(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as stream:
        stream.write(data)
    return buffer.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the embedded excerpt of Fashion-MNIST.")
    parser.add_argument(
        "--source", type=Path, default=DEBIAN_PATH, help="folder with the four IDX files of the full set"
    )
    parser.add_argument("--target", type=Path, default=EXCERPT_PATH, help="folder to write into")
    arguments = parser.parse_args()
    make(arguments.source, arguments.target)
