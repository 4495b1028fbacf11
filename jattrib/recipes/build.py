"""From the shared rooms of a config to arrays and functions: the only translation of the two."""

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8

from jattrib.core.errors import InvalidInputError
from jattrib.data import corpus, vision
from jattrib.models import gpt, mlp, resnet
from jattrib.models.model import Model
from jattrib.recipes import config as configs


def load_data(room: configs.Data) -> tuple[vision.Dataset, vision.Dataset]:
    """Return training and test set.

    Raises:
        InvalidInputError: a size is larger than its set, or the data are unsound.
        StoreError: a file is missing or damaged.
    """
    match room:
        case configs.FashionMnistExcerpt():
            train, test = vision.fashion_mnist_excerpt()
        case configs.FashionMnist(path=path):
            train, test = vision.fashion_mnist(path)
        case configs.Digits():
            train, test = vision.digits()
        case configs.Npz(path=path):
            train = vision.npz(path, inputs="train_inputs", labels="train_labels")
            test = vision.npz(path, inputs="test_inputs", labels="test_labels", classes=classes(train))
            if test.inputs.shape[1:] != train.inputs.shape[1:]:
                raise InvalidInputError(
                    f"{path}: test_inputs of shape {test.inputs.shape}",
                    expected=f"examples of shape {train.inputs.shape[1:]}, as in train_inputs",
                    remedy="store the examples of both sets in one shape",
                )
        case configs.Text(length=length):
            parts = passages(room)
            known = corpus.alphabet([*parts[0], *parts[1]])
            train, test = (
                corpus.sequences([corpus.characters(each.text, known) for each in part], length) for part in parts
            )
    return _first(train, room.train_size, "data.train_size"), _first(test, room.test_size, "data.test_size")


def passages(room: configs.Text) -> tuple[list[corpus.Passage], list[corpus.Passage]]:
    """Return the passages of training and test set, in the order of `load_data`, before sizes are cut."""
    found = corpus.read(room.name, path=room.path)
    order = np.random.default_rng(room.seed).permutation(len(found))
    held = -(-len(found) // 10)
    return [found[i] for i in order[held:]], [found[i] for i in order[:held]]


def to_images(room: configs.Images, inputs: Float[np.ndarray, "n ..."]) -> UInt8[np.ndarray, "n h w c"]:
    """Return inputs as pixels of 0 to 255, for pictures: what normalisation did is undone.

    How an NPZ file's inputs came about is not known: their range is spread over 0 to 255, and inputs that are not
    images become a strip, one pixel a feature.
    """
    match room:
        case configs.FashionMnistExcerpt() | configs.FashionMnist():
            return vision.to_images(inputs, vision.FASHION_MNIST_PIXELS)
        case configs.Digits():
            return vision.to_images(inputs, vision.DIGITS_PIXELS)
        case configs.Npz():
            image = inputs.ndim == 4 and inputs.shape[-1] in (1, 3)
            shaped = inputs if image else inputs.reshape(len(inputs), 1, -1, 1)
            low, high = shaped.min(), shaped.max()
            return np.rint((shaped - low) * (255 / (float(high - low) or 1.0))).astype(np.uint8)


def class_names(room: configs.Data, count: int) -> tuple[str, ...]:
    """Return what the classes are called; their numbers, where they have no names."""
    if isinstance(room, configs.FashionMnistExcerpt | configs.FashionMnist):
        return vision.FASHION_MNIST_CLASSES
    return tuple(str(label) for label in range(count))


def classes(*sets: vision.Dataset) -> int:
    """Return the number of classes: one more than the largest label of the training set.

    Tokens that are in the test set alone count too, if it is given.
    """
    return max(int(each.labels.max()) for each in sets) + 1


def build_model(room: configs.Model, shape: tuple[int, ...], count: int) -> Model:
    """Return the model.

    Args:
        room: which one.
        shape: the shape of one input.
        count: the number of classes.

    Raises:
        InvalidInputError: a model of images is asked for, and inputs are no images, or too small ones.
    """
    match room:
        case configs.Mlp(widths=widths, activation=activation):
            return mlp.mlp(int(np.prod(shape)), widths, count, activation=activation)
        case configs.ResNet9(width=width, normalisation=normalisation):
            if len(shape) != 3:
                raise InvalidInputError(
                    f"inputs of shape {shape} for a resnet9",
                    expected="images of shape (height, width, channels)",
                    remedy='use model.kind = "mlp", or store the inputs as images',
                )
            return resnet.resnet9(shape, count, width=width, normalisation=normalisation)
        case configs.Gpt(style=style, width=width, layers=layers, heads=heads, scale=scale):
            if len(shape) != 1:
                raise InvalidInputError(
                    f"inputs of shape {shape} for a gpt",
                    expected="sequences of tokens",
                    remedy='use data.kind = "text", or another model',
                )
            return gpt.decoder(gpt.Config(style, count, shape[0], width, layers, heads, scale=scale))


def optimizer(room: configs.Training, steps: int) -> optax.GradientTransformation:
    """Return gradient descent with momentum, `v ← μv + g + λθ`, `θ ← θ − η_t v`, for a run of `steps` steps.

    For an `AdamTraining` it is Adam with decoupled weight decay, `θ ← θ − η_t (m̂ / (√(v̂ + ε_root) + 10⁻⁸) + λθ)`.
    """
    if isinstance(room, configs.AdamTraining):
        return optax.adamw(
            learning_rate(room, steps), room.momentum, room.square_momentum, eps_root=room.epsilon_root,
            weight_decay=room.weight_decay,
        )  # fmt: skip
    return optax.chain(
        optax.add_decayed_weights(room.weight_decay),
        optax.sgd(learning_rate(room, steps), momentum=room.momentum),
    )


def learning_rate(room: configs.Training, steps: int) -> optax.Schedule:
    """Return the rate by step: it rises on a line from zero until the peak, then does what the schedule says.

    A step takes the rate at its middle, `x = (t + ½) / steps`, so that no step is wasted on a rate of zero:
    `η_t = η · min(x / peak, fall(x))`.  After the peak `fall` is `(1 − x) / (1 − peak)` (triangular),
    `½ + ½ cos π(x − peak) / (1 − peak)` (cosine) or 1 (constant); before it, 1.
    """

    def rate(step: ArrayLike) -> Float[Array, ""]:
        x = (jnp.asarray(step, float) + 0.5) / steps
        rise = x / room.peak if room.peak else jnp.ones_like(x)
        after = jnp.clip((x - room.peak) / (1 - room.peak), 0, 1)
        falls = {"triangular": 1 - after, "cosine": 0.5 + 0.5 * jnp.cos(jnp.pi * after), "constant": 1 + 0 * after}
        return room.learning_rate * jnp.minimum(rise, falls[room.schedule])

    return rate


def _first(dataset: vision.Dataset, size: int | None, name: str) -> vision.Dataset:
    if size is None:
        return dataset
    if size > len(dataset.labels):
        raise InvalidInputError(
            f"{name} = {size}",
            expected=f"at most {len(dataset.labels)}, the examples that there are",
            remedy=f"lower {name}, or leave it out to keep all",
        )
    return vision.Dataset(dataset.inputs[:size], dataset.labels[:size])
