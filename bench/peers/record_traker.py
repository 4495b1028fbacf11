# pyright: reportMissingImports=false
"""Record what `traker` 0.3.2 computes on a tiny problem: the oracle of the faithfulness test.

    python -m bench.peers.record_traker --out tests/attribution/data/traker_small.npz

With M checkpoints, p parameters, output gradients g (of the margin), projections P_m (p, k) of ±1, and λ its
`lambda_reg`, the package computes

    φ_m = g_m P_m / √p                                        stored as `grads`, n rows
    Q_m = 1 − softmax(logits)_y                               stored as `out_to_loss`
    K_m = φ_mᵀ φ_m + λ I
    R_m = K_m⁻¹ / mean_ij |(K_m⁻¹)_ij|                        the rescaling by the mean of the absolute entries
    features_m = φ_m R_m
    scores = [1/M Σ_m features_m φ_m(query)ᵀ] ⊙ [1/M Σ_m Q_m]      a product of means, Q on the training side

and this script asserts that it does, against NumPy in float64, before it writes anything.  All in float32.  The arrays:

    train_gradients (M, n, p), query_gradients (M, q, p), projection (M, p, k)      given
    train_logits (M, n, c), train_labels (n,)                                       given
    train_features (M, n, k), query_features (M, q, k), weights (M, n)              φ, φ of the queries, Q
    preconditioned (M, n, k), scores (n, q)                                         features and scores for λ = 0
    damping ()                                                                      a λ > 0
    damped_preconditioned (M, n, k), damped_scores (n, q)                           features and scores with it
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from bench.peers import traker as package

SIZES = (12, 6, 3)
TRAIN, QUERIES, DIM, CHECKPOINTS = 40, 8, 16, 2
DAMPING = 0.01
TOLERANCE = 1e-5


def record() -> dict[str, np.ndarray]:
    """Run the package on random data and two random checkpoints, and return every array on the way."""
    torch.manual_seed(0)
    train, queries = _batch(TRAIN), _batch(QUERIES)
    model = package.classifier(SIZES)
    states = {number: package.classifier(SIZES).state_dict() for number in range(CHECKPOINTS)}
    arrays: dict[str, np.ndarray] = {}
    for prefix, damping in (("", 0.0), ("damped_", DAMPING)):
        with tempfile.TemporaryDirectory() as folder:
            traker = package.make(
                model, Path(folder), examples=TRAIN, dim=DIM, distribution="rademacher", whole_matrix=True,
                damping=damping,
            )  # fmt: skip
            arrays |= _featurize(traker, states, train, queries)
            arrays[f"{prefix}scores"] = package.scores(traker, states, [queries], name="queries")
            preconditioned = [package.stored(traker, number, "features") for number in states]
            arrays[f"{prefix}preconditioned"] = np.stack(preconditioned)
            arrays["query_features"] = np.stack([_query_features(traker, number) for number in states])
    return arrays | {"train_labels": train[1].numpy().astype(np.int32), "damping": np.array(DAMPING)}


def verify(arrays: dict[str, np.ndarray]) -> float:
    """Return the largest relative difference between the package's arrays and the formulas above, in float64."""
    given = {name: array.astype(np.float64) for name, array in arrays.items()}
    p = given["train_gradients"].shape[-1]
    features, queries = (given[f"{side}_gradients"] @ given["projection"] / np.sqrt(p) for side in ("train", "query"))
    exponentials = np.exp(given["train_logits"])
    softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
    weights = 1 - np.take_along_axis(softmax, arrays["train_labels"][None, :, None], axis=-1)[..., 0]
    differences = [
        _difference(arrays["train_features"], features),
        _difference(arrays["query_features"], queries),
        _difference(arrays["weights"], weights),
    ]
    for prefix, damping in (("", 0.0), ("damped_", DAMPING)):
        gram = features.swapaxes(1, 2) @ features + damping * np.eye(features.shape[-1])
        inverse = np.linalg.inv(gram)
        inverse /= np.abs(inverse).mean(axis=(1, 2), keepdims=True)
        preconditioned = features @ inverse
        products = preconditioned @ queries.swapaxes(1, 2)
        differences.append(_difference(arrays[f"{prefix}preconditioned"], preconditioned))
        differences.append(_difference(arrays[f"{prefix}scores"], products.mean(0) * weights.mean(0)[:, None]))
    return max(differences)


def _batch(count: int) -> list[torch.Tensor]:
    return [torch.randn(count, SIZES[0]), torch.randint(SIZES[-1], (count,))]


def _featurize(
    traker: package.Traker,
    states: Mapping[int, package.State],
    train: list[torch.Tensor],
    queries: list[torch.Tensor],
) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {
        name: []
        for name in ("train_gradients", "query_gradients", "train_logits", "projection", "train_features", "weights")
    }
    for number, state in states.items():
        package.featurize(traker, state, number, [train])
        for name, batch in (("train_gradients", train), ("query_gradients", queries)):
            found[name].append(package.gradients(traker, batch))
        found["train_logits"].append(traker.model(train[0]).detach().numpy().copy())
        found["projection"].append(traker.projector.proj_matrix.numpy().copy())
        found["train_features"].append(package.stored(traker, number, "grads"))
        found["weights"].append(package.stored(traker, number, "out_to_loss")[:, 0])
    return {name: np.stack(parts) for name, parts in found.items()}


def _query_features(traker: package.Traker, number: int) -> Float[np.ndarray, "q k"]:
    traker.saver.load_current_store(number, "queries", QUERIES)
    return np.array(traker.saver.current_store["queries_grads"])


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    arrays = record()
    difference = verify(arrays)
    if difference > TOLERANCE:
        raise SystemExit(f"the package differs from the formulas by {difference:.1e}, more than {TOLERANCE:.0e}")
    np.savez_compressed(out, **arrays)  # pyright: ignore[reportArgumentType]
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    print(f"{out}: {out.stat().st_size} bytes, within {difference:.1e} of the formulas\n{shapes}")


if __name__ == "__main__":
    main()
