from decimal import Decimal, getcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.models import outputs

LOGITS = {
    "ordinary": [0.3, -1.2, 2.5, 0.0],
    "all equal": [7.0, 7.0, 7.0, 7.0],
    "sure and right": [1e4, -1e4, 0.0, 5.0],
    "sure and wrong": [-1e4, 1e4, 1e4, 3.0],
    "memorised": [30.0, 1.0, -2.0, 0.5],
    "far from zero": [9000.0, 9001.0, 8999.5, 8990.0],
    "two classes": [1.5, -0.25],
}


def exact(values):
    """Return margin and cross-entropy of label 0, and the softmax over the others, in 60 digits."""
    getcontext().prec = 60
    z = [Decimal(float(v)) for v in np.array(values, np.float32)]
    top = max(z[1:])
    weights = [(v - top).exp() for v in z[1:]]
    margin = z[0] - top - sum(weights).ln()
    loss = (1 + (-margin).exp()).ln() if margin > -2000 else -margin
    return float(margin), float(loss), np.array([float(w / sum(weights)) for w in weights])


@pytest.mark.parametrize("values", LOGITS.values(), ids=LOGITS.keys())
def test_margin_loss_and_probability_agree_with_sixty_digits(values):
    logits, label = jnp.array(values, jnp.float32), jnp.int32(0)
    margin, loss, _ = exact(values)
    np.testing.assert_allclose(outputs.margin(logits, label), margin, rtol=1e-6)
    # In float32 log(softmax) would give 0 for the loss of the memorised example, which is 3e-13.
    np.testing.assert_allclose(outputs.cross_entropy(logits, label), loss, rtol=3e-6, atol=1e-38)
    np.testing.assert_allclose(outputs.correct_probability(logits, label), np.exp(-loss), rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("values", LOGITS.values(), ids=LOGITS.keys())
def test_gradients_agree_with_their_closed_forms(values):
    logits, label = jnp.array(values, jnp.float32), jnp.int32(0)
    margin, loss, others = exact(values)
    expected = np.concatenate([[1.0], -others])
    np.testing.assert_allclose(jax.grad(outputs.margin)(logits, label), expected, rtol=1e-5, atol=1e-38)
    wrong = np.exp(-margin - loss)  # 1 − p_y = exp(−margin) p_y
    got = jax.grad(outputs.cross_entropy)(logits, label)
    np.testing.assert_allclose(got, -wrong * expected, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("masked", [(), (2,), (1, 3), (1, 2, 3)])
def test_masked_classes_have_no_part_in_margins_losses_and_their_derivatives(masked):
    values = np.array([0.5, -1.0, 2.0, 0.25], np.float32)
    kept = np.delete(np.arange(4), masked)
    logits = jnp.asarray(np.where(np.isin(np.arange(4), kept), values, -np.inf), jnp.float32)
    batch, labels = jnp.stack([logits, jnp.asarray(values)]), jnp.zeros(2, jnp.int32)
    for output in (outputs.margin, outputs.cross_entropy):
        slope, curvature = np.zeros(4), np.zeros((4, 4))
        if len(kept) > 1:
            slope[kept] = jax.grad(output)(jnp.asarray(values[kept]), jnp.int32(0))
            curvature[np.ix_(kept, kept)] = jax.hessian(output)(jnp.asarray(values[kept]), jnp.int32(0))
            value = output(jnp.asarray(values[kept]), jnp.int32(0))
        else:
            slope[0], value = (1, np.inf) if output is outputs.margin else (0, 0)
        np.testing.assert_allclose(output(logits, jnp.int32(0)), value, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(output)(logits, jnp.int32(0)), slope, rtol=1e-6)
        slopes = jax.jit(jax.vmap(jax.grad(output)))(batch, labels)
        np.testing.assert_allclose(slopes[0], slope, rtol=1e-6)
        np.testing.assert_allclose(slopes[1], jax.grad(output)(batch[1], jnp.int32(0)), rtol=1e-6)
        for derivative in (jax.hessian, lambda f: jax.jacrev(jax.grad(f)), lambda f: jax.jacrev(jax.jacfwd(f))):
            got = jax.jit(jax.vmap(derivative(output)))(batch, labels)[0]
            np.testing.assert_allclose(got, curvature, rtol=1e-6, atol=1e-7)


def test_every_label_and_double_precision(x64):
    logits = jnp.array(np.random.default_rng(0).normal(size=6) * 5)
    for label in range(6):
        others = np.delete(np.asarray(logits), label)
        expected = logits[label] - np.log(np.exp(others).sum())
        got = outputs.margin(logits, jnp.int32(label))
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-13)
        p = np.exp(logits[label]) / np.exp(logits).sum()
        np.testing.assert_allclose(outputs.cross_entropy(logits, jnp.int64(label)), -np.log(p), rtol=1e-12)


@pytest.mark.parametrize(("dtype", "label"), [(np.uint8, 3), (np.int8, 100), (np.uint16, 299), (np.bool_, 1)])
@pytest.mark.usefixtures("shapes_unchecked")
def test_labels_of_a_byte_are_told_from_those_a_turn_away(dtype, label):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=300).astype(np.float32))
    expected = logits[label] - np.log(np.exp(np.delete(np.asarray(logits), label)).sum())
    np.testing.assert_allclose(outputs.margin(logits, jnp.asarray(dtype(label))), expected, rtol=1e-5)
    sure = jnp.where(jnp.arange(300) == 299, 1e4, logits)
    assert int(outputs.draw_label(jax.random.key(0), sure, (0.0, dtype(label)))[1]) == 299


