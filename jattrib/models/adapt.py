"""The door for models of any library: each becomes a `Model`, a pair of pure functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch, Key, Params
from jattrib.models.model import Model


def from_nnx(factory: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Adapt a Flax NNX module, given as `factory(rngs) -> module`.

    `params` are its `nnx.Param`s, `state` all its other variables (batch statistics, dropout's generators), both as
    plain nested dicts of arrays with string keys.  `train=True` calls the module as `module.train()` leaves it,
    `train=False` as `module.eval()` does.

    The factory is run once here, abstractly, for the structure, which must not depend on the key.
    """
    abstract = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
    abstract.eval()
    eval_graph, param_like, state_like = nnx.split(abstract, nnx.Param, ...)
    abstract.train()
    train_graph = nnx.graphdef(abstract)

    def init(key: Key) -> tuple[Params, Any]:
        _, params, state = nnx.split(factory(nnx.Rngs(key)), nnx.Param, ...)
        return _plain(params), _plain(state)

    def apply(params: Params, state: Any, x: Batch, /, *, train: bool = False):
        graph = train_graph if train else eval_graph
        module: Any = nnx.merge(graph, _variables(param_like, params), _variables(state_like, state))
        outputs = module(jax.tree.map(jnp.asarray, x))
        return outputs, _plain(nnx.state(module, nnx.Not(nnx.Param))) if train else state

    return Model(init, apply)


def _plain(state: Any) -> dict[str, Any]:
    """Nested dicts with string keys: a checkpoint gives them back as they were, unlike a list's numbers."""
    return _stringed(nnx.to_pure_dict(state))


def _stringed(tree: Any) -> Any:
    return {str(name): _stringed(leaf) for name, leaf in tree.items()} if isinstance(tree, dict) else tree


def _variables(like: Any, values: Any) -> Any:
    def fill(path: tuple[Any, ...], variable: Any) -> Any:
        leaf = values
        for name in path:
            leaf = leaf[str(name)]
        return variable.replace(leaf)

    flat = nnx.to_flat_state(like)
    return nnx.from_flat_state([(path, fill(path, variable)) for path, variable in flat])


def from_linen(
    module: linen.Module, example: Batch, *, train_argument: str | None = None, rngs: tuple[str, ...] = ()
) -> Model:
    """Adapt a Flax Linen module.

    `params` is the collection of that name, `state` a dict of all the others and, under `"rngs"`, of a key for each
    name in `rngs`, which every call in training mode replaces.

    Args:
        module: the module.
        example: a batch, of which only shapes and dtypes matter.
        train_argument: the boolean keyword of its `__call__` that is to be true in training, such as `"train"`.
        rngs: the names of the generators that it draws from in training, such as `("dropout",)`.
    """
    apply_linen: Any = module.apply  # its return type depends on `mutable`

    def mode(train: bool) -> dict[str, Any]:
        return {} if train_argument is None else {train_argument: train}

    def init(key: Key) -> tuple[Params, Any]:
        key, *keys = jax.random.split(key, 1 + len(rngs))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), example)
        variables = dict(module.init(key, zeros, **mode(False)))
        params = variables.pop("params", {})
        return params, variables | ({"rngs": dict(zip(rngs, keys, strict=True))} if rngs else {})

    def apply(params: Params, state: Any, x: Batch, /, *, train: bool = False):
        collections = {name: leaf for name, leaf in state.items() if name != "rngs"}
        variables = {"params": params, **collections}
        if not train:
            return apply_linen(variables, x, **mode(False)), state
        pairs = {name: jax.random.split(state["rngs"][name]) for name in rngs}
        drawn = {name: pair[0] for name, pair in pairs.items()}
        outputs, updated = apply_linen(variables, x, rngs=drawn, mutable=list(collections), **mode(True))
        kept = {"rngs": {name: pair[1] for name, pair in pairs.items()}} if rngs else {}
        return outputs, {**collections, **updated, **kept}

    return Model(init, apply)


def from_callable_tree(
    module: Callable[..., Any], *, factory: Callable[[Key], Callable[..., Any]] | None = None, batched: bool = False
) -> Model:
    """Adapt a module that is a pytree with its arrays as leaves and is called as `module(x)`: Equinox's, for one.

    `params` is the module itself with None in place of every leaf that is not a floating-point array; those leaves
    (functions, integers, flags) stay as they are in `module`.  `state` is empty: for a module that updates statistics
    or draws random numbers in training, write `Model(init, apply)`.

    Args:
        module: the module.
        factory: `factory(key) -> module` of the same structure, for `init`.  Without it `init` gives the arrays of
            `module` whatever the key, as serves for a trained model.
        batched: whether `module` takes a batch; if not, it takes one example and is vmapped.

    Raises:
        InvalidInputError: the module has no floating-point array among its leaves, or the factory's has another number.
    """
    leaves, structure = jax.tree.flatten(module)
    floating = [_is_floating(leaf) for leaf in leaves]
    if not any(floating):
        raise InvalidInputError(
            f"a {type(module).__name__} with no floating-point array among its {len(leaves)} leaves",
            expected="a pytree module whose parameters are leaves",
            remedy="register its class as a pytree (jax.tree_util.register_dataclass), or use from_function",
        )

    def init(key: Key) -> tuple[Params, Any]:
        made = leaves if factory is None else jax.tree.leaves(factory(key))
        if len(made) != len(leaves):
            raise InvalidInputError(
                f"a factory whose module has {len(made)} leaves",
                expected=f"{len(leaves)}, as the module has",
                remedy="give a factory and a module of one structure, such as module=factory(key)",
            )
        return structure.unflatten(leaf if own else None for leaf, own in zip(made, floating, strict=True)), {}

    def apply(params: Params, state: Any, x: Batch, /, *, train: bool = False):
        own = iter(jax.tree.leaves(params))
        whole = structure.unflatten(
            next(own) if is_own else leaf for leaf, is_own in zip(leaves, floating, strict=True)
        )
        return (whole(x) if batched else jax.vmap(whole)(x)), state

    return Model(init, apply)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating)


def from_function(init: Callable[[Key], Params], apply: Callable[[Params, Batch], Any]) -> Model:
    """Adapt plain functions `init(key) -> params` and `apply(params, x) -> outputs`, `x` a batch: without state."""
    return Model(lambda key: (init(key), {}), lambda params, state, x, /, *, train=False: (apply(params, x), state))
