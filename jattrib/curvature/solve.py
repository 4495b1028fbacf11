"""The kernel inverse: `(G + λI)⁻¹ B` for a Gram matrix G, or an error that says why there is none."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib_kernels.backend import Backend
from jattrib_kernels.kernel_inverse import Info, kernel_inverse

__all__ = ["Info", "solve"]

_USELESS = 1e-2  # relative residual above which a solution is an error: it has less than two digits


def solve(
    gram: Float[Array | np.ndarray, "k k"],
    targets: Float[Array | np.ndarray, "k *q"],
    *,
    damping: float | int | Float[Array, ""] = 0.0,
    refine: int = 1,
    backend: Backend = "auto",
) -> tuple[Float[Array, "k *q"], Info]:
    """Solve `(G + λI) X = B` by Cholesky factorisation with iterative refinement.

    Under `jit` and `vmap`, where no value can be looked at, nothing is raised about values: read `Info`.

    Args:
        gram: G, symmetric positive semi-definite.
        targets: B, one column or several, of G's dtype.
        damping: λ, in the units of G as it is given; for a damping of the mean curvature, give the mean, `ΦᵀΦ / n`.
        refine: steps of refinement; one gives X to working precision at any condition that float32 can factorise, none
            is enough where a ridge keeps the condition low.
        backend: which implementation runs; `auto` is the Pallas kernel on a TPU or GPU and LAPACK elsewhere.

    Returns:
        X, and `Info(residual, smallest_pivot, positive_definite)`: the relative residual `‖B − (G + λI)X‖ / ‖B‖`, the
        smallest pivot of the factorisation in the units of G, and whether it is above rounding error.

    Raises:
        InvalidInputError: shapes or dtypes do not match, G is not symmetric or an entry is not finite, λ is negative or
            no number.
        DivergedError: `G + λI` is not positive definite to working precision, or the relative residual is above 1e-2.
    """
    _check_shapes(gram, targets, damping)
    concrete = not any(isinstance(x, Tracer) for x in (gram, targets, damping))
    gram, targets, ridge = jnp.asarray(gram), jnp.asarray(targets), jnp.asarray(damping, gram.dtype)
    if concrete:
        _check_values(gram, targets, ridge)
    solution, info = _solve(gram, targets, ridge, refine, backend)
    if concrete and not bool(info.positive_definite):
        raise _indefinite(gram, ridge, info)
    if concrete and not float(info.residual) <= _USELESS:
        raise _inaccurate(gram, ridge, info)
    return solution, info


@partial(jax.jit, static_argnums=(3, 4))
def _solve(gram: Array, targets: Array, damping: Array, refine: int, backend: Backend) -> tuple[Array, Info]:
    return kernel_inverse(gram, targets, damping=damping, refine=refine, backend=backend)


def _check_shapes(gram: Array | np.ndarray, targets: Array | np.ndarray, damping: Any) -> None:
    square = gram.ndim == 2 and gram.shape[0] == gram.shape[1] > 0
    if not square or gram.dtype not in (jnp.float32, jnp.float64):
        raise InvalidInputError(
            f"a Gram matrix of shape {gram.shape} and dtype {gram.dtype}",
            expected="a square matrix (k, k) of float32 or float64, k at least 1",
            remedy="pass ΦᵀΦ of features Φ (n, k), accumulated in float32 or better; vmap over a stack of matrices",
        )
    if targets.ndim not in (1, 2) or targets.shape[0] != gram.shape[0] or targets.dtype != gram.dtype:
        raise InvalidInputError(
            f"targets of shape {targets.shape} and dtype {targets.dtype} for a Gram matrix {gram.shape} of "
            f"{gram.dtype}",
            expected=f"one column ({gram.shape[0]},) or several ({gram.shape[0]}, q), of the Gram matrix's dtype",
            remedy="transpose features (q, k) to columns (k, q), and cast them to the Gram matrix's dtype",
        )
    if jnp.ndim(damping):
        raise InvalidInputError(
            f"damping of shape {jnp.shape(damping)}",
            expected="one number",
            remedy="vmap over several, or add a diagonal to the Gram matrix",
        )


def _check_values(gram: Array, targets: Array, damping: Array) -> None:
    largest, skew, worst_target = (float(x) for x in _extremes(gram, targets))
    if not np.isfinite(largest) or not np.isfinite(worst_target):
        where = "Gram matrix" if not np.isfinite(largest) else "targets"
        raise InvalidInputError(
            f"entries of the {where} that are not finite",
            expected="finite numbers",
            remedy="look for NaN or overflow in the features: a diverged checkpoint, or gradients in half precision",
        )
    if not (np.isfinite(float(damping)) and damping >= 0):
        raise InvalidInputError(
            f"damping = {float(damping):g}",
            expected="a finite number, at least 0",
            remedy="give a non-negative damping",
        )
    if skew > float(jnp.finfo(gram.dtype).eps) ** 0.5 * largest:
        raise InvalidInputError(
            f"a Gram matrix that differs from its transpose by {skew:g} where its largest entry is {largest:g}",
            expected="a symmetric matrix",
            remedy="pass ΦᵀΦ, or (G + Gᵀ) / 2",
        )


@jax.jit
def _extremes(gram: Array, targets: Array) -> tuple[Array, Array, Array]:
    return jnp.max(jnp.abs(gram)), jnp.max(jnp.abs(gram - gram.T)), jnp.max(jnp.abs(targets), initial=0)


def _indefinite(gram: Array, damping: Array, info: Info) -> DivergedError:
    mean, k = float(jnp.mean(jnp.diagonal(gram))), gram.shape[0]
    return DivergedError(
        f"a Gram matrix ({k}, {k}) of {gram.dtype} with damping {float(damping):g} is not positive definite: its "
        f"smallest pivot is {float(info.smallest_pivot):.3g}, its mean eigenvalue {mean:.3g}",
        expected="a positive definite matrix: without damping, ΦᵀΦ is singular when there are fewer examples than "
        "features (n < k) or when features depend on one another",
        remedy=_more_damping(mean),
    )


def _inaccurate(gram: Array, damping: Array, info: Info) -> DivergedError:
    return DivergedError(
        f"a system ({gram.shape[0]}, {gram.shape[0]}) of {gram.dtype} with damping {float(damping):g} whose solution "
        f"leaves a relative residual of {float(info.residual):.3g}",
        expected=f"a residual of at most {_USELESS:g}: a condition number below about 1 / {gram.dtype} epsilon",
        remedy=_more_damping(float(jnp.mean(jnp.diagonal(gram)))),
    )


def _more_damping(mean: float) -> str:
    start = f" (a tenth of the mean eigenvalue, {mean / 10:.3g}, is a usual start)" if mean > 0 else ""
    return f"give a larger damping{start}, more examples, fewer features, or float64"
