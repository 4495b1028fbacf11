"""Influence against leave-one-out in closed form and explicit matrices in double precision; what must not matter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattrib.attribution import features, influence, tracin
from jattrib.core import mesh as meshes
from jattrib.core import store, tree
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.stream import InMemory, Subset
from jattrib.curvature import arnoldi, ekfac, explicit, krylov, products
from jattrib.projection import dense, sketch
from tests.curvature import problems

pytestmark = pytest.mark.usefixtures("x64")
DAMPING, QUERIES = 0.05, 4
quiet = partial(influence.scores, problems.loss, progress=False)


@pytest.fixture(scope="module")
def problem():
    """Per-example gradients of the losses and of the queries' margins, and the Gauss-Newton matrix, all explicit."""
    with jax.enable_x64(True):
        train, queries = problems.data(), problems.data(QUERIES, seed=7)
        matrix = problems.ggn_matrix(train) + DAMPING * np.eye(tree.size(problems.params()))
        return problems.gradients(problems.loss, train), problems.gradients(problems.margin, queries), matrix


def queries():
    return InMemory(problems.data(QUERIES, seed=7))


def directions_of(rows):
    return jax.vmap(tree.ravel(problems.params())[1])(jnp.asarray(rows))


def test_ridge_regression_has_its_leave_one_out_changes():
    """`τ_i / (1 − h_i)` is the change of the prediction when example i is left out, exactly."""
    rng = np.random.default_rng(1)
    X, y, points = rng.normal(size=(12, 3)), rng.normal(size=12), rng.normal(size=(2, 3))
    ridge = 0.2
    K = X.T @ X + 12 * ridge * np.eye(3)
    theta = np.linalg.solve(K, X.T @ y)

    def loss(params, example):
        return 0.5 * (jnp.vdot(params, example[0]) - example[1]) ** 2

    def output(params, example):
        return jnp.vdot(params, example)

    params, train = jnp.asarray(theta), InMemory((X, y))
    matrix = explicit.matrix(products.streamed(products.hessian(loss, params), train), params)
    directions = explicit.inverse(matrix, damping=ridge)(influence.gradients(output, params, InMemory(points)))
    found = influence.scores(loss, params, train, directions, progress=False)
    leverage = np.einsum("ij,jk,ik->i", X, np.linalg.inv(K), X)
    for i in range(12):
        kept = np.arange(12) != i
        without = np.linalg.solve(X[kept].T @ X[kept] + 12 * ridge * np.eye(3), X[kept].T @ y[kept])
        np.testing.assert_allclose(found[i] / (1 - leverage[i]), points @ (theta - without), rtol=1e-8)


def test_every_curvature_gives_the_explicit_scores(problem):
    train, margins, matrix = problem
    wanted = -train @ np.linalg.solve(matrix, margins.T) / len(train)
    params, source = problems.params(), problems.source()
    operator = products.streamed(products.ggn(problems.logits, problems.label_loss, params), source, chunk=64)
    gradients = influence.gradients(problems.margin, params, queries())
    np.testing.assert_allclose(problems.rows(gradients), margins, rtol=1e-9, atol=1e-12)
    undamped = jnp.asarray(matrix - DAMPING * np.eye(len(matrix)))
    unravel = tree.ravel(params)[1]
    times = jax.jit(lambda v: jax.vmap(unravel)(jax.vmap(lambda each: tree.ravel(each)[0])(v) @ undamped))
    space = arnoldi.arnoldi(times, params, key=jax.random.key(0), steps=len(matrix))
    inverses = {
        "explicit": explicit.inverse(undamped, damping=DAMPING),
        "cg": lambda v: krylov.conjugate_gradient(operator, v, damping=DAMPING, tolerance=1e-11)[0],
        "arnoldi": arnoldi.inverse(space, damping=DAMPING),
    }
    for name, inverse in inverses.items():
        found = quiet(params, source, inverse(gradients))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-8 * np.abs(wanted).max(), err_msg=name)


