"""Decoder-only transformers, in the style of GPT-2 and of Llama, from one configuration.

The layers' parameters are stacked along a leading axis and the forward pass is a scan over them, so that compilation
does not grow with depth.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.models.adapt import from_nnx
from jattrib.models.model import Model

STYLES = ("gpt2", "llama")
DTYPES = ("float32", "bfloat16", "float16")


class RotaryScaling(NamedTuple):
    """How Llama 3 stretches its rotary wavelengths to contexts longer than it was first trained on.

    Wavelengths of more than `original / low` tokens grow by `factor`, those of less than `original / high` stay, and
    the frequencies between are interpolated.

    Source: Dubey et al. 2024, "The Llama 3 herd of models", section 3.4, and the configuration of its weights.
    """

    factor: float
    low: float
    high: float
    original: int


class Config(NamedTuple):
    """The shape of a decoder.

    Attributes:
        style: `gpt2`: LayerNorm, learned positions, GELU (its tanh form), biases.  `llama`: RMSNorm, rotary positions,
            SwiGLU, no biases.
        vocabulary: tokens there are.
        context: the longest sequence.
        width: of the residual stream.
        layers: how many.
        heads: attention heads.
        hidden: width inside the feed-forward layers; 4 `width` when left out.
        kv_heads: heads of keys and values, each shared by `heads / kv_heads` queries; `heads` when left out.
        head_width: of a head; `width / heads` when left out.
        tied: whether logits are products with the token embeddings; the alternative is a matrix of their own.
        epsilon: added to variances and mean squares.
        theta: the base of rotary wavelengths.
        scaling: of rotary wavelengths.
        scale: standard deviation of initial weights; of those that write to the residual stream, over √(2 `layers`).
        dtype: of activations and products; the parameters' own when left out.  Norms, attention weights and logits are
            computed in float32 at least.
        remat: whether the backward pass computes each layer's activations again, which saves their memory.
        scan: whether layers are a loop in the compiled program or stand there one by one.
    """

    style: Literal["gpt2", "llama"]
    vocabulary: int
    context: int
    width: int
    layers: int
    heads: int
    hidden: int | None = None
    kv_heads: int | None = None
    head_width: int | None = None
    tied: bool = True
    epsilon: float = 1e-5
    theta: float = 10_000.0
    scaling: RotaryScaling | None = None
    scale: float = 0.02
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    remat: bool = False
    scan: bool = True

    @property
    def inner(self) -> int:
        """Width inside the feed-forward layers."""
        return 4 * self.width if self.hidden is None else self.hidden

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads if self.head_width is None else self.head_width


class Norm(nnx.Module):
    """LayerNorm, `(x − mean) / √(var + ε) · scale + bias`, or RMSNorm, `x / √(mean x² + ε) · scale`."""

    def __init__(self, config: Config):
        self.scale = nnx.Param(jnp.ones(config.width))
        self.bias = nnx.Param(jnp.zeros(config.width)) if config.style == "gpt2" else None
        self.epsilon = config.epsilon

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the normalised activations, in the dtype of `x`."""
        scale = self.scale[...]
        wide = tree.sum_dtype(scale.dtype)
        y, scale = x.astype(wide), scale.astype(wide)
        if self.bias is None:
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
            return (y * scale[None, None]).astype(x.dtype)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * scale[None, None] + self.bias[...].astype(wide)[None, None]).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention in which groups of query heads share a head of keys and values."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        linear = partial(_linear, config, rngs=rngs)
        self.query = linear(config.width, config.heads * config.head)
        self.key = linear(config.width, config.groups * config.head)
        self.value = linear(config.width, config.groups * config.head)
        self.out = linear(config.heads * config.head, config.width, writes=True)
        self.config = config

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return what the heads write to the residual stream."""
        batch, length, _ = x.shape
        head = (batch, length, self.config.groups, -1, self.config.head)
        q, k, v = self.query(x).reshape(head), self.key(x).reshape(head), self.value(x).reshape(head)
        if self.config.style == "llama":
            angles = _angles(self.config, length, tree.sum_dtype(q.dtype))
            q, k = _rotate(q, angles), _rotate(k, angles)
        logits = jnp.einsum("bqgnh,bkgh->bgnqk", q, k[:, :, :, 0], preferred_element_type=tree.sum_dtype(q.dtype))
        causal = jnp.tril(jnp.ones((length, length), bool))
        logits = jnp.where(causal[None, None, None], logits * self.config.head**-0.5, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bgnqk,bkgh->bqgnh", weights, v[:, :, :, 0])
        return self.out(mixed.reshape(batch, length, -1))


class FeedForward(nnx.Module):
    """`down(gelu(up x))`, or SwiGLU, `down(silu(gate x) · up x)`."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.up = _linear(config, config.width, config.inner, rngs=rngs)
        self.gate = _linear(config, config.width, config.inner, rngs=rngs) if config.style == "llama" else None
        self.down = _linear(config, config.inner, config.width, rngs=rngs, writes=True)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return what the layer writes to the residual stream."""
        inner = jax.nn.gelu(self.up(x)) if self.gate is None else jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(inner)


class Layer(nnx.Module):
    """Attention and feed-forward layer, each after a norm and added to the residual stream."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention_norm = Norm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config)
        self.mlp = FeedForward(config, rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the residual stream after the layer."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Embedding(nnx.Module):
    """Vectors of tokens and, where positions are learned, of positions."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        draw = nnx.initializers.normal(config.scale)
        self.tokens = nnx.Param(draw(rngs.params(), (config.vocabulary, config.width)))
        learned = config.style == "gpt2"
        self.positions = nnx.Param(draw(rngs.params(), (config.context, config.width))) if learned else None

    def __call__(self, tokens: Integer[Array, "b t"]) -> Float[Array, "b t d"]:
        """Return the vectors; NaN for a token outside the vocabulary, which no loss takes for a number."""
        x = jnp.asarray(self.tokens[...]).at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return x if self.positions is None else x + self.positions[...][None, : tokens.shape[1]]


class Head(nnx.Module):
    """A matrix of its own from the residual stream to logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(config.scale)(rngs.params(), (config.width, config.vocabulary)))


