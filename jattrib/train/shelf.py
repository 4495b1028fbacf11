"""Where a replay keeps its carries: on the device, on the host, or on disk, from where it can be resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jattrib.core import mesh as meshes
from jattrib.core import params


class Shelf(NamedTuple):
    """Where carries are kept, by the number of their segment.

    Attributes:
        kind: `device`, `host`, or `recompute`: the device, which is given only a few of them.
        directory: on disk, whatever the kind; None is not on disk.
        mesh: every device of it holds carries whole.
        identity: what the things on disk were computed from.
    """

    kind: str
    directory: Path | None = None
    mesh: Mesh | None = None
    identity: Mapping[str, Any] | None = None

    def put(self, number: int, carry: PyTree) -> PyTree:
        """Keep a carry, and return what `get` wants to have back."""
        if self.directory is not None:
            self.save(f"carry-{number}", carry)
            return None
        return to_host(carry) if self.kind == "host" else carry

    def get(self, number: int, kept: PyTree, like: PyTree) -> PyTree:
        """Return a carry on the devices; `like` is one of its structure."""
        if kept is not None and self.kind != "host":
            return kept
        kept = self.load(f"carry-{number}", like) if kept is None else kept
        return self.place(kept, like)

    def place(self, kept: PyTree, like: PyTree) -> PyTree:
        """Return what `to_host` made, on the devices, words as keys again where `like` has them."""
        return meshes.replicate(jax.tree.map(meshes.keyed, kept, like), self.mesh)

    def stored(self) -> list[int]:
        """Return which carries are on disk."""
        found = [] if self.directory is None else self.directory.glob("carry-*")
        return sorted(int(path.name.removeprefix("carry-")) for path in found if params.exists(path))

    def holds(self, name: str) -> bool:
        """Return whether something of this name is on disk."""
        return self.directory is not None and params.exists(self.directory / name)

    def save(self, name: str, value: PyTree) -> None:
        """Write a pytree under a name; every process must call it, and the first one writes."""
        value = to_host(value)
        if self.directory is not None and jax.process_index() == 0:
            params.save_params(self.directory / name, value, self.identity)

    def load(self, name: str, like: PyTree) -> PyTree:
        """Return what was written under a name, as `to_host` made it; `like` is of its structure and may be abstract.

        Raises:
            StoreError: it is damaged, or belongs to another run.
        """
        assert self.directory is not None
        words = jax.eval_shape(lambda tree: jax.tree.map(meshes.words, tree), like)
        return params.load_params(self.directory / name, words, self.identity)

    def clear(self) -> None:
        """Remove what was written; the directory too, if nothing else is in it."""
        if self.directory is None or jax.process_index() != 0 or not self.directory.is_dir():
            return
        for name in ("progress", *(f"carry-{number}" for number in self.stored())):
            if self.holds(name):
                params.remove(self.directory / name)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()


def to_host(value: PyTree) -> PyTree:
    """Return a pytree as NumPy arrays, typed keys as their words."""
    return jax.tree.map(meshes.fetch, value)
