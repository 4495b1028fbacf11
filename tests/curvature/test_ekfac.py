"""K-FAC and EK-FAC where theory makes them exact, beside the damped Fisher inverse, and in layers of every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core import mesh as meshes
from jattrib.core import stream, tree
from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.core.stream import InMemory
from jattrib.curvature import ekfac
from jattrib.grads import taps
from jattrib.grads.per_example import per_example
from jattrib.models.outputs import draw_label
from tests.curvature import problems

pytestmark = pytest.mark.usefixtures("x64")


def linear(params, example):
    """A loss whose output gradient is part of the example."""
    x, slope = example
    return jnp.vdot(x @ params["kernel"] + params["bias"], slope)


def linear_problem(inputs, slopes):
    params = {"kernel": jnp.zeros((inputs.shape[1], slopes.shape[1])), "bias": jnp.zeros(slopes.shape[1])}
    rows = np.concatenate([slopes[:, None, :], inputs[:, :, None] * slopes[:, None, :]], axis=1)  # the bias comes first
    return params, rows.reshape(len(inputs), -1)


def flat(vectors):
    return np.asarray(jax.vmap(lambda each: tree.ravel(each)[0])(vectors))


@pytest.mark.parametrize("corrected", [True, False])
def test_one_layer_of_independent_factors_has_the_explicit_inverse(corrected):
    """Every input meets every output gradient: the Fisher matrix is a Kronecker product."""
    rng = np.random.default_rng(0)
    x, s = rng.normal(size=(6, 3)), rng.normal(size=(5, 2))
    inputs, slopes = np.repeat(x, 5, axis=0), np.tile(s, (6, 1))
    params, gradients = linear_problem(inputs, slopes)
    loss = ekfac.empirical_fisher(linear)
    factors = ekfac.fit(loss, params, InMemory((inputs, slopes)), corrected=corrected, chunk=16, progress=False)
    vectors = jax.vmap(tree.ravel(params)[1])(jnp.asarray(rng.normal(size=(3, 8))))
    fisher = gradients.T @ gradients / len(gradients)
    ridge = 0.1 * np.trace(fisher) / len(fisher)
    found = flat(ekfac.inverse(factors)(vectors))
    np.testing.assert_allclose(found, np.linalg.solve(fisher + ridge * np.eye(8), flat(vectors).T).T, rtol=1e-8)
    found = flat(ekfac.inverse(factors, damping=0.3)(vectors))
    np.testing.assert_allclose(found, np.linalg.solve(fisher + 0.3 * np.eye(8), flat(vectors).T).T, rtol=1e-8)


def test_the_passes_of_abstract_parameters_compile():
    """What a plan for hardware that is not there asks for: nothing but shapes."""
    shape = jax.ShapeDtypeStruct
    params = {"kernel": shape((3, 2), jnp.float64), "bias": shape((2,), jnp.float64)}
    loss = ekfac.empirical_fisher(linear)
    layers = taps.find(loss, params, ((shape((3,), jnp.float64), shape((2,), jnp.float64)), shape((), jnp.int32)))
    rows = (shape((4, 3), jnp.float64), shape((4, 2), jnp.float64)), shape((4,), jnp.int32)
    moments = ekfac.moments(layers, loss, params, rows, shape((4,), bool))
    sides = jax.eval_shape(moments.init)
    assert [[side.shape for side in both] for both in sides.values()] == [[(1, 4, 4), (1, 2, 2)]]  # a bias, too
    rotations = {name: tuple(shape(side.shape, side.dtype) for side in both) for name, both in sides.items()}
    squares = ekfac.squares(layers, rotations, loss, params, rows, shape((4,), bool))
    for statistic in (moments, squares):
        assert stream.lower_fold(statistic, rows, chunk=4).compile().memory_analysis() is not None


def test_sides_that_are_too_wide_keep_their_own_basis(monkeypatch):
    monkeypatch.setattr(ekfac, "WIDEST", 4)
    rng = np.random.default_rng(8)
    inputs, slopes = rng.normal(size=(19, 6)), rng.normal(size=(19, 3))  # of no other test, which would be compiled
    params, gradients = linear_problem(inputs, slopes)
    factors = ekfac.fit(ekfac.empirical_fisher(linear), params, InMemory((inputs, slopes)), chunk=8, progress=False)
    wide, narrow = factors.bases.inputs["kernel"], factors.bases.outputs["kernel"]
    assert wide.vectors is None
    np.testing.assert_allclose(wide.values[0], [*np.square(inputs).mean(0), 1], rtol=1e-12)
    right = np.asarray(narrow.vectors[0])
    rows = np.concatenate([inputs, np.ones((19, 1))], axis=1)[:, :, None] * slopes[:, None, :]
    values = np.square(rows @ right).mean(0)
    np.testing.assert_allclose(factors.eigenvalues["kernel"][0], values, rtol=1e-9)
    vectors = jax.vmap(tree.ravel(params)[1])(jnp.asarray(gradients[:2]))
    solved, _ = taps.matrices(factors.layers, ekfac.inverse(factors, damping=0.2)(vectors))
    np.testing.assert_allclose(solved["kernel"][:, 0], (rows[:2] @ right) / (values + 0.2) @ right.T, rtol=1e-9)


def true_loss():
    return ekfac.true_fisher(problems.logits, problems.label_loss, draw_label, key=jax.random.key(0))


@pytest.mark.slow
def test_the_mlp_at_its_start_has_the_damped_inverse_of_its_layers_fisher_matrices(monkeypatch):
    """In random directions; EK-FAC knows nothing of how layers depend on each other, so that is left out of both."""
    params = jax.tree.map(lambda leaf: leaf / 1.4 if leaf.ndim == 2 else 0 * leaf, problems.params())
    monkeypatch.setattr(problems, "params", lambda: params)
    batch = problems.data(2000, seed=5)
    matrix = problems.ggn_matrix(batch)
    first = np.arange(len(matrix)) < problems.INPUTS * problems.HIDDEN + problems.HIDDEN
    matrix = matrix * (first[:, None] == first[None])
    factors = ekfac.fit(true_loss(), params, InMemory(batch), chunk=2000, progress=False)
    rows, vectors = problems.vectors(30)
    ridge = 0.1 * np.trace(matrix) / len(matrix)
    exact = np.linalg.solve(matrix + ridge * np.eye(len(matrix)), rows.T).T
    found = problems.rows(ekfac.inverse(factors, damping=ridge)(vectors))

    def cosines(other):
        return (exact * other).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(other, axis=1)

    assert np.median(cosines(found)) > 0.99
    assert np.median(cosines(rows)) < 0.9  # the identity is not close


def test_labels_are_drawn_so_that_the_second_moment_is_the_gauss_newton_matrix():
    params, example = problems.params(), jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), problems.data(1))
    draws = 2000
    numbered = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (draws, *leaf.shape)), example)
    rows = flat(per_example(true_loss(), params, (numbered, jnp.arange(draws))))
    products = rows[:, :, None] * rows[:, None, :]
    exact = problems.ggn_matrix(jax.tree.map(lambda leaf: leaf[None], example))
    assert (np.abs(products.mean(0) - exact) < 5 * products.std(0) / np.sqrt(draws) + 1e-12).all()


def test_neither_chunks_nor_devices_matter():
    settings = ({"chunk": 10}, {"chunk": 16, "mesh": meshes.data_mesh()})
    found = [ekfac.fit(true_loss(), problems.params(), problems.source(), progress=False, **each) for each in settings]
    _, vectors = problems.vectors(2)
    one, other = [problems.rows(ekfac.inverse(each)(vectors)) for each in found]
    np.testing.assert_allclose(other, one, rtol=1e-9)
    for name, values in found[0].eigenvalues.items():
        np.testing.assert_allclose(found[1].eigenvalues[name], values, rtol=1e-9, atol=1e-15)


WORDS, WIDTH, OUT = 7, 4, 3


def sequence_logits(params, tokens):
    """A look-up, a scale, a square matrix used twice, a plain leaf, a wide output: one layer of every form."""
    rows = params["embedding"][tokens] * params["scale"][None]
    rows = jnp.tanh(rows @ params["twice"])
    rows = jnp.tanh(rows @ params["twice"]) * jnp.exp(params["temper"])[None]
    return rows @ params["last"]["kernel"] + params["last"]["bias"][None]


def sequence_loss(params, example):
    tokens, slopes = example
    return jnp.sum(jax.nn.log_softmax(sequence_logits(params, tokens)) * slopes)


def test_every_form_of_layer_has_the_squares_of_its_plain_gradients():
    """Eigenvectors and Λ from plain per-example gradients and NumPy; positions are summed before squares are taken."""
    rng = np.random.default_rng(3)
    params = {
        "embedding": rng.normal(size=(WORDS, WIDTH)), "scale": 1 + 0.1 * rng.normal(size=WIDTH),
        "twice": rng.normal(size=(WIDTH, WIDTH)), "temper": 0.1 * rng.normal(size=WIDTH),
        "last": {"kernel": rng.normal(size=(WIDTH, OUT)), "bias": rng.normal(size=OUT)},
    }  # fmt: skip
    params = jax.tree.map(jnp.asarray, params)
    batch = rng.integers(0, WORDS, (11, 5)), rng.normal(size=(11, 5, OUT))
    loss, source = ekfac.empirical_fisher(sequence_loss), InMemory(batch)
    factors = ekfac.fit(loss, params, source, chunk=4, progress=False)
    gradients = per_example(sequence_loss, params, jax.tree.map(jnp.asarray, batch))
    matrices, plain = taps.matrices(factors.layers, gradients)
    assert {"embedding", "twice", "last/kernel"} <= set(matrices)
    for name, each in matrices.items():
        left, right = factors.bases.inputs[name].vectors, factors.bases.outputs[name].vectors
        left = np.eye(each.shape[2])[None] if left is None else np.asarray(left)
        np.testing.assert_allclose(left[0].T @ left[0], np.eye(each.shape[2]), atol=1e-12)
        squares = np.einsum("lij,blio,lok->bljk", left, each, np.asarray(right)) ** 2
        np.testing.assert_allclose(factors.eigenvalues[name], squares.mean(0), rtol=1e-9, atol=1e-14)
    for name, each in plain.items():
        np.testing.assert_allclose(factors.plain[name], (np.asarray(each) ** 2).mean(0), rtol=1e-9)
    counts = np.bincount(batch[0].ravel(), minlength=WORDS) / batch[0].size
    np.testing.assert_allclose(factors.bases.inputs["embedding"].values[0], counts, rtol=1e-12)
    hidden = np.asarray(
        jnp.tanh((params["embedding"][batch[0]] * np.asarray(params["scale"])[None, None]) @ params["twice"])
    )
    rows = np.asarray(jnp.tanh(hidden @ params["twice"]) * np.exp(params["temper"])[None, None]).reshape(-1, WIDTH)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    values = factors.bases.inputs["last/kernel"].values[0]
    np.testing.assert_allclose(values, np.linalg.eigvalsh(rows.T @ rows / len(rows)), rtol=1e-9, atol=1e-12)
    solved = ekfac.inverse(factors, damping=0.2)(gradients)
    back, _ = taps.matrices(factors.layers, solved)
    right = np.asarray(factors.bases.outputs["last/kernel"].vectors[0])
    left = np.asarray(factors.bases.inputs["last/kernel"].vectors[0])
    inner = (left.T @ np.asarray(matrices["last/kernel"])[:, 0] @ right) / (
        np.asarray(factors.eigenvalues["last/kernel"])[0] + 0.2
    )
    np.testing.assert_allclose(back["last/kernel"][:, 0], left @ inner @ right.T, rtol=1e-9)


def test_a_square_table_of_which_rows_and_columns_are_looked_up_has_the_given_basis():
    params = jnp.asarray(np.random.default_rng(2).normal(size=(5, 5)))
    tokens = np.random.default_rng(3).integers(0, 5, (9, 4)).astype(np.int32)

    def output(table, tokens):
        slopes = jnp.arange(1.0, 21.0)
        return jnp.vdot(jnp.sin(table[tokens]).ravel(), slopes) + jnp.vdot(jnp.cos(table[:, tokens]).ravel(), slopes)

    factors = ekfac.fit(ekfac.empirical_fisher(output), params, InMemory(tokens), chunk=4, progress=False)
    gradients = np.asarray(jax.vmap(jax.grad(output), in_axes=(None, 0))(params, tokens))
    solved = ekfac.inverse(factors, damping=0.5)(jnp.asarray(gradients))
    np.testing.assert_allclose(solved, gradients / (np.square(gradients).mean(0) + 0.5), rtol=1e-9)


@pytest.mark.parametrize("positions", [1, 5, 40])
def test_factors_in_half_precision_are_summed_in_single(positions):
    """Their own products are exact in single precision; sums in half would stop at some hundreds of examples."""
    rng = np.random.default_rng(6)
    half = jnp.bfloat16

    def loss(params, example):
        x, slopes = example
        return jnp.sum((x.astype(half) @ params["kernel"].astype(half)).astype(jnp.float32) * slopes)

    params = {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    batch = tuple(rng.normal(1, 1, (800, positions, size)).astype(np.float32) for size in (4, 3))
    factors = ekfac.fit(ekfac.empirical_fisher(loss), params, InMemory(batch), chunk=8, progress=False)
    a, s = (np.asarray(jnp.asarray(each, half), np.float64) for each in batch)
    sides = factors.bases.inputs["kernel"], factors.bases.outputs["kernel"]
    for rows, basis in zip((a, s), sides, strict=True):
        assert basis.vectors.dtype == jnp.float32
        rows = rows.reshape(-1, rows.shape[-1])
        values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
        np.testing.assert_allclose(basis.values[0], values, rtol=1e-5)
        np.testing.assert_allclose(np.abs(vectors.T @ np.asarray(basis.vectors[0])), np.eye(len(values)), atol=1e-4)
    left, right = (np.asarray(basis.vectors[0], np.float64) for basis in sides)
    gradients = left.T @ np.einsum("bpi,bpo->bio", a, s) @ right
    np.testing.assert_allclose(factors.eigenvalues["kernel"][0], np.square(gradients).mean(0), rtol=1e-5)


def test_bad_input_is_refused():
    nothing = ekfac.empirical_fisher(lambda params, example: jnp.sum(params**2) * example[0][0])
    with pytest.raises(InvalidInputError, match="no parameter is used linearly"):
        ekfac.fit(nothing, jnp.ones((2, 2)), problems.source(), progress=False)
    vector = ekfac.empirical_fisher(lambda params, example: problems.logits(params, example))
    with pytest.raises(InvalidInputError, match="one floating-point number"):
        ekfac.fit(vector, problems.params(), problems.source(), progress=False)
    inputs, labels = problems.data()
    inputs[3] = np.nan
    with pytest.raises(DivergedError, match=r"second moments of the layer 'first/kernel' that are not finite"):
        ekfac.fit(ekfac.empirical_fisher(problems.loss), problems.params(), InMemory((inputs, labels)), progress=False)
    with pytest.raises(InvalidInputError, match="a source of 0 examples"):
        ekfac.fit(ekfac.empirical_fisher(problems.loss), problems.params(), problems.source(0), progress=False)
    flat_loss = ekfac.empirical_fisher(lambda params, example: 0 * problems.loss(params, example))
    factors = ekfac.fit(flat_loss, problems.params(), problems.source(), progress=False)
    with pytest.raises(InvalidInputError, match=r"an eigenvalue of 0 in the layer 'first/kernel'"):
        ekfac.inverse(factors)
    with pytest.raises(InvalidInputError, match="an eigenvalue of inf in the layer"):
        ekfac.inverse(factors, damping=np.inf)
    operator, vectors = ekfac.inverse(factors, damping=1), problems.vectors(2)[1]
    with pytest.raises(InvalidInputError, match=r"vectors with the shape \[4, 5\] at 'first/kernel'.*have 2 dim"):
        operator(problems.params())
    with pytest.raises(InvalidInputError, match="vectors with nothing at 'last/kernel'"):
        operator({"first": vectors["first"]})
