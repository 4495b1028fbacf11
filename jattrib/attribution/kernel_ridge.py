"""Ridge regression in the eigenvectors of the rows' kernel: one decomposition for all targets and dampings."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jattrib.attribution.design import Design, centred


class Kernel(NamedTuple):
    """The fitted rows' kernel `XXᵀ` in its eigenvectors, and what is regressed, in the same basis.

    Attributes:
        design: the rows.
        spectrum: the eigenvalues.
        vectors: the eigenvectors.
        unit: the mean eigenvalue; 1 where no column varies, whose coefficients are then 0.
        targets: outputs, centred.
        priors: the prior's predictions, centred, of length 1; 0 without a prior.
        means: of the outputs.
        norms: what the prior's predictions were divided by.
        wanted: outputs of the held-out rows, less the means.
        told: the prior's predictions of them.
    """

    design: Design
    spectrum: Float[Array, " m"]
    vectors: Float[Array, "m m"]
    unit: Float[Array, ""]
    targets: Float[Array, "t m"]
    priors: Float[Array, "t m"]
    means: Float[np.ndarray, " t"]
    norms: Float[np.ndarray, " t"]
    wanted: Float[Array, "t h"]
    told: Float[Array, "t h"]


def decomposed(design: Design, outputs: np.ndarray, prior: Float[np.ndarray, "n t"]) -> Kernel:
    """Return the kernel of the fitted rows, decomposed, with the outputs and what a prior predicts of them."""
    kind = design.rows.dtype
    targets, means = centred(design, outputs)
    scaled = jnp.asarray((prior * np.where(np.isfinite(design.scales), design.scales, 0)[:, None]).T, kind)
    here, there = (jnp.matmul(scaled, rows.T, precision="highest") for rows in (design.rows, design.others))
    norms = np.asarray(jnp.linalg.norm(here, axis=1), np.float64)
    norms = np.where(norms > 0, norms, 1)
    divided = [each / jnp.asarray(norms, kind)[:, None] for each in (here, there)]
    others = np.sqrt(design.weights[~design.kept])[:, None]
    wanted = jnp.asarray(((outputs[~design.kept] - means) * others).T, kind)
    spectrum, vectors = jnp.linalg.eigh(jnp.matmul(design.rows, design.rows.T, precision="highest"))
    spectrum = jnp.maximum(spectrum, 0)
    rotated = [jnp.matmul(each, vectors, precision="highest") for each in (targets, divided[0])]
    first, second = rotated
    unit = jnp.mean(spectrum)
    unit = jnp.where(unit > 0, unit, 1)
    return Kernel(design, spectrum, vectors, unit, first, second, means, norms, wanted, divided[1])


def solve(kernel: Kernel, damping: Float[Array, " t"]) -> tuple[Float[Array, "t n"], Float[Array, " t"]]:
    """Return the weights of standardised columns at one damping a target, and γ."""
    dual, multiple = _dual(kernel, _inverse(kernel, damping))
    weights = jnp.matmul(
        jnp.matmul(dual, kernel.vectors.T, precision="highest"), kernel.design.rows, precision="highest"
    )
    return weights, multiple


def errors(kernel: Kernel, damping: Float[Array, ""]) -> Float[Array, " t"]:
    """Return the mean squared error of one damping on held-out rows, or on each row in turn.

    Left out, a row's error is its residual over one minus its leverage, that of the mean and the prior included.
    """
    design = kernel.design
    inverse = _inverse(kernel, damping[None])
    dual, multiple = _dual(kernel, inverse)
    if not design.kept.all():
        across = jnp.matmul(jnp.matmul(design.others, design.rows.T, precision="highest"), kernel.vectors,
                            precision="highest")  # fmt: skip
        predicted = jnp.matmul(dual, across.T, precision="highest") + multiple[:, None] * kernel.told
        return jnp.sum(jnp.square(kernel.wanted - predicted), axis=1) / design.weights[~design.kept].sum().astype(
            dual.dtype
        )
    residual, slope = (
        jnp.matmul(each, kernel.vectors.T, precision="highest") for each in (dual, kernel.priors * inverse)
    )
    within = jnp.sum(kernel.priors * inverse * kernel.priors, axis=1, keepdims=True)
    mean = jnp.asarray(design.weights / design.weights.sum(), dual.dtype) / (damping * kernel.unit)
    kept = jnp.sum(jnp.square(kernel.vectors) * inverse, axis=1) - mean
    kept = kept[None, :] - jnp.square(slope) / jnp.where(within > 0, within, 1)
    tiny = jnp.finfo(dual.dtype).eps / (kernel.spectrum[-1] + damping * kernel.unit)
    return jnp.mean(jnp.square(residual / jnp.maximum(kept, tiny)), axis=1)


def _inverse(kernel: Kernel, damping: Float[Array, " d"]) -> Float[Array, "d m"]:
    """Return the eigenvalues of `(XXᵀ + δ)⁻¹`, for one damping or one a target."""
    return 1 / (kernel.spectrum[None, :] + damping[:, None] * kernel.unit)


def _dual(kernel: Kernel, inverse: Float[Array, "d m"]) -> tuple[Float[Array, "t m"], Float[Array, " t"]]:
    """Return the dual coefficients `(XXᵀ + δ)⁻¹ (y − γ p)` in the eigenvectors, and γ."""
    across = jnp.sum(kernel.priors * inverse * kernel.targets, axis=1)
    within = jnp.sum(kernel.priors * inverse * kernel.priors, axis=1)
    multiple = jnp.where(within > 0, across / jnp.where(within > 0, within, 1), 0)
    return inverse * (kernel.targets - multiple[:, None] * kernel.priors), multiple
