"""TRAK against closed forms in double precision, the package's recorded arrays, and what must not matter."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.attribution import features as kept
from jattrib.attribution import trak
from jattrib.core import mesh as meshes
from jattrib.core import store, stream
from jattrib.core.errors import DivergedError, InvalidInputError, StoreError
from jattrib.core.types import Projector
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Margin
from jattrib.projection import dense, sketch

RECORDED = Path(__file__).parent / "data" / "traker_small.npz"


def no_projection(dim):
    """Gradients as they are: the projector of a model with `dim` parameters."""

    def apply(state, gradients):
        return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(gradients)], axis=1)

    return Projector(dim, lambda key, params: jnp.zeros(0), apply)


def linear(params, example):
    x, _ = example
    return x @ params


def residual_loss(target):
    return lambda output: 0.5 * (output - target) ** 2


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(37, 6)).astype(np.float32), rng.integers(0, 3, 37).astype(np.int32)
    queries = rng.normal(size=(5, 6)).astype(np.float32), rng.integers(0, 3, 5).astype(np.int32)
    model = mlp(6, (8,), 3)
    checkpoints = [model.init(jax.random.key(seed)) for seed in range(3)]
    return model, checkpoints, train, queries


def featurized(problem, projector, **settings):
    model, checkpoints, train, queries = problem
    found = []
    for number, (params, state) in enumerate(checkpoints):
        output, key = Margin(model.apply, state), jax.random.key(100 + number)
        both = [
            trak.features(
                output, params, stream.InMemory(each), projector=projector, key=key, progress=False, **settings
            )
            for each in (train, queries)
        ]
        found.append(both)
    return [each[0] for each in found], [each[1].gradients for each in found]


def test_linear_regression_has_its_closed_form(x64):
    """For f = xᵀθ and squared loss a score is `x_iᵀ(XᵀX)⁻¹x (y_i − f_i)`: leave-one-out times 1 − h_i."""
    rng = np.random.default_rng(1)
    X, y, query = rng.normal(size=(30, 4)), rng.normal(size=30), rng.normal(size=(3, 4))
    theta = np.linalg.solve(X.T @ X, X.T @ y)
    weights = -(X @ theta - y)
    train = trak.Features(X, weights)
    scores = np.asarray(trak.scores([train], [query]))
    leverage = np.einsum("ij,jk,ik->i", X, np.linalg.inv(X.T @ X), X)
    for left_out in range(30):
        kept = np.arange(30) != left_out
        without = np.linalg.solve(X[kept].T @ X[kept], X[kept].T @ y[kept])
        change = query @ (theta - without)
        np.testing.assert_allclose(scores[left_out] / (1 - leverage[left_out]), change, rtol=1e-9)


def test_features_are_projected_gradients_and_residuals(problem):
    """Against the gradient written out, and p from the softmax."""
    model, checkpoints, train, _ = problem
    params, state = checkpoints[0]
    projector = no_projection(sum(leaf.size for leaf in jax.tree.leaves(params)))
    found = trak.features(
        Margin(model.apply, state), params, stream.InMemory(train), projector=projector, key=jax.random.key(0), chunk=8
    )
    logits = np.asarray(model.apply(params, state, train[0])[0], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.weights, 1 - p[np.arange(37), train[1]], rtol=2e-5)
    for row in (0, 7, 36):
        gradient = jax.grad(Margin(model.apply, state))(params, (train[0][row], train[1][row]))
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
        np.testing.assert_allclose(found.gradients[row], flat, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("combination", ["mean_of_products", "product_of_means"])
@pytest.mark.parametrize("rescale", [False, True])
def test_combinations_are_what_their_formulas_say(combination, rescale):
    """The equations in float64 NumPy with explicit inverses."""
    rng = np.random.default_rng(2)
    phi, psi = rng.normal(size=(3, 40, 7)), rng.normal(size=(3, 5, 7))
    q = rng.uniform(size=(3, 40))
    damping = 0.3
    products = []
    for features, queries in zip(phi, psi, strict=True):
        unit = np.trace(features.T @ features) / 40 / 7
        inverse = np.linalg.inv(features.T @ features / 40 + damping * unit * np.eye(7))
        inverse = inverse / np.abs(inverse).mean() if rescale else inverse / 40
        products.append(features @ inverse @ queries.T)
    products = np.array(products)
    if combination == "mean_of_products":
        expected = (products * q[:, :, None]).mean(0)
    else:
        expected = products.mean(0) * q.mean(0)[:, None]
    train = [trak.Features(f.astype(np.float32), w.astype(np.float32)) for f, w in zip(phi, q, strict=True)]
    scores = trak.scores(
        train, [each.astype(np.float32) for each in psi], relative_damping=damping, rescale=rescale,
        combination=combination,
    )  # fmt: skip
    np.testing.assert_allclose(scores, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


def test_the_package_is_reproduced():
    """`traker` 0.3.2 on recorded gradients and its own projection matrix: features and scores to 1e-5 relative."""
    with np.load(RECORDED) as arrays:
        recorded = {name: arrays[name] for name in arrays.files}
    checkpoints = range(len(recorded["train_gradients"]))
    p = recorded["train_gradients"].shape[-1]
    train, queries = [], []
    for number in checkpoints:
        matrix = recorded["projection"][number]
        features, targets = (
            recorded[name][number] @ matrix / np.float32(np.sqrt(p)) for name in ("train_gradients", "query_gradients")
        )
        for found, name in ((features, "train_features"), (targets, "query_features")):
            error = np.linalg.norm(found - recorded[name][number]) / np.linalg.norm(recorded[name][number])
            assert error < 1e-5
        train.append(trak.Features(features, recorded["weights"][number]))
        queries.append(targets)
    scores = np.asarray(trak.scores(train, queries, rescale=True, combination="product_of_means"))
    assert np.linalg.norm(scores - recorded["scores"]) / np.linalg.norm(recorded["scores"]) < 1e-5


def test_unprojected_inner_products_are_what_projected_ones_estimate(problem):
    """Means over many projections of the Gram matrix approach the gradients' own, within five deviations."""
    model, checkpoints, train, _ = problem
    params, state = checkpoints[0]
    output, source = Margin(model.apply, state), stream.InMemory(jax.tree.map(lambda leaf: leaf[:4], train))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    plain = trak.features(output, params, source, projector=no_projection(size), key=jax.random.key(0), progress=False)
    exact = plain.gradients @ plain.gradients.T
    for family in (sketch.projector(32), dense.projector(32)):
        grams = []
        for seed in range(60):
            found = trak.features(output, params, source, projector=family, key=jax.random.key(seed), progress=False)
            grams.append(found.gradients @ found.gradients.T)
        deviation = np.std(grams, axis=0) / np.sqrt(60)
        assert (np.abs(np.mean(grams, axis=0) - exact) < 5 * deviation).all()


