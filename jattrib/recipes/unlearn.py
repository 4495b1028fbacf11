"""`jattrib unlearn`: make a saved classifier forget some of its training examples.

Datamodel Matching trains models on random halves of the training set, in a folder where a killed command resumes,
predicts from them what a model without the examples would output, and fine-tunes the classifier towards that.  The
baselines fine-tune, or change the weights at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jattrib.core import files, tree
from jattrib.core.errors import InvalidInputError
from jattrib.data import masks as subset_masks
from jattrib.models.outputs import margin
from jattrib.recipes import build, classifier, rundir
from jattrib.recipes import config as configs
from jattrib.recipes.classifier import Classifier
from jattrib.train import ensemble
from jattrib.train.loop import Plan, Trained
from jattrib.unlearning import baselines, dmm, finetune
from jattrib.unlearning.finetune import Models, Problem, Settings

SETTINGS: dict[str, dict[str, Any]] = {
    "gradient_ascent": {"settings": Settings(5, 250, 1e-4)},
    "retain_descent": {"settings": Settings(5, 250, 5e-4)},
    "ascent_descent": {"settings": Settings(5, 250, 5e-4), "part": 0.2},
    "neggrad_plus": {"settings": Settings(5, 250, 5e-4), "part": 0.4},
    "random_labels": {"settings": Settings(5, 250, 5e-4)},
    "salun": {"settings": Settings(5, 250, 5e-4)},
    "scrub": {"settings": Settings(5, 250, 5e-4)},
    "ssd": {},
    "newton_step": {"damping": 1e-2},
    "first_order": {"rate": 1.0},
}
"""What the baselines are told: fine-tuning, and what they have no default for."""

MATCHING = Settings(12, 250, 5e-4)
"""How Datamodel Matching fine-tunes."""

THRESHOLD = 2.5
"""Of its denoising, in standard errors."""


def methods() -> tuple[str, ...]:
    """Return the names of all methods."""
    return ("dmm", *(name for name in get_args(baselines.Method) if name != "nothing"))


def read_indices(path: Path) -> Int[np.ndarray, " f"]:
    """Read the indices of the examples to forget: whole numbers in a text file, or an NPY file.

    Raises:
        InvalidInputError: the file cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                found = np.lib.format.read_array(file, allow_pickle=False)
        else:
            found = np.array(path.read_text().split(), str)
        if found.size == 0:
            raise ValueError("it holds no index")
        numbers = found.astype(np.int64)
        if found.ndim != 1 or found.dtype.kind not in "iuU":
            raise ValueError(f"{found.dtype} of shape {found.shape}")
        if found.dtype.kind == "u" and numbers.min() < 0:
            raise OverflowError(f"{found.max()} is too large")
    except (OSError, ValueError, TypeError, OverflowError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidInputError(
            f"{path}: {reason}",
            expected="the indices of the examples to forget, whole numbers: one a line, or an NPY file",
            remedy="count examples from 0 in the training set of the classifier",
        ) from error
    return numbers


def unlearn(
    model: Path, forget: Path, out: Path, *, method: str = "dmm", subset_models: int = 200, seed: int = 0
) -> dict[str, float | int | str]:
    """Unlearn, save the classifier in `out`, and return the figures of `out/summary.json`.

    Args:
        model: the directory of a saved classifier.
        forget: the file that says what to forget.
        out: the directory for the classifier without it.
        method: `dmm`, or a baseline.
        subset_models: models on random halves that Datamodel Matching trains.
        seed: of everything random.

    Raises:
        InvalidInputError: the method is unknown, the indices are not those of a forget set, or `out` holds something
            else.
        StoreError: there is no classifier, it is damaged or of another shape, or `out` cannot be written, is of another
            unlearning, or another process works in it.
        DivergedError: the parameters left the finite numbers.
    """
    if method not in methods():
        match = configs.close_match(method, methods())
        raise InvalidInputError(
            f"--method {method}",
            expected=f"one of {', '.join(methods())}",
            remedy=f"did you mean {match}?" if match else "dmm is the method to begin with",
        )
    if out.resolve() == model.resolve():
        raise InvalidInputError(
            f"--out {out}, which is the model itself",
            expected="a directory of its own",
            remedy="choose another, for example --out unlearned",
        )
    before = classifier.load(model)
    problem = finetune.problem(before.model.apply, (before.train.inputs, before.train.labels), read_indices(forget))
    said = {
        "classifier": tree.digest((before.params, before.state, before.train)), "forget": tree.digest(problem.forget),
        "method": method, "seed": seed, **({"subset_models": subset_models} if method == "dmm" else {}),
    }  # fmt: skip
    with rundir.claimed(out, said):
        return _unlearn(before, problem, out, method, subset_models, seed)


def _unlearn(
    before: Classifier, problem: Problem, out: Path, method: str, subset_models: int, seed: int
) -> dict[str, float | int | str]:
    models = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], Models(before.params, before.state))
    shift = None
    if method == "dmm":
        shift = _shift(before, problem, out / "resume", subset_models, seed)
        after = dmm.datamodel_matching(problem, models, lambda at: shift[at], jax.random.key(seed), settings=MATCHING)
    else:
        run: Callable[..., Models] = getattr(baselines, method)
        keys = jax.random.key(seed)[None]
        after = run(problem, models, keys, **SETTINGS[method])
    figures = {"method": method, "forgotten": len(problem.forget), **_figures(before, problem, models, after)}
    if shift is not None:
        own = finetune.logits(problem.apply, models, problem.data[0][problem.forget])
        target = dmm.direct(own, shift[problem.forget])
        figures["margin_forgotten_predicted"] = float(_margins(target, problem.data[1][problem.forget]).mean())
    params, state = jax.tree.map(lambda leaf: leaf[0], (after.params, after.state))
    classifier.save(out, before.description, params, state, before.train.labels)
    files.write_json(out / "summary.json", figures)
    return figures


