"""What a model is to the rest of the house: two pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float

from jattrib.core.types import Batch, Key, Params


@runtime_checkable
class Apply(Protocol):
    """A model's forward pass on a batch: a pure function, so it may be transformed."""

    def __call__(
        self, params: Params, state: Any, x: Batch, /, *, train: bool = False
    ) -> tuple[Float[Array, "b ..."], Any]:
        """Return `(outputs, new_state)`."""
        ...


class Model(NamedTuple):
    """A model: `init(key) -> (params, state)` and `apply(params, state, x, *, train=False) -> (outputs, new_state)`.

    `params` is what is differentiated.  `state` is a pytree, possibly empty, of everything else that changes in
    training: batch statistics, the generators of dropout.  With `train=False` the state is returned as it came.
    """

    init: Callable[[Key], tuple[Params, Any]]
    apply: Apply
