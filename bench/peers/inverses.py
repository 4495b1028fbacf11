# pyright: reportMissingImports=false
"""Are our inverses of a curvature as true as those of `dattri` 0.3.0?  The cosine of both to NumPy's, in float64.

    python -m bench.peers.inverses --out bench/results/fidelity_dattri.jsonl

Both sides have a network 64-16-10 with tanh, trained on 1,500 8x8 digits, the same directions (gradients of the losses
of other digits), and the same damping.  EK-FAC is held against its own formula, written with NumPy, and against the
damped inverse of each layer's empirical Fisher matrix, which it approximates; the inverse that is called explicit
against that of the Hessian of the mean loss over all examples, which it claims to be.

What the package's source says of the differences.  Its EK-FAC applies `Q` where its transpose belongs, on both sides,
both ways (`IFAttributorEKFAC.transform_test_rep`), and where a layer has a bias puts the bias behind the flattened
weights and cuts rows anew.  Its explicit, CG and LiSSA inverses are sums over the loader's batches of each batch's own
inverse, which is the inverse of the whole for a single batch alone.  None of this is imitated here.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bench import harness
from jattrib.core import stream, tree
from jattrib.curvature import ekfac, explicit, products
from jattrib.data import vision
from jattrib.models.outputs import cross_entropy

SIZES, BATCH, DIRECTIONS, STEPS = (64, 16, 10), 50, 20, 300
PACKAGES = ("torch", "dattri")
Rows = Float[np.ndarray, "q p"]


class Case(NamedTuple):
    """A network with or without biases, and its data; parameters are in PyTorch's order of axes."""

    params: Any
    data: tuple[np.ndarray, np.ndarray]
    directions: Rows


def run() -> list[harness.Row]:
    """Compare EK-FAC with and without biases, and the inverse called explicit with small batches and one large one."""
    harness.require("dattri", "torch")
    rows = []
    with jax.enable_x64(True):
        for bias in (True, False):
            case = problem(bias)
            exact, ridge = layerwise(case)
            sides = ours_ekfac(case, ridge), package(case, "ekfac", ridge, batch=len(case.data[1]))
            name = f"EK-FAC, {'with' if bias else 'without'} biases"
            rows.append(row(f"{name}, its formula", formula(case, ridge), sides))
            rows.append(row(f"{name}, the inverse", exact, sides))
        case = problem(True)
        exact, ridge = hessian_inverse(case, 0.1)
        for batch in (BATCH, len(case.data[1])):
            sides = ours_explicit(case, ridge), package(case, "explicit", ridge, batch=batch)
            rows.append(row(f"explicit inverse, batches of {batch}", exact, sides))
    return rows


def row(name: str, exact: Rows, sides: tuple[Rows, Rows]) -> harness.Row:
    """Return the median cosines of both sides to the exact rows."""
    ours, other = (float(np.median(cosines(exact, side))) for side in sides)
    return harness.Row(
        case=name, ours=ours, other=other, other_name="dattri", ratio=ours / other, unit="cosine",
        device=harness.device(), versions=harness.versions(PACKAGES),
        note=f"median over {DIRECTIONS} directions, float64",
    )  # fmt: skip


def cosines(a: Rows, b: Rows) -> Float[np.ndarray, " q"]:
    """Return the cosine of each pair of rows."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def logits(params: Any, example: Any) -> jax.Array:
    """Return the logits of one example; matrices are `[outputs, inputs]`."""
    x = example[0]
    for number, layer in enumerate(params):
        x = layer["weight"] @ x
        x = x + layer["bias"] if "bias" in layer else x
        x = jnp.tanh(x) if number + 1 < len(params) else x
    return x


def loss(params: Any, example: Any) -> jax.Array:
    """Return the loss of one example."""
    return cross_entropy(logits(params, example), jnp.asarray(example[1]))


def problem(bias: bool) -> Case:
    """Return a network after some steps of descent on all examples."""
    data, others = ((each.inputs.reshape(len(each.labels), -1).astype(float), each.labels) for each in vision.digits())
    rng, params = np.random.default_rng(0), []
    for before, after in itertools.pairwise(SIZES):
        layer = {"weight": rng.normal(size=(after, before)) / np.sqrt(before)}
        params.append(layer | ({"bias": np.zeros(after)} if bias else {}))
    params = jax.tree.map(jnp.asarray, params)

    @jax.jit
    def step(params: Any) -> Any:
        gradient = jax.grad(lambda each: jax.vmap(partial(loss, each))(data).mean())(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)

    for _ in range(STEPS):
        params = step(params)
    return Case(params, data, gradients(params, (others[0][:DIRECTIONS], others[1][:DIRECTIONS])))


def gradients(params: Any, data: Any) -> Rows:
    """Return the gradients of the losses of examples, as rows."""
    return flat(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, data))


def layerwise(case: Case) -> tuple[Rows, float]:
    """Return the damped inverses of the layers' empirical Fisher matrices, and the damping: a tenth of the mean."""
    rows = gradients(case.params, case.data)
    ridge, solved, start = 0.1 * float(np.square(rows).mean()), [], 0
    for layer in case.params:
        part = slice(start, start := start + tree.size(layer))
        fisher = rows[:, part].T @ rows[:, part] / len(rows)
        solved.append(np.linalg.solve(fisher + ridge * np.eye(len(fisher)), case.directions[:, part].T).T)
    return np.concatenate(solved, axis=1), ridge


