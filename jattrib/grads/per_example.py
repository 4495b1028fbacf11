"""Per-example gradients: `vmap` of `grad`."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jattrib.core import mesh as meshes
from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import Batch, OutputFn, Params

MOST = 256
"""Examples a device that a pass takes at once, where it is given no number, at most."""


def per_example(output: OutputFn, params: Params, batch: Batch) -> Params:
    """Return `g_i = ∇_θ f(z_i; θ)` for every example: the tree of `params` with a leading axis over the batch.

    Raises:
        InvalidInputError: a leaf of the parameters is not floating.
    """
    check_floating(params)
    return jax.vmap(jax.grad(output), in_axes=(None, 0))(params, batch)


def values_and_per_example(output: OutputFn, params: Params, batch: Batch) -> tuple[Float[Array, " b"], Params]:
    """Return the outputs `f(z_i; θ)` and their gradients, from one forward pass.

    Raises:
        InvalidInputError: a leaf of the parameters is not floating.
    """
    check_floating(params)
    return jax.vmap(jax.value_and_grad(output), in_axes=(None, 0))(params, batch)


def check_floating(params: Params) -> None:
    """Refuse parameters of which a leaf is not floating: it has no gradient.

    Raises:
        InvalidInputError: there is one; it is named.
    """
    for name, leaf in zip(tree.paths(params), jax.tree.leaves(params), strict=True):
        if not jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf), jnp.floating):
            raise InvalidInputError(
                f"parameters whose leaf {name!r} is not floating",
                expected="floating-point leaves, which have gradients",
                remedy="pass the trainable arrays alone and close over the others",
            )


def at_once(params: Params, *, mesh: Mesh | None = None) -> int:
    """Return how many examples to differentiate at once where no number is given: a power of two for each device.

    On a CPU their gradients take up to 16 MiB, for eight examples more if need be: allocations above 32 MiB are mapped
    anew in every call, which then takes twice as long.  On an accelerator they take up to 4 GiB.

    Args:
        params: the parameters, or their shapes.
        mesh: of the pass; None is the default device.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    room, least = (2**24, 8) if platform == "cpu" else (2**32, 1)
    fitting = max(room // max(tree.nbytes(params), 1), least)
    return meshes.width(mesh) * min(MOST, 1 << (fitting.bit_length() - 1))