def test_neither_order_nor_copies_nor_chunks_nor_devices_matter(problem):
    train, margins, matrix = problem
    directions = directions_of(np.linalg.solve(matrix, margins.T).T)
    wanted = -train @ np.linalg.solve(matrix, margins.T) / len(train)
    batch, params = problems.data(), problems.params()
    for settings in ({"chunk": 10}, {"chunk": 16, "mesh": meshes.data_mesh()}):
        found = quiet(params, InMemory(batch), directions, **settings)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-13)
    order = np.random.default_rng(3).permutation(len(train))
    shuffled = quiet(params, InMemory(jax.tree.map(lambda leaf: leaf[order], batch)), directions, chunk=10)
    np.testing.assert_allclose(shuffled, wanted[order], rtol=1e-9, atol=1e-13)
    twice = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[:3]]), batch)
    copies = quiet(params, InMemory(twice), directions, chunk=10) * (len(train) + 3) / len(train)
    np.testing.assert_allclose(copies, np.concatenate([wanted, wanted[:3]]), rtol=1e-9, atol=1e-13)


def split_problem():
    """A network whose matrices lie in parts on a mesh of four by two devices; and the mesh."""
    rng = np.random.default_rng(11)
    sizes = {"first": (4, 8), "last": (8, 3)}
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=size)), "bias": jnp.asarray(rng.normal(size=size[1]))}
        for name, size in sizes.items()
    }
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"first": {"kernel": jax.P("data", "model"), "bias": jax.P("model")}, "last": {"kernel": jax.P("model")}}
    specs["last"]["bias"] = jax.P()
    placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)), params, specs)
    return params, placed, mesh


@pytest.mark.slow
def test_parameters_that_are_split_over_a_mesh_stay_split_and_change_nothing():
    """EK-FAC's factors, features of factors and scores; the factors are split over the mesh, too."""
    whole, placed, mesh = split_problem()
    loss, projector, found = ekfac.empirical_fisher(problems.loss), sketch.projector(16), []
    for params, settings in ((whole, {"chunk": 8}), (placed, {"chunk": 8, "mesh": mesh})):
        factors = ekfac.fit(loss, params, problems.source(), progress=False, **settings)
        vectors = influence.gradients(problems.margin, params, queries(), **settings)
        directions = ekfac.inverse(factors)(jax.tree.map(np.asarray, vectors))
        scores = quiet(params, problems.source(), jax.tree.map(np.asarray, directions), **settings)
        kept = features.features(
            problems.loss, params, problems.source(), projector=projector, key=jax.random.key(0), **settings
        )
        found.append((factors, scores, kept))
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-8, atol=1e-12)
    values = found[1][0].eigenvalues["first/kernel"]
    np.testing.assert_allclose(values, found[0][0].eigenvalues["first/kernel"], rtol=1e-9)
    assert values.sharding.spec == jax.P(None, None, ("data", "model"))  # [1, 5, 8]: the outputs alone are even
    assert found[1][0].bases.outputs["first/kernel"].vectors.addressable_shards[0].data.size == 64 // 8


def test_plain_gradients_serve_where_there_are_no_factors():
    def loss(params, example):
        return jnp.sum(params**2) * example[0][0]

    params, directions = jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = influence.scores(loss, params, problems.source(), directions, progress=False)
    x = problems.data()[0][:, 0]
    np.testing.assert_allclose(found, -np.outer(x, [2, 4, 6]) / len(x), rtol=1e-12)

    def mixed(params, example):
        return jnp.sum(params["half"].astype(jnp.float32) ** 2) * example[0][0].astype(jnp.float32)

    half, units = jnp.array([[1.0, 2.0], [3.0, 4.0]], jnp.bfloat16), jnp.eye(4, dtype=jnp.float32).reshape(4, 2, 2)
    found = influence.scores(mixed, {"half": half}, problems.source(), {"half": units}, progress=False)
    np.testing.assert_allclose(found, -np.outer(x, [2, 4, 6, 8]) / len(x), rtol=1e-2)  # gradients are rounded


