from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core.errors import DivergedError, InvalidInputError
from jattrib.unlearning import baselines, finetune
from jattrib.unlearning.finetune import Settings
from tests.unlearning import oracles

BRISK = Settings(epochs=2, batch_size=16, learning_rate=0.05)

EVERY = {
    "gradient_ascent": partial(baselines.gradient_ascent, settings=BRISK),
    "retain_descent": partial(baselines.retain_descent, settings=BRISK),
    "ascent_descent": partial(baselines.ascent_descent, settings=BRISK),
    "neggrad_plus": partial(baselines.neggrad_plus, settings=BRISK),
    "random_labels": partial(baselines.random_labels, settings=BRISK),
    "salun": partial(baselines.salun, settings=BRISK),
    "scrub": partial(baselines.scrub, settings=BRISK),
    "ssd": partial(baselines.ssd, alpha=0.5, strength=0.3),
    "newton_step": partial(baselines.newton_step, damping=1e-2),
    "first_order": partial(baselines.first_order, rate=1.0),
}


def losses(problem, models, indices):
    x, labels = problem.data[0][indices], problem.data[1][indices]
    return np.stack([oracles.losses(oracles.stacked(models.params, at), x, labels) for at in range(models.size)])


@pytest.mark.parametrize("name", EVERY)
def test_every_unlearner_moves_every_model(task, name):
    problem, models, keys = task
    found = EVERY[name](problem, models, keys)
    assert (finetune.moved(models, found) > 1e-3).all()
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, models, found))


def test_doing_nothing_moves_none(task):
    problem, models, keys = task
    assert (finetune.moved(models, baselines.nothing(problem, models, keys)) == 0).all()


@pytest.mark.parametrize("name", ["gradient_ascent", "neggrad_plus", "ascent_descent", "scrub", "random_labels"])
def test_what_is_forgotten_fits_worse_than_after_descent_alone(trained, name):
    problem, models, keys = trained
    alone = EVERY["retain_descent"](problem, models, keys)
    found = EVERY[name](problem, models, keys)
    forget = problem.forget
    assert (losses(problem, found, forget).mean(1) > losses(problem, models, forget).mean(1)).all()
    if name not in ("gradient_ascent", "random_labels"):
        assert (losses(problem, found, forget).mean(1) > losses(problem, alone, forget).mean(1) - 1e-3).all()
        kept = losses(problem, found, problem.retain).mean(1) - losses(problem, models, problem.retain).mean(1)
        assert (kept < 0.1).all()


def test_descent_on_what_is_retained_lowers_its_loss(task):
    problem, models, keys = task
    found = EVERY["retain_descent"](problem, models, keys)
    assert (losses(problem, found, problem.retain).mean(1) < losses(problem, models, problem.retain).mean(1)).all()


def test_a_first_order_step_is_one_step_up(task):
    problem, models, keys = task
    found = baselines.first_order(problem, models, keys, rate=0.7)
    x, labels = (each[problem.forget] for each in problem.data)
    for model in range(2):
        theta = oracles.stacked(models.params, model)
        expected = theta + 0.7 * oracles.gradients(theta, x, labels).sum(axis=0) / 60
        np.testing.assert_allclose(oracles.stacked(found.params, model), expected, rtol=1e-4, atol=1e-6)


def test_newtons_step_is_the_solve_with_the_explicit_hessian(trained):
    """The Gauss-Newton matrix of softmax regression is its Hessian."""
    problem, models, keys = trained
    x, labels = (each[problem.retain] for each in problem.data)
    theta = oracles.stacked(models.params, 0)
    found = oracles.stacked(baselines.newton_step(problem, models, keys, damping=0.05).params, 0)
    curvature = oracles.hessian(theta, x) + 0.05 * np.eye(theta.size)
    step = np.linalg.solve(curvature, oracles.gradients(theta, x, labels).mean(axis=0).ravel())
    np.testing.assert_allclose(found, theta - step.reshape(theta.shape), rtol=1e-3, atol=1e-4)


