# pyright: reportMissingImports=false
"""The random projections of `traker`, `dattri` and scikit-learn on one batch, each as a function to be timed.

On the CPU, both PyTorch packages have dense projections alone: the matrix is drawn anew for every batch, 100 columns at
a time, as they come; in one block of k columns they draw it once and keep it, which is much faster where p·k numbers
fit.  `dattri`'s `random_mask`, which picks k coordinates and drops the rest, is no projection that keeps inner products
and does not take part.  scikit-learn keeps its matrix, drawn outside the time: dense, sparse at its own density of
1/√p, and at the density 1/k, at which a coordinate goes to one feature on average, as in our sketch.

On a CUDA GPU, `fast_jl`, which `traker` calls, and the SJLT kernel that `dattri` calls, with one bucket a coordinate.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from jattrib.core import mesh as meshes

SEED = 0


class Peer(NamedTuple):
    """A function that projects the batch, and the distributions that it comes from."""

    work: Callable[[], Any]
    packages: tuple[str, ...]


def on_cpu(x: np.ndarray, dim: int) -> tuple[dict[str, Peer], dict[str, Peer]]:
    """Return dense and sparse projections of `x`, `(n, p)`, to dim features, by name."""
    from dattri.func import projection as dattri
    from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection
    from trak import projectors as traker

    torch.set_num_threads(meshes.cores())
    rows, size, device = torch.from_numpy(x), x.shape[1], torch.device("cpu")
    dense, sparse = {}, {}
    for block, how in ((100, "as it comes"), (dim, "whole matrix kept")):
        common = {"proj_dim": dim, "seed": SEED, "device": device, "block_size": block, "dtype": torch.float32}
        theirs = traker.BasicProjector(grad_dim=size, proj_type=traker.ProjectionType.normal, **common)
        dense[f"traker BasicProjector, {how}"] = Peer(partial(theirs.project, rows, 0), ("torch", "traker"))
        theirs = dattri.BasicProjector(feature_dim=size, proj_type=dattri.ProjectionType.normal, **common)
        dense[f"dattri BasicProjector, {how}"] = Peer(partial(theirs.project, rows, 0), ("torch", "dattri"))
    theirs = GaussianRandomProjection(dim, random_state=SEED).fit(x)
    dense["scikit-learn Gaussian"] = Peer(partial(theirs.transform, x), ("scikit-learn",))
    for density, name in (("auto", "1/√p"), (1 / dim, "1/k")):
        theirs = SparseRandomProjection(dim, density=density, dense_output=True, random_state=SEED).fit(x)
        sparse[f"scikit-learn sparse, density {name}"] = Peer(partial(theirs.transform, x), ("scikit-learn",))
    return dense, sparse


def on_gpu(x: jax.Array, dim: int) -> tuple[dict[str, Peer], dict[str, Peer], list[str]]:
    """Return dense projections and sketches of `x` on the GPU, by name, and why others are absent.

    `fast_jl` gets half precision where the rows are of bfloat16, which it does not take.
    """
    if not torch.cuda.is_available():
        return {}, {}, ["torch was built without CUDA"]
    rows, device, absent = torch.from_dlpack(x), torch.device("cuda"), []
    dense, sketch = {}, {}
    if importlib.util.find_spec("fast_jl") is None or importlib.util.find_spec("trak") is None:
        absent.append("fast_jl is not installed")
    else:
        from trak import projectors as traker

        half = rows.half() if rows.dtype == torch.bfloat16 else rows
        kind = traker.ProjectionType.rademacher

        def fast_jl() -> Callable[[], Any]:
            theirs = traker.CudaProjector(x.shape[1], dim, SEED, kind, device, max_batch_size=32)
            return partial(theirs.project, half, 0)

        _add(dense, absent, "fast_jl, by traker", fast_jl, ("torch", "traker", "fast_jl"))
    if importlib.util.find_spec("sjlt") is None or importlib.util.find_spec("dattri") is None:
        absent.append("dattri's sjlt is not installed")
    else:
        from dattri.func import projection as dattri

        def sjlt() -> Callable[[], Any]:
            kind = dattri.ProjectionType.sjlt
            theirs = dattri.CudaProjector(x.shape[1], dim, SEED, kind, device, dtype=rows.dtype)
            return partial(theirs.project, rows, 0)

        _add(sketch, absent, "SJLT, by dattri", sjlt, ("torch", "dattri", "sjlt"))
    return dense, sketch, absent


def wait(made: Any) -> None:
    """Wait for what PyTorch has begun; on a CPU it is done."""
    if isinstance(made, torch.Tensor) and made.is_cuda:
        torch.cuda.synchronize()


def _add(
    found: dict[str, Peer],
    absent: list[str],
    name: str,
    make: Callable[[], Callable[[], Any]],
    packages: tuple[str, ...],
) -> None:
    """Add a peer that gets through one call; a card that it does not know costs its row alone, and is reported."""
    try:
        work = make()
        wait(work())
    except (RuntimeError, ModuleNotFoundError) as error:
        absent.append(f"{name} failed: {str(error).splitlines()[0]}")
    else:
        found[name] = Peer(work, packages)