def test_scores_follow_a_permutation_of_the_training_set(problem):
    model, checkpoints, train, queries = problem
    order = np.random.default_rng(3).permutation(37)
    shuffled = (model, checkpoints, jax.tree.map(lambda leaf: leaf[order], train), queries)
    projector = sketch.projector(16)
    one, two = (trak.scores(*featurized(each, projector), relative_damping=0.1) for each in (problem, shuffled))
    np.testing.assert_allclose(one[order], two, rtol=1e-3, atol=1e-5 * np.abs(one).max())


def test_a_duplicate_has_its_twins_score(problem):
    model, checkpoints, train, queries = problem
    twice = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[:3]]), train)
    scores = trak.scores(*featurized((model, checkpoints, twice, queries), sketch.projector(16)), relative_damping=0.1)
    np.testing.assert_allclose(scores[:3], scores[37:], rtol=1e-5)


@pytest.mark.parametrize(
    "projector",
    [sketch.projector(16), pytest.param(dense.projector(16), marks=pytest.mark.slow)],
    ids=["sketch", "dense"],
)
def test_neither_chunks_nor_devices_matter(problem, projector):
    reference = trak.scores(*featurized(problem, projector, chunk=64), relative_damping=0.1)
    scale = np.abs(reference).max()
    for settings in ({"chunk": 5}, {"chunk": 16, "mesh": meshes.data_mesh()}):
        again = trak.scores(*featurized(problem, projector, **settings), relative_damping=0.1)
        np.testing.assert_allclose(again, reference, rtol=1e-3, atol=1e-5 * scale)


