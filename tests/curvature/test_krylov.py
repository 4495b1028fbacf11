"""Products against explicit matrices; solvers and cheap approximations against inverses, in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core import mesh as meshes
from jattrib.core import tree
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.core.stream import InMemory
from jattrib.curvature import arnoldi, datainf, diagonal, explicit, krylov, products
from tests.curvature import problems

pytestmark = pytest.mark.usefixtures("x64")
DAMPING = 0.02


@pytest.fixture(scope="module")
def ggn():
    """The generalised Gauss-Newton matrix of the problem, explicit, and its operator on vectors."""
    with jax.enable_x64(True):
        matrix = expected_matrix("ggn")
        unravel = tree.ravel(problems.params())[1]
        times = jax.jit(lambda vectors: jax.vmap(unravel)(_rows(vectors) @ matrix))
        return matrix, times


def _rows(vectors):
    return jax.vmap(lambda each: tree.ravel(each)[0])(vectors)


def product(kind):
    params = problems.params()
    return {
        "hessian": lambda: products.hessian(problems.loss, params),
        "ggn": lambda: products.ggn(problems.logits, problems.label_loss, params),
        "fisher": lambda: products.fisher(problems.loss, params),
    }[kind]()


@functools.cache
def expected_matrix(kind):
    batch = problems.data()
    if kind == "fisher":
        rows = problems.gradients(problems.loss, batch)
        return rows.T @ rows / len(rows)
    return {"hessian": problems.hessian_matrix, "ggn": problems.ggn_matrix}[kind](batch)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_products_are_those_of_the_explicit_matrix_for_any_chunk_and_mesh(kind):
    rows, vectors = problems.vectors(3)
    wanted = rows @ expected_matrix(kind)
    for settings in ({"chunk": 8}, {"chunk": 16, "mesh": meshes.data_mesh()}):
        found = products.streamed(product(kind), problems.source(), **settings)(vectors)
        np.testing.assert_allclose(problems.rows(found), wanted, rtol=1e-10, atol=1e-12)


def test_random_products_are_unbiased_and_repeat():
    rows, vectors = problems.vectors(2)
    operator = products.sampled(product("ggn"), problems.source(), size=64)
    draws = np.array([problems.rows(operator(jax.random.key(seed), vectors)) for seed in range(40)])
    exact = rows @ expected_matrix("ggn")
    assert (np.abs(draws.mean(0) - exact) < 5 * draws.std(0) / np.sqrt(40) + 1e-12).all()
    np.testing.assert_array_equal(draws[7], problems.rows(operator(jax.random.key(7), vectors)))


def test_the_matrix_of_an_operator_and_its_inverse():
    operator = products.streamed(product("hessian"), problems.source())
    matrix = explicit.matrix(operator, problems.params(), columns=16)
    np.testing.assert_allclose(matrix, expected_matrix("hessian"), rtol=1e-9, atol=1e-12)
    rows, vectors = problems.vectors(2)
    shift = 1 + float(np.abs(np.linalg.eigvalsh(matrix)).max())
    solved = explicit.inverse(matrix, damping=shift)(vectors)
    wanted = np.linalg.solve(np.asarray(matrix) + shift * np.eye(len(matrix)), rows.T).T
    np.testing.assert_allclose(problems.rows(solved), wanted, rtol=1e-8)


def test_conjugate_gradients_agree_with_the_explicit_inverse(ggn):
    matrix, operator = ggn
    rows, vectors = problems.vectors(4)
    vectors = jax.tree.map(lambda leaf: leaf.at[3].set(0), vectors)
    found, info = krylov.conjugate_gradient(operator, vectors, damping=DAMPING, tolerance=1e-11, iterations=300)
    wanted = np.linalg.solve(matrix + DAMPING * np.eye(len(matrix)), rows.T).T
    np.testing.assert_allclose(problems.rows(found)[:3], wanted[:3], rtol=0, atol=1e-8 * np.abs(wanted).max())
    assert not problems.rows(found)[3].any()
    assert info.converged.all()
    assert info.iterations[3] == 0
    left = rows - problems.rows(found) @ (matrix + DAMPING * np.eye(len(matrix)))
    ratio = np.linalg.norm(left[:3], axis=1) / np.linalg.norm(rows[:3], axis=1)
    np.testing.assert_allclose(info.residual[:3], ratio, rtol=0.1)
    exact = explicit.inverse(jnp.asarray(matrix), damping=DAMPING)
    again, quick = krylov.conjugate_gradient(operator, vectors, damping=DAMPING, tolerance=1e-11, precondition=exact)
    np.testing.assert_allclose(problems.rows(again)[:3], wanted[:3], rtol=0, atol=1e-8 * np.abs(wanted).max())
    assert quick.iterations.max() <= 2


def test_conjugate_gradients_solve_for_right_hand_sides_of_any_size():
    """In single precision their squares are 0 or infinite; the solution of the small one was 0, and had converged."""
    rng = np.random.default_rng(0)
    root, row = rng.normal(size=(6, 6)), rng.normal(size=6)
    matrix = root @ root.T / 6
    single = jnp.asarray(matrix, jnp.float32)
    operator = lambda vectors: jnp.matmul(vectors, single, precision="highest")  # noqa: E731
    wanted = np.linalg.solve(matrix + DAMPING * np.eye(6), row)
    sizes = np.array([1e-28, 1, 1e28])
    targets = jnp.asarray(sizes[:, None] * row, jnp.float32)
    found, info = krylov.conjugate_gradient(operator, targets, damping=DAMPING)
    assert info.converged.all()
    assert info.iterations.min() > 1
    np.testing.assert_allclose(np.asarray(found, np.float64) / sizes[:, None], np.tile(wanted, (3, 1)), rtol=2e-3)


def test_conjugate_gradients_say_when_they_have_not_converged(ggn):
    _, operator = ggn
    _, vectors = problems.vectors(2)
    _, info = krylov.conjugate_gradient(operator, vectors, damping=DAMPING, tolerance=1e-11, iterations=3)
    assert not info.converged.any()
    assert (info.residual > 1e-4).all()
    np.testing.assert_array_equal(info.iterations, [3, 3])


def test_conjugate_gradients_refuse_what_has_no_solution(ggn):
    _, operator = ggn
    _, vectors = problems.vectors(1)
    with pytest.raises(DivergedError, match=r"(?s)a direction of curvature -.*Gauss-Newton.*damping well above"):
        krylov.conjugate_gradient(lambda v: jax.tree.map(lambda leaf: -leaf, operator(v)), vectors, damping=1e-3)
    with pytest.raises(DivergedError, match="right-hand side is not finite"):
        krylov.conjugate_gradient(operator, jax.tree.map(lambda leaf: leaf * np.nan, vectors))
    with pytest.raises(DivergedError, match="product with the curvature is not finite"):
        krylov.conjugate_gradient(lambda v: jax.tree.map(lambda leaf: leaf * np.inf, operator(v)), vectors)
    with pytest.raises(InvalidInputError, match="damping = -1"):
        krylov.conjugate_gradient(operator, vectors, damping=-1)


def test_lissa_with_all_data_agrees_with_the_inverse_and_measures_its_scale(ggn):
    matrix, operator = ggn
    rows, vectors = problems.vectors(2)
    found, info = krylov.lissa(lambda key, v: operator(v), vectors, key=jax.random.key(0), damping=0.2, steps=100)
    wanted = np.linalg.solve(matrix + 0.2 * np.eye(len(matrix)), rows.T).T
    np.testing.assert_allclose(problems.rows(found), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    top = np.linalg.eigvalsh(matrix)[-1]
    assert top + 0.2 < info.scale < 1.2 * top + 0.2 + 1e-12
    assert (info.residual < 1e-6).all()


def test_lissa_with_random_batches_approaches_the_inverse():
    rows, vectors = problems.vectors(1)
    operator = products.sampled(product("ggn"), problems.source(), size=16)
    found, info = krylov.lissa(operator, vectors, key=jax.random.key(1), damping=0.3, steps=40, repeats=3)
    wanted = np.linalg.solve(expected_matrix("ggn") + 0.3 * np.eye(rows.shape[1]), rows.T).T
    assert np.linalg.norm(problems.rows(found) - wanted) < 0.1 * np.linalg.norm(wanted)
    assert 0 < info.residual[0] < 0.5


def test_lissa_reports_divergence(ggn):
    _, operator = ggn
    _, vectors = problems.vectors(1)
    with pytest.raises(DivergedError, match=r"(?s)series of right-hand side 0 has grown.*scale 0\.05.*larger scale"):
        krylov.lissa(lambda key, v: operator(v), vectors, key=jax.random.key(0), damping=0.1, scale=0.05)
    with pytest.raises(InvalidInputError, match="steps = 0"):
        krylov.lissa(lambda key, v: operator(v), vectors, key=jax.random.key(0), damping=0.1, steps=0)


def test_arnoldi_of_full_rank_is_the_inverse(ggn):
    """The matrix is singular with a large null space: the Krylov space ends early and goes on afresh."""
    matrix, operator = ggn
    size = len(matrix)
    rows, vectors = problems.vectors(3)
    space = arnoldi.arnoldi(operator, problems.params(), key=jax.random.key(0), steps=size)
    np.testing.assert_allclose(np.sort(space.eigenvalues), np.linalg.eigvalsh(matrix), atol=1e-12)
    basis = problems.rows(space.basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(size), atol=1e-10)
    wanted = np.linalg.solve(matrix + DAMPING * np.eye(size), rows.T).T
    found = problems.rows(arnoldi.inverse(space, damping=DAMPING)(vectors))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-8 * np.abs(wanted).max())
    projector = arnoldi.projector(space, damping=DAMPING)
    features = projector.apply(projector.init(jax.random.key(0), problems.params()), vectors)
    np.testing.assert_allclose(
        features @ features.T, rows @ wanted.T, rtol=0, atol=1e-8 * np.abs(rows @ wanted.T).max()
    )


def test_arnoldi_finds_the_largest_eigenvalues_first(ggn):
    matrix, operator = ggn
    space = arnoldi.arnoldi(operator, problems.params(), key=jax.random.key(0), steps=30, rank=4)
    values, vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(space.eigenvalues, values[::-1][:4], rtol=1e-6)
    overlap = np.abs(problems.rows(space.basis) @ vectors[:, ::-1][:, :4])
    np.testing.assert_allclose(np.diag(overlap), 1, atol=1e-5)
    left = problems.rows(operator(space.basis)) - np.asarray(space.eigenvalues)[:, None] * problems.rows(space.basis)
    assert (np.linalg.norm(left, axis=1) <= np.asarray(space.residuals) + 1e-10).all()


def test_arnoldi_in_half_precision_is_of_the_krylov_space():
    """It began anew at every step, with residuals of 0, and found no eigenvalue."""
    half, values = jnp.bfloat16, np.concatenate([[9.0, 5.0, 3.0], np.linspace(0.1, 1, 37)])
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    matrix = jnp.asarray(rotation * values @ rotation.T, jnp.float32)

    def operator(vectors):
        assert vectors["w"].dtype == half
        wide = vectors["w"].reshape(len(vectors["w"]), -1).astype(jnp.float32)
        return {"w": (wide @ matrix).astype(half).reshape(vectors["w"].shape)}

    space = arnoldi.arnoldi(operator, {"w": jnp.zeros((8, 5), half)}, key=jax.random.key(0), steps=12, rank=3)
    np.testing.assert_allclose(space.eigenvalues, values[:3], rtol=0.02)
    overlap = np.asarray(space.basis["w"]).reshape(3, 40) @ rotation[:, :3]
    np.testing.assert_allclose(np.abs(np.diag(overlap)), 1, atol=0.02)
    vector = jnp.asarray(rotation[:, :2].T.reshape(2, 8, 5), half)
    solved = arnoldi.inverse(space, damping=1.0)({"w": vector})["w"]
    assert solved.dtype == half
    np.testing.assert_allclose(
        solved.astype(np.float64), vector.astype(np.float64) / np.array([10.0, 6.0])[:, None, None], atol=0.01
    )


def test_arnoldi_refuses_what_it_cannot_do(ggn):
    _, operator = ggn
    with pytest.raises(InvalidInputError, match=r"steps = 99, rank = 99 for 43 parameters"):
        arnoldi.arnoldi(operator, problems.params(), key=jax.random.key(0), steps=99)
    flat = arnoldi.Subspace(problems.vectors(2)[1], jnp.array([1.0, 0.0]), jnp.zeros(2))
    with pytest.raises(DivergedError, match=r"(?s)an eigenvalue of 0 with damping 0.*rank"):
        arnoldi.inverse(flat)
    with pytest.raises(DivergedError, match=r"(?s)an eigenvalue of -1 with damping 0\.1.*positive eigenvalues"):
        arnoldi.projector(flat._replace(eigenvalues=jnp.array([1.0, -1.0])), damping=0.1)


def test_the_mean_eigenvalue_is_the_trace_over_the_dimension(ggn):
    matrix, operator = ggn
    found = products.mean_eigenvalue(operator, problems.params(), key=jax.random.key(0), samples=400)
    assert found == pytest.approx(np.trace(matrix) / len(matrix), rel=0.1)


def test_the_diagonal_is_the_fishers_own():
    gradients = problems.gradients(problems.loss, problems.data())
    found = diagonal.fisher(problems.loss, problems.params(), problems.source(), chunk=8, progress=False)
    np.testing.assert_allclose(tree.ravel(found)[0], (gradients**2).mean(0), rtol=1e-10)
    rows, vectors = problems.vectors(2)
    solved = diagonal.inverse(found, damping=0.3)(vectors)
    np.testing.assert_allclose(problems.rows(solved), rows / ((gradients**2).mean(0) + 0.3), rtol=1e-10)
    relative = diagonal.inverse(found)(vectors)["last"]["bias"]
    d = np.asarray(found["last"]["bias"])
    np.testing.assert_allclose(relative, np.asarray(vectors["last"]["bias"]) / (d + 0.1 * d.mean()), rtol=1e-10)
    with pytest.raises(InvalidInputError, match=r"a curvature of 0 at 'first/bias'"):
        diagonal.inverse(tree.zeros_like(found), damping=0)


def test_datainf_is_the_mean_of_inverses_layer_by_layer():
    gradients = problems.gradients(problems.loss, problems.data())
    rows, vectors = problems.vectors(2)
    cut = problems.INPUTS * problems.HIDDEN + problems.HIDDEN
    wanted = np.zeros_like(rows)
    for part in (slice(0, cut), slice(cut, None)):
        g = gradients[:, part]
        ridge = 0.1 * (g**2).mean()
        inverses = [np.linalg.inv(np.outer(each, each) + ridge * np.eye(len(each))) for each in g]
        wanted[:, part] = rows[:, part] @ np.mean(inverses, axis=0)
    for settings in ({"chunk": 8}, {"chunk": 16, "mesh": meshes.data_mesh()}):
        found = datainf.precondition(problems.loss, problems.params(), problems.source(), vectors, **settings)
        np.testing.assert_allclose(problems.rows(found), wanted, rtol=1e-8)
    scale = lambda params, example: params["scale"] * example[0][0]  # noqa: E731
    slopes = problems.data()[0][:, 0]
    alone = datainf.precondition(scale, {"scale": 2.0}, problems.source(), {"scale": np.ones(1)}, damping=0.5)
    np.testing.assert_allclose(alone["scale"], [np.mean(1 / (slopes**2 + 0.5))], rtol=1e-8)
    with pytest.raises(InvalidInputError, match=r"a damping of 0 in the layer 'first'"):
        datainf.precondition(problems.loss, problems.params(), problems.source(), vectors, damping=0)


def test_parameters_in_half_precision_have_sums_in_single():
    """Hundreds of small increments, at which a sum in half precision would stop; the gradients are its own."""
    half, rng = jnp.bfloat16, np.random.default_rng(4)
    params = {"kernel": jnp.asarray(rng.normal(size=3), half)}
    x = np.asarray(jnp.asarray(rng.uniform(1, 2, (2000, 3)), half))
    source, settings = InMemory(x), {"chunk": 4}
    rows = x.astype(np.float64)

    def loss(params, x):
        return jnp.vdot(params["kernel"], x)

    found = diagonal.fisher(loss, params, source, progress=False, **settings)
    np.testing.assert_allclose(found["kernel"], np.square(rows).mean(0), rtol=1e-4)
    vectors = {"kernel": jnp.asarray(rng.normal(size=(2, 3)), half)}
    v = np.asarray(vectors["kernel"], np.float64)
    solved = {
        "diagonal": (diagonal.inverse(found, damping=0.5)(vectors), v / (np.square(rows).mean(0) + 0.5)),
        "fisher": (products.streamed(products.fisher(loss, params), source, **settings)(vectors),
                   v @ rows.T @ rows / len(rows)),
        "datainf": (datainf.precondition(loss, params, source, vectors, damping=0.5, **settings),
                    v @ np.mean([np.linalg.inv(np.outer(g, g) + 0.5 * np.eye(3)) for g in rows], axis=0)),
    }  # fmt: skip
    for name, (one, wanted) in solved.items():
        assert one["kernel"].dtype == half, name
        np.testing.assert_allclose(one["kernel"].astype(np.float64), wanted, rtol=0.02, atol=0.02, err_msg=name)


def test_curvatures_that_are_not_finite_are_refused():
    inputs, labels = problems.data()
    inputs[3, 0] = np.nan
    broken, params, (_, vectors) = InMemory((inputs, labels)), problems.params(), problems.vectors(2)
    operator = products.streamed(products.hessian(problems.loss, params), broken)
    for call in (
        lambda: diagonal.fisher(problems.loss, params, broken, progress=False),
        lambda: datainf.precondition(problems.loss, params, broken, vectors),
        lambda: datainf.precondition(problems.loss, params, broken, vectors, damping=0.1),
        lambda: products.mean_eigenvalue(operator, params, key=jax.random.key(0), samples=2),
    ):
        with pytest.raises(DivergedError, match=r"not finite at 'first|a mean eigenvalue of nan"):
            call()
    whole = diagonal.fisher(problems.loss, params, problems.source(), progress=False)
    space = arnoldi.Subspace(vectors, jnp.array([1.0, 2.0]), jnp.zeros(2))
    for refused in (
        lambda: diagonal.inverse(whole, damping=np.inf),
        lambda: datainf.precondition(problems.loss, params, problems.source(), vectors, damping=np.inf),
        lambda: arnoldi.inverse(space, damping=np.inf),
    ):
        with pytest.raises(InvalidInputError, match=r"a curvature of inf|a damping of inf|damping = inf"):
            refused()
    with pytest.raises(InvalidInputError, match="distribution = 'gaussian'"):
        products.random_vectors(jax.random.key(0), params, 2, distribution="gaussian")


def test_too_many_parameters_for_a_matrix_are_refused():
    with pytest.raises(InvalidInputError, match=r"(?s)20001 parameters.*ekfac"):
        explicit.matrix(lambda v: v, jnp.zeros(20_001))


def _operators():
    params, size = problems.params(), tree.size(problems.params())
    basis = jax.vmap(tree.ravel(params)[1])(jnp.eye(size))
    space = arnoldi.Subspace(basis, jnp.ones(size), jnp.zeros(size))
    return {
        "explicit": explicit.inverse(jnp.eye(size), damping=1),
        "arnoldi": arnoldi.inverse(space, damping=1),
        "diagonal": diagonal.inverse(jax.tree.map(jnp.ones_like, params), damping=1),
        "datainf": functools.partial(datainf.precondition, problems.loss, params, problems.source(), damping=1),
        "products": products.streamed(products.hessian(problems.loss, params), problems.source()),
        "conjugate gradients": functools.partial(
            krylov.conjugate_gradient, products.streamed(product("ggn"), problems.source()), damping=1
        ),
        "lissa": functools.partial(
            krylov.lissa, products.sampled(product("ggn"), problems.source()), key=jax.random.key(0), damping=1
        ),
    }


BLIND = ("explicit", "conjugate gradients", "lissa")
"""What is given no parameters."""


@pytest.mark.parametrize(
    "name", ["explicit", "arnoldi", "diagonal", "datainf", "products", "conjugate gradients", "lissa"]
)
def test_vectors_of_another_tree_or_of_no_rows_are_refused_by_name(name):
    operator, params = _operators()[name], problems.params()
    vectors = problems.vectors(2)[1]
    with pytest.raises(InvalidInputError) as error:
        operator(params)
    known = "vectors with the shape [5] at 'first/bias', where the parameters have 1 dimensions"
    assert str(error.value).startswith("4 vectors at 'first/kernel', 5 at 'first/bias'" if name in BLIND else known)
    assert "of one vector, `leaf[None]` of its leaves" in str(error.value)
    fewer = {"first": vectors["first"], "last": {"bias": vectors["last"]["bias"]}}
    with pytest.raises(InvalidInputError, match=r"'last/kernel'|vectors of 28 numbers .*3 at 'last/bias'"):
        operator(fewer)
    wrong = vectors | {"last": {"bias": vectors["last"]["bias"][:, :2], "kernel": vectors["last"]["kernel"]}}
    with pytest.raises(InvalidInputError, match=r"\[\d, 2\] at 'last/bias'.*the shape \[3\]|of 42 numbers .*2 at"):
        operator(wrong)
    more = vectors | {"extra": jnp.ones((2, 3))}
    with pytest.raises(InvalidInputError, match=r"\[\d, 3\] at 'extra'.*have nothing|of 46 numbers .*3 at 'extra'"):
        operator(more)
    uneven = vectors | {"last": {"bias": vectors["last"]["bias"][:1], "kernel": vectors["last"]["kernel"]}}
    with pytest.raises(InvalidInputError, match="1 vectors at 'last/bias', 2 at 'first/bias'"):
        operator(uneven)
