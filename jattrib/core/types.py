"""The few protocols of the house, on one page.

Everything is a pure function over pytrees or a NamedTuple of them: no base classes, no registries, no global state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

Params = Any
"""A pytree of floating-point arrays: what is differentiated."""

Batch = Any
"""A pytree of arrays that share their leading axis: some examples."""

Example = Any
"""A pytree of arrays: one row of a `Batch`, without the leading axis."""

Key = jax.Array
"""A typed key, as made by `jax.random.key`."""


@runtime_checkable
class OutputFn(Protocol):
    """A scalar function of one example, `f(params, example)`: the caller vmaps.

    Any callable will do.  One that carries arrays of its own (batch statistics, say) should be a registered pytree, so
    that a new set of arrays does not mean a new compilation; `models.outputs.Margin` is one.
    """

    def __call__(self, params: Params, example: Example, /) -> Float[Array, ""]:
        """Return the output of one example."""
        ...


@runtime_checkable
class Source(Protocol):
    """A sequence of examples, in memory, on disk or behind a loader."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray, /) -> Batch:
        """Return the examples at `indices`, stacked along a leading axis."""
        ...


class Fold(NamedTuple):
    """A statistic over one pass of the data whose state is a sum.

    Because it is a sum, chunking and sharding change nothing but rounding.  `update(batch, valid)` returns the
    **increment** of the state for one batch; rows where `valid` is false are padding and must contribute nothing.
    """

    init: Callable[[], Any]
    update: Callable[[Batch, Bool[Array, " b"]], Any]
    finish: Callable[[Any], Any]


class Projector(NamedTuple):
    """A random linear map from gradient pytrees to `dim` features.

    `init(key, params)` fixes the map (a small pytree: words of a counter-based generator, never a matrix) and
    `apply(state, gradients)` maps a pytree of `(n, *leaf.shape)` arrays to `Float[n dim]`.  A map that needs no
    gradients to be made has `direct(state, output, params, batch)`: the outputs, and the features of their gradients.
    """

    dim: int
    init: Callable[[Key, Params], Any]
    apply: Callable[[Any, Params], Float[Array, "n dim"]]
    direct: Callable[[Any, OutputFn, Params, Batch], tuple[Float[Array, " n"], Float[Array, "n dim"]]] | None = None
