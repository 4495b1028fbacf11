"""Algebra of pytrees: inner products, paths, selection by path, digests."""

import dataclasses
import functools
import hashlib
import math
import types
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jattrib.core.errors import InvalidInputError

Scalar = float | int | np.floating | Float[Array, ""]

BARE = "value"
"""The name of a leaf that has no path: the tree is the leaf."""


def dot(left: PyTree, right: PyTree) -> Float[Array, ""]:
    """Return the inner product `Σ_i left_i · right_i` of two pytrees of one structure.

    Leaves of half precision are summed in single precision.
    """
    _check_alike(left, right)
    kind = sum_dtype(_common_dtype(jax.tree.leaves((left, right))))
    multiply = functools.partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)
    products = jax.tree.map(lambda x, y: multiply(jnp.asarray(x, kind), jnp.asarray(y, kind)), left, right)
    return functools.reduce(jnp.add, jax.tree.leaves(products), jnp.zeros((), kind))


def norm(x: PyTree) -> Float[Array, ""]:
    """Return `‖x‖`, of numbers of any size: in single precision squares below 1e-38 are 0, above 1e38 infinite.

    >>> float(norm({"a": jnp.float32(3e-30), "b": jnp.full(1, 4e-30, jnp.float32)}) * 1e30)
    5.0
    """
    wide = widen(x)
    tops = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(wide)]
    kind = _common_dtype(tops)
    top = functools.reduce(jnp.maximum, [each.astype(kind) for each in tops], jnp.zeros((), kind))
    unit = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
    parts = jax.tree.map(lambda leaf: leaf / unit.astype(leaf.dtype), wide)
    return jnp.sqrt(dot(parts, parts)) * unit


def level(x: PyTree) -> tuple[PyTree, Float[Array, ""]]:
    """Return `x / s` and s, the power of two for which `½ ≤ ‖x / s‖ < 1`: no digit changes.  Of zeros s is 1."""
    size = norm(x)
    exponent = jnp.where((size > 0) & jnp.isfinite(size), jnp.frexp(size)[1], 0)
    one = jnp.ones((), size.dtype)
    return scale(jnp.ldexp(one, -exponent), x), jnp.ldexp(one, exponent)


def axpy(factor: Scalar, x: PyTree, y: PyTree) -> PyTree:
    """Return `factor · x + y`, each leaf in the dtype of `y`'s."""
    _check_alike(x, y)

    def leaf(u: Any, v: Any) -> Array:
        v = jnp.asarray(v)
        return jnp.asarray(factor, v.dtype) * jnp.asarray(u, v.dtype) + v

    return jax.tree.map(leaf, x, y)


def scale(factor: Scalar, x: PyTree) -> PyTree:
    """Return `factor · x`, each leaf in its own dtype."""
    return jax.tree.map(lambda u: jnp.asarray(factor, jnp.asarray(u).dtype) * jnp.asarray(u), x)


def sum_dtype(dtype: Any) -> Any:
    """Return the type in which numbers of a type are summed: float32 for half precision, else their own."""
    return jnp.dtype(jnp.float32 if dtype in (jnp.bfloat16, jnp.float16) else dtype)


def widen(x: PyTree) -> PyTree:
    """Return `x`, each leaf in the type in which its numbers are summed: `sum_dtype`."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, sum_dtype(jnp.result_type(leaf))), x)


def zeros_like(x: PyTree) -> PyTree:
    """Return zeros of the structure, shapes and dtypes of `x`."""
    return jax.tree.map(jnp.zeros_like, x)


def ravel(x: PyTree) -> tuple[Float[Array, " p"], Callable[[Float[Array, " p"]], PyTree]]:
    """Return the leaves of `x` in one vector, in `jax.tree.leaves`' order, and the function that undoes it."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.flatten_util.ravel_pytree(x)


def size(x: PyTree) -> int:
    """Return how many numbers `x` holds.

    >>> size({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
    9
    """
    return sum(int(np.prod(np.shape(leaf), dtype=np.int64)) for leaf in jax.tree.leaves(x))


def nbytes(x: PyTree) -> int:
    """Return how many bytes the arrays of `x`, or of such shapes, take.

    >>> nbytes({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)})
    30
    """
    return sum(math.prod(np.shape(leaf)) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(x))


def paths(x: PyTree) -> list[str]:
    """Return the leaves' paths, in `jax.tree.leaves`' order; a bare leaf's is `value`.

    >>> paths({"layers": [{"kernel": 1.0, "bias": 2.0}]})
    ['layers/0/bias', 'layers/0/kernel']
    """
    found = [path for path, _ in jax.tree_util.tree_flatten_with_path(x)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator="/") or BARE for path in found]


def to_names(x: PyTree) -> dict[str, Any]:
    """Return the leaves of `x` by path: what the stores keep.

    Raises:
        InvalidInputError: two leaves have one path (a key that holds a slash, say).
    """
    names = paths(x)
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise InvalidInputError(
            f"more than one leaf with the path {twice[0]!r}",
            expected="a path of its own for every leaf",
            remedy="rename the keys of the pytree: no slashes, no numbers beside equal strings",
        )
    return dict(zip(names, jax.tree.leaves(x), strict=True))