def test_a_layer_that_is_shared_over_time_has_the_products_of_its_gradients():
    """A scan that uses the same matrix at every step, and one of its branches another."""
    rng = np.random.default_rng(5)
    params = {"again": rng.normal(size=(3, 3)), "inputs": rng.normal(size=(4, 3)), "odd": rng.normal(size=(3, 3))}
    rows = rng.normal(size=(5, 6, 4))

    def output(params, example):
        def step(h, x):
            h = jnp.tanh(h @ params["again"] + x @ params["inputs"])
            return jax.lax.cond(x[0] > 0, lambda h: h @ params["odd"], lambda h: h, h), None

        return jnp.sum(jax.lax.scan(step, jnp.zeros(3), example)[0] * jnp.arange(1.0, 4.0))

    params, source = jax.tree.map(jnp.asarray, params), InMemory(rows)
    gradients = jax.vmap(jax.grad(output), in_axes=(None, 0))(params, rows)
    flat = np.asarray(jax.vmap(lambda each: tree.ravel(each)[0])(gradients))
    found = influence.scores(output, params, source, gradients, chunk=2, progress=False)
    np.testing.assert_allclose(found, -flat @ flat.T / 5, rtol=1e-9, atol=1e-12)


def test_products_and_norms_are_what_their_formulas_say(problem):
    train, margins, matrix = problem
    params, source = problems.params(), problems.source()
    solved = np.linalg.solve(matrix, margins.T)
    queries_, directions = directions_of(margins), directions_of(solved.T)
    np.testing.assert_allclose(
        influence.gradient_dot(problems.loss, params, source, queries_), -train @ margins.T, rtol=1e-8
    )
    lengths = np.linalg.norm(train, axis=1)[:, None] * np.linalg.norm(margins, axis=1)
    np.testing.assert_allclose(
        influence.cosine(problems.loss, params, source, queries_), -train @ margins.T / lengths, rtol=1e-8
    )
    own = np.einsum("ip,pq,iq->i", train, np.linalg.inv(matrix), train)
    inverse = explicit.inverse(jnp.asarray(matrix))
    plain = -train @ solved / len(train)
    local = quiet(params, source, directions, norm=influence.local_norm(inverse))
    np.testing.assert_allclose(local, plain / np.sqrt(own)[:, None], rtol=1e-8)
    moved = np.linalg.norm(np.linalg.solve(matrix, train.T), axis=0)
    parameter = quiet(params, source, directions, norm=influence.parameter_norm(inverse))
    np.testing.assert_allclose(parameter, plain / moved[:, None], rtol=1e-8)
    found = influence.self_influence(problems.loss, params, source, inverse)
    np.testing.assert_allclose(found, own / len(train), rtol=1e-8)


def test_gradients_of_any_size_have_their_angles():
    """In single precision the square of 1e-24 is 0, and that of 1e24 infinite."""
    params, train = problems.params(np.float32), problems.source(dtype=np.float32)
    queries_ = influence.gradients(problems.margin, params, InMemory(problems.data(QUERIES, seed=7, dtype=np.float32)))
    inverse = jax.tree_util.Partial(lambda vectors: jax.tree.map(lambda leaf: 4 * leaf, vectors))
    wanted = influence.cosine(problems.loss, params, train, queries_)
    relative = quiet(params, train, queries_, norm=influence.local_norm(inverse))
    assert np.abs(wanted).max() > 0.3
    for size in (1e-24, 1e24):
        loss = lambda params, example, size=size: size * problems.loss(params, example)  # noqa: E731
        scaled = jax.tree.map(lambda leaf, size=size: size * leaf, queries_)
        np.testing.assert_allclose(influence.cosine(loss, params, train, queries_), wanted, atol=1e-6)
        np.testing.assert_allclose(influence.cosine(problems.loss, params, train, scaled), wanted, atol=1e-6)
        found = influence.scores(loss, params, train, queries_, norm=influence.local_norm(inverse), progress=False)
        np.testing.assert_allclose(found, relative, rtol=1e-4, atol=1e-6)


