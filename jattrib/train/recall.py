"""The members of a finished ensemble, addressed by the number of their subset and their seed."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Integer, Key

from jattrib.core import store
from jattrib.core.errors import StoreError
from jattrib.core.types import Batch
from jattrib.train import ensemble as ensembles
from jattrib.train import loop


def find(
    directory: Path,
    key: Key[Array, ""],
    masks: Bool[np.ndarray, "s n"],
    subsets: Integer[np.ndarray, " m"],
    seeds: Integer[np.ndarray, " m"],
) -> Integer[np.ndarray, " m"]:
    """Return the rows of a directory that hold the members (subset, seed), in whatever order they were trained.

    A member is found by what it was trained on, its mask and its key, which every row keeps a digest of.

    Args:
        directory: of `ensemble.train` or `ensemble.collect`.
        key: that `ensemble.member_keys` was given.
        masks: of all subsets, by number.
        subsets: numbers of the members' subsets.
        seeds: of the members.

    Raises:
        StoreError: a member is not there, or the directory is damaged.
    """
    rows = store.Rows.open(directory)
    have = {}
    for number in np.flatnonzero(rows.completed).tolist():
        first = number * rows.chunk
        digests = rows.read("names", first, min(first + rows.chunk, len(rows)))
        have |= {digest.tobytes(): first + place for place, digest in enumerate(digests)}
    words = np.asarray(jax.random.key_data(ensembles.member_keys(key, subsets, seeds)))
    wanted = ensembles.names(masks[subsets], words)
    found = np.array([have.get(name.tobytes(), -1) for name in wanted], int)
    if (found < 0).any():
        at = int((found < 0).argmax())
        raise StoreError(
            f"{directory} holds no model of subset {subsets[at]} with seed {seeds[at]} among its {len(have)}",
            expected="members that were trained, with the key and the masks of that training",
            remedy="train them (the directory is extended), or pass the key and masks that it was begun with",
        )
    return found


def read(
    directory: Path,
    key: Key[Array, ""],
    masks: Bool[np.ndarray, "s n"],
    subsets: Integer[np.ndarray, " m"],
    seeds: Integer[np.ndarray, " m"],
) -> dict[str, np.ndarray]:
    """Return what is kept of the members (subset, seed), stacked in their order: `losses` and `outputs`, by path.

    The arguments and errors are those of `find`.
    """
    rows = store.Rows.open(directory)
    found = rows.take(find(directory, key, masks, subsets, seeds))
    return {name: array for name, array in found.items() if name != "names"}


def again(
    directory: Path,
    ensemble: ensembles.Ensemble,
    data: Batch,
    key: Key[Array, ""],
    masks: Bool[np.ndarray, "s n"],
    subset: int,
    seed: int,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> loop.Trained:
    """Train one stored member again, and return all of it: the very bits of the model whose outputs were kept.

    It runs in the same program, a chunk as wide as the directory's, and its losses are compared with those kept.

    Raises:
        StoreError: as `find`, or the losses differ: other data, another optimiser or another kind of device.
    """
    place = int(find(directory, key, masks, np.array([subset]), np.array([seed]))[0])
    rows = store.Rows.open(directory)
    one = ensembles.member_keys(key, np.array([subset]), np.array([seed]))
    members: Any = ensemble._replace(width=rows.chunk)
    trained = ensembles.train(members, data, masks[[subset]], one, mesh=mesh, label="training again")
    kept = rows.read("losses", place, place + 1)
    if not np.array_equal(trained.losses, kept):
        off = float(np.abs(trained.losses - kept).max())
        raise StoreError(
            f"the model of subset {subset}, seed {seed}, trained again, has losses that differ by up to {off:.3g}",
            expected=f"the bits of row {place} of {directory}",
            remedy="use the data, model, optimiser, mesh and kind of device that the directory was made with",
        )
    return jax.tree.map(lambda leaf: leaf[0], trained)