def test_one_logit_is_refused():
    with pytest.raises(InvalidInputError, match=r"1 logits\n  expected: at least two classes\n.*two logits, \(0, z\)"):
        outputs.margin(jnp.ones(1), jnp.int32(0))


@pytest.mark.parametrize("value", [-1e-6, -1e-3, -0.5, -0.69, -0.70, -3.0, -50.0, -1000.0])
def test_log_odds_and_their_gradient_agree_with_sixty_digits(value):
    getcontext().prec = 60
    exact_value = Decimal(float(np.float32(value)))
    p = exact_value.exp()
    got, slope = jax.value_and_grad(outputs.log_odds)(jnp.float32(value))
    np.testing.assert_allclose(got, float(exact_value - (1 - p).ln()), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(slope, float(1 / (1 - p)), rtol=2e-6)


def test_log_odds_are_elementwise_and_never_nan():
    grid = jnp.array([[0.0, -jnp.inf], [-0.1, -2.0]])
    odds = outputs.log_odds(grid)
    assert odds[0, 0] == jnp.inf
    assert odds[0, 1] == -jnp.inf
    assert not jnp.isnan(jax.grad(outputs.log_odds)(jnp.float32(0.0)))
    np.testing.assert_allclose(odds[1], np.log(np.exp(grid[1]) / (1 - np.exp(grid[1]))), rtol=1e-6)


def affine(params, state, x, /, *, train=False):
    return x @ params + state["shift"][None], {"shift": state["shift"] + float(train)}


X, Y = jnp.array([1.0, 2.0]), jnp.int32(2)
PARAMS, SHIFT = jnp.array([[1.0, -1.0, 0.5], [0.0, 1.0, 2.0]]), jnp.array([0.0, 0.5, -0.5])


@pytest.mark.parametrize(
    ("output", "scalar"), [(outputs.Margin, outputs.margin), (outputs.Loss, outputs.cross_entropy)]
)
def test_output_functions_take_one_example_and_differentiate(output, scalar):
    function = output(affine, {"shift": SHIFT})
    expected = scalar(PARAMS.T @ X + SHIFT, Y)
    np.testing.assert_allclose(function(PARAMS, (X, Y)), expected, rtol=1e-6)
    slope = jax.grad(scalar)(PARAMS.T @ X + SHIFT, Y)
    np.testing.assert_allclose(jax.grad(function)(PARAMS, (X, Y)), np.outer(X, slope), rtol=1e-5)


def test_new_statistics_do_not_compile_again_and_a_stack_of_them_vmaps():
    traced = []

    def apply(params, state, x, /, *, train=False):
        traced.append(train)
        return affine(params, state, x, train=train)

    shifts = jnp.stack([SHIFT, 2 * SHIFT, -SHIFT])
    call = jax.jit(lambda function: function(PARAMS, (X, Y)))
    single = [call(outputs.Margin(apply, {"shift": shift})) for shift in shifts]
    assert traced == [False]
    together = jax.vmap(lambda function: function(PARAMS, (X, Y)))(outputs.Margin(apply, {"shift": shifts}))
    np.testing.assert_allclose(together, single, rtol=1e-6)
    assert len({float(value) for value in single}) == 3


def test_inputs_may_be_a_pytree():
    def apply(params, state, x, /, *, train=False):
        return params * x["left"] + x["right"], state

    x = {"left": jnp.array([1.0, 2.0]), "right": jnp.array([0.5, 0.0])}
    value = outputs.Margin(apply, ())(jnp.float32(3.0), (x, jnp.int32(1)))
    np.testing.assert_allclose(value, 6.0 - 3.5, rtol=1e-6)


SEQUENCE = jnp.array(np.random.default_rng(3).normal(size=(4, 2)), jnp.float32)
LABELS = jnp.array([2, 0, -1, 1], jnp.int32)


def test_losses_of_a_sequence_are_those_of_its_labels_without_padding():
    logits = SEQUENCE @ PARAMS + SHIFT[None]
    exact_logits = np.asarray(logits, np.float64)
    expected = np.log(np.exp(exact_logits).sum(axis=1)) - exact_logits[np.arange(4), LABELS]
    expected[2] = 0
    np.testing.assert_allclose(outputs.token_losses(logits, LABELS), expected, rtol=1e-5)
    np.testing.assert_allclose(outputs.mean_loss(logits, LABELS), expected.sum() / 3, rtol=1e-5)
    assert outputs.mean_loss(logits, jnp.full(4, -1, jnp.int32)) == 0
    one = outputs.mean_loss(logits[0], jnp.int32(2)), outputs.cross_entropy(logits[0], jnp.int32(2))
    np.testing.assert_array_equal(*one)


def test_output_functions_take_one_sequence():
    def apply(params, state, x, /, *, train=False):
        return x @ params + state["shift"][None, None], state

    own = {"shift": SHIFT}
    expected = outputs.token_losses(SEQUENCE @ PARAMS + SHIFT[None], LABELS)
    loss = outputs.Loss(apply, own)(PARAMS, (SEQUENCE, LABELS))
    np.testing.assert_allclose(loss, expected.sum() / 3, rtol=1e-6)
    np.testing.assert_allclose(outputs.LogLikelihood(apply, own)(PARAMS, (SEQUENCE, LABELS)), -loss, rtol=1e-6)
    places = jnp.arange(4)
    each = jax.vmap(lambda place: outputs.TokenLoss(apply, own)(PARAMS, (SEQUENCE, LABELS, place)))(places)
    np.testing.assert_allclose(each, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rare_labels_are_drawn_as_often_as_they_should_be(dtype):
    """In half precision's own noise one of odds e⁻⁷ is drawn half as often."""
    draws, logits = 200_000, jnp.asarray([0, -7], dtype)
    keys = jax.random.split(jax.random.key(0), draws)
    _, labels = jax.vmap(lambda key: outputs.draw_label(key, logits, (0.0, 0)))(keys)
    expected = draws / (1 + np.exp(7))
    assert abs(int(labels.sum()) - expected) < 4 * np.sqrt(expected)
    _, padding = outputs.draw_label(keys[0], logits[None], (0.0, jnp.asarray([-1])))
    assert padding.tolist() == [-1]
