"""Kept features in an index that finds a query's most helpful sources without a pass over all of them, nearly always.

The score of a source is minus the inner product of its features with a query's direction, over n, so that the best
sources are those of the largest inner product with minus the direction: a search that the library FAISS answers
approximately (the extra `index`).  `features.top` is the exact answer, in one pass; `recall` says how much of it an
index finds.

Source: Malkov and Yashunin 2018 (graphs), Jégou, Douze and Schmid 2011 (cells), as FAISS has them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from jattrib.attribution.features import BLOCK, NAME, Features, check_directions, check_finite
from jattrib.attribution.influence import Top
from jattrib.core import files
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.store import Rows

FILE = "index.faiss"


class Index(NamedTuple):
    """Features, arranged for search.

    Attributes:
        searcher: FAISS's own.
        rows: n, sources.
        dim: k, features of each.
        identity: what the features are of; that of the store, where they come from one.
    """

    searcher: Any
    rows: int
    dim: int
    identity: dict[str, Any]


def build(train: Features, *, factory: str = "HNSW32") -> Index:
    """Return an index of features.

    Args:
        train: the features of n training examples, or their store.
        factory: how they are arranged, in FAISS's own words: `HNSW32`, a graph of 32 neighbours each;
            `IVF1024,Flat`, in 1,024 cells; `IVF1024,PQ16`, compressed in them; `Flat`, exact.

    Raises:
        InvalidInputError: FAISS is not installed, does not know the factory or how to add rows to it, there are
            too few rows for it, or one is not finite.
    """
    faiss = _faiss()
    count, dim = len(train), train.arrays[NAME][0][0] if isinstance(train, Rows) else train.shape[1]
    try:
        searcher = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not searcher.is_trained:
            searcher.train(np.concatenate([_rows(train, start) for start in range(0, count, BLOCK)]))
        for start in range(0, count, BLOCK):
            searcher.add(_rows(train, start))
    except RuntimeError as error:
        raise InvalidInputError(
            f"factory = {factory!r} for {count} rows of {dim}: {str(error).strip().splitlines()[-1]}",
            expected="an arrangement that FAISS knows and numbers itself, and no more cells than rows",
            remedy="factory='HNSW32' serves any number of rows",
        ) from error
    return Index(searcher, count, dim, dict(train.identity) if isinstance(train, Rows) else {})


def search(
    index: Index, directions: Float[Array | np.ndarray, "q k"], *, k: int, harmful: bool = False, effort: int = 64
) -> Top:
    """Return nearly the k largest scores of each direction (`harmful`: the smallest), `τ_ij = −(1/n) φ_i · d_j`.

    Args:
        index: of the training set's features.
        directions: `features.inverse(train)(query features)`.
        k: how many.
        harmful: whether the smallest are asked for.
        effort: how far to look: candidates that a graph keeps, cells that are opened.  More is slower and finds more.

    Raises:
        InvalidInputError: directions are of another dimension or not finite, or k or effort is out of range.
    """
    check_directions(directions, index.dim)
    if not 1 <= k <= index.rows or effort < 1:
        raise InvalidInputError(
            f"k = {k}, effort = {effort}", expected=f"k from 1 to {index.rows}, and effort from 1", remedy="change it"
        )
    sign = 1.0 if harmful else -1.0
    asked = np.ascontiguousarray(sign * np.asarray(directions), np.float32)
    check_finite(asked, "direction")  # in single precision, too
    _set_effort(index.searcher, max(effort, k))
    products, indices = index.searcher.search(asked, k)
    if (indices < 0).any():
        raise InvalidInputError(
            f"effort = {effort}, with which the index finds {int((indices >= 0).sum(axis=1).min())} of k = {k}",
            expected="enough candidates", remedy="raise effort",
        )  # fmt: skip
    return Top(indices, products * np.float32(sign * -1 / index.rows))


def recall(found: Top, exact: Top) -> float:
    """Return which part of the exact answer was found, mean over queries.

    >>> recall(Top(np.array([[3, 1]]), np.zeros((1, 2))), Top(np.array([[3, 2]]), np.zeros((1, 2))))
    0.5
    """
    pairs = zip(found.indices, exact.indices, strict=True)
    return float(np.mean([np.isin(wanted, got).mean() for got, wanted in pairs]))


def save(index: Index, directory: Path) -> None:
    """Write an index, with what it is of.

    Raises:
        StoreError: the directory cannot be written.
    """
    content = _faiss().serialize_index(index.searcher).tobytes()
    files.write_atomic(directory / FILE, content)
    manifest = {"rows": index.rows, "dim": index.dim, "identity": index.identity, "content": _digest(content)}
    files.write_manifest(directory / files.MANIFEST, manifest)


def load(directory: Path, *, identity: Mapping[str, Any] | None = None) -> Index:
    """Return an index that was saved; one of other features is refused.

    Args:
        directory: where it is.
        identity: what its features must be of (`features.identity`); entries that the index has beyond are its own.

    Raises:
        StoreError: it is missing or damaged, or its identity is another.
    """
    faiss, manifest = _faiss(), files.read_manifest(directory / files.MANIFEST)
    stored = manifest["identity"]
    if identity is not None:
        files.check_identity(directory, {name: stored.get(name) for name in identity}, identity)
    try:
        content = (directory / FILE).read_bytes()
        if _digest(content) != manifest.get("content"):  # or it is another's, saved over this one but for its manifest
            raise OSError("it is not what its manifest describes")
        searcher = faiss.deserialize_index(np.frombuffer(content, np.uint8))
    except (OSError, RuntimeError) as error:
        raise StoreError(
            f"{directory / FILE} cannot be read: {error}", expected="an index that `save` wrote", remedy="build it anew"
        ) from error
    return Index(searcher, manifest["rows"], manifest["dim"], stored)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise InvalidInputError(
            "an index without the package faiss",
            expected="FAISS",
            remedy="pip install 'jattrib[index]', or use `features.top`, which is exact",
        ) from error
    return faiss


def _rows(train: Features, start: int) -> Float[np.ndarray, "b k"]:
    stop = min(start + BLOCK, len(train))
    rows = train.read(NAME, start, stop) if isinstance(train, Rows) else train[start:stop]
    rows = np.ascontiguousarray(rows, np.float32)
    check_finite(rows, "the row of features", start)
    return rows


def _innermost(searcher: Any) -> Any:
    """Return the index that a transformation, a list of numbers or a refinement is wrapped around."""
    searcher = _faiss().downcast_index(searcher)
    for name in ("index", "base_index"):
        if hasattr(searcher, name):
            return _innermost(getattr(searcher, name))
    return searcher


def _set_effort(searcher: Any, effort: int) -> None:
    innermost = _innermost(searcher)
    if hasattr(innermost, "hnsw"):
        innermost.hnsw.efSearch = effort
    if hasattr(innermost, "nsg"):
        innermost.nsg.search_L = effort
    if hasattr(innermost, "nprobe"):
        innermost.nprobe = effort