def test_newtons_step_warns_of_a_system_that_is_not_solved(trained):
    problem, models, keys = trained
    said = r"step of 2 of 2 models is not solved: with damping 0.001 a relative residual of up to 0\.\d+ .*after 1 iter"
    with pytest.warns(baselines.UnsolvedWarning, match=said):
        baselines.newton_step(problem, models, keys, damping=1e-3, iterations=1)


@pytest.mark.parametrize("name", ["ssd", "newton_step", "first_order"])
def test_steps_from_models_that_are_not_finite_say_so(task, name):
    problem, models, keys = task
    broken = models._replace(params=jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), models.params))
    with pytest.raises(DivergedError, match=r"a right-hand side|parameters of model 1 are not finite"):
        EVERY[name](problem, broken, keys)


def test_dampening_scales_down_what_matters_more_to_the_forget_set(task):
    problem, models, keys = task
    found = baselines.ssd(problem, models, keys, alpha=0.5, strength=0.3)
    x, labels = problem.data
    for model in range(2):
        theta = oracles.stacked(models.params, model)
        squares = np.square(oracles.gradients(theta, x, labels))
        everything, forget = squares.mean(axis=0), squares[problem.forget].mean(axis=0)
        expected = np.where(forget > 0.5 * everything, theta * np.minimum(0.3 * everything / forget, 1), theta)
        assert 0 < (expected != theta).sum() < theta.size
        np.testing.assert_allclose(oracles.stacked(found.params, model), expected, rtol=1e-4, atol=1e-6)


def test_only_salient_weights_move(task):
    problem, models, keys = task
    found = baselines.salun(problem, models, keys, settings=BRISK, saliency=0.2)
    x, labels = (each[problem.forget] for each in problem.data)
    for model in range(2):
        theta = oracles.stacked(models.params, model)
        size = np.abs(oracles.gradients(theta, x, labels).mean(axis=0))
        salient = size >= np.sort(size.ravel())[-3]
        change = oracles.stacked(found.params, model) - theta
        assert (change[~salient] == 0).all()
        assert (change[salient] != 0).all()


def test_the_student_leaves_its_teacher_where_it_is_to_forget(trained):
    problem, models, keys = trained
    found = baselines.scrub(problem, models, keys, settings=BRISK, ascents=2, forget_batch=5)
    before, after = (finetune.logits(problem.apply, each, problem.data[0]) for each in (models, found))
    teacher, student = (np.asarray(jax.nn.log_softmax(each)) for each in (before, after))
    divergence = (np.exp(teacher) * (teacher - student)).sum(axis=-1)
    assert (divergence[:, problem.forget].mean(1) > 2 * divergence[:, problem.retain].mean(1)).all()


def test_scrub_rewinds_to_the_epoch_of_the_error_that_is_asked_for(task):
    problem, models, keys = task
    settings = BRISK._replace(epochs=3, learning_rate=0.3)
    x, labels = (each[problem.forget] for each in problem.data)

    def errors(models):
        return (finetune.logits(problem.apply, models, x).argmax(-1) != labels).mean(-1)

    ends = [baselines.scrub(problem, models, keys, settings=settings._replace(epochs=n)) for n in (1, 2, 3)]
    history = np.stack([errors(each) for each in ends])
    goal = np.array([history[0, 0], history[2, 1]])
    found = baselines.scrub(problem, models, keys, settings=settings, rewind=goal)
    best = np.abs(history - goal).argmin(axis=0)
    for model, end in enumerate(best):
        np.testing.assert_allclose(found.params["kernel"][model], ends[end].params["kernel"][model], rtol=1e-5)


def relabelled(monkeypatch, unlearn, problem, models, keys):
    """The labels that a method trains on, and the models that it leaves."""
    seen = []
    descend = baselines._descend
    monkeypatch.setattr(baselines, "_descend", lambda *all_: seen.append(all_[2][1]) or descend(*all_))
    return unlearn(problem, models, keys), seen[0]