def test_self_influence_takes_a_solver_that_is_a_loop_on_the_host(problem):
    train, _, matrix = problem
    undamped = jnp.asarray(matrix - DAMPING * np.eye(len(matrix)))
    unravel = tree.ravel(problems.params())[1]
    times = jax.jit(lambda v: jax.vmap(unravel)(jax.vmap(lambda each: tree.ravel(each)[0])(v) @ undamped))

    def inverse(vectors):
        return krylov.conjugate_gradient(times, vectors, damping=DAMPING, tolerance=1e-11)[0]

    found = influence.self_influence(problems.loss, problems.params(), problems.source(), inverse, compiled=False)
    own = np.einsum("ip,pq,iq->i", train, np.linalg.inv(matrix), train)
    np.testing.assert_allclose(found, own / len(train), rtol=1e-7)


def test_tokens_scores_add_up_to_those_of_their_example(problem):
    _, margins, matrix = problem
    directions = directions_of(np.linalg.solve(matrix, margins.T).T)
    rng = np.random.default_rng(5)
    batch = rng.normal(size=(6, 3, problems.INPUTS)), rng.integers(0, problems.CLASSES, (6, 3)).astype(np.int32)

    def losses(params, example):
        return jnp.stack([problems.loss(params, jax.tree.map(lambda leaf, t=t: leaf[t], example)) for t in range(3)])

    found = influence.token_scores(losses, problems.params(), InMemory(batch), directions, chunk=4)
    single = InMemory(jax.tree.map(lambda leaf: leaf.reshape(18, *leaf.shape[2:]), batch))
    wanted = quiet(problems.params(), single, directions, chunk=10).reshape(6, 3, QUERIES) * 18 / 6
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-13)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), directions)
    cast = influence.token_scores(losses, problems.params(), InMemory(batch), single)
    np.testing.assert_allclose(cast, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())
    with pytest.raises(InvalidInputError, match=r"losses of the shape \[\] for one example"):
        influence.token_scores(lambda *each: losses(*each).sum(), problems.params(), InMemory(batch), directions)


def test_the_best_of_blocks_are_the_best_of_all(problem, monkeypatch):
    train, margins, matrix = problem
    directions = directions_of(np.linalg.solve(matrix, margins.T).T)
    scores = -train @ np.linalg.solve(matrix, margins.T) / len(train)
    monkeypatch.setattr(influence, "BLOCK", 10)
    for harmful, order in ((False, np.argsort(-scores.T, axis=1)), (True, np.argsort(scores.T, axis=1))):
        found = influence.top(
            problems.loss, problems.params(), problems.source(), directions, k=12, harmful=harmful, chunk=10
        )
        np.testing.assert_array_equal(found.indices, order[:, :12])
        np.testing.assert_allclose(found.scores, np.take_along_axis(scores.T, order[:, :12], 1), rtol=1e-9)
    ties = influence.best([(0, np.zeros((3, 1))), (3, np.ones((2, 1))), (5, np.ones((1, 1)))], k=4, count=6)
    np.testing.assert_array_equal(ties.indices, [[3, 4, 5, 0]])
    with pytest.raises(InvalidInputError, match="k = 7"):
        influence.best([], k=7, count=6)


