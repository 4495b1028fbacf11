import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.data import vision
from jattrib.recipes import build, config, experiment, rundir


@pytest.fixture
def npz(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "train_inputs": rng.normal(size=(7, 5)).astype(np.float32),
        "train_labels": np.array([0, 1, 2, 0, 1, 2, 2]),
        "test_inputs": rng.normal(size=(3, 5)).astype(np.float32),
        "test_labels": np.array([2, 1, 0]),
    }
    np.savez(tmp_path / "data.npz", **arrays)
    return config.Npz(path=str(tmp_path / "data.npz")), arrays


def test_npz_reads_both_sets_and_sizes_keep_the_first(npz):
    room, arrays = npz
    train, test = build.load_data(room)
    np.testing.assert_array_equal(train.inputs, arrays["train_inputs"])
    np.testing.assert_array_equal(test.labels, arrays["test_labels"])
    assert build.classes(train) == 3
    train, test = build.load_data(config.Npz(path=room.path, train_size=4, test_size=1))
    np.testing.assert_array_equal(train.labels, [0, 1, 2, 0])
    np.testing.assert_array_equal(test.inputs, arrays["test_inputs"][:1])


def test_a_size_larger_than_the_set(npz):
    with pytest.raises(InvalidInputError, match=r"data.test_size = 4\n.*at most 3.*\n.*lower data.test_size"):
        build.load_data(config.Npz(path=npz[0].path, test_size=4))


def test_a_missing_data_path():
    with pytest.raises(StoreError, match=r"nowhere.npz(.|\n)*remedy: .*check the path"):
        build.load_data(config.Npz(path="nowhere.npz"))
    with pytest.raises(StoreError, match=r"nowhere(.|\n)*the embedded excerpt"):
        build.load_data(config.FashionMnist(path="nowhere"))


def test_a_test_label_that_training_does_not_have(npz, tmp_path):
    np.savez(tmp_path / "bad.npz", **{**npz[1], "test_labels": np.array([0, 3, 1])})
    with pytest.raises(InvalidInputError, match=r"label 3 of example 1\n.*labels from 0 to 2"):
        build.load_data(config.Npz(path=str(tmp_path / "bad.npz")))


def test_test_inputs_of_another_shape_than_those_of_training(npz, tmp_path):
    np.savez(tmp_path / "bad.npz", **{**npz[1], "test_inputs": np.ones((3, 4), np.float32)})
    with pytest.raises(
        InvalidInputError,
        match=r"bad.npz: test_inputs of shape \(3, 4\)\n.*examples of shape \(5,\), as in train_inputs",
    ):
        build.load_data(config.Npz(path=str(tmp_path / "bad.npz")))


def test_the_kinds_read_what_they_name():
    train, test = build.load_data(config.Digits(train_size=20, test_size=5))
    whole, _ = vision.digits()
    np.testing.assert_array_equal(train.inputs, whole.inputs[:20])
    assert len(test.labels) == 5
    train, _ = build.load_data(config.FashionMnistExcerpt(train_size=20))
    np.testing.assert_array_equal(train.labels, vision.fashion_mnist_excerpt()[0].labels[:20])
    from_files, _ = build.load_data(config.FashionMnist(path=str(vision.EXCERPT_PATH), train_size=20))
    np.testing.assert_array_equal(train.inputs, from_files.inputs)


def test_classes_have_names():
    assert build.class_names(config.FashionMnistExcerpt(), 10)[9] == "Ankle boot"
    assert build.class_names(config.Digits(), 3) == ("0", "1", "2")


def test_images_undo_normalisation():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1)).astype(np.uint8)
    inputs = vision.normalise(pixels)
    np.testing.assert_array_equal(build.to_images(config.FashionMnistExcerpt(), inputs), pixels)
    unknown = build.to_images(config.Npz(path=""), inputs)
    spread = np.rint((pixels - pixels.min()) * (255.0 / np.ptp(pixels)))
    assert np.abs(unknown.astype(float) - spread).max() <= 1
    strip = build.to_images(config.Npz(path=""), np.array([[0.0, 1.0, 0.5]]))
    assert strip.tolist() == [[[[0], [255], [128]]]]
    assert build.to_images(config.Npz(path=""), np.full((1, 2), 3.0)).tolist() == [[[[0], [0]]]]