class Decoder(nnx.Module):
    """Embeddings, layers, a norm, logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embedding = Embedding(config, rngs)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs)

        self.layers = stacked(rngs)
        self.norm = Norm(config)
        self.head = None if config.tied else Head(config, rngs)
        self.config = config

    def __call__(self, tokens: Integer[Array, "b t"]) -> Float[Array, "b t v"]:
        """Return the logits of the token after each."""
        length, context = tokens.shape[1], self.config.context
        if length > context:
            raise InvalidInputError(
                f"sequences of {length} tokens",
                expected=f"at most the context of {context}",
                remedy="cut the sequences, or build the decoder with a longer context",
            )
        x = self.embedding(tokens)
        dtype = x.dtype if self.config.dtype is None else jnp.dtype(self.config.dtype)
        x = self.norm(self._through_layers(x.astype(dtype)))
        contract = partial(jnp.einsum, preferred_element_type=tree.sum_dtype(dtype))
        if self.head is None:
            return contract("btd,vd->btv", x, self.embedding.tokens[...].astype(dtype))
        return contract("btd,dv->btv", x, self.head.kernel[...].astype(dtype))

    def _through_layers(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        graph, stacked = nnx.split(self.layers)

        def run(x: Float[Array, "b t d"], layer: Any) -> tuple[Float[Array, "b t d"], None]:
            return nnx.merge(graph, layer)(x), None

        run = jax.checkpoint(run, prevent_cse=not self.config.scan) if self.config.remat else run
        return jax.lax.scan(run, x, stacked, unroll=1 if self.config.scan else self.config.layers)[0]


def decoder(config: Config) -> Model:
    """A decoder-only transformer: `apply` takes tokens `[b, t]` and returns the logits `[b, t, v]` of the next ones.

    It has no dropout and no state.  Parameters are float32: `embedding`, `layers` (each leaf stacked, `[layers, …]`),
    `norm` and, unless tied, `head`; kernels are `[inputs, outputs]`.  Sequences that are shorter than their batch are
    padded on the right, where causality hides the padding from them.

    Rotary positions turn the first half of a head against its second half, as Hugging Face's layout of Llama does.

    Raises:
        InvalidInputError: a size is not positive, heads do not divide, or the style or dtype is unknown; from `apply`,
            a sequence is longer than the context.

    Source: Radford et al. 2019, section 2.3 (GPT-2); Touvron et al. 2023, section 2.2 (Llama); Ainslie et al. 2023,
    section 2.2 (grouped queries).
    """
    sizes = (config.vocabulary, config.context, config.width, config.layers, config.heads, config.inner, config.groups)
    known = config.style in STYLES and config.dtype in (None, *DTYPES)
    narrow = config.head_width is not None and config.head_width < 1
    if min(sizes) < 1 or narrow or config.epsilon <= 0 or not known:
        raise InvalidInputError(
            str(config),
            expected=f"positive sizes, a style among {', '.join(STYLES)}, a dtype among {', '.join(DTYPES)} or None",
            remedy="for example Config('gpt2', vocabulary=256, context=64, width=64, layers=2, heads=4)",
        )
    if config.heads % config.groups or (config.head_width is None and config.width % config.heads):
        raise InvalidInputError(
            f"width {config.width}, {config.heads} heads, {config.groups} of keys and values",
            expected="heads that divide the width, and heads of keys and values that divide the heads",
            remedy="change one of them, or give head_width",
        )
    if config.style == "llama" and config.head % 2:
        raise InvalidInputError(
            f"heads of width {config.head}", expected="an even width, which halves", remedy="give another head_width"
        )
    return from_nnx(lambda rngs: Decoder(config, rngs))


def frequencies(config: Config) -> Float[np.ndarray, " half"]:
    """Return the angle by which rotary positions turn each pair of coordinates a token, `θ^(−2i / head)`, scaled."""
    plain = config.theta ** (-2 * np.arange(config.head // 2) / config.head)
    if config.scaling is None:
        return plain
    factor, low, high, original = config.scaling
    turns = original * plain / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / factor)


def _angles(config: Config, length: int, dtype: Any) -> Float[Array, "t half"]:
    return jnp.arange(length, dtype=dtype)[:, None] * jnp.asarray(frequencies(config), dtype)[None]


def _rotate(x: Float[Array, "b t g n h"], angles: Float[Array, "t half"]) -> Float[Array, "b t g n h"]:
    cosine, sine = (f(angles)[None, :, None, None] for f in (jnp.cos, jnp.sin))
    left, right = jnp.split(x.astype(angles.dtype), 2, axis=-1)
    turned = jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)
    return turned.astype(x.dtype)


def _linear(config: Config, before: int, after: int, *, rngs: nnx.Rngs, writes: bool = False) -> nnx.Linear:
    scale = config.scale / (2 * config.layers) ** 0.5 if writes else config.scale
    dtype = None if config.dtype is None else jnp.dtype(config.dtype)
    draw: Callable[..., Any] = nnx.initializers.normal(scale)
    return nnx.Linear(before, after, use_bias=config.style == "gpt2", dtype=dtype, kernel_init=draw, rngs=rngs)