def test_kept_features_answer_later_queries_and_refuse_other_projections(problem, tmp_path, monkeypatch):
    """With all eigenvectors as the projection the features' scores are the explicit ones."""
    train, margins, matrix = problem
    params, key = problems.params(), jax.random.key(3)
    values, vectors = np.linalg.eigh(matrix)
    basis = jax.vmap(tree.ravel(params)[1])(jnp.asarray(vectors.T))
    projector = arnoldi.projector(arnoldi.Subspace(basis, jnp.asarray(values), jnp.zeros(len(values))))
    identity = features.identity(params, projector=projector, key=key)

    def rows(**changed):
        arrays = features.layout(projector, np.float64)
        return store.Rows.create_or_open(
            tmp_path / "rows", arrays=arrays, length=23, chunk=8, identity=identity | changed
        )

    settings = {"projector": projector, "key": key}
    made = features.features(problems.loss, params, problems.source(), into=rows(), **settings)
    asked = features.features(problems.margin, params, queries(), **settings)
    wanted = -train @ np.linalg.solve(matrix, margins.T) / len(train)
    np.testing.assert_allclose(features.scores(made, asked), wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())
    monkeypatch.setattr(features, "BLOCK", 9)
    top = features.top(store.Rows.open(tmp_path / "rows"), asked, k=3)
    np.testing.assert_array_equal(top.indices, np.argsort(-wanted.T, axis=1)[:, :3])
    phi = np.asarray(made.array("features"))
    gram = phi.T @ phi / len(phi)
    solved = features.inverse(made)(jnp.asarray(asked))
    ridge = 0.1 * np.trace(gram) / len(gram)
    np.testing.assert_allclose(solved, np.linalg.solve(gram + ridge * np.eye(len(gram)), asked.T).T, rtol=1e-6)
    moved = tree.axpy(1e-9, params, params)
    with pytest.raises(StoreError, match=r"its parameters is '.*', this run's is"):
        features.check(made, moved, **settings)
    with pytest.raises(InvalidInputError, match=r"43 features a training example, 5 a direction"):
        features.scores(made, np.zeros((2, 5)))
    bad = np.where(np.arange(len(asked))[:, None] == 1, np.nan, asked)
    for refused in (features.scores, partial(features.top, k=3)):
        with pytest.raises(InvalidInputError, match="direction 1 is not finite"):
            refused(made, bad)
    broken = np.where(np.arange(len(phi))[:, None] == 11, np.nan, phi)
    for refused in (features.scores, partial(features.top, k=3)):
        with pytest.raises(InvalidInputError, match="the row of scores 11 is not finite"):
            refused(broken, asked)
    with pytest.raises(InvalidInputError, match="features of 0 examples"):
        features.scores(phi[:0], asked)


@pytest.mark.slow
def test_identities_tell_seeds_and_families_apart():
    params = problems.params(np.float32)
    found = [
        features.identity(params, projector=projector, key=jax.random.key(seed))
        for projector, seed in [
            (sketch.projector(8), 0), (sketch.projector(8), 1), (dense.projector(8), 0),
            (dense.projector(8, distribution="normal"), 0),
        ]
    ]  # fmt: skip
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert found[0] == features.identity(params, projector=sketch.projector(8), key=jax.random.key(0))


def test_tracin_sums_checkpoints_with_their_optimisers_steps():
    params, source = problems.params(), problems.source()
    later = jax.tree.map(lambda leaf: leaf * 0.9, params)
    optimizer = optax.chain(optax.clip(10.0), optax.adam(1e-3))
    state = optimizer.init(params)
    for seed in (1, 2):
        gradient = jax.tree.map(lambda leaf: leaf[0], problems.vectors(1, seed)[1])
        with jax.numpy_dtype_promotion("standard"):
            _, state = optimizer.update(gradient, state, params)
    places = [tracin.Checkpoint(params, 0.3, tracin.sgd(0.9)), tracin.Checkpoint(later, 0.2, tracin.adam(state))]
    found = tracin.scores(problems.loss, problems.margin, places, source, queries(), progress=False)
    g = problems.vectors(1, 1)[0][0], problems.vectors(1, 2)[0][0]
    v = (0.999 * 0.001 * g[0] ** 2 + 0.001 * g[1] ** 2) / (1 - 0.999**2)
    total = 0
    for place, rate, scale in ((params, 0.3, np.full(len(v), 10.0)), (later, 0.2, 1 / (np.sqrt(v) + 1e-8))):
        losses, margins = (
            problems.rows(influence.gradients(f, place, s))
            for f, s in ((problems.loss, source), (problems.margin, queries()))
        )
        total = total - rate * (losses * scale) @ margins.T / len(losses)
    np.testing.assert_allclose(found, total, rtol=1e-8)


