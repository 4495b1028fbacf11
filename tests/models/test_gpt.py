import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.models import gpt, outputs
from jattrib.train import loop

SHAPE = {"vocabulary": 11, "context": 7, "width": 8, "layers": 3, "heads": 4}
STRETCHED = gpt.RotaryScaling(factor=8.0, low=1.0, high=4.0, original=16)
CONFIGS = {
    "gpt2": gpt.Config("gpt2", **SHAPE),
    "gpt2, its own head, grouped": gpt.Config("gpt2", **SHAPE, tied=False, kv_heads=2, hidden=5),
    "llama": gpt.Config("llama", **SHAPE, tied=False, kv_heads=2, hidden=12, epsilon=1e-3, theta=50.0),
    "llama, tied, wide heads, stretched": gpt.Config(
        "llama", **SHAPE, kv_heads=1, head_width=6, theta=40.0, scaling=STRETCHED
    ),
}
TOKENS = np.random.default_rng(0).integers(0, SHAPE["vocabulary"], (2, 7)).astype(np.int32)


def drawn(config, dtype=np.float64):
    """Return parameters that are all of order one, so that every one of them matters."""
    rng = np.random.default_rng(1)
    like, state = jax.eval_shape(gpt.decoder(config).init, jax.random.key(0))
    assert state == {}
    return jax.tree.map(lambda leaf: (0.6 * rng.normal(size=leaf.shape) + 0.1).astype(dtype), like)


def stretched(wavelength, scaling):
    """Llama 3's rule for one wavelength, by cases."""
    factor, low, high, original = scaling
    if wavelength < original / high:
        return wavelength
    if wavelength > original / low:
        return wavelength * factor
    share = (original / wavelength - low) / (high - low)
    return 1 / ((1 - share) / (factor * wavelength) + share / wavelength)


def rotated(vector, place, config):
    """Turn each pair (i, i + half) of one head as a complex number."""
    half = len(vector) // 2
    out = vector[:half] + 1j * vector[half:]
    for i in range(half):
        wavelength = 2 * np.pi * config.theta ** (2 * i / (2 * half))
        wavelength = wavelength if config.scaling is None else stretched(wavelength, config.scaling)
        out[i] *= np.exp(2j * np.pi * place / wavelength)
    return np.concatenate([out.real, out.imag])


def oracle(config, params, tokens):
    """The logits of one sequence: one head, one place, one layer after another."""

    def norm(x, p):
        x = x - x.mean() if "bias" in p else x
        return x / np.sqrt((x**2).mean() + config.epsilon) * p["scale"] + p.get("bias", 0)

    def affine(x, p):
        return x @ p["kernel"] + p.get("bias", 0)

    def attention(xs, p):
        q, k, v = ([affine(x, p[name]).reshape(-1, config.head) for x in xs] for name in ("query", "key", "value"))
        if config.style == "llama":
            q, k = ([np.stack([rotated(h, t, config) for h in at]) for t, at in enumerate(each)] for each in (q, k))
        out = []
        for t in range(len(xs)):
            heads = []
            for h in range(config.heads):
                g = h // (config.heads // config.groups)
                weights = np.array([np.exp(q[t][h] @ k[s][g] / np.sqrt(config.head)) for s in range(t + 1)])
                heads.append(sum(w * v[s][g] for s, w in enumerate(weights)) / weights.sum())
            out.append(affine(np.concatenate(heads), p["out"]))
        return out

    def feed_forward(x, p):
        u = affine(x, p["up"])
        if config.style == "gpt2":
            return affine(0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))), p["down"])
        g = affine(x, p["gate"])
        return affine(g / (1 + np.exp(-g)) * u, p["down"])

    xs = [params["embedding"]["tokens"][token] for token in tokens]
    if config.style == "gpt2":
        xs = [x + params["embedding"]["positions"][t] for t, x in enumerate(xs)]
    for number in range(config.layers):
        layer = jax.tree.map(operator.itemgetter(number), params["layers"])
        written = attention([norm(x, layer["attention_norm"]) for x in xs], layer["attention"])
        xs = [x + w for x, w in zip(xs, written, strict=True)]
        xs = [x + feed_forward(norm(x, layer["mlp_norm"]), layer["mlp"]) for x in xs]
    head = params["embedding"]["tokens"].T if config.tied else params["head"]["kernel"]
    return np.stack([norm(x, params["norm"]) @ head for x in xs])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_forward_pass_against_numpy_in_double_precision(x64, config):
    params = drawn(config)
    logits, _ = jax.jit(gpt.decoder(config).apply)(params, {}, TOKENS)
    assert logits.dtype == jnp.float64
    expected = np.stack([oracle(config, params, tokens) for tokens in TOKENS])
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-10)


