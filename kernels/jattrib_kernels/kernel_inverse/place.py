"""Where a device stands among those that share a matrix by rows, and how they speak to one another."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Place(NamedTuple):
    """This device among `size`: `Place()` is one that is alone, for which nothing here does anything.

    Blocks of rows are numbered in the order of elimination, which goes round the devices: block j is the `j // size`-th
    of device `j % size`.
    """

    axis: tuple[str, ...] | None = None
    size: int = 1

    @property
    def number(self) -> jax.Array | int:
        """Which device this is."""
        return 0 if self.axis is None else lax.axis_index(self.axis)

    def owns(self, block: jax.Array) -> jax.Array:
        """Return whether a block of rows is here."""
        return block % self.size == self.number

    def from_owner(self, block: jax.Array, x: jax.Array) -> jax.Array:
        """Give every device what the owner of a block has."""
        return x if self.axis is None else lax.psum(jnp.where(self.owns(block), x, jnp.zeros_like(x)), self.axis)

    def total(self, x: jax.Array) -> jax.Array:
        """Sum over the devices."""
        return x if self.axis is None else lax.psum(x, self.axis)

    def largest(self, x: jax.Array) -> jax.Array:
        """Return the maximum over the devices."""
        return x if self.axis is None else lax.pmax(x, self.axis)

    def gather(self, rows: jax.Array) -> jax.Array:
        """Return the rows of all devices."""
        return rows if self.axis is None else lax.all_gather(rows, self.axis, tiled=True)
