"""ResNet-9: the nine-layer residual network of the CIFAR-10 speed runs, on which TRAK and datamodels were measured."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattrib.core.errors import InvalidInputError
from jattrib.models.adapt import from_nnx
from jattrib.models.model import Model

NORMALISATIONS = ("batch", "group")
SMALLEST_SIDE = 12


def _normalise(channels: int, normalisation: str, rngs: nnx.Rngs) -> nnx.BatchNorm | nnx.GroupNorm:
    if normalisation == "batch":
        return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
    group = math.gcd(channels, 16)
    return nnx.GroupNorm(channels, None, group, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


class Block(nnx.Module):
    """Convolution without bias, normalisation, ReLU."""

    def __init__(
        self,
        before: int,
        after: int,
        normalisation: str,
        rngs: nnx.Rngs,
        *,
        size: int = 3,
        stride: int = 1,
        padding: Any = "SAME",
    ):
        self.conv = nnx.Conv(
            before, after, (size, size), strides=stride, padding=padding, use_bias=False, kernel_init=_HE, rngs=rngs
        )
        self.norm = _normalise(after, normalisation, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Return the block's activations."""
        x = self.conv(x)
        with jax.numpy_dtype_promotion("standard"):  # Flax compares the inputs' dtype with float32 here
            x = self.norm(x)
        return jax.nn.relu(x)


class Residual(nnx.Module):
    """The input plus two blocks of it."""

    def __init__(self, channels: int, normalisation: str, rngs: nnx.Rngs):
        self.first = Block(channels, channels, normalisation, rngs)
        self.second = Block(channels, channels, normalisation, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return the sum."""
        return x + self.second(self.first(x))


class ResNet9(nnx.Module):
    """Three stages of width, 2 width and 4 width channels with a residual pair after the second and the third."""

    def __init__(self, channels: int, classes: int, width: int, normalisation: str, rngs: nnx.Rngs):
        self.stem = Block(channels, width, normalisation, rngs)
        self.down = Block(width, 2 * width, normalisation, rngs, size=5, stride=2, padding=2)
        self.middle = Residual(2 * width, normalisation, rngs)
        self.widen = Block(2 * width, 4 * width, normalisation, rngs)
        self.deep = Residual(4 * width, normalisation, rngs)
        self.narrow = Block(4 * width, 2 * width, normalisation, rngs, padding="VALID")
        self.head = nnx.Linear(2 * width, classes, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Return the logits."""
        x = self.middle(self.down(self.stem(x)))
        x = nnx.max_pool(self.widen(x), (2, 2), strides=(2, 2))
        x = jnp.max(self.narrow(self.deep(x)), axis=(1, 2))
        return 0.2 * self.head(x)


_HE = nnx.initializers.he_normal()


def resnet9(shape: tuple[int, ...], classes: int, *, width: int = 64, normalisation: str = "batch") -> Model:
    """ResNet-9, on images of at least 12 × 12 pixels.

    3×3 convolution to `width` channels; 5×5 with stride 2 to 2 `width`; residual pair; 3×3 to 4 `width`; 2×2
    max-pooling; residual pair; 3×3 without padding to 2 `width`; maximum over positions; linear map without bias,
    scaled by .2.  Every convolution is without bias and is followed by a normalisation and a ReLU.  Parameters are
    float32.

    It departs from the PyTorch model in its initialisation (He's and LeCun's normal) and in that the running variance
    of batch normalisation averages the batches' own variances, without Bessel's correction.

    Args:
        shape: height, width and channels of an image.
        classes: the number of logits.
        width: channels of the first stage; published results are for 64.
        normalisation: `"batch"`, whose statistics (momentum .9) are the model's state, or `"group"`, of 16 channels
            each, without state.

    Raises:
        InvalidInputError: a size is not positive, an image is too small, or the normalisation is unknown.

    Source: Park et al. 2023, appendix (CIFAR-10 and ResNet-9).
    """
    sound = len(shape) == 3 and min(*shape, classes, width) >= 1
    if not sound or normalisation not in NORMALISATIONS:
        raise InvalidInputError(
            f"shape={shape}, classes={classes}, width={width}, normalisation={normalisation!r}",
            expected=f"(height, width, channels), positive sizes, a normalisation among {', '.join(NORMALISATIONS)}",
            remedy="for example resnet9((32, 32, 3), 10, width=64, normalisation='batch')",
        )
    if min(shape[:2]) < SMALLEST_SIDE:
        raise InvalidInputError(
            f"images of {shape[0]} by {shape[1]} pixels",
            expected=f"at least {SMALLEST_SIDE} by {SMALLEST_SIDE}: the last stage leaves nothing of smaller ones",
            remedy="enlarge the images, or use an MLP",
        )
    return from_nnx(lambda rngs: ResNet9(shape[2], classes, width, normalisation, rngs))
