"""What the README says works: its snippet runs as it stands."""

import re
from pathlib import Path

import jax
import numpy as np

from jattrib.models.mlp import mlp

README = Path(__file__).parents[1] / "README.md"


def test_the_snippet_attributes_a_users_model():
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    rng = np.random.default_rng(0)
    train, test = (
        (rng.normal(size=(n, 20)).astype(np.float32), rng.integers(0, 3, n).astype(np.int32)) for n in (40, 6)
    )
    model = mlp(20, (32,), 3)
    names = {
        "model": model, "train": train, "test": test, "checkpoints": [model.init(jax.random.key(s)) for s in range(2)],
    }  # fmt: skip
    exec(snippet, names)
    scores = np.asarray(names["scores"])
    assert scores.shape == (40, 6)
    assert np.isfinite(scores).all()
    # An example helps itself: attribute the training set to itself, and its own score is the largest of its column.
    names |= {"test": train}
    exec(snippet, names)
    own = np.asarray(names["scores"])
    assert (np.argmax(own, axis=0) == np.arange(40)).mean() > 0.9


def test_every_path_in_the_readme_exists():
    root = README.parent
    for path in re.findall(r"\]\(([\w./-]+)\)", README.read_text()):
        assert (root / path).exists(), path
