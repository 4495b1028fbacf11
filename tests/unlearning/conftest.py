import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.unlearning import finetune
from tests.unlearning import oracles

CLASSES = 3


def linear(params, state, x, *, train=False):
    return x @ params["kernel"] + params["bias"][None], state


def by_token(params, state, x, *, train=False):
    return x @ params["kernel"] + params["bias"][None, None], state


@pytest.fixture
def sequences(task):
    """The same linear models of every token of twelve sequences, which end in padding, and five of them to forget."""
    _, models, keys = task
    random = np.random.default_rng(5)
    x = random.standard_normal((12, 4, 4)).astype(np.float32)
    labels = random.integers(0, CLASSES, (12, 4)).astype(np.int32)
    labels[np.arange(4)[None, :] >= random.integers(1, 5, 12)[:, None]] = -1
    assert (labels[:5] < 0).any()
    return finetune.problem(by_token, (x, labels), np.arange(5)), models, keys


@pytest.fixture
def task():
    """Two linear classifiers of sixty examples, a little trained, and five examples to forget."""
    random = np.random.default_rng(0)
    x = random.standard_normal((60, 4)).astype(np.float32)
    labels = (x @ random.standard_normal((4, CLASSES))).argmax(axis=1).astype(np.int32)
    labels[:5] = (labels[:5] + 1) % CLASSES
    keys = jax.random.split(jax.random.key(1), 2)
    params = {
        "kernel": 0.5 * jax.vmap(lambda key: jax.random.normal(key, (4, CLASSES)))(keys),
        "bias": jnp.zeros((2, CLASSES)),
    }
    problem = finetune.problem(linear, (x, labels), np.arange(5))
    models = finetune.Models(params, ())
    return problem, models, keys


@pytest.fixture
def trained(task):
    """The same models at the minimum of a slightly damped loss, by Newton's method in float64."""
    problem, _, keys = task
    theta = oracles.minimum(*problem.data, damping=1e-2)
    params = {"kernel": jnp.asarray(theta[:4], jnp.float32)[None], "bias": jnp.asarray(theta[4], jnp.float32)[None]}
    return problem, finetune.Models(jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), params), ()), keys
