"""TracIn: influence traced through the checkpoints of a training run, with the step that its optimiser would take.

A step at the parameters `θ_c` on the mean loss, `θ ← θ − η P_c ∇L`, changes the output f of a query, as far as example
i is its cause, by `−(η/n) ∇ℓ_iᵀ P_c ∇f_j`.  The score is the sum over checkpoints, each of which stands for the steps
around it: positive where more weight on the example raises the output.

Source: Pruthi et al. 2020, sections 3.1 to 3.3 (TracInCP), whose score of two losses is `Σ_c η_c ∇ℓ_i · ∇ℓ_j`; the
optimiser's preconditioner as in Xia et al. 2024 (LESS), section 3.1, there on one side without momentum.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jattrib.attribution import influence
from jattrib.attribution.influence import Precondition, Vectors
from jattrib.core import tree
from jattrib.core.errors import InvalidInputError
from jattrib.core.types import OutputFn, Params, Source


class Checkpoint(NamedTuple):
    """Parameters on the way, and the steps that they stand for.

    Attributes:
        params: `θ_c`.
        rate: the sum of the learning rates of the steps that it stands for.
        precondition: `P_c`, the optimiser's (`sgd`, `adam`); the identity when left out.
    """

    params: Params
    rate: float
    precondition: Precondition | None = None


def scores(
    loss: OutputFn,
    output: OutputFn,
    checkpoints: Sequence[Checkpoint],
    train: Source,
    queries: Source,
    *,
    chunk: int = 256,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Float[np.ndarray, "n q"]:
    """Return `τ_ij = −(1/n) Σ_c η_c ∇ℓ_i(θ_c)ᵀ P_c ∇f_j(θ_c)`, in one pass over the training set a checkpoint.

    Args:
        loss: the loss ℓ of one training example.
        output: the output f of one query.
        checkpoints: on the way of one run.
        train: the n training examples.
        queries: the queries.
        chunk: examples differentiated at once.
        mesh: spreads the examples over its first axis.
        progress: whether to show it.

    Raises:
        InvalidInputError: there is no checkpoint or no example, the tree of a checkpoint is another, a rate or a score
            is not finite.
    """
    _check(checkpoints)
    total = np.zeros((len(train), len(queries)))
    for params, rate, precondition in checkpoints:
        found = influence.gradients(output, params, queries, chunk=chunk, mesh=mesh)
        directions = precondition(found) if precondition else found
        total = total + rate * influence.scores(
            loss, params, train, directions, chunk=chunk, mesh=mesh, progress=progress
        )
    return total.astype(tree.sum_dtype(jnp.result_type(jax.tree.leaves(checkpoints[0].params)[0])))


def sgd(momentum: float = 0.0) -> Precondition:
    """Return the preconditioner of gradient descent, `g / (1 − μ)`: what all steps make of one gradient.

    Raises:
        InvalidInputError: the momentum μ is not in [0, 1).
    """
    if not 0 <= momentum < 1:
        raise InvalidInputError(f"momentum = {momentum}", expected="0 <= momentum < 1", remedy="change it")
    return jax.tree_util.Partial(_scaled, jnp.asarray(1 / (1 - momentum)))


def adam(state: optax.OptState, *, b2: float = 0.999, eps: float = 1e-8) -> Precondition:
    """Return the preconditioner of Adam, `g / (√(v / (1 − β₂^t)) + ε)`, from the second moments v of an optax state.

    Args:
        state: of `optax.adam`, `adamw` or a chain that holds `scale_by_adam`.
        b2: β₂.
        eps: ε.

    Raises:
        InvalidInputError: the state holds no second moments, or no step was taken; later, that they are of others than
            the parameters.

    Source: Kingma and Ba 2015, algorithm 1; the running mean of gradients is left out: over all steps it passes on
    each of them whole.
    """
    found = [each for each in _nodes(state) if isinstance(each, optax.ScaleByAdamState)]
    steps = [int(np.asarray(each.count)) for each in found]
    if len(found) != 1 or steps[0] < 1:
        raise InvalidInputError(
            f"an optimiser's state with {len(found)} sets of second moments, after {steps} steps",
            expected="that of one Adam after a step or more",
            remedy="pass the state that was saved with the checkpoint; use `sgd` for gradient descent",
        )
    correction = 1 - b2 ** steps[0]
    return jax.tree_util.Partial(
        _divided, jax.tree.map(lambda v: jnp.sqrt(v / correction) + jnp.asarray(eps, v.dtype), found[0].nu)
    )


def _nodes(state: Any) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))


def _scaled(factor: Float[Array, ""], vectors: Vectors) -> Vectors:
    return tree.scale(factor, vectors)


@jax.jit
def _divided(scales: Params, vectors: Vectors) -> Vectors:
    has = {name: leaf.shape for name, leaf in tree.to_names(scales).items()}
    given = {name: leaf.shape[1:] for name, leaf in tree.to_names(vectors).items()}
    differing = sorted(name for name in has.keys() | given.keys() if has.get(name) != given.get(name))
    if differing:
        name = differing[0]
        raise InvalidInputError(
            f"second moments of {has.get(name, 'nothing')} at {name!r}, where the parameters have "
            f"{given.get(name, 'nothing')}",
            expected="an Adam that trains all of the checkpoint's parameters",
            remedy="pass the state of this model; where a part is frozen, close over it and pass the trained part",
        )
    return jax.tree.map(lambda scale, vector: vector / scale[None], scales, vectors)


def _check(checkpoints: Sequence[Checkpoint]) -> None:
    if not checkpoints:
        raise InvalidInputError("no checkpoints", expected="one or more", remedy="save some while training")
    shapes = [
        {name: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for name, leaf in tree.to_names(each.params).items()}
        for each in checkpoints
    ]
    for number, (checkpoint, found) in enumerate(zip(checkpoints, shapes, strict=True)):
        differing = sorted(name for name in found.keys() | shapes[0].keys() if found.get(name) != shapes[0].get(name))
        if differing:
            name = differing[0]
            raise InvalidInputError(
                f"checkpoint {number} with {found.get(name, 'nothing')} at {name!r}, where the first has "
                f"{shapes[0].get(name, 'nothing')}",
                expected="checkpoints of one model",
                remedy="leave out those of another run",
            )
        if not np.isfinite(checkpoint.rate):
            raise InvalidInputError(
                f"checkpoint {number} with a rate of {checkpoint.rate}",
                expected="a finite sum of learning rates",
                remedy="sum the schedule over the steps that the checkpoint stands for",
            )