@functools.cache
def compiled(name):
    return jax.jit(gpt.decoder(CONFIGS[name]).apply)


def value_and_gradient(config):
    model = gpt.decoder(config)
    loss = loop.classification_loss(model)

    def total(params):
        return loss(params, {}, (TOKENS[:, :-1], TOKENS[:, 1:]))[0].sum()

    return jax.jit(jax.value_and_grad(total))(drawn(config, np.float32))


@pytest.mark.parametrize(("name", "change"), [("gpt2", {"scan": False}), ("llama", {"remat": True})])
@pytest.mark.slow
def test_scanned_layers_equal_unrolled_and_recomputed_ones(name, change):
    expected, got = value_and_gradient(CONFIGS[name]), value_and_gradient(CONFIGS[name]._replace(**change))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, expected)


def test_layers_are_one_loop_and_remat_saves_their_activations():
    config = CONFIGS["llama"]
    params = jax.eval_shape(gpt.decoder(config).init, jax.random.key(0))[0]

    def saved(config):
        def total(params):
            return gpt.decoder(config).apply(params, {}, TOKENS)[0].sum()

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(total, p)[1], params)))

    assert str(jax.make_jaxpr(lambda p: gpt.decoder(config).apply(p, {}, TOKENS))(params)).count("scan[") == 1
    assert saved(config._replace(remat=True)) < 0.6 * saved(config)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_no_logit_sees_a_later_token_and_every_logit_its_own(name):
    params = drawn(CONFIGS[name], np.float32)
    apply = compiled(name)
    before = np.asarray(apply(params, {}, TOKENS)[0])
    for place in range(7):
        changed = TOKENS.copy()
        changed[:, place] = (changed[:, place] + 1) % SHAPE["vocabulary"]
        after = np.asarray(apply(params, {}, changed)[0])
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert (np.abs(after[:, place:] - before[:, place:]).max(axis=(0, 2)) > 1e-4).all()


def test_half_precision_keeps_parameters_and_logits_in_single():
    model, params = gpt.decoder(CONFIGS["llama"]._replace(dtype="bfloat16")), drawn(CONFIGS["llama"], np.float32)
    made, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    logits, single = jax.jit(model.apply)(params, {}, TOKENS)[0], compiled("llama")(params, {}, TOKENS)[0]
    assert logits.dtype == jnp.float32
    assert 1e-5 < float(np.abs(logits - single).max() / np.abs(single).max()) < 0.05


