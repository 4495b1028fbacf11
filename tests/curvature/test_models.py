"""Every inverse of a curvature on a convolution and on a transformer with tied embeddings and scanned layers, float64.

The oracle is the softmax's own formula for the Gauss-Newton matrix, from the explicit Jacobian of the logits.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.attribution import influence
from jattrib.core import mesh as meshes
from jattrib.core import tree
from jattrib.core.stream import InMemory
from jattrib.curvature import arnoldi, explicit, krylov, products
from jattrib.models import gpt
from jattrib.models.outputs import Logits, LogLikelihood, Loss, label_loss

pytestmark = pytest.mark.usefixtures("x64")
COUNT, QUERIES, DAMPING = 12, 2, 0.05
CONFIG = gpt.Config("gpt2", vocabulary=5, context=3, width=4, layers=2, heads=2, hidden=4, scale=0.5)


def convolution(params, state, x, /, *, train=False):
    """A 3×3 convolution of stride 2, tanh, a linear layer."""
    y = jax.lax.conv_general_dilated(x, params["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jnp.tanh(y + params["bias"][None, None, None])
    return y.reshape(len(x), -1) @ params["last"], state


def conv_problem(rng):
    params = {"kernel": rng.normal(size=(3, 3, 1, 3)), "bias": rng.normal(size=3), "last": rng.normal(size=(12, 3))}
    sets = [(rng.normal(size=(n, 4, 4, 1)), rng.integers(0, 3, n).astype(np.int32)) for n in (COUNT, QUERIES)]
    return convolution, jax.tree.map(jnp.asarray, params), {}, sets


def transformer_problem(rng):
    model = gpt.decoder(CONFIG)
    shapes, state = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), shapes)
    sets = [tuple(rng.integers(0, 5, (n, 3)).astype(np.int32) for _ in range(2)) for n in (COUNT, QUERIES)]
    return model.apply, params, state, sets


def oracle(logits, params, batch):
    """`(1/n) Σ_i (1/T) Σ_t J_itᵀ (diag p − p pᵀ) J_it`."""
    vector, unravel = tree.ravel(params)
    outputs = jax.jit(lambda v: jax.vmap(lambda example: logits(unravel(v), example))(batch))
    shape = outputs(vector).shape
    jacobian = np.asarray(jax.jacfwd(outputs)(vector)).reshape(-1, shape[-1], vector.size)
    p = np.asarray(jax.nn.softmax(outputs(vector))).reshape(-1, shape[-1])
    inner = np.einsum("nc,cd->ncd", p, np.eye(shape[-1])) - np.einsum("nc,nd->ncd", p, p)
    return np.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian, optimize=True) / len(p)


@pytest.mark.parametrize(
    "make",
    [conv_problem, pytest.param(transformer_problem, marks=pytest.mark.slow)],
    ids=["convolution", "transformer"],
)
def test_every_inverse_gives_the_oracles_influence(make):
    apply, params, state, (train, asked) = make(np.random.default_rng(0))
    loss, output, logits = Loss(apply, state), LogLikelihood(apply, state), Logits(apply, state)
    source = InMemory(train)
    matrix = oracle(logits, params, jax.tree.map(jnp.asarray, train))
    rows = [_rows(f, params, batch) for f, batch in ((loss, train), (output, asked))]
    wanted = -rows[0] @ np.linalg.solve(matrix + DAMPING * np.eye(len(matrix)), rows[1].T) / COUNT
    operator = products.streamed(products.ggn(logits, label_loss, params), source, chunk=16, mesh=meshes.data_mesh())
    found = explicit.matrix(operator, params)
    np.testing.assert_allclose(found, matrix, rtol=0, atol=1e-10 * np.abs(matrix).max())
    unravel = tree.ravel(params)[1]
    times = jax.jit(lambda v: jax.vmap(unravel)(jax.vmap(lambda each: tree.ravel(each)[0])(v) @ found))
    space = arnoldi.arnoldi(times, params, key=jax.random.key(1), steps=len(matrix))
    solve = partial(krylov.conjugate_gradient, times, damping=DAMPING, tolerance=1e-12, iterations=2000)
    gradients = influence.gradients(output, params, InMemory(asked))
    for name, inverse in {
        "explicit": explicit.inverse(found, damping=DAMPING),
        "conjugate gradients": lambda vectors: solve(vectors)[0],
        "Arnoldi": arnoldi.inverse(space, damping=DAMPING),
    }.items():
        scores = influence.scores(loss, params, source, inverse(gradients), chunk=12, progress=False)
        np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-8 * np.abs(wanted).max(), err_msg=name)


def _rows(function, params, batch):
    vector, unravel = tree.ravel(params)
    every = jax.jit(lambda v: jax.vmap(lambda example: function(unravel(v), example))(jax.tree.map(jnp.asarray, batch)))
    return np.asarray(jax.jacrev(every)(vector))