def formula(case: Case, ridge: float) -> Rows:
    """Return `Q_S [(Q_Sᵀ G Q_A) / (Λ + λ)] Q_Aᵀ` in each layer, with NumPy: Grosse et al. 2023, equation 20."""
    x, solved, start = case.data[0], [], 0
    rows, inputs = gradients(case.params, case.data), []
    for layer in case.params:
        inputs.append(np.concatenate([np.ones((len(x), 1)), x], axis=1) if "bias" in layer else x)
        x = np.tanh(inputs[-1] @ _matrix(layer).T)
    for a, layer in zip(inputs, case.params, strict=True):
        part = slice(start, start := start + tree.size(layer))
        grown, asked = (_matrices(each[:, part], layer) for each in (rows, case.directions))
        s = grown[:, :, 0] if "bias" in layer else np.einsum("noi,ni->no", grown, a) / np.square(a).sum(1)[:, None]
        left, right = (np.linalg.eigh(each.T @ each / len(each))[1] for each in (s, a))
        values = np.square(left.T @ grown @ right).mean(0)
        found = left @ ((left.T @ asked @ right) / (values + ridge)) @ right.T
        parts = [found[:, :, :1].reshape(len(found), -1)] if "bias" in layer else []
        solved += [*parts, found[:, :, len(parts) :].reshape(len(found), -1)]
    return np.concatenate(solved, axis=1)


def _matrix(layer: Any) -> np.ndarray:
    bias = [np.asarray(layer["bias"])[:, None]] if "bias" in layer else []
    return np.concatenate([*bias, np.asarray(layer["weight"])], axis=1)


def _matrices(rows: Rows, layer: Any) -> np.ndarray:
    """Return a layer's part of rows as matrices `[outputs, inputs]`, the bias in the first column."""
    after, before = layer["weight"].shape
    bias = rows[:, : rows.shape[1] - after * before].reshape(len(rows), after, -1) if "bias" in layer else None
    weight = rows[:, rows.shape[1] - after * before :].reshape(len(rows), after, before)
    return weight if bias is None else np.concatenate([bias, weight], axis=2)


def hessian_inverse(case: Case, ridge: float) -> tuple[Rows, float]:
    """Return the damped inverse of the Hessian of the mean loss over all examples, by `jax.hessian` and NumPy.

    The damping is raised by its most negative eigenvalue, and returned.
    """
    vector, unravel = tree.ravel(case.params)
    matrix = jax.jit(jax.hessian(lambda v: jax.vmap(partial(loss, unravel(v)))(case.data).mean()))(vector)
    ridge = ridge + max(0.0, -float(np.linalg.eigvalsh(np.asarray(matrix)).min()))
    return np.linalg.solve(np.asarray(matrix) + ridge * np.eye(len(vector)), case.directions.T).T, ridge


def vectors(case: Case) -> Any:
    """Return the directions as pytrees."""
    return jax.vmap(tree.ravel(case.params)[1])(jnp.asarray(case.directions))


def flat(found: Any) -> Rows:
    """Return pytrees as rows."""
    return np.asarray(jax.vmap(lambda each: tree.ravel(each)[0])(found))


def ours_ekfac(case: Case, ridge: float) -> Rows:
    """Return what this package's EK-FAC makes of the directions."""
    factors = ekfac.fit(ekfac.empirical_fisher(loss), case.params, stream.InMemory(case.data), progress=False)
    return flat(ekfac.inverse(factors, damping=ridge)(vectors(case)))


def ours_explicit(case: Case, ridge: float) -> Rows:
    """Return what this package's explicit inverse makes of the directions."""
    operator = products.streamed(products.hessian(loss, case.params), stream.InMemory(case.data), chunk=BATCH)
    return flat(explicit.inverse(explicit.matrix(operator, case.params), damping=ridge)(vectors(case)))


def package(case: Case, kind: str, ridge: float, *, batch: int) -> Rows:
    """Return what the package makes of the directions, which it has in its own order: weight, then bias, by layer."""
    import torch
    from dattri.algorithm import influence_function as package
    from dattri.task import AttributionTask

    torch.set_default_dtype(torch.float64)
    names = [f"{2 * number}" for number in range(len(case.params))]
    model = torch.nn.Sequential()
    for number, layer in enumerate(case.params):
        after, before = layer["weight"].shape
        model.append(torch.nn.Linear(before, after, bias="bias" in layer))
        if number + 1 < len(case.params):
            model.append(torch.nn.Tanh())
    state = {
        f"{name}.{leaf}": torch.tensor(np.asarray(value))
        for name, layer in zip(names, case.params, strict=True)
        for leaf, value in layer.items()
    }

    def mean_loss(params: Any, data: Any) -> Any:
        inputs, labels = data
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, params, inputs), labels)

    task = AttributionTask(loss_func=mean_loss, model=model, checkpoints=state)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(case.data[0]), torch.tensor(case.data[1].astype(np.int64))),
        batch_size=batch,
    )
    make: dict[str, Callable[[], Any]] = {
        "ekfac": lambda: package.IFAttributorEKFAC(task, damping=ridge),
        "explicit": lambda: package.IFAttributorExplicit(task, regularization=ridge),
    }
    attributor = make[kind]()
    attributor.cache(loader)
    order = _theirs(case)
    asked = torch.tensor(np.ascontiguousarray(case.directions[:, order]))
    found = attributor.transform_test_rep(0, asked).detach().numpy()
    torch.set_default_dtype(torch.float32)
    back = np.empty_like(found)
    back[:, order] = found
    return back


def _theirs(case: Case) -> np.ndarray:
    """Return the places of the package's coordinates in ours, where a layer's bias comes before its weight."""
    places, start = [], 0
    for layer in case.params:
        size = {name: leaf.size for name, leaf in layer.items()}
        first = size.get("bias", 0)
        places += [np.arange(start + first, start + first + size["weight"]), np.arange(start, start + first)]
        start += first + size["weight"]
    return np.concatenate(places)


if __name__ == "__main__":
    harness.main(run, "inverses")
