"""Metagradients against central differences of plain training in double precision, and every way to replay."""

import weakref
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from jattrib.core.errors import DivergedError, InvalidInputError, StoreError
from jattrib.models import gpt
from jattrib.models.adapt import from_function, from_nnx
from jattrib.models.mlp import mlp
from jattrib.models.outputs import Loss, Margin
from jattrib.train import budget, loop, pullback, replay

N, BATCH, EPOCHS = 14, 4, 3
QUERIES = 5


class ResNet(nnx.Module):
    """A residual block with batch normalisation.  With ReLU, training would jump, and no difference would converge."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 3, (3, 3), use_bias=False, rngs=rngs)
        self.first = nnx.BatchNorm(3, use_fast_variance=False, momentum=0.8, rngs=rngs)
        self.conv = nnx.Conv(3, 3, (3, 3), use_bias=False, rngs=rngs)
        self.second = nnx.BatchNorm(3, use_fast_variance=False, momentum=0.8, rngs=rngs)
        self.head = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        with jax.numpy_dtype_promotion("standard"):
            x = jax.nn.gelu(self.first(self.stem(x)))
            x = x + jax.nn.gelu(self.second(self.conv(x)))
        return self.head(x.mean(axis=(1, 2)))


def transformer(style, layers=2, *, scan=True):
    config = gpt.Config(style, vocabulary=7, context=6, width=8, layers=layers, heads=2, hidden=6, scale=0.5, scan=scan)
    return gpt.decoder(config)


def dropout_mlp():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
            self.drop = nnx.Dropout(0.3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(jax.nn.gelu(self.first(x))))

    return from_nnx(Net)


MODELS = {
    "mlp": (lambda: mlp(5, (6,), 3, activation="gelu"), lambda rng, n: rng.normal(size=(n, 5))),
    "resnet": (lambda: from_nnx(ResNet), lambda rng, n: rng.normal(size=(n, 5, 5, 1))),
    "gpt2": (partial(transformer, "gpt2"), lambda rng, n: rng.integers(0, 7, (n, 6))),
    "llama": (partial(transformer, "llama"), lambda rng, n: rng.integers(0, 7, (n, 6))),
    "dropout": (dropout_mlp, lambda rng, n: rng.normal(size=(n, 5))),
}


class Problem(NamedTuple):
    output: replay.Output
    run: replay.Run
    inputs: replay.Inputs
    queries: tuple


SGD = optax.sgd(0.2, momentum=0.9)


@cache
def problem(name="mlp", optimizer=SGD, hyper=None, *, dtype=jnp.float64, queries=QUERIES):
    """A small run and some queries.  Cached, and so are the programs that it is compiled to."""
    rng = np.random.default_rng(1)
    make, draw = MODELS[name]
    model = make()

    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    params, state = jax.tree.map(cast, jax.jit(model.init)(jax.random.key(3)))
    inputs, targets = draw(rng, N + queries), rng.integers(0, 3, N + queries)
    targets = targets if inputs.dtype == float else rng.integers(0, 7, inputs.shape)  # tokens have tokens for labels
    inputs = cast(jnp.asarray(inputs))
    plan = loop.Plan(EPOCHS, BATCH, N)
    order = jax.jit(lambda key: loop.schedule(key, jnp.ones(N, bool), plan))(jax.random.key(4))
    data, asked = (inputs[:N], jnp.asarray(targets[:N])), (inputs[N:], jnp.asarray(targets[N:]))
    run = replay.Run(loop.classification_loss(model), optimizer, data, order)
    weights = jnp.asarray(rng.uniform(0.5, 1.5, N), dtype)
    output = partial(Loss if targets.ndim == 2 else Margin, model.apply)
    hyper = () if hyper is None else jax.tree.map(jnp.asarray, HYPER[hyper])
    return Problem(output, run, replay.Inputs(weights, params, state, hyper), asked)


def replayed(case, **settings):
    return replay.metagradient(*case, progress=False, **settings)


def by_plain_training(case, weights, params, optimizer, draws=None):
    """The outputs of a model that `loop.train` trained."""
    order = case.run.order if draws is None else case.run.order._replace(weights=draws)
    trained = loop.train(
        case.run.loss, optimizer, (params, case.inputs.state), case.run.data, order, weights=weights, epochs=1
    )
    return jax.vmap(partial(case.output(trained.state), trained.params))(case.queries)


def difference(function, at, direction, step=1e-6):
    """The derivative along a direction by central differences, to the fourth order in the step."""

    def ahead(steps):
        return np.asarray(function(jax.tree.map(lambda x, d: np.asarray(x) + steps * step * d, at, direction)))

    return (8 * (ahead(1) - ahead(-1)) - (ahead(2) - ahead(-2))) / (12 * step)


def directions(like, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), like)


def along(derivative, direction):
    """The inner product with a direction, for each query (the last axis)."""
    parts = jax.tree.map(lambda d, v: np.tensordot(v, np.asarray(d), axes=v.ndim), derivative, direction)
    return sum(jax.tree.leaves(parts))


def assert_agree(found, expected, tolerance=1e-6):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.linalg.norm(expected) > 1e-4
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


STEPS = EPOCHS * -(-N // BATCH)
RATES = 0.2 * np.minimum((np.arange(STEPS) + 0.5) / 4, 1.0)


def sgd(rates):
    return optax.sgd(lambda count: rates[count])


def momentum(rates):
    return optax.sgd(lambda count: rates[count], momentum=0.9)


def adam(hyper):
    """A schedule, and a decay rate of the moments."""
    return optax.adam(lambda count: hyper["rates"][count] / 10, b1=hyper["b1"], eps=1e-4, eps_root=1e-6)


def adamw(hyper):
    """A schedule and weight decay at once."""
    rates, decay = hyper["rates"] / 10, hyper["decay"]
    return optax.adamw(lambda count: rates[count], weight_decay=decay, eps=1e-4, eps_root=1e-6)


HYPER = {
    sgd: RATES / 4,
    momentum: RATES,
    adam: {"rates": RATES, "b1": np.asarray(0.8)},
    adamw: {"rates": RATES, "decay": np.asarray(0.1)},
    "multiplier": np.ones(STEPS),
    "one": np.ones(()),
    "single": np.ones(STEPS, np.float32),
}
SLOW = pytest.mark.slow
QUICK = [("mlp", sgd), ("mlp", momentum), ("mlp", adam), ("resnet", momentum)]
REST = [
    pytest.param(model, make, marks=SLOW)
    for model in ("mlp", "resnet", "gpt2", "llama")
    for make in (sgd, momentum, adam, adamw)
    if (model, make) not in QUICK
]


@pytest.mark.parametrize(("model", "make"), [*QUICK, *REST])
def test_metagradients_are_central_differences_of_training(x64, model, make):
    case = problem(model, make, make)
    hyper = case.inputs.hyper
    found = replayed(case)
    weights, params = case.inputs.weights, case.inputs.params
    plain = jax.jit(lambda weights, params, hyper: by_plain_training(case, weights, params, make(hyper)))
    np.testing.assert_allclose(found.values, plain(weights, params, hyper), rtol=1e-12)
    for name, at, function in (
        ("weights", weights, lambda x: plain(x, params, hyper)),
        ("params", params, lambda x: plain(weights, x, hyper)),
        ("hyper", hyper, lambda x: plain(weights, params, x)),
    ):
        direction = directions(at, 7)
        assert_agree(along(getattr(found, name), direction), difference(function, at, direction))
    single = np.eye(N)[3]  # one example, not a mixture
    assert_agree(found.weights[3], difference(lambda x: plain(x, params, hyper), weights, single))


def test_outputs_through_a_stopped_gradient_move_with_the_parameters(x64):
    """By central differences, whichever part of a model a gradient stops at, in training and in the output alike."""
    case, rng = problem(), np.random.default_rng(0)
    params = {"first": jnp.asarray(rng.normal(size=(5, 6))), "last": jnp.asarray(rng.normal(size=(6, 3)))}

    def frozen(params, x):
        return jnp.tanh(jax.lax.stop_gradient(x @ params["first"])) @ params["last"]

    def straight_through(params, x):
        last = params["last"] + jax.lax.stop_gradient(jnp.tanh(params["last"]) - params["last"])
        return jnp.tanh(x @ params["first"]) @ last

    for forward in (frozen, straight_through):
        model = from_function(lambda key: params, forward)
        run = case.run._replace(loss=loop.classification_loss(model))
        inputs = case.inputs._replace(params=params, state=())
        here = case._replace(output=partial(Margin, model.apply), run=run, inputs=inputs)
        found = replayed(here)
        plain = jax.jit(partial(by_plain_training, here, optimizer=SGD))
        for name, at, function in (
            ("weights", inputs.weights, lambda x, plain=plain: plain(x, params)),
            ("params", params, lambda x, plain=plain, inputs=inputs: plain(inputs.weights, x)),
        ):
            direction = directions(at, 5)
            assert_agree(along(getattr(found, name), direction), difference(function, at, direction))


@pytest.mark.slow
def test_the_multiplier_of_an_update_is_that_of_the_learning_rate(x64):
    base = replay.scaled(optax.sgd(lambda count: 0.2 / (1 + count), momentum=0.9))
    case = problem("mlp", base, "multiplier")
    steps = case.inputs.hyper
    direction = directions(steps, 2)

    def plain(multiplier):
        rates = jnp.asarray(0.2 / (1 + np.arange(STEPS))) * multiplier
        return by_plain_training(case, case.inputs.weights, case.inputs.params, momentum(rates))

    found = replayed(case)
    assert_agree(along(found.hyper, direction), difference(jax.jit(plain), steps, direction))
    whole = replayed(problem("mlp", base, "one"))
    np.testing.assert_allclose(whole.hyper, found.hyper.sum(0), rtol=1e-12)


@pytest.mark.slow
def test_single_draws_have_derivatives_of_their_own(x64):
    case = problem()
    draws = jnp.asarray(np.random.default_rng(5).uniform(0.5, 1.5, case.run.order.indices.shape))
    found = replayed(case._replace(inputs=case.inputs._replace(weights=draws)), segment=5)
    direction = directions(draws, 3)

    def plain(draws):
        return by_plain_training(case, None, case.inputs.params, case.run.optimizer, draws)

    assert found.weights.shape == (*draws.shape, QUERIES)
    assert_agree(along(found.weights, direction), difference(jax.jit(plain), draws, direction))


def test_weights_of_draws_in_the_order_multiply_those_of_examples(x64):
    case = problem()
    draws = jnp.asarray(np.random.default_rng(5).uniform(0.5, 1.5, case.run.order.indices.shape))
    case = case._replace(run=case.run._replace(order=case.run.order._replace(weights=draws)))
    direction = directions(case.inputs.weights, 3)

    def plain(weights):
        return by_plain_training(case, weights, case.inputs.params, case.run.optimizer)

    found = along(replayed(case).weights, direction)
    assert_agree(found, difference(jax.jit(plain), case.inputs.weights, direction))


def test_an_order_cut_short_gives_an_earlier_model(x64):
    case = problem()
    early = case._replace(run=case.run._replace(order=jax.tree.map(lambda leaf: leaf[:7], case.run.order)))
    direction = directions(case.inputs.weights, 3)

    def plain(weights):
        return by_plain_training(early, weights, case.inputs.params, case.run.optimizer)

    expected = difference(jax.jit(plain), case.inputs.weights, direction)
    assert_agree(along(replayed(early).weights, direction), expected)


def test_queries_together_are_queries_one_by_one(x64):
    case = problem("resnet")
    together = replayed(case)
    for at in (0, QUERIES - 1):
        one = jax.tree.map(lambda leaf, at=at: leaf[at : at + 1], case.queries)
        alone = replayed(case._replace(queries=one))
        for name in ("values", "weights", "params", "norms"):
            jax.tree.map(
                lambda x, y, at=at: np.testing.assert_allclose(x[..., at], y[..., 0], rtol=1e-9, atol=1e-12),
                getattr(together, name), getattr(alone, name),
            )  # fmt: skip


def assert_same(left, right, rtol=1e-10):
    (left, right) = ((*each[:4], each.trained[0]) for each in (left, right))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-12), left, right)


@pytest.mark.parametrize(
    "settings",
    [
        {"segment": STEPS},
        {"segment": 5},
        {"segment": 1, "checkpoints": "recompute"},
        {"segment": 3, "checkpoints": "host"},
        {"segment": 3, "directory": "carries"},
        {"segment": 1, "directory": "carries", "checkpoints": "recompute", "checkpoint_every": 0.0},
        {"block": 2, "segment": 3},
    ],
    ids=str,
)
def test_every_way_to_replay_gives_the_same(x64, tmp_path, settings):
    case = problem()
    whole = replayed(case)
    if "directory" in settings:
        settings = {**settings, "directory": tmp_path / settings["directory"]}
    other = replayed(case, **settings)
    assert_same(whole, other)
    assert not list(tmp_path.iterdir())  # what was kept on disk is gone
    np.testing.assert_allclose(other.norms[[0, -1]], whole.norms[[0, -1]], rtol=1e-10)


@pytest.mark.slow
def test_random_generators_in_the_state_are_replayed(x64, tmp_path):
    case = problem("dropout")
    whole = replayed(case)
    for settings in ({"checkpoints": "host", "segment": 3}, {"directory": tmp_path, "segment": 3}):
        assert_same(whole, replayed(case, **settings))
    direction = directions(case.inputs.weights, 3)

    def plain(weights):
        return by_plain_training(case, weights, case.inputs.params, case.run.optimizer)

    assert_agree(along(whole.weights, direction), difference(jax.jit(plain), case.inputs.weights, direction))


@pytest.mark.parametrize(
    ("model", "shape"),
    [("mlp", (2, 4)), pytest.param("resnet", (2, 4), marks=SLOW), pytest.param("gpt2", (4, 2), marks=SLOW)],
    ids=str,
)
def test_eight_devices_give_what_one_does(x64, model, shape):
    mesh = jax.make_mesh(shape, ("query", "batch")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))
    case = problem(model)
    one, eight = replayed(case), replayed(case, mesh=mesh)
    assert_same(one, eight, rtol=1e-8)


ADAMW = replay.scaled(optax.adamw(0.01, eps_root=1e-8))


class KilledError(Exception):
    pass


def count_calls(monkeypatch, stop_after=None):
    """Count steps forward and back, and die when there were `stop_after` of them."""
    calls = []
    for name in ("advance", "trace", "pull"):
        original = getattr(pullback, name)

        def wrapped(*arguments, name=name, original=original):
            if len(calls) == stop_after:
                raise KilledError
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(pullback, name, wrapped)
    return calls


@pytest.mark.parametrize("checkpoints", ["device", "recompute"])
def test_killed_anywhere_and_resumed_gives_the_same_bits(tmp_path, monkeypatch, checkpoints):
    case = problem("mlp", ADAMW, "single", dtype=jnp.float32)
    settings = {"segment": 3, "checkpoints": checkpoints, "checkpoint_every": 0.0}
    with monkeypatch.context() as patch:
        calls = count_calls(patch)
        whole = replayed(case, **settings)
        total = len(calls)
    for stop in range(total):
        directory = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            count_calls(patch, stop)
            with pytest.raises(KilledError):
                replayed(case, directory=directory, **settings)
        with monkeypatch.context() as patch:
            rest = count_calls(patch)
            resumed = replayed(case, directory=directory, **settings)
        jax.tree.map(np.testing.assert_array_equal, whole, resumed)
        assert len(rest) <= total - stop + (2 if checkpoints == "device" else 4)  # the step it died in, not all of it


def test_a_directory_of_another_run_is_refused(tmp_path, monkeypatch):
    case = problem(dtype=jnp.float32)
    with monkeypatch.context() as patch:
        count_calls(patch, 8)
        with pytest.raises(KilledError):
            replayed(case, segment=3, directory=tmp_path, checkpoint_every=0.0)
    other = case._replace(inputs=case.inputs._replace(weights=2 * case.inputs.weights))
    with pytest.raises(StoreError, match="belongs to another run: its inputs is"):
        replayed(other, segment=3, directory=tmp_path)
    with pytest.raises(StoreError, match="belongs to another run: its model is nothing, this run's is 'wide'"):
        replayed(case, segment=3, directory=tmp_path, identity={"model": "wide"})
    backwards = case._replace(queries=jax.tree.map(lambda leaf: leaf[::-1], case.queries))
    with pytest.raises(StoreError, match="belongs to another run: its queries is"):
        replayed(backwards, segment=3, directory=tmp_path)


def test_an_identity_says_nothing_of_what_a_directory_knows(tmp_path, monkeypatch):
    case = problem(dtype=jnp.float32)
    settings = {"segment": 3, "directory": tmp_path, "identity": {"data": "CIFAR", "inputs": 1}}
    with monkeypatch.context() as patch:
        count_calls(patch, 8)
        with pytest.raises(KilledError):
            replayed(case, checkpoint_every=0.0, **settings)
    other = case._replace(run=case.run._replace(data=(3 * case.run.data[0], case.run.data[1])))
    with pytest.raises(StoreError, match="belongs to another run: its data is"):
        replayed(other, **settings)
    with pytest.raises(StoreError, match=r"its identity.inputs is 1, this run's is 2"):
        replayed(case, **{**settings, "identity": {"data": "CIFAR", "inputs": 2}})
    jax.tree.map(np.testing.assert_array_equal, replayed(case, **settings), replayed(case, segment=3))


def test_a_square_root_of_zero_is_named(x64):
    """A feature that is always zero has no gradient, and Adam's derivative there is that of a root at zero."""
    case = problem("mlp", optax.adam(0.01))
    data = (case.run.data[0].at[:, 2].set(0.0), case.run.data[1])
    case = case._replace(run=case.run._replace(data=data))
    with pytest.raises(DivergedError, match=r"its derivative is not(?s:.*)give Adam an eps_root"):
        replayed(case)
    mended = case._replace(run=case.run._replace(optimizer=optax.adam(0.01, eps_root=1e-12)))
    assert np.isfinite(replayed(mended).weights).all()