def assert_followed(found, models, x, labels, phases):
    for model in range(models.size):
        theta = oracles.stacked(models.params, model)
        expected = oracles.followed(theta, x.astype(np.float64), labels, phases)
        assert np.abs(expected - theta).max() > 1e-2
        np.testing.assert_allclose(oracles.stacked(found.params, model), expected, rtol=1e-4, atol=2e-6)


FORGET, RETAIN, EVERY_SEQUENCE = np.arange(5), np.arange(5, 12), np.arange(12)
FULL = Settings(epochs=1, batch_size=64, learning_rate=0.3, optimizer="sgd")


@pytest.mark.parametrize("name", ["random_labels", "salun"])
def test_sequences_are_relabelled_token_by_token_and_keep_their_padding(sequences, monkeypatch, name):
    problem, models, keys = sequences
    whole = {"saliency": 1.0} if name == "salun" else {}
    unlearn = partial(getattr(baselines, name), settings=FULL, **whole)
    found, labels = relabelled(monkeypatch, unlearn, problem, models, keys)
    true = problem.data[1]
    np.testing.assert_array_equal(labels < 0, true < 0)
    np.testing.assert_array_equal(labels[5:], true[5:])
    real = true[:5] >= 0
    shifts = (labels[:5] - true[:5])[real] % 3
    assert set(shifts) == {1, 2}
    assert labels[:5][real].min() >= 0
    assert_followed(found, models, problem.data[0], labels, [(0.3, [[(EVERY_SEQUENCE, 1.0, 0.0)]])])


def test_scrub_of_sequences_is_the_mean_over_tokens(sequences):
    problem, models, keys = sequences
    settings = FULL._replace(epochs=2, decay=0.5)
    found = baselines.scrub(problem, models, keys, settings=settings, ascents=2, alpha=0.7, gamma=1.9)
    retained = [(RETAIN, 0.7, 1.0), (RETAIN, 1.9, 0.0)]
    phases = [(rate, [[(FORGET, -1.0, 1.0)], retained]) for rate in (0.3, 0.15)]
    assert_followed(found, models, *problem.data, phases)


def test_errors_of_sequences_leave_padding_out(sequences):
    problem, models, _ = sequences
    x, labels = (each[:5] for each in problem.data)
    expected = []
    for model in range(2):
        theta = oracles.stacked(models.params, model)
        wrong = [
            (oracles.extended(tokens) @ theta).argmax(axis=1)[own >= 0] != own[own >= 0]
            for tokens, own in zip(x, labels, strict=True)
        ]
        expected.append(np.concatenate(wrong).mean())
    np.testing.assert_allclose(baselines._errors(problem, models), expected)


def as_sequences(problem):
    """The examples of a classifier as sequences of one token."""
    return problem.data[0][:, None], problem.data[1][:, None]


def test_scrub_is_its_equations(task):
    """Phases from rest: over F in small batches away from the teacher, over R at full batch; rates decay by epoch."""
    problem, models, keys = task
    settings = FULL._replace(epochs=3, decay=0.5)
    found = baselines.scrub(
        problem, models, keys, settings=settings, ascents=2, forget_batch=2, alpha=0.6, gamma=1.7, part=0.4
    )  # fmt: skip
    chosen = baselines._sample(keys[0], problem.retain, 0.4)
    assert len(np.unique(chosen)) == 22
    retained = [(chosen, 0.6, 1.0), (chosen, 1.7, 0.0)]
    for model in range(2):
        phases = []
        for epoch in range(3):
            own = jax.random.fold_in(keys[model], epoch)[None]
            order = finetune.shuffled(own, 5, FULL._replace(batch_size=2)).order
            away = [np.asarray(at)[np.asarray(ok)] for at, ok in zip(order.indices[0], order.valid[0], strict=True)]
            assert [len(at) for at in away] == [2, 2, 1]
            ascents = [[(problem.forget[at], -1.0, 1.0)] for at in away] if epoch < 2 else []
            phases.append((0.3 * 0.5**epoch, [*ascents, retained]))
        one = jax.tree.map(lambda leaf, at=model: leaf[at : at + 1], models)
        mine = jax.tree.map(lambda leaf, at=model: leaf[at : at + 1], found)
        assert_followed(mine, one, *as_sequences(problem), phases)


