"""Functions of rows, a block at a time, against float64 and row by row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib_kernels.by_rows import by_rows, cases, pallas_tpu

BACKENDS = ("reference", "interpret")


@pytest.mark.parametrize("case", cases.NUMERIC, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_is_that_of_float64(backend, case):
    arguments = cases.arguments(case)
    found = jax.jit(partial(by_rows, cases.total, backend=backend))(*arguments)
    for mine, exact in zip(jax.tree.leaves(found), jax.tree.leaves(cases.exact(*arguments)), strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float64), exact, rtol=2e-5, atol=1e-5)
    assert jax.tree.map(lambda leaf: leaf.dtype, found[0]) == jax.tree.map(lambda leaf: leaf.dtype, arguments[1])


def test_the_kernel_leaves_the_state_that_it_was_given():
    shared, state, rows = cases.arguments(cases.NUMERIC[2])
    before = jax.tree.map(np.array, state)
    by_rows(cases.total, shared, state, rows, backend="interpret")
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_loops_hand_the_state_on():
    shared, state, rows = cases.arguments(cases.NUMERIC[2])

    def loop(backend):
        turn = partial(by_rows, cases.total, shared, rows=rows, backend=backend)
        return jax.jit(lambda state: jax.lax.fori_loop(0, 3, lambda _, state: turn(state)[0], state))(state)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), loop("interpret"), loop("reference"))


def test_where_there_is_no_kernel_the_function_for_all_rows_at_once_runs():
    shared, state, rows = cases.arguments(cases.NUMERIC[1])

    def whole(shared, state, rows):
        found, largest = cases.total(shared, state, rows)
        return found, largest + 1

    for backend, more in (("auto", 1), ("reference", 1), ("interpret", 0)):
        _, largest = by_rows(cases.total, shared, state, rows, whole=whole, backend=backend)
        np.testing.assert_allclose(largest, cases.exact(shared, state, rows)[1] + more, rtol=1e-5)


def test_auto_takes_what_the_kernel_does_not_have(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    asked = []

    def kernel(function, *args, **settings):
        asked.append(settings)
        return function(*args)

    monkeypatch.setattr(pallas_tpu, "by_rows", kernel)
    shared, state, rows = cases.arguments(cases.NUMERIC[1])
    by_rows(cases.total, shared, state, rows)
    assert asked == [{"interpret": False}]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), rows)
    by_rows(lambda shared, state, rows: (state,), shared, state, half)
    wide = jax.tree.map(lambda leaf: jnp.ones((5, 2**16)) if leaf.ndim == 2 else leaf, (state, rows))
    by_rows(cases.total, shared | {"scales": jnp.ones(2**16)}, *wide)
    assert len(asked) == 1
    many = jax.tree.map(lambda leaf: jnp.ones((2**18, *leaf.shape[1:]), leaf.dtype), (state, rows))
    by_rows(cases.total, shared, *many)  # of whose vectors a block has eight numbers
    assert len(asked) == 2
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    by_rows(cases.total, shared, state, rows)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("interpret", lambda leaf: leaf.astype(jnp.bfloat16), r"arrays of bfloat16\n.*float32 and int32"),
        ("interpret", lambda leaf: jnp.ones((5, 2**16)), r"blocks of \d+ MiB\n.*48 MiB"),
        ("pallas_gpu", lambda leaf: leaf, "no such kernel for a GPU"),
        ("mosaic", lambda leaf: leaf, "expected one of auto"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused(backend, change, message):
    shared, state, rows = cases.arguments(cases.NUMERIC[1])
    state, rows = jax.tree.map(lambda leaf: change(leaf) if leaf.ndim == 2 else leaf, (state, rows))
    shared["scales"] = jnp.ones(state["x"].shape[1])
    with pytest.raises(ValueError, match=f"(?s){message}"):
        by_rows(cases.total, shared, state, rows, backend=backend)
