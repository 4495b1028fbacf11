"""The dense random projection of gradient pytrees."""

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jattrib.core.types import Key, Params, Projector
from jattrib.projection import leaves
from jattrib_kernels.backend import Backend
from jattrib_kernels.dense_projection import dense_projection
from jattrib_kernels.dense_projection.reference import ROWS, Distribution


@functools.cache
def projector(dim: int, *, distribution: Distribution = "rademacher", backend: Backend = "auto") -> Projector:
    """Return the projector `φ = g R / √dim` with R of independent entries of mean 0 and variance 1.

    Inner products of features are unbiased, `E⟨φ, φ'⟩ = ⟨g, g'⟩`; with signs their variance is
    `(‖g‖²‖g'‖² + ⟨g, g'⟩² − 2 Σ_i g_i² g'_i²) / dim`.  R is a pure function of the key and the coordinate, on every
    backend, mesh and tiling; its state is the two words of the key.

    Args:
        dim: number of features k.
        distribution: `rademacher` or `normal` entries.
        backend: `auto`, or an implementation of `jattrib_kernels` by name.

    Raises:
        InvalidInputError: dim is below 1; from `init`, dim exceeds the number of parameters, a leaf is not floating,
            or the key is of another generator than Threefry.

    Source: Johnson and Lindenstrauss 1984; Achlioptas 2003, theorem 1.1.  Unlike `traker`, which divides by √p, the
    scale is that of the gradients.
    """
    leaves.check_dim(dim)

    def init(key: Key, params: Params) -> leaves.KeyWords:
        leaves.check_params(params, dim)
        return leaves.key_words(key)

    def apply(state: leaves.KeyWords, gradients: Params) -> Float[Array, "n dim"]:
        def project(leaf: leaves.Leaf) -> Array:
            return dense_projection(
                leaf.rows, state, dim, block_offset=leaf.block, distribution=distribution, backend=backend
            )

        out = leaves.total(gradients, project, block=ROWS)
        return out * jnp.asarray(1 / math.sqrt(dim), out.dtype)

    return Projector(dim, init, apply)
