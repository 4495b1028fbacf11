import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.unlearning import finetune
from tests.unlearning import oracles

CLASSES = 3


def linear(params, state, x, *, train=False):
    return x @ params["kernel"] + params["bias"][None], state


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