def from_names(like: PyTree, named: Mapping[str, Any]) -> PyTree:
    """Return the pytree of `like`'s structure whose leaves `to_names` had named.

    Raises:
        InvalidInputError: a name is missing, or one too many.
    """
    wanted = to_names(like)
    differing = sorted(wanted.keys() ^ named.keys())
    if differing:
        where = "missing from" if differing[0] in wanted else "not expected in"
        raise InvalidInputError(
            f"{differing[0]!r} is {where} the named leaves",
            expected=f"the {len(wanted)} names of the pytree, such as {next(iter(wanted), None)!r}",
            remedy="pass what `to_names` made of a pytree of this very structure",
        )
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in wanted])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Merge:
    """Put selected leaves back among those that were not selected; a pytree, so that it passes through `jit`."""

    rest: tuple[Any, ...]
    names: tuple[str | None, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, selected: Mapping[str, Any]) -> PyTree:
        """Return the whole pytree with `selected` in its places."""
        others = iter(self.rest)
        leaves = [next(others) if name is None else selected[name] for name in self.names]
        return jax.tree.unflatten(self.structure, leaves)


def select(x: PyTree, *patterns: str) -> tuple[dict[str, Any], Merge]:
    """Return the leaves whose path matches one of the shell patterns, by path, and the function that puts them back.

    `*` matches slashes too: `select(params, "*/kernel")` takes the kernels at any depth.  A pattern that matches a
    whole prefix takes the leaves below it: `layers/0` is `layers/0/*`.

    Raises:
        InvalidInputError: a pattern matches no leaf.
    """
    named = to_names(x)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in named):
            raise InvalidInputError(
                f"the pattern {pattern!r}, which matches no leaf",
                expected=f"a pattern of the paths {', '.join(list(named)[:8])}{', …' if len(named) > 8 else ''}",
                remedy="`jattrib.core.tree.paths(params)` lists the paths",
            )
    chosen = {name: leaf for name, leaf in named.items() if any(_matches(name, pattern) for pattern in patterns)}
    rest = tuple(leaf for name, leaf in named.items() if name not in chosen)
    names = tuple(name if name in chosen else None for name in named)
    return chosen, Merge(rest, names, jax.tree.structure(x))


def _matches(name: str, pattern: str) -> bool:
    # A path is a pattern of itself, whatever is in brackets in it.
    own = name == pattern or name.startswith(f"{pattern}/")
    return own or fnmatchcase(name, pattern) or fnmatchcase(name, pattern + "/*")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Split:
    """A callable pytree whose leaves are not all arrays: the others are static."""

    arrays: tuple[Any, ...]
    others: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arrays = iter(self.arrays)
        leaves = [next(arrays) if other is _ARRAY else other for other in self.others]
        return jax.tree.unflatten(self.structure, leaves)(*args, **kwargs)


class _Array:
    """Marks the place of an array among the static leaves."""


_ARRAY = _Array


def callable_tree(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` as a pytree, to be an argument of a jitted function: new arrays do not recompile it.

    A registered pytree (a dataclass that carries arrays, a Flax or Equinox module) is its own, a `functools.partial`
    and a method of a pytree give up the arrays they are bound to, and any other function is static: its identity is
    what it is compiled for, and arrays in its closure are constants.  Leaves that are not arrays (an activation
    function, a name) are static too.
    """
    if not jax.tree_util.all_leaves([function]):
        node = function
    elif isinstance(function, functools.partial):
        node = jax.tree_util.Partial(function.func, *function.args, **function.keywords)
    elif isinstance(function, types.MethodType) and not jax.tree_util.all_leaves([function.__self__]):
        node = jax.tree_util.Partial(function.__func__, function.__self__)
    else:
        return jax.tree_util.Partial(function)
    leaves, structure = jax.tree.flatten(node)
    if all(_is_array(leaf) for leaf in leaves):
        return node
    arrays = tuple(leaf for leaf in leaves if _is_array(leaf))
    return _Split(arrays, tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves), structure)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def digest(x: PyTree) -> str:
    """Return the SHA-256 of a pytree: of its leaves' paths, dtypes, shapes and bytes.

    Containers of another kind with the same paths (a tuple for a list) have the same digest; the same numbers in
    another dtype have another.
    """
    total = hashlib.sha256()
    for name, leaf in zip(paths(x), jax.tree.leaves(x), strict=True):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            name, leaf = f"{name}:{jax.random.key_impl(leaf)}", jax.random.key_data(leaf)
        value = np.asarray(leaf)
        total.update(f"{name}\0{value.dtype.name}\0{value.shape}\0".encode())
        total.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _common_dtype(leaves: list[Any]) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*leaves) if leaves else jnp.dtype(jnp.float32)


def _check_alike(left: PyTree, right: PyTree) -> None:
    if jax.tree.structure(left) == jax.tree.structure(right):
        pairs = zip(paths(left), jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        uneven = [(name, np.shape(u), np.shape(v)) for name, u, v in pairs if np.shape(u) != np.shape(v)]
        if not uneven:
            return
        got = "{!r} of shapes {} and {}".format(*uneven[0])
    else:
        got = f"trees of the structures {jax.tree.structure(left)} and {jax.tree.structure(right)}"
    raise InvalidInputError(got, expected="two pytrees of one structure and shape", remedy="pass two such pytrees")
