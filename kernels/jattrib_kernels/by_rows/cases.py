"""A function of rows and the shapes that feed its tests."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """Rows.

    Attributes:
        n: rows.
        width: of a row.
        seed: of their entries.
    """

    n: int
    width: int
    seed: int = 0

    def __str__(self) -> str:
        """Return a short name."""
        return f"n{self.n}-width{self.width}"


NUMERIC = (Case(1, 1), Case(5, 130), Case(20, 300), Case(64, 128))
"""Fewer rows than a block has, blocks that do not fill up, several of them."""


def arguments(case: Case) -> tuple[dict, dict, dict]:
    """Return what all rows share, a state, and what is read alone, in single precision: `total`'s arguments."""
    generator = np.random.default_rng(case.seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(generator.standard_normal(shape), jnp.float32)

    shared = {"scales": draw(case.width), "shift": draw()}
    state = {"x": draw(case.n, case.width), "turns": jnp.arange(case.n, dtype=jnp.int32), "norm": draw(case.n)}
    return shared, state, {"y": draw(case.n, case.width), "factor": draw(case.n)}


def total(shared: dict, state: dict, rows: dict) -> tuple[dict, jax.Array]:
    """Return a state after sums that each need the one before, a loop and a choice, and a number of each row."""
    inner = jnp.sum(state["x"] * rows["y"] * shared["scales"][None], axis=1)
    x = state["x"] + (rows["factor"] * inner)[:, None] * rows["y"]
    norm = jnp.sum(x * x, axis=1)

    def halve(_, norm: jax.Array) -> jax.Array:
        return norm / 2 + shared["shift"]

    some = jnp.max(jnp.where(norm > 1, 1, 0)) > 0
    halved = jax.lax.cond(some, lambda: jax.lax.fori_loop(0, 3, halve, norm), lambda: norm)
    moved = jnp.where(norm > 1, halved, norm)
    turns = state["turns"] + (norm > 1).astype(jnp.int32)
    return {"x": x, "turns": turns, "norm": state["norm"] + moved}, jnp.max(x, axis=1)


def exact(shared: dict, state: dict, rows: dict) -> tuple[dict, np.ndarray]:
    """Return what `total` does, in float64, row by row."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (shared, state, rows))
    (shared, state, rows), largest = wide, []
    x, turns, norms = state["x"].copy(), state["turns"].copy(), state["norm"].copy()
    for at, row in enumerate(x):
        row += rows["factor"][at] * (row * rows["y"][at]) @ shared["scales"] * rows["y"][at]
        norm = row @ row
        if norm > 1:
            turns[at] += 1
            norm = norm / 8 + shared["shift"] * 1.75
        norms[at] += norm
        largest.append(row.max())
    return {"x": x, "turns": turns, "norm": norms}, np.array(largest)