def test_a_diverged_run_is_named():
    case = problem("mlp", optax.sgd(1e30), dtype=jnp.float32)
    with pytest.raises(DivergedError, match=r"the output of query \d is nan after training"):
        replayed(case)


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (lambda c: c._replace(inputs=c.inputs._replace(weights=jnp.ones(3))), {}, r"shape \(3,\), data of \[14\]"),
        (lambda c: c._replace(inputs=c.inputs._replace(hyper={"n": jnp.arange(2)})), {}, "'n' of dtype int32"),
        (lambda c: c._replace(queries=jax.tree.map(lambda x: x[:0], c.queries)), {}, r"queries of leading axes \[0\]"),
        (lambda c: c._replace(queries=(c.queries[0][:2], c.queries[1])), {}, "queries of leading axes"),
        (lambda c: c, {"segment": 0}, "segment = 0"),
        (lambda c: c, {"block": 0}, "block = 0"),
        (
            lambda c: c,
            {"mesh": jax.make_mesh((1, 8), ("query", "batch"), axis_types=(AxisType.Auto,) * 2)},
            "batches of 4 examples on a mesh of 8",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(spoil, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        replayed(spoil(problem(dtype=jnp.float32)), **settings)


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (lambda c: c._replace(inputs=c.inputs._replace(weights=jnp.ones(N, int))), {}, "weights of dtype int32"),
        (lambda c: c, {"checkpoints": "disk"}, "checkpoints = 'disk'(?s:.*)device, host, recompute"),
        (
            lambda c: c._replace(
                run=c.run._replace(optimizer=replay.scaled(SGD)), inputs=c.inputs._replace(hyper=jnp.ones(STEPS - 1))
            ),
            {},
            f"{STEPS - 1} multipliers of the updates of {STEPS} steps",
        ),
    ],
)
def test_what_shapes_do_not_tell_is_refused_in_words(shapes_unchecked, spoil, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        replayed(spoil(problem(dtype=jnp.float32)), **settings)


def test_the_output_that_is_not_finite_is_named():
    case = problem(dtype=jnp.float32)
    case = case._replace(output=lambda state: lambda params, query: jnp.where(query == 2.0, jnp.inf, 1.0))
    with pytest.raises(DivergedError, match=r"the output of query 1 is inf after training"):
        replayed(case._replace(queries=jnp.asarray([1.0, 2.0, 3.0])))


@pytest.mark.parametrize("part", ["parameters", "model state", "optimiser's moments"])
def test_complex_numbers_are_refused(part):
    case = problem(dtype=jnp.float32)
    number = {"z": jnp.ones(2, jnp.complex64)}
    if part == "parameters":
        case = case._replace(inputs=case.inputs._replace(params={**case.inputs.params, **number}))
    if part == "model state":
        case = case._replace(inputs=case.inputs._replace(state=number))
    if part == "optimiser's moments":
        keeps = optax.GradientTransformation(lambda params: number, lambda updates, kept, params=None: (updates, kept))
        case = case._replace(run=case.run._replace(optimizer=optax.chain(case.run.optimizer, keeps)))
    with pytest.raises(
        InvalidInputError, match=f"the {part} at .*z' of dtype complex64(?s:.*)real and imaginary parts"
    ):
        replayed(case)


def long_run(case, steps):
    order = jax.tree.map(lambda leaf: jnp.resize(leaf, (steps, *leaf.shape[1:])), case.run.order)
    return case._replace(run=case.run._replace(order=order))


@pytest.mark.slow
def test_memory_grows_as_the_root_of_the_steps():
    case = problem(dtype=jnp.float32)
    found = {steps: budget.memory(*long_run(case, steps)) for steps in (16, 64, 256)}
    carry = sum(leaf.nbytes for leaf in jax.tree.leaves((case.inputs.params, case.inputs.params)))  # and momentum
    for steps, each in found.items():
        assert each.checkpoints + each.trace == carry * (2 * int(steps**0.5) + 1)
        assert each.cotangents == found[16].cotangents == QUERIES * (carry + 4 * N)
    few = budget.memory(*long_run(case, 256), segment=1, checkpoints="recompute")
    assert few.checkpoints + few.trace == carry * (1 + 8 + 2)
    data, order, inputs, queries = jax.eval_shape(lambda: (case.run.data, case.run.order, case.inputs, case.queries))
    programs = budget.programs(case.output, case.run._replace(data=data, order=order), inputs, queries)
    assert set(programs) == {"advance", "trace", "read", "pull"}


@pytest.mark.parametrize(("checkpoints", "most"), [("device", 16), ("recompute", 5)])
def test_no_more_carries_are_alive_than_planned(monkeypatch, checkpoints, most):
    case = long_run(problem(dtype=jnp.float32), 16)
    made, alive = [], []
    advance, pull = pullback.advance, pullback.pull

    def remembered(*arguments):
        carry = advance(*arguments)
        made.append(weakref.ref(jax.tree.leaves(carry)[0]))
        return carry

    def counted(*arguments):
        alive.append(sum(each() is not None for each in made))
        return pull(*arguments)

    monkeypatch.setattr(pullback, "advance", remembered)
    monkeypatch.setattr(pullback, "pull", counted)
    replayed(case, segment=1, checkpoints=checkpoints)
    assert max(alive) <= most
    assert alive[-1] <= 1
    if checkpoints == "device":
        assert alive == sorted(alive, reverse=True)
