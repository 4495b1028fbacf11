"""A small classifier in double precision, and its curvatures written out as matrices."""

import jax
import jax.numpy as jnp
import numpy as np

from jattrib.core import tree
from jattrib.core.stream import InMemory
from jattrib.models.outputs import label_loss

COUNT, INPUTS, HIDDEN, CLASSES = 23, 4, 5, 3


def logits(params, example):
    hidden = jnp.tanh(example[0] @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"]


def loss(params, example):
    return label_loss(logits(params, example), example)


def margin(params, example):
    values = logits(params, example)
    return jnp.sum(jnp.where(jnp.arange(CLASSES, dtype=jnp.int32) == example[1], values, -values / 2))


def params(dtype=np.float64):
    rng = np.random.default_rng(0)
    sizes = {"first": (INPUTS, HIDDEN), "last": (HIDDEN, CLASSES)}
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=size) * 0.7, dtype),
            "bias": jnp.asarray(rng.normal(size=size[1]), dtype),
        }
        for name, size in sizes.items()
    }


def data(count=COUNT, seed=1, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, INPUTS)).astype(dtype), rng.integers(0, CLASSES, count).astype(np.int32)


def source(count=COUNT, seed=1, dtype=np.float64):
    return InMemory(data(count, seed, dtype))


def flat(function, batch):
    """`function` of flat parameters, for every example of a batch."""
    _, unravel = tree.ravel(params())
    return lambda vector: jax.vmap(lambda example: function(unravel(vector), example))(batch)


def gradients(function, batch):
    """Per-example gradients as a matrix, by reverse differentiation of all outputs."""
    vector, _ = tree.ravel(params())
    return np.asarray(jax.jacrev(flat(function, batch))(vector))


def hessian_matrix(batch):
    vector, _ = tree.ravel(params())
    return np.asarray(jax.hessian(lambda each: flat(loss, batch)(each).mean())(vector))


def ggn_matrix(batch):
    """`(1/n) Σ Jᵀ (diag p − p pᵀ) J`, the softmax's own formula."""
    vector, _ = tree.ravel(params())
    jacobian = np.asarray(jax.jacrev(flat(logits, batch))(vector))
    p = np.asarray(jax.nn.softmax(flat(logits, batch)(vector)))
    inner = np.einsum("nc,cd->ncd", p, np.eye(CLASSES)) - np.einsum("nc,nd->ncd", p, p)
    return np.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian) / len(p)


def vectors(count, seed=2):
    """Random right-hand sides: as a matrix, and as pytrees."""
    rows = np.random.default_rng(seed).normal(size=(count, tree.size(params())))
    return rows, jax.vmap(tree.ravel(params())[1])(jnp.asarray(rows))


def rows(tree_of_vectors):
    """Vectors as a matrix again."""
    return np.asarray(jax.vmap(lambda each: tree.ravel(each)[0])(tree_of_vectors))