def test_neggrad_plus_is_its_equation(task):
    """A full batch of each: `β mean_R ℓ − (1 − β) mean_F ℓ`, of a part of R."""
    problem, models, keys = task
    found = baselines.neggrad_plus(problem, models, keys, settings=FULL, balance=0.8, part=0.4)
    chosen = baselines._sample(keys[0], problem.retain, 0.4)
    assert len(chosen) == 22
    step = [(chosen, 0.8, 0.0), (problem.forget, -0.2, 0.0)]
    assert_followed(found, models, *as_sequences(problem), [(0.3, [step])])


def test_ascent_descent_is_its_equation(task):
    """One mean over both, in which F's losses ascend."""
    problem, models, keys = task
    found = baselines.ascent_descent(problem, models, keys, settings=FULL, ascent=0.7, part=0.2)
    chosen = baselines._sample(keys[0], problem.retain, 0.2)
    assert len(chosen) == 11
    both, weights = np.concatenate([chosen, problem.forget]), np.repeat([1.0, -0.7], [11, 5])
    assert_followed(found, models, *as_sequences(problem), [(0.3, [[(both, weights, 0.0)]])])


def test_ascent_and_descent_alone_are_their_equations(task):
    problem, models, keys = task
    sequences = as_sequences(problem)
    away = baselines.gradient_ascent(problem, models, keys, settings=FULL)
    assert_followed(away, models, *sequences, [(0.3, [[(problem.forget, -1.0, 0.0)]])])
    back = baselines.retain_descent(problem, models, keys, settings=FULL, part=0.3)
    chosen = baselines._sample(keys[0], problem.retain, 0.3)
    assert len(chosen) == 16
    assert_followed(back, models, *sequences, [(0.3, [[(chosen, 1.0, 0.0)]])])


def test_random_labels_are_wrong_every_one_and_of_every_class(task, monkeypatch):
    problem, models, keys = task
    problem = finetune.problem(problem.apply, problem.data, np.arange(30))
    unlearn = partial(baselines.random_labels, settings=FULL, part=0.5)
    found, labels = relabelled(monkeypatch, unlearn, problem, models, keys)
    chosen = baselines._sample(keys[0], problem.retain, 0.5)
    true = problem.data[1]
    assert len(labels) == 45
    np.testing.assert_array_equal(labels[30:], true[chosen])
    assert (labels[:30] != true[:30]).all()
    pairs = set(zip(true[:30].tolist(), labels[:30].tolist(), strict=True))
    assert pairs == {(a, b) for a in range(3) for b in range(3) if a != b}
    x = problem.data[0][np.concatenate([problem.forget, chosen])]
    assert_followed(found, models, x[:, None], labels[:, None], [(0.3, [[(np.arange(45), 1.0, 0.0)]])])


@pytest.mark.parametrize(("part", "count"), [(0.4, 22), (0.5, 28), (1e-6, 1), (1.0, 55)])
def test_a_part_of_what_is_retained_is_so_many_of_it(task, part, count):
    problem, _, keys = task
    chosen = baselines._sample(keys[0], problem.retain, part)
    assert len(chosen) == len(np.unique(chosen)) == count
    assert set(chosen) <= set(problem.retain)


@pytest.mark.parametrize("rewind", [None, np.zeros(2)])
def test_scrub_without_an_epoch_is_refused(task, rewind):
    problem, models, keys = task
    with pytest.raises(InvalidInputError, match=r"epochs = 0\n.*at least one epoch"):
        baselines.scrub(problem, models, keys, settings=BRISK._replace(epochs=0), rewind=rewind)


def test_parts_are_parts(task):
    problem, models, keys = task
    with pytest.raises(InvalidInputError, match="part = 0"):
        baselines.retain_descent(problem, models, keys, part=0.0)
    with pytest.raises(InvalidInputError, match=r"saliency = 1\.5"):
        baselines.salun(problem, models, keys, saliency=1.5)
    assert jnp.isfinite(models.params["kernel"]).all()