def test_initial_scales_are_gpt2s_and_layers_differ():
    config = gpt.Config("gpt2", vocabulary=300, context=64, width=64, layers=8, heads=4, scale=0.1)
    init = jax.jit(gpt.decoder(config).init)
    params, _ = init(jax.random.key(0))
    layers = params["layers"]
    for leaf in (params["embedding"]["tokens"], layers["attention"]["query"]["kernel"], layers["mlp"]["up"]["kernel"]):
        np.testing.assert_allclose(leaf.std(), 0.1, rtol=0.03)
    for leaf in (layers["attention"]["out"]["kernel"], layers["mlp"]["down"]["kernel"]):
        np.testing.assert_allclose(leaf.std(), 0.1 / 4, rtol=0.03)
    kernel = layers["attention"]["query"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    assert (layers["mlp_norm"]["scale"] == 1).all()
    again, _ = init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_published_sizes():
    small = gpt.Config("gpt2", vocabulary=50257, context=1024, width=768, layers=12, heads=12)
    smol = gpt.Config("llama", 49152, 2048, 576, 30, 9, hidden=1536, kv_heads=3)
    big = gpt.Config("llama", 128256, 8192, 4096, 32, 32, hidden=14336, kv_heads=8, tied=False)
    for config, expected in ((small, 124_439_808), (smol, 134_515_008), (big, 8_030_261_248)):
        params, _ = jax.eval_shape(gpt.decoder(config).init, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_a_token_outside_the_vocabulary_is_no_number():
    tokens = np.where(np.arange(14).reshape(2, 7) < 7, -1, SHAPE["vocabulary"]).astype(np.int32)
    logits, _ = compiled("gpt2")(drawn(CONFIGS["gpt2"], np.float32), {}, tokens)
    assert np.isnan(logits).all()


def test_padding_on_the_right_changes_neither_loss_nor_gradient():
    params = drawn(CONFIGS["gpt2"], np.float32)
    loss = loop.classification_loss(gpt.decoder(CONFIGS["gpt2"]))
    labels = np.where(np.arange(7) < 4, np.roll(TOKENS[:1], -1, axis=1), -1).astype(np.int32)

    @jax.jit
    @jax.value_and_grad
    def one(params, padding):
        inputs = jnp.where(jnp.arange(7)[None] < 4, TOKENS[:1], padding)
        return loss(params, {}, (inputs, labels))[0][0]

    value, gradient = one(params, jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, one(params, jnp.int32(3)), (value, gradient))
    logits = oracle(CONFIGS["gpt2"], params, TOKENS[0, :4])
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(4), labels[0, :4]]
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-5)
    assert not gradient["embedding"]["positions"][4:].any()


@pytest.mark.slow
def test_it_learns_through_the_training_loop_and_serves_as_an_output_function():
    config = gpt.Config("gpt2", vocabulary=5, context=8, width=16, layers=2, heads=2)
    model = gpt.decoder(config)
    start = np.arange(40) % 5
    tokens = ((start[:, None] + np.arange(9)) % 5).astype(np.int32)  # each token is the one before, plus one
    data = (tokens[:, :-1], tokens[:, 1:])
    plan = loop.Plan(epochs=4, batch_size=8, size=40)
    loss = loop.classification_loss(model)

    @jax.jit
    def run(key):
        order = loop.schedule(key, jnp.ones(40, bool), plan)
        trained = loop.train(loss, optax.adam(1e-2), model.init(key), jax.tree.map(jnp.asarray, data), order, epochs=4)
        output = outputs.LogLikelihood(model.apply, trained.state)
        return trained.losses, jax.vmap(output, in_axes=(None, 0))(trained.params, data)

    losses, values = run(jax.random.key(0))
    np.testing.assert_allclose(losses[0], np.log(5), rtol=0.2)
    assert (np.asarray(values) > -0.5 * np.log(5)).all()
    assert float(-values.mean()) < float(losses[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width=0.*\n  expected: positive sizes"),
        ({"head_width": 0}, "head_width=0.*\n  expected: positive sizes"),
        ({"style": "bert"}, "style='bert'.*\n  expected: .*a style among gpt2, llama"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"heads": 3}, "width 8, 3 heads, 3 of keys and values\n  expected: heads that divide the width"),
        ({"kv_heads": 3}, "width 8, 4 heads, 3 of keys and values"),
        ({"style": "llama", "head_width": 5}, "heads of width 5\n  expected: an even width"),
    ],
)
def test_unsound_configurations_are_refused(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        gpt.decoder(CONFIGS["gpt2"]._replace(**changes))


def test_a_sequence_longer_than_the_context_is_refused():
    model = gpt.decoder(CONFIGS["llama"])
    with pytest.raises(InvalidInputError, match="sequences of 8 tokens\n  expected: at most the context of 7"):
        model.apply(drawn(CONFIGS["llama"]), {}, np.zeros((1, 8), np.int32))