def shapes_of(model, *shape):
    def logits(key, inputs):
        params, state = model.init(key)
        return params, model.apply(params, state, inputs)[0]

    return jax.eval_shape(logits, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_models_are_those_of_the_room():
    params, logits = shapes_of(build.build_model(config.Mlp(widths=(5, 4)), (2, 3, 1), 7), 6, 2, 3, 1)
    assert logits.shape == (6, 7)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == (6 * 5 + 5) + (5 * 4 + 4) + (4 * 7 + 7)
    rooms = [config.ResNet9(width=4, normalisation=name) for name in ("group", "batch")]
    params, logits = zip(
        *(shapes_of(build.build_model(room, (12, 12, 1), 3), 2, 12, 12, 1) for room in rooms), strict=True
    )
    assert all(each.shape == (2, 3) for each in logits)
    assert {leaf.shape for leaf in jax.tree.leaves(params[0])} >= {(3, 3, 1, 4), (5, 5, 4, 8), (8, 3)}


def test_a_resnet_wants_images():
    with pytest.raises(InvalidInputError, match=r"inputs of shape \(5,\) for a resnet9\n.*\n.*model.kind = \"mlp\""):
        build.build_model(config.ResNet9(), (5,), 3)


def rates(steps, **fields):
    room = config.Training(learning_rate=2.0, **fields)
    return np.array([build.learning_rate(room, steps)(step) for step in range(steps)])


def test_the_rate_is_triangular_about_its_peak():
    np.testing.assert_allclose(
        rates(8, peak=0.25), 2 * np.array([0.25, 0.75, 11 / 12, 9 / 12, 7 / 12, 5 / 12, 3 / 12, 1 / 12]), rtol=1e-6
    )
    falling = rates(4, peak=0.0)
    np.testing.assert_allclose(falling, 2 * np.array([7, 5, 3, 1]) / 8, rtol=1e-6)


def test_the_other_schedules_share_the_rise():
    x = (np.arange(40) + 0.5) / 40
    cosine = np.where(x < 0.3, x / 0.3, 0.5 + 0.5 * np.cos(np.pi * (x - 0.3) / 0.7))
    np.testing.assert_allclose(rates(40, peak=0.3, schedule="cosine"), 2 * cosine, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rates(40, peak=0.3, schedule="constant"), 2 * np.minimum(x / 0.3, 1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_optimizer_is_gradient_descent_with_momentum(dtype):
    with jax.enable_x64(dtype == np.float64):
        room = config.Training(learning_rate=0.3, momentum=0.8, weight_decay=0.1, schedule="triangular", peak=0.5)
        optimizer = build.optimizer(room, 6)
        params, wanted = {"w": jnp.asarray([1.0, -2.0], dtype)}, np.array([1.0, -2.0])
        state, velocity = optimizer.init(params), np.zeros(2)
        for step in range(6):
            gradient = jax.tree.map(lambda w: w**3, params)
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            x = (step + 0.5) / 6
            velocity = 0.8 * velocity + wanted**3 + 0.1 * wanted
            wanted = wanted - 0.3 * min(x / 0.5, (1 - x) / 0.5) * velocity
        assert params["w"].dtype == dtype
        np.testing.assert_allclose(params["w"], wanted, rtol=1e-6 if dtype == np.float64 else 1e-4)


def test_an_image_of_zeros_is_like_no_other():
    inputs = np.array([[1, 0], [0, 0], [3, 4]], np.float32)
    both = vision.Dataset(inputs, np.array([0, 1, 1]))
    task = experiment.Task(*[None] * len(experiment.Task._fields))._replace(train=both, queries=both)  # type: ignore
    np.testing.assert_allclose(experiment.similarity(task), [[1, 0, -0.6], [0, 0, 0], [-0.6, 0, 1]], rtol=1e-6)


@pytest.mark.parametrize("part", [0.001, 0.999])
def test_a_part_of_no_example_or_of_all_is_refused_before_anything_is_trained(tmp_path, part):
    data = config.Digits(train_size=200, test_size=50)
    settings = experiment.Config(
        data, config.Mlp((8,)), config.Training(), experiment.Evaluation(queries=9, counterfactual_fraction=part)
    )
    with pytest.raises(
        InvalidInputError,
        match=rf"evaluation.counterfactual_fraction = {part} of 200.*\n.*\n.*it between 0.005 and 0.995",
    ):
        experiment.prepare(settings, rundir.RunDir(tmp_path, {}, 0.0, 0.0))
