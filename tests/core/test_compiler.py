"""The compiler computes what the program says, where one of its releases did not; that release is named."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core import compiler


@pytest.mark.parametrize(
    ("shared", "queries"),
    [((250, 10), 64), ((256, 128), 8), ((50, 64, 32), 3), ((2, 50, 64, 64), 3)],
)
def test_sums_of_products_with_a_broadcast_factor(shared, queries):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=shared).astype(np.float32)
    each = rng.normal(size=(queries, *shared)).astype(np.float32)
    found = jax.jit(jax.vmap(lambda b, x: b * (b * x).sum(-1, keepdims=True), in_axes=(None, 0)))(factor, each)
    b, x = factor.astype(np.float64), each.astype(np.float64)
    expected = b * (b * x).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-4)


def test_softmax_pulled_back_for_many_queries_at_once():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(250, 10)).astype(np.float32)
    cotangents = rng.normal(size=(32, 250, 10)).astype(np.float32)

    @jax.jit
    def pulled(logits, cotangents):
        _, pull = jax.vjp(jax.nn.softmax, logits)
        return jax.vmap(lambda cotangent: pull(cotangent)[0])(cotangents)

    raised = np.exp(logits.astype(np.float64))
    p = raised / raised.sum(-1, keepdims=True)
    expected = p * (cotangents - (p * cotangents).sum(-1, keepdims=True))
    np.testing.assert_allclose(np.asarray(pulled(logits, cotangents)), expected, rtol=1e-4, atol=1e-6)


def test_squared_rows_of_a_product_in_a_long_batch():
    n = 32_769
    rows = jnp.stack([jnp.arange(n, dtype=jnp.float32), jnp.zeros(n), jnp.zeros(n)], axis=1)
    found = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    np.testing.assert_allclose(np.asarray(found), np.arange(n, dtype=np.float64) ** 2, rtol=1e-6)


def test_a_release_that_is_wrong_is_named():
    with pytest.warns(compiler.UnsoundCompilerWarning, match=r"jaxlib 0\.10\.2 is installed.*pip install"):
        compiler.warn_if_unsound("0.10.2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler.warn_if_unsound("0.10.1")
