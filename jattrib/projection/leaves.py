"""How the leaves of a pytree share one random matrix: each starts at a row of its own, and nothing is concatenated.

Leaf l holds the coordinates `[start_l, start_l + size_l)` of a virtual vector; `start_l` is the sum of the sizes before
it, each rounded up to whole blocks of the matrix.  Leaves come in the order of `jax.tree.leaves`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Key, Params

KeyWords = UInt32[Array, "2"]
"""The state of a projector: the two words of a Threefry key."""


class Leaf(NamedTuple):
    """The gradients of one leaf as a matrix, and the first block of the random matrix that they meet."""

    rows: Float[Array, "n size"]
    block: int


def matrices(gradients: Params, *, block: int) -> list[Leaf]:
    """Return each leaf of `(n, *shape)` gradients as an `(n, size)` matrix with its first block of `block` coordinates.

    A leaf that is a `jax.ShapeDtypeStruct` is absent: it keeps its place and contributes nothing.  So one leaf can be
    projected before the others exist.
    """
    start, found = 0, []
    for leaf in jax.tree.leaves(gradients):
        width = math.prod(leaf.shape[1:])
        if width and not isinstance(leaf, jax.ShapeDtypeStruct):
            found.append(Leaf(leaf.reshape(leaf.shape[0], width), start))
        start += -(-width // block)
    return found


def total(gradients: Params, project: Callable[[Leaf], Float[Array, "n k"]], *, block: int) -> Float[Array, "n k"]:
    """Return the sum of the leaves' projections, in the widest of their types."""
    parts = [project(leaf) for leaf in matrices(gradients, block=block)]
    dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    return sum((part.astype(dtype) for part in parts[1:]), start=parts[0].astype(dtype))


def key_words(key: Key) -> KeyWords:
    """Return the words of a typed Threefry key.

    Raises:
        InvalidInputError: the key is raw, several, or of another generator.
    """
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key) or key.shape != ():
        raise InvalidInputError(
            f"a key of type {jnp.result_type(key)} and shape {jnp.shape(key)}",
            expected="one typed key",
            remedy="pass `jax.random.key(seed)`; vmap `init` over several keys",
        )
    name = str(jax.random.key_impl(key))
    if name != "threefry2x32":
        raise InvalidInputError(
            f"a key of the generator {name}",
            expected="a threefry2x32 key, which gives the same matrix on every backend",
            remedy="pass `jax.random.key(seed, impl='threefry2x32')`",
        )
    return jax.random.key_data(key)


def check_dim(dim: int) -> None:
    """Refuse a dimension that is no positive integer."""
    if not isinstance(dim, int | np.integer) or dim < 1:
        raise InvalidInputError(
            f"dim = {dim!r}", expected="an integer of at least 1", remedy="512 to 4096 suits most models"
        )


def check_copies(copies: int) -> None:
    """Refuse a number of copies that is no positive integer."""
    if copies < 1:
        raise InvalidInputError(f"copies = {copies}", expected="copies >= 1", remedy="1 is CountSketch; 4 is an SJLT")


def check_params(params: Params, dim: int) -> None:
    """Refuse parameters that cannot be projected to `dim` features.

    Raises:
        InvalidInputError: there is no leaf, a leaf is not floating, or dim exceeds the number of parameters.
    """
    leaves = jax.tree.leaves(params)
    others = sorted({str(jnp.result_type(x)) for x in leaves if not jnp.issubdtype(jnp.result_type(x), jnp.floating)})
    if others or not leaves:
        raise InvalidInputError(
            f"parameters with leaves of type {', '.join(others)}" if others else "parameters without a leaf",
            expected="floating-point leaves, which have gradients",
            remedy="pass the trainable arrays alone and close over the others",
        )
    if dim > tree.size(params):
        raise InvalidInputError(
            f"dim = {dim} for {tree.size(params)} parameters",
            expected="dim at most the number of parameters",
            remedy=f"choose dim <= {tree.size(params)}, or use the gradients without a projection",
        )