def _shift(
    before: Classifier, problem: Problem, folder: Path, subset_models: int, seed: int
) -> Float[np.ndarray, "n c"]:
    """Return what models on random halves say that leaving the examples out does to the training set's logits."""
    training, n = before.description.training, len(before.train.labels)
    plan = Plan(training.epochs, training.batch_size, n // 2)
    strategy = "threads" if jax.default_backend() == "cpu" else "vmap"
    members = ensemble.Ensemble(before.model, build.optimizer(training, plan.steps), plan, strategy=strategy)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    masks = subset_masks.subsets(key, n, alpha=0.5, count=subset_models)
    numbers = np.arange(subset_models)
    outputs = ensemble.collect(
        jax.tree_util.Partial(_logits, before.model.apply, jnp.asarray(before.train.inputs)), members,
        tuple(before.train), masks, ensemble.member_keys(key, numbers, np.zeros_like(numbers)),
        directory=folder / "subsets", identity={"description": tree.digest(np.frombuffer(
            repr(before.description).encode(), np.uint8))}, label="training on random halves",
    )  # fmt: skip
    return dmm.shift_of_masks(masks, outputs, problem.forget, threshold=THRESHOLD)


def _logits(apply: Any, inputs: Float[Array, "n ..."], trained: Trained) -> Float[Array, "n c"]:
    return apply(trained.params, trained.state, inputs, train=False)[0]


def _margins(logits: Float[np.ndarray, "m x c"], labels: Int[np.ndarray, " x"]) -> Float[np.ndarray, "m x"]:
    return np.asarray(jax.vmap(jax.vmap(margin), (0, None))(jnp.asarray(logits), jnp.asarray(labels)))


def _figures(before: Classifier, problem: Problem, models: Models, after: Models) -> dict[str, float]:
    """Return accuracy and mean margin of what is forgotten, retained and new, before and after."""
    parts = {
        "forgotten": tuple(each[problem.forget] for each in before.train),
        "retained": tuple(each[problem.retain] for each in before.train),
        "test": tuple(before.test),
    }
    figures = {"weights_moved": float(finetune.moved(models, after)[0])}
    for part, (inputs, labels) in parts.items():
        for when, each in (("before", models), ("after", after)):
            logits = finetune.logits(problem.apply, each, inputs)
            figures[f"accuracy_{part}_{when}"] = float((logits.argmax(axis=-1) == labels).mean())
            figures[f"margin_{part}_{when}"] = float(_margins(logits, labels).mean())
    return figures