def test_bad_checkpoints_are_refused():
    params = problems.params()
    other = {**params, "last": {"kernel": params["last"]["kernel"]}}
    good = tracin.Checkpoint(params, 0.1)
    run = partial(tracin.scores, problems.loss, problems.margin, train=problems.source(), queries=queries())
    with pytest.raises(
        InvalidInputError, match=r"checkpoint 1 with nothing at 'last/bias', where the first has float64\[3\]"
    ):
        run([good, tracin.Checkpoint(other, 0.1)])
    with pytest.raises(InvalidInputError, match="no checkpoints"):
        run([])
    with pytest.raises(InvalidInputError, match="checkpoint 0 with a rate of nan"):
        run([good._replace(rate=float("nan"))])
    with pytest.raises(InvalidInputError, match="0 sets of second moments"):
        tracin.adam(optax.sgd(0.1).init(params))
    with pytest.raises(InvalidInputError, match=r"after \[0\] steps"):
        tracin.adam(optax.adam(0.1).init(params))
    frozen = optax.masked(optax.adam(0.1), {"first": True, "last": False})
    with jax.numpy_dtype_promotion("standard"):
        _, state = frozen.update(params, frozen.init(params), params)
    with pytest.raises(InvalidInputError, match=r"second moments of nothing at 'last/bias', where .* have \(3,\)"):
        run([good._replace(precondition=tracin.adam(state))])
    with pytest.raises(InvalidInputError, match="momentum = 1"):
        tracin.sgd(1.0)


def test_bad_input_is_refused():
    params, directions = problems.params(), problems.vectors(2)[1]
    cut = {**directions, "last": jax.tree.map(lambda leaf: leaf[..., :2], directions["last"])}
    with pytest.raises(
        InvalidInputError, match=r"directions \('last/bias', \(2, 2\)\) for parameters \('last/bias', \(3,\)\)"
    ):
        quiet(params, problems.source(), cut)
    inputs, labels = problems.data()
    inputs[7] = np.nan
    with pytest.raises(InvalidInputError, match="example 7 has a gradient or a score that is not finite"):
        quiet(params, InMemory((inputs, labels)), directions, chunk=10)
    upside_down = influence.local_norm(jax.tree_util.Partial(lambda v: jax.tree.map(jnp.negative, v)))
    with pytest.raises(InvalidInputError, match=r"(?s)example 0 has .* not finite.*positive definite"):
        quiet(params, problems.source(), directions, norm=upside_down)
    with pytest.raises(InvalidInputError, match="one floating-point number"):
        influence.gradients(problems.logits, params, queries())
    with pytest.raises(InvalidInputError, match="leaf 'steps' is not floating"):
        influence.gradients(problems.margin, {**params, "steps": jnp.int32(3)}, queries())
    empty = Subset(problems.source(), np.zeros(0, np.int64))
    for refused in (
        lambda: influence.gradients(problems.margin, params, empty),
        lambda: quiet(params, empty, directions),
        lambda: tracin.scores(
            problems.loss, problems.margin, [tracin.Checkpoint(params, 0.1)], problems.source(), empty, progress=False
        ),
    ):
        with pytest.raises(InvalidInputError, match="a source of 0 examples"):
            refused()
