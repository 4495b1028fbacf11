"""Data whose law is known: for tests, and for checks against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Key
from jattrib.data.vision import Dataset


def gaussian_classes(key: Key, n: int, *, features: int, classes: int, separation: float = 3.0) -> Dataset:
    """Draw `n` examples from Gaussians of unit covariance, one a class: `x ~ N(separation · u_y, I)`.

    The `u_c` are random unit vectors; labels (int32) are `0, 1, …` over and over, so that any run of rows is balanced.

    Raises:
        InvalidInputError: a size is not positive.
    """
    _positive(n=n, features=features, classes=classes)
    mean_key, noise_key = jax.random.split(key)
    means = jax.random.normal(mean_key, (classes, features))
    means = separation * means / jnp.linalg.norm(means, axis=1, keepdims=True)
    labels = np.arange(n, dtype=np.int32) % classes
    return Dataset(np.asarray(means[labels] + jax.random.normal(noise_key, (n, features))), labels)


def linear_regression(
    key: Key, n: int, *, features: int, noise: float = 0.1
) -> tuple[Dataset, Float[np.ndarray, " features"]]:
    """Draw `x ~ N(0, I)` and `y = x·w + noise · ε`, with `w` and `ε` standard normal; return the data and `w`.

    Raises:
        InvalidInputError: a size is not positive.
    """
    _positive(n=n, features=features)
    x_key, w_key, noise_key = jax.random.split(key, 3)
    x, w = jax.random.normal(x_key, (n, features)), jax.random.normal(w_key, (features,))
    y = x @ w + noise * jax.random.normal(noise_key, (n,))
    return Dataset(np.asarray(x), np.asarray(y)), np.asarray(w)


def _positive(**sizes: int) -> None:
    if min(sizes.values()) < 1:
        raise InvalidInputError(
            ", ".join(f"{name}={size}" for name, size in sizes.items()), expected="positive sizes", remedy="raise them"
        )
