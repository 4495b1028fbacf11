"""A trained classifier on disk, with what is needed to build it again: what `jattrib unlearn` takes and leaves.

DIR/manifest.json   data and model, as a config has them, and what the training inputs were
DIR/arrays-…        parameters, model state, and the labels that it was trained on
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np
from jaxtyping import Int

from jattrib.core import files, params
from jattrib.core import tree as core_tree
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.types import Params
from jattrib.data.vision import Dataset
from jattrib.models.model import Model
from jattrib.recipes import build
from jattrib.recipes import config as configs


class Description(configs.Room, frozen=True):
    """What a classifier is made of.

    Attributes:
        data: what it was trained on.
        model: what was trained.
        training: how.
    """

    data: configs.Data
    model: configs.Model
    training: configs.Training


class Classifier(NamedTuple):
    """A trained classifier.

    Attributes:
        description: what it is made of.
        model: initialisation and forward pass.
        params: its parameters.
        state: its model state.
        train: what it was trained on, the labels as they were.
        test: what it was not trained on.
    """

    description: Description
    model: Model
    params: Params
    state: Any
    train: Dataset
    test: Dataset


def save(
    path: Path, description: Description, params_: Params, state: Any, labels: Int[np.ndarray, " n"] | None = None
) -> None:
    """Save a classifier; `labels` are those that it was trained on, where they are not those of the data.

    Raises:
        InvalidInputError: they are not as many as the training set's.
        StoreError: the directory cannot be written.
    """
    train, _ = build.load_data(description.data)
    labels = train.labels if labels is None else labels
    if labels.shape != train.labels.shape:
        raise InvalidInputError(
            f"labels of shape {labels.shape}", expected=f"{train.labels.shape}, those of the training set",
            remedy="give a label for every training example, or none",
        )  # fmt: skip
    tree = {"params": params_, "state": state, "labels": np.asarray(labels, np.int32)}
    said = {"classifier": configs.plain(description), "inputs": core_tree.digest(train.inputs)}
    params.save_params(path, tree, said)


def load(path: Path) -> Classifier:
    """Load a classifier, verified.

    Raises:
        StoreError: there is none, it was altered, its parameters are of a model of another shape, or its data are no
            longer those that it was trained on.
        InvalidInputError: its data cannot be read any more.
    """
    if not params.exists(path):
        raise StoreError(
            f"{path} holds no classifier: it has no {files.MANIFEST}",
            expected="a directory that `recipes.classifier.save` or `jattrib unlearn` made",
            remedy="correct the path; a run of the recipe `dmm` leaves one in its folder `classifier`",
        )
    said = files.read_manifest(path / files.MANIFEST)["identity"]
    try:
        description = msgspec.convert(said.get("classifier"), Description)
    except msgspec.ValidationError as error:
        raise StoreError(
            f"{path} holds parameters, but no classifier: {error}",
            expected="parameters with the data, model and training that they are of",
            remedy="save it with `recipes.classifier.save`",
        ) from error
    train, test = build.load_data(description.data)
    if said.get("inputs") not in (None, core_tree.digest(train.inputs)):  # None: saved before it was kept
        raise StoreError(
            f"the training inputs of {description.data} are not those that the classifier in {path} was trained on",
            expected="the data as they were: indices of examples are those of their rows",
            remedy="restore the data, or train a classifier on what they are now",
        )
    model = build.build_model(description.model, train.inputs.shape[1:], build.classes(train))
    like, state = jax.eval_shape(model.init, jax.random.key(0))
    labels = np.zeros(train.labels.shape, np.int32)
    found = params.load_params(path, {"params": like, "state": state, "labels": labels})
    train = Dataset(train.inputs, found["labels"].astype(train.labels.dtype))
    return Classifier(description, model, found["params"], found["state"], train, test)
