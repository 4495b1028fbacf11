"""Sources of examples: in memory, a part of another, a random-access sequence."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from jattrib.core import mesh, tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch, Source


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A source over arrays in memory that share their leading axis.

    Raises:
        InvalidInputError: they do not share it, or whole numbers do not fit the type that JAX gives them.
    """

    batch: Batch

    def __post_init__(self):
        object.__setattr__(self, "batch", jax.tree.map(_held, self.batch))
        lengths = {name: np.shape(leaf)[:1] for name, leaf in tree.to_names(self.batch).items()}
        if len(set(lengths.values())) != 1 or () in lengths.values():
            raise InvalidInputError(
                f"arrays of the lengths {', '.join(f'{name}: {list(each)}' for name, each in lengths.items())}",
                expected="one array or more, all with one leading axis: the examples",
                remedy="pass inputs and labels of the same examples",
            )

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.batch)[0])

    def take(self, indices: Integer[np.ndarray, " b"]) -> Batch:
        """Return the examples at `indices`."""
        return jax.tree.map(lambda leaf: leaf[indices], self.batch)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some examples of a source, in the order of `indices`.

    Raises:
        InvalidInputError: an index is out of range, or they are no whole numbers, such as a mask.
    """

    source: Source
    indices: Integer[np.ndarray, " n"]

    def __post_init__(self):
        check_indices(self.indices)
        outside = (self.indices < 0) | (self.indices >= len(self.source))
        if outside.any():
            raise InvalidInputError(
                f"the index {self.indices[outside][0]} into {len(self.source)} examples",
                expected=f"indices from 0 to {len(self.source) - 1}",
                remedy="pass the numbers of examples; of a mask, `np.flatnonzero(mask)`",
            )

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: Integer[np.ndarray, " b"]) -> Batch:
        """Return the examples at `indices` of the subset."""
        return self.source.take(self.indices[indices])


def check_indices(indices: np.ndarray) -> None:
    """Refuse what is no array of whole numbers: a mask, above all, would be taken for zeros and ones.

    Raises:
        InvalidInputError: it is none.
    """
    if indices.size and not np.issubdtype(indices.dtype, np.integer):
        raise InvalidInputError(
            f"indices of dtype {indices.dtype}",
            expected="the numbers of examples, counted from 0",
            remedy="of a mask, pass `np.flatnonzero(mask)`",
        )


@runtime_checkable
class RandomAccess(Protocol):
    """What `grain` sources, lists and map-style datasets have in common."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """Return one example: a pytree of arrays."""
        ...


@dataclasses.dataclass(frozen=True)
class Items:
    """A source over a random-access sequence of single examples, a `grain.sources` one, say; it stacks them."""

    items: RandomAccess

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: Integer[np.ndarray, " b"]) -> Batch:
        """Return the examples at `indices`, stacked."""
        examples = [self.items[int(index)] for index in indices]
        return jax.tree.map(_stacked, *examples)


def _held(leaf: Any) -> Any:
    """Return an array on the host, in native byte order; typed keys, which NumPy does not know, as they are."""
    if isinstance(leaf, jax.Array) and mesh.is_key(leaf):
        return leaf
    array = np.asarray(leaf)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind in "iu" and array.size:
        most = np.iinfo(jax.dtypes.canonicalize_dtype(array.dtype))
        if array.min() < most.min or array.max() > most.max:
            raise InvalidInputError(
                f"{array.dtype} from {array.min()} to {array.max()}",
                expected=f"whole numbers that fit {most.dtype}, which is what JAX makes of them",
                remedy="number them from 0, or enable 64 bits: `jax.config.update('jax_enable_x64', True)`",
            )
    return array


def _stacked(*leaves: Any) -> Any:
    held = [_held(leaf) for leaf in leaves]
    return np.stack(held) if isinstance(held[0], np.ndarray) else jnp.stack(held)