def test_features_resume_from_disk_and_are_verified(problem, tmp_path):
    model, checkpoints, train, _ = problem
    params, state = checkpoints[0]
    projector = sketch.projector(16)
    settings = {"projector": projector, "key": jax.random.key(1), "progress": False, "chunk": 8}
    output, source = Margin(model.apply, state), stream.InMemory(train)
    expected = trak.features(output, params, source, **settings)
    identity = kept.identity(params, projector=projector, key=settings["key"])

    def rows():
        return store.Rows.create_or_open(
            tmp_path / "rows", arrays=trak.layout(projector), length=37, chunk=8, identity=identity
        )

    half = rows()
    half.write(0, {"gradients": expected.gradients[:16] + 1, "weights": expected.weights[:16]})
    found = trak.features(output, params, source, into=half, **settings)
    np.testing.assert_array_equal(found.gradients[:16], expected.gradients[:16] + 1)  # kept, not computed again
    np.testing.assert_array_equal(found.gradients[16:], expected.gradients[16:])
    data = max((tmp_path / "rows").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    data.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        trak.features(output, params, source, into=rows(), **settings)


def test_rows_of_another_checkpoint_or_of_none_are_refused(problem, tmp_path):
    model, checkpoints, train, _ = problem
    (params, state), (other, other_state) = checkpoints[:2]
    projector = sketch.projector(16)
    settings = {"projector": projector, "key": jax.random.key(1), "progress": False, "chunk": 8}
    identity = kept.identity(params, projector=projector, key=settings["key"])
    source = stream.InMemory(train)

    def rows(name, identity=None):
        return store.Rows.create_or_open(
            tmp_path / name, arrays=trak.layout(projector), length=37, chunk=8, identity=identity
        )

    with pytest.raises(StoreError, match=r"anonymous, whose identity is empty(.|\n)*remedy: .*features\.identity\("):
        trak.features(Margin(model.apply, state), params, source, into=rows("anonymous"), **settings)
    made = trak.features(Margin(model.apply, state), params, source, into=rows("own", identity), **settings)
    wanted = trak.features(Margin(model.apply, state), params, source, **settings)
    np.testing.assert_array_equal(made.gradients, wanted.gradients)
    with pytest.raises(StoreError, match=r"its parameters is '.*', this run's is"):
        trak.features(Margin(model.apply, other_state), other, source, into=rows("own", identity), **settings)
    another = settings | {"key": jax.random.key(2)}
    with pytest.raises(StoreError, match=r"its projection is '.*', this run's is"):
        trak.features(Margin(model.apply, state), params, source, into=rows("own", identity), **another)
    named = trak.features(Margin(model.apply, state), params, source, into=rows("named", {"run": 3}), **settings)
    np.testing.assert_array_equal(named.gradients, wanted.gradients)


def test_a_gradient_that_is_not_finite_names_the_example(problem):
    model, checkpoints, train, _ = problem
    params, state = checkpoints[0]
    inputs = train[0].copy()
    inputs[29] = np.nan
    with pytest.raises(InvalidInputError, match=r"example 29 has a gradient that is not finite"):
        trak.features(
            Margin(model.apply, state), params, stream.InMemory((inputs, train[1])), projector=sketch.projector(8),
            key=jax.random.key(0), chunk=16,
        )  # fmt: skip


def test_bad_features_are_refused(shapes_unchecked):
    rng = np.random.default_rng(4)
    few = trak.Features(rng.normal(size=(5, 8)).astype(np.float32), np.ones(5, np.float32))
    query = rng.normal(size=(2, 8)).astype(np.float32)
    with pytest.raises(DivergedError, match="damping"):
        trak.scores([few], [query])
    with pytest.raises(InvalidInputError, match="8 features a training example, 7 a query"):
        trak.scores([few], [query[:, :7]], relative_damping=0.1)
    with pytest.raises(InvalidInputError, match="no checkpoints"):
        trak.scores([], [])
    for lists in (([few, few], [query]), ([few], [query, query])):
        with pytest.raises(InvalidInputError, match="pass two lists of one length"):
            trak.scores(*lists, relative_damping=0.1)
    fewer = trak.Features(few.gradients[:4], few.weights[:4])
    for train, queries in (([few, fewer], [query, query]), ([few, few], [query, query[:1]])):
        with pytest.raises(InvalidInputError, match="the same examples and queries at each checkpoint"):
            trak.scores(train, queries, relative_damping=0.1)
    with pytest.raises(InvalidInputError, match=r"5 training examples and weights of shape \(1,\)"):
        trak.scores([few._replace(weights=few.weights[:1])], [query], relative_damping=0.1)
    weights = np.array([1, 1, np.inf, 1, 1], np.float32)
    for value, settings in ((np.nan, {"rescale": True}), (np.inf, {"rescale": False})):
        bad = np.where(np.arange(2)[:, None] == 1, np.float32(value), query)
        with pytest.raises(InvalidInputError, match="query 1 is not finite"):
            trak.scores([few], [bad], relative_damping=0.1, **settings)
        with pytest.raises(InvalidInputError, match="the weight of training example 2 is not finite"):
            trak.scores([few._replace(weights=weights)], [query], relative_damping=0.1, **settings)
    with pytest.raises(InvalidInputError, match=r"combination = 'mean_of_product'[\s\S]*'mean_of_products'"):
        trak.scores([few], [query], relative_damping=0.1, combination="mean_of_product")


def test_a_dimension_beyond_the_parameters_is_refused(problem):
    with pytest.raises(InvalidInputError, match="dim = 84 for 83 parameters"):
        featurized(problem, sketch.projector(84))


def test_mean_eigenvalue_is_the_trace_over_the_dimension():
    gradients = np.random.default_rng(5).normal(size=(9, 4)).astype(np.float32)
    eigenvalues = np.linalg.eigvalsh(gradients.T.astype(np.float64) @ gradients / 9)
    assert trak.mean_eigenvalue(gradients) == pytest.approx(eigenvalues.mean(), rel=1e-6)
