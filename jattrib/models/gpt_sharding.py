"""How a decoder's parameters lie on a mesh: fully sharded over one axis, tensor-parallel over another."""

import math
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Params

Axis = str | tuple[str, ...] | None
"""An axis of a mesh, several taken as one, or none."""

_MODEL, _DATA = "model", "data"
_TOKENS = "embedding/tokens"
_RULES: dict[str, tuple[str | None, ...]] = {
    _TOKENS: (_MODEL, _DATA),
    "embedding/positions": (None, _DATA),
    "head/kernel": (_DATA, _MODEL),
    "layers/attention/out/kernel": (None, _MODEL, _DATA),
    "layers/mlp/down/kernel": (None, _MODEL, _DATA),
    "layers/*/kernel": (None, _DATA, _MODEL),
    "layers/attention/out/bias": (),
    "layers/mlp/down/bias": (),
    "layers/*norm/*": (),
    "layers/*/bias": (None, _MODEL),
    "norm/*": (),
}
"""The first pattern that a leaf's path matches says where its dimensions go."""


def partition(params: Params, mesh: Mesh, *, data: Axis = "data", model: Axis = "model") -> PyTree[PartitionSpec]:
    """Return the partition of every leaf of a decoder's parameters, abstract ones too.

    Heads and the feed-forward layers' insides are split over `model`, and so are tokens, in embedding and logits: each
    device multiplies its own part, and the residual stream is summed once after attention and once after the feed-
    forward layer.  The other dimension of each matrix is split over `data` and is gathered when its layer's turn
    comes.  The tokens of the embedding are split over both, if these divide them, and its width is whole: if that were
    split over `data`, devices would compute logits of all examples.  Norms are everywhere.  A dimension that an axis
    does not divide is not split.

    Examples are to be spread over `data` too.  More devices on `model` than there are heads of keys and values still
    give the right result, but split heads, which have to be put together again.

    Args:
        params: of `gpt.decoder`.
        mesh: with the axes named.
        data: the axis, or axes, for examples and for the second dimension of matrices; None does not split these.
        model: the axis, or axes, for the first.

    Raises:
        InvalidInputError: the mesh has no such axis, or a leaf is not a decoder's.

    Source: Shoeybi et al. 2019, section 3 (the split of attention and feed-forward layers); Rajbhandari et al. 2020,
    section 5 (the split over data).
    """
    axes = {_DATA: _names(data), _MODEL: _names(model)}
    unknown = [name for names in axes.values() for name in names if name not in mesh.shape]
    if unknown:
        raise InvalidInputError(
            f"the axis {unknown[0]!r}",
            expected=f"one of the mesh's: {', '.join(mesh.axis_names)}",
            remedy="name the axes: partition(params, mesh, data=..., model=...)",
        )

    def spec(path: str, leaf: Any) -> PartitionSpec:
        rule = next((rule for pattern, rule in _RULES.items() if fnmatchcase(path, pattern)), None)
        if rule is None:
            raise InvalidInputError(
                f"the leaf {path!r}",
                expected="a parameter of gpt.decoder",
                remedy="write partitions of your own for it",
            )
        both = axes[_MODEL] + axes[_DATA]
        if path == _TOKENS and both and leaf.shape[0] % math.prod(mesh.shape[name] for name in both) == 0:
            return PartitionSpec(both if len(both) > 1 else next(iter(both)), None)
        split = []
        for size, role in zip(leaf.shape, rule, strict=False):
            names = axes[role] if role is not None else ()
            count = 1
            for name in names:
                count *= mesh.shape[name]
            split.append((names[0] if len(names) == 1 else names) if count > 1 and size % count == 0 else None)
        return PartitionSpec(*split)

    return tree.from_names(params, {path: spec(path, leaf) for path, leaf in tree.to_names(params).items()})


def shardings(params: Params, mesh: Mesh, *, data: Axis = "data", model: Axis = "model") -> PyTree[NamedSharding]:
    """Return `partition` as shardings: for `jax.device_put`, `jax.jit` and `hf.read`."""
    specs = partition(params, mesh, data=data, model=model)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _names(axis: Axis) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis
