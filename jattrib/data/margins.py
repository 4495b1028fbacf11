"""Margin arrays of other people's models, in NPY files: what the unlearning metrics take.

Public collections have one of two layouts: one array `[model, point]` in one file, or a folder with one array `[point]`
a model, whose file name bears the model's number (`id_17_epoch_23.npy`, `val_margins_17.npy`).
"""

import os
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.files import is_there


def read(path: str | Path, *, models: int | None = None) -> Float[np.ndarray, "n x"]:
    """Read margins `[model, point]` from one NPY file, or from a folder with one a model, in float64.

    The models of a folder come in the order of the first number in which their file names differ, so that the same
    model is in the same row of every folder.  Nothing is unpickled.

    Args:
        path: the file, or the folder.
        models: how many to read, the first ones; all when left out.

    Raises:
        StoreError: there is no such file or folder, or one cannot be read.
        InvalidInputError: a file is no NPY array of real numbers of the expected rank, holds NaN, or differs in its
            number of points; files have no number of their own; or there are fewer models than were asked for, or none
            were.
    """
    path = Path(path)
    if models is not None and models < 1:
        raise InvalidInputError(f"models = {models}", expected="at least one", remedy="leave it out for all")
    if not is_there(path) and not path.exists():
        raise StoreError(f"{path}: no such file or folder", expected="margins in NPY files", remedy="check the path")
    if os.path.isdir(path):  # not one that this process may not look at
        files = _numbered(path)[:models]
        rows = [_load(file, 1) for file in files]
        for file, row in zip(files, rows, strict=True):
            if row.shape != rows[0].shape:
                raise InvalidInputError(
                    f"{file}: margins of {row.size} points",
                    expected=f"{rows[0].size}, as in {files[0].name}",
                    remedy="keep models that were evaluated on other points in another folder",
                )
        found = np.stack(rows)
    else:
        found = _load(path, 2)[:models]
    if models is not None and len(found) < models:
        raise InvalidInputError(
            f"{path}: margins of {len(found)} models", expected=f"{models} of them", remedy="ask for fewer"
        )
    return found


def _numbered(folder: Path) -> list[Path]:
    """Return the NPY files of a folder by the number that tells them apart."""
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise InvalidInputError(
            f"{folder}: a folder without NPY files",
            expected="one file a model, such as id_0.npy",
            remedy="give the folder that holds them, not one above it",
        )
    numbers = [[int(digits) for digits in re.findall(r"\d+", file.stem)] for file in files]
    for place in range(min(map(len, numbers))):
        own = [number[place] for number in numbers]
        if len(set(own)) == len(own):
            return [file for _, file in sorted(zip(own, files, strict=True))]
    raise InvalidInputError(
        f"{folder}: {files[0].name} and others, which no number tells apart",
        expected="a number of its own in each file name, at the same place, as in id_0_epoch_23.npy",
        remedy="rename the files, or stack their arrays into one file [model, point]",
    )


def _load(file: Path, rank: int) -> Float[np.ndarray, "*shape"]:
    try:
        with file.open("rb") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
    except OSError as error:
        raise StoreError(
            f"{file}: {error.strerror or error}", expected="a readable NPY file", remedy="check its permissions"
        ) from error
    except Exception as error:  # format errors of many types
        raise InvalidInputError(
            f"{file}: {error}", expected="an NPY file", remedy="fetch the file again; it is damaged or of another kind"
        ) from error
    if array.dtype.kind not in "fiu" or array.ndim != rank or array.size == 0:
        raise InvalidInputError(
            f"{file}: {array.dtype} of shape {array.shape}",
            expected=f"real numbers {'[model, point]' if rank == 2 else '[point], one file a model'}",
            remedy="give one file [model, point], or the folder of files [point]",
        )
    values = array.astype(np.float64)
    if np.isnan(values).any():
        raise InvalidInputError(
            f"{file}: {np.count_nonzero(np.isnan(values))} of {values.size} margins are NaN",
            expected="numbers",
            remedy="leave out models that diverged",
        )
    return values
