"""Parameters on disk: orbax for the arrays, a manifest with their digest for the certainty."""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jattrib.core import files, mesh, tree
from jattrib.core.errors import InvalidInputError, StoreError

ARRAYS = "arrays"
ROWS = "journal.jsonl"
"""The file that tells a store of rows from one of parameters."""

REFUSED = (ValueError, RuntimeError)
"""What orbax raises where the operating system refuses to write."""


def save_params(path: Path, params: PyTree, identity: Mapping[str, Any] | None = None) -> None:
    """Save a pytree of arrays; what was there before stays until the new one is complete.

    In a program of several processes, one of them should call it, with arrays that it holds whole (`mesh.fetch`).

    Raises:
        InvalidInputError: two leaves have one path, or one is no array of numbers or of typed keys.
        StoreError: the directory cannot be written, or holds rows.
    """
    path = Path(path)
    leaves = tree.to_names(params)
    named = {name: _array(name, leaf) for name, leaf in leaves.items()}
    with files.writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if (path / ROWS).exists():
            raise _rows(path)
        older = _versions(path)
        data = f"{ARRAYS}-{max(older.values(), default=0) + 1}"
        stored = {name: leaf for name, leaf in named.items() if leaf.size}
        if stored:
            _write(path / data, stored)
        described = {name: _described(leaf) for name, leaf in leaves.items()}
        manifest = {"format": files.FORMAT, "digest": tree.digest(named), "data": data, "arrays": described}
        files.write_manifest(path / files.MANIFEST, {**manifest, "identity": dict(identity or {})})
        for each in older:
            shutil.rmtree(each)


def load_params(path: Path, like: PyTree, identity: Mapping[str, Any] | None = None) -> PyTree:
    """Load a pytree that `save_params` saved, verified.

    Args:
        path: the directory.
        like: a pytree of its structure, shapes and dtypes; it may be abstract (`jax.eval_shape`).
        identity: what it was computed from; None takes any.

    Returns:
        JAX arrays; NumPy arrays where those of `like` are.

    Raises:
        StoreError: there is none, its tree is another (the first differing path is named), it was altered, or it
            belongs to another run.
    """
    path = Path(path)
    if not exists(path):
        raise StoreError(
            f"{path} holds no parameters: it has no {files.MANIFEST}",
            expected="a directory that `save_params` made",
            remedy="correct the path, or train again",
        )
    manifest = files.read_manifest(path / files.MANIFEST)
    if "digest" not in manifest:
        raise _rows(path)
    if identity is not None:
        files.check_identity(path, manifest["identity"], identity)
    wanted = tree.to_names(like)
    _check_tree(path, manifest["arrays"], {name: _described(leaf) for name, leaf in wanted.items()})
    words = {name: jax.eval_shape(mesh.words, leaf) if _is_key(leaf) else leaf for name, leaf in wanted.items()}
    named = {name: np.zeros(np.shape(leaf), _dtype(leaf)) for name, leaf in words.items()}
    try:
        with _orbax() as checkpointer:
            import orbax.checkpoint as ocp

            stored = {name: leaf for name, leaf in named.items() if leaf.size}
            args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored}
            if stored:
                named |= checkpointer.restore((path / manifest["data"]).absolute(), item=stored, restore_args=args)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise files.altered(path / manifest["data"], str(error).splitlines()[0]) from error
    if tree.digest(named) != manifest["digest"]:
        raise files.altered(path / manifest["data"], "the parameters do not match their digest")
    host = {name: isinstance(leaf, np.ndarray | np.generic) for name, leaf in wanted.items()}
    found = {name: leaf if host[name] else jnp.asarray(leaf) for name, leaf in named.items()}
    return tree.from_names(
        like, {name: mesh.keyed(leaf, wanted[name]) if _is_key(wanted[name]) else leaf for name, leaf in found.items()}
    )


def exists(path: Path) -> bool:
    """Return whether `save_params` saved something here."""
    return files.is_there(Path(path) / files.MANIFEST)


def remove(path: Path) -> None:
    """Remove what `save_params` saved, and the directory if nothing else is in it."""
    path = Path(path)
    with files.writing(path):
        (path / files.MANIFEST).unlink(missing_ok=True)
        for each in _versions(path):
            shutil.rmtree(each)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _versions(path: Path) -> dict[Path, int]:
    """Return the arrays that were saved here, unfinished ones included, and their numbers."""
    found = {each: re.fullmatch(rf"{ARRAYS}-(\d+)(\..*)?", each.name) for each in path.glob(f"{ARRAYS}-*")}
    return {each: int(match[1]) for each, match in found.items() if match}


def _rows(path: Path) -> StoreError:
    return StoreError(
        f"{path} holds rows, no parameters",
        expected="a directory of its own, or one that `save_params` made",
        remedy="choose another directory, or open the rows with `Rows.open`",
    )


def _write(data: Path, stored: Mapping[str, np.ndarray]) -> None:
    """Write arrays; where that fails, what there is of them is removed, for they may be what filled the disk."""
    try:
        with _orbax() as checkpointer:
            checkpointer.save(data.absolute(), dict(stored))
    except (OSError, *REFUSED) as error:
        for each, number in _versions(data.parent).items():
            if data.name == f"{ARRAYS}-{number}":
                shutil.rmtree(each, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(str(error).splitlines()[0]) from error


def _array(name: str, leaf: Any) -> np.ndarray:
    """Return a leaf as NumPy keeps it, in native byte order; of typed keys, their words."""
    try:
        array = mesh.fetch(leaf) if _is_key(leaf) else np.asarray(leaf, _dtype(leaf))
    except (TypeError, OverflowError) as error:
        raise _no_array(name, repr(leaf)) from error
    if array.dtype.kind in "OSUMm":
        raise _no_array(name, f"of dtype {array.dtype}")
    return array


def _no_array(name: str, what: str) -> InvalidInputError:
    return InvalidInputError(
        f"the leaf {name!r}, {what}",
        expected="an array of numbers or of typed keys",
        remedy="keep other things in `identity`, or beside it with `core.store.write_json`",
    )


def _described(leaf: Any) -> list[Any]:
    return [list(np.shape(leaf)), str(leaf.dtype) if _is_key(leaf) else _dtype(leaf).name]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and mesh.is_key(leaf)


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)).newbyteorder("=")


def _check_tree(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for name in sorted(stored.keys() | asked.keys()):
        if stored.get(name) != asked.get(name):
            has, wants = ("{1}{0}".format(*each[name]) if name in each else "nothing" for each in (stored, asked))
            raise StoreError(
                f"{path} holds another model: at {name!r} it has {has}, this model has {wants}",
                expected="parameters of the same paths, shapes and dtypes",
                remedy="build the model that was saved, or choose another checkpoint",
            )


@contextmanager
def _orbax() -> Iterator[Any]:
    """Yield a checkpointer of this process alone, its log silent: what goes wrong is raised."""
    import orbax.checkpoint as ocp  # half a second that only those who save or load need to wait

    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    try:
        with ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(multiprocessing_options=options), multiprocessing_options=options
        ) as checkpointer:
            yield checkpointer
    finally:
        log.setLevel(level)
