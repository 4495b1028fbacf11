"""The scalars that are attributed: margins, log-odds and losses, computed from logits.

All are written for one example; the caller vmaps.  Labels must be in range: the loaders of `jattrib.data` see to it.

Where an example is a sequence, so are its logits `[t, c]` and its labels `[t]`: language models predict the next token
at each place.  A label of a sequence that is below zero is padding, which counts nothing.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Example, Key, Params
from jattrib.models.model import Apply


def margin(logits: Float[Array, " c"], label: Integer[Array, ""]) -> Float[Array, ""]:
    """The correct-class margin: `logit_y − log Σ_{c≠y} exp(logit_c)`, which is `log p_y / (1 − p_y)`.

    It never goes through the probability, so it is exact where p_y rounds to 0 or 1, and its gradient is finite there.
    Logits of −∞, those of masked classes, count nothing and have no gradient; where all others are, it is ∞.

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
    label = _wide(label)
    own = jnp.arange(classes, dtype=label.dtype) == label
    # Everything is taken relative to the largest other logit, so that a common offset costs no digits.
    top = jax.lax.stop_gradient(jnp.max(jnp.where(own, -jnp.inf, logits)))
    relative = logits - jnp.where(jnp.isfinite(top), top, 0)
    others = jnp.sum(jnp.where(own, 0, jnp.exp(jnp.where(own, 0, relative))))
    # Where all others are masked, at −∞, the logarithm is kept off zero, where its gradient is NaN.
    masked = jax.lax.stop_gradient(others) == 0
    return jnp.sum(jnp.where(own, relative, 0)) - jnp.where(masked, -jnp.inf, jnp.log(jnp.where(masked, 1, others)))


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
    value = margin(logits, label)
    # Where all other classes are masked it is infinite, where softplus has a curvature of NaN.
    masked = jax.lax.stop_gradient(value) == jnp.inf
    return jax.nn.softplus(-jnp.where(masked, jnp.finfo(value.dtype).max, value))


def token_losses(logits: Float[Array, "t c"], labels: Integer[Array, " t"]) -> Float[Array, " t"]:
    """The negative log-likelihood of every label of a sequence in nats, and zero where it is padding (below zero).

    Raises:
        InvalidInputError: there are fewer than two classes.
    """
    return jnp.where(labels < 0, 0, jax.vmap(cross_entropy)(logits, labels))


def mean_loss(logits: Float[Array, "*t c"], labels: Integer[Array, "*t"]) -> Float[Array, ""]:
    """The negative log-likelihood in nats of one label, or its mean over a sequence without its padding.

    A sequence that is all padding has none: its loss is zero.

    Raises:
        InvalidInputError: there are fewer than two classes.
    """
    if labels.ndim == 0:
        return cross_entropy(logits, labels)
    losses = token_losses(logits, labels)
    return losses.sum() / jnp.maximum((labels >= 0).sum(), 1).astype(losses.dtype)


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
    """The output function `(params, (x, y)) -> mean_loss` in nats, of a model in evaluation mode; a pytree too."""

    apply: Apply
    state: Any

    def __call__(self, params: Params, example: Example, /) -> Float[Array, ""]:
        """Return the loss on one example: one label, or the mean over a sequence's."""
        x, y = example
        return mean_loss(_logits(self.apply, params, self.state, x), jnp.asarray(y))


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["apply"])
@dataclass(frozen=True)
class LogLikelihood:
    """The output function `(params, (x, y)) -> −mean_loss` in nats a token: more is better; a pytree too."""

    apply: Apply
    state: Any

    def __call__(self, params: Params, example: Example, /) -> Float[Array, ""]:
        """Return the log-likelihood of one example, its mean where it is a sequence."""
        x, y = example
        return -mean_loss(_logits(self.apply, params, self.state, x), jnp.asarray(y))


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["apply"])
@dataclass(frozen=True)
class TokenLoss:
    """The output function `(params, (x, y, place)) -> loss` in nats of the label at one place of a sequence.

    For scores of single tokens: give the same `x` and `y` with each place.
    """

    apply: Apply
    state: Any

    def __call__(self, params: Params, example: Example, /) -> Float[Array, ""]:
        """Return the loss at `place`; zero if it is padding."""
        x, y, place = example
        losses = token_losses(_logits(self.apply, params, self.state, x), jnp.asarray(y))
        return jnp.where(jnp.arange(losses.shape[0]) == place, losses, 0).sum()


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["apply"])
@dataclass(frozen=True)
class Logits:
    """The logits of one example `(x, y)`, of a model in evaluation mode; a pytree too.

    With `label_loss` it is the loss in two halves, as `curvature.products.ggn` and `curvature.ekfac` take it.
    """

    apply: Apply
    state: Any

    def __call__(self, params: Params, example: Example, /) -> Float[Array, "*t c"]:
        """Return the logits of one example."""
        return _logits(self.apply, params, self.state, example[0])


def label_loss(logits: Float[Array, "*t c"], example: Example) -> Float[Array, ""]:
    """Return the `mean_loss` in nats of the logits of an example `(x, y)`."""
    return mean_loss(logits, jnp.asarray(example[1]))


def draw_label(key: Key, logits: Float[Array, "*t c"], example: Example) -> Example:
    """Return the example `(x, y)` with labels drawn from the model, `y ~ softmax(logits)`; padding stays padding.

    Logits in half precision are drawn from in single: its noise would hardly ever choose a rare label.
    """
    x, y = example
    y, logits = _wide(jnp.asarray(y)), logits.astype(tree.sum_dtype(logits.dtype))
    return x, jnp.where(y < 0, y, jax.random.categorical(key, logits).astype(y.dtype))


def _wide(label: Integer[Array, "..."]) -> Integer[Array, "..."]:
    """Return labels in a type that counts all classes: those of a byte would begin again at the 257th."""
    return label if label.dtype.itemsize >= 4 else label.astype(jnp.int32)


def _logits(apply: Apply, params: Params, state: Any, x: Any) -> Float[Array, "*t c"]:
    logits, _ = apply(params, state, jax.tree.map(lambda leaf: leaf[None], x), train=False)
    return logits[0]
