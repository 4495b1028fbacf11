"""Per-example gradients that are projected as they appear: the n×p matrix never exists.

The projection is linear, so the features of an example are themselves a gradient: with `θ_l` replaced by an identity
whose derivative maps the cotangent `g_l` to `P_lᵀ g_l`, the gradient with respect to a k-vector that enters all leaves
is `Σ_l P_lᵀ g_l`.  The backward pass then projects each leaf when it reaches it, and drops it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jattrib.core import mesh as meshes
from jattrib.core.types import Batch, Example, OutputFn, Params, Projector
from jattrib.grads import per_example


def of_gradients(
    output: OutputFn, params: Params, batch: Batch, *, projector: Projector, state: Params
) -> Float[Array, "n k"]:
    """Return `φ_i = Pᵀ ∇_θ f(z_i; θ)` for every example of a batch, equal to `projector.apply` of the gradients.

    Of the gradients, one leaf for all examples is alive at a time, not all: p is then the size of the largest leaf in
    the memory that a batch takes.

    Args:
        output: the output f.
        params: the parameters θ.
        batch: examples with a leading axis.
        projector: one whose `apply` takes absent leaves, as those of this package do (see `leaves.matrices`).
        state: its state, `projector.init(key, params)`.
    """
    return values_and_of_gradients(output, params, batch, projector=projector, state=state)[1]


def values_and_of_gradients(
    output: OutputFn, params: Params, batch: Batch, *, projector: Projector, state: Params
) -> tuple[Float[Array, " n"], Float[Array, "n k"]]:
    """Return the outputs `f(z_i; θ)` and their projected gradients, from one forward pass; see `of_gradients`."""
    if projector.direct is not None:
        return projector.direct(state, output, params, batch)
    leaves, structure = jax.tree.flatten(params)
    absent = [jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype) for leaf in leaves]
    features = jax.eval_shape(projector.apply, state, jax.tree.unflatten(structure, absent))

    def project(i: int, state: Params, gradient: Array) -> Float[Array, " k"]:
        present = [*absent[:i], gradient[None], *absent[i + 1 :]]
        return projector.apply(state, jax.tree.unflatten(structure, present))[0].astype(features.dtype)

    def value(zero: Float[Array, " k"], example: Example) -> Float[Array, ""]:
        tapped = [_tap(partial(project, i), leaf, zero, state) if leaf.size else leaf for i, leaf in enumerate(leaves)]
        return output(jax.tree.unflatten(structure, tapped), example)

    zero = jnp.zeros(features.shape[1], features.dtype)
    return jax.vmap(jax.value_and_grad(value), in_axes=(None, 0))(zero, batch)


def at_once(params: Params, *, projector: Projector, mesh: Mesh | None = None) -> int:
    """Return how many examples to project at once where no number is given; see `per_example.at_once`.

    A projector that needs no gradients takes as many as any.
    """
    if projector.direct is not None:
        return per_example.MOST * meshes.width(mesh)
    return per_example.at_once(params, mesh=mesh)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(project, leaf, zero, state):
    """Return `leaf`; its cotangent, projected, becomes the cotangent of `zero`."""
    del project, zero, state
    return leaf


def _tap_fwd(project, leaf, zero, state):
    return _tap(project, leaf, zero, state), state


def _tap_bwd(project, state, gradient):
    return None, project(state, gradient), None


_tap.defvjp(_tap_fwd, _tap_bwd)
