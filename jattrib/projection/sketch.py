"""The block-rotated sign sketch of gradient pytrees."""

import functools

from jaxtyping import Array, Float

from jattrib.core.types import Key, Params, Projector
from jattrib.projection import leaves
from jattrib_kernels.backend import Backend
from jattrib_kernels.sketch_projection import sketch_projection


@functools.cache
def projector(dim: int, *, copies: int = 1, backend: Backend = "auto") -> Projector:
    """Return the projector `φ = Σ_b roll(σ_b ⊙ g_b, r_b)` over blocks of dim coordinates; one pass over the gradients.

    Inner products of features are unbiased, and their variance is at most `(‖g‖²‖g'‖² + ⟨g, g'⟩²) / dim`, that of
    CountSketch; `sketch_projection` has the proof.  The map is a pure function of the key, on every backend, mesh and
    tiling; its state is the two words of the key.

    Args:
        dim: number of features k.
        copies: independent sketches s, summed and divided by √s: each coordinate goes to s features, which thins the
            tails of the error but not its variance.
        backend: `auto`, or an implementation of `jattrib_kernels` by name.

    Raises:
        InvalidInputError: dim or copies is below 1; from `init`, dim exceeds the number of parameters, a leaf is not
            floating, or the key is of another generator than Threefry.

    Source: Charikar, Chen and Farach-Colton 2002 (CountSketch); Kane and Nelson 2014 (s > 1).  Signs and rotations by
    blocks replace their hash of every coordinate.
    """
    leaves.check_dim(dim)
    leaves.check_copies(copies)

    def init(key: Key, params: Params) -> leaves.KeyWords:
        leaves.check_params(params, dim)
        return leaves.key_words(key)

    def apply(state: leaves.KeyWords, gradients: Params) -> Float[Array, "n dim"]:
        def project(leaf: leaves.Leaf) -> Array:
            return sketch_projection(leaf.rows, state, dim, block_offset=leaf.block, copies=copies, backend=backend)

        return leaves.total(gradients, project, block=dim)

    return Projector(dim, init, apply)
