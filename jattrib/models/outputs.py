"""The scalars that are attributed: margins, log-odds and losses, computed from logits.

All are written for one example; the caller vmaps.  Labels must be in range: the loaders of `jattrib.data` see to it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Example, Params
from jattrib.models.model import Apply


def margin(logits: Float[Array, " c"], label: Integer[Array, ""]) -> Float[Array, ""]:
    """The correct-class margin: `logit_y − log Σ_{c≠y} exp(logit_c)`, which is `log p_y / (1 − p_y)`.

    It never goes through the probability, so it is exact where p_y rounds to 0 or 1, and its gradient is finite there.

    Raises:
        InvalidInputError: there are fewer than two classes.

    Source: Park et al. 2023, section 2 (TRAK's output function for classification).
    """
    classes = logits.shape[0]
    if classes < 2:
        raise InvalidInputError(
            f"{classes} logits", expected="at least two classes", remedy="give a binary model two logits, (0, z)"
        )
    # Masks, not indexing: under vmap and grad an index becomes a gather and a scatter, which are slow on accelerators.
    own = jnp.arange(classes, dtype=label.dtype) == label
    # Everything is taken relative to the largest other logit, so that a common offset costs no digits.
    top = jax.lax.stop_gradient(jnp.max(jnp.where(own, -jnp.inf, logits)))
    relative = logits - jnp.where(jnp.isfinite(top), top, 0)
    others = jnp.sum(jnp.where(own, 0, jnp.exp(jnp.where(own, 0, relative))))
    return jnp.sum(jnp.where(own, relative, 0)) - jnp.log(others)


def correct_probability(logits: Float[Array, " c"], label: Integer[Array, ""]) -> Float[Array, ""]:
    """The softmax probability of the label, `p_y = σ(margin)`; `1 − p_y` is best computed as `σ(−margin)`.

    Raises:
        InvalidInputError: there are fewer than two classes.
    """
    return jax.nn.sigmoid(margin(logits, label))


def cross_entropy(logits: Float[Array, " c"], label: Integer[Array, ""]) -> Float[Array, ""]:
    """The negative log-likelihood of the label in nats, `−log p_y = log(1 + exp(−margin))`.

    Written with the margin it keeps its relative precision where the loss is tiny, as on memorised examples.

    Raises:
        InvalidInputError: there are fewer than two classes.
    """
    return jax.nn.softplus(-margin(logits, label))


def log_odds(log_probability: Float[Array, "..."]) -> Float[Array, "..."]:
    """The log-odds of an event of log-probability ℓ ≤ 0, elementwise: `ℓ − log(1 − exp ℓ)`.

    For outputs that come as a log-probability, such as that of a generated sequence; it is infinite at ℓ = 0.  From
    logits use `margin`.

    Source: Cohen-Wang et al. 2024, section 3 (ContextCite's output function).
    """
    half = -jnp.log(jnp.asarray(2, log_probability.dtype))
    # Each branch is accurate on its own side of log ½ and is kept off its singularity, where its gradient is NaN.
    near = jnp.log(-jnp.expm1(jnp.maximum(log_probability, half)))
    far = jnp.log1p(-jnp.exp(jnp.minimum(log_probability, half)))
    return log_probability - jnp.where(log_probability > half, near, far)


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["apply"])
@dataclass(frozen=True)
class Margin:
    """The output function `(params, (x, y)) -> margin`, of a model in evaluation mode.

    A pytree whose leaves are those of `state`: new batch statistics do not mean a new compilation, and a stack of
    states vmaps.
    """

    apply: Apply
    state: Any

    def __call__(self, params: Params, example: Example, /) -> Float[Array, ""]:
        """Return the margin of one example."""
        x, y = example
        return margin(_logits(self.apply, params, self.state, x), jnp.asarray(y))


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["apply"])
@dataclass(frozen=True)
class Loss:
    """The output function `(params, (x, y)) -> cross-entropy` in nats, of a model in evaluation mode; a pytree too."""

    apply: Apply
    state: Any

    def __call__(self, params: Params, example: Example, /) -> Float[Array, ""]:
        """Return the loss on one example."""
        x, y = example
        return cross_entropy(_logits(self.apply, params, self.state, x), jnp.asarray(y))


def _logits(apply: Apply, params: Params, state: Any, x: Any) -> Float[Array, " c"]:
    logits, _ = apply(params, state, jax.tree.map(lambda leaf: leaf[None], x), train=False)
    return logits[0]
