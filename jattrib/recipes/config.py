"""Configs: a TOML file, and fragments from the command line, into frozen structs.

The structs here are the rooms that recipes share: where data comes from, what the model is, how it is trained.  A
recipe puts them into a struct of its own (see the package's docstring).  `build` turns rooms into arrays and functions.
"""

import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from jattrib.core.errors import InvalidInputError, JattribError

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(gt=0, lt=1)]
"""Between 0 and 1, neither of them."""


class Room(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a config: frozen, and closed to keys that it does not know."""


class DataRoom(Room, frozen=True):
    """What every source of data can be told.

    Attributes:
        train_size: how many training examples to keep, the first ones; all when left out.
        test_size: how many test examples to keep, the first ones; all when left out.
    """

    train_size: Count | None = None
    test_size: Count | None = None


class FashionMnistExcerpt(DataRoom, frozen=True, tag_field="kind", tag="fashion_mnist_excerpt"):
    """The 5,000 training and 1,000 test images of Fashion-MNIST that come with the package."""


class FashionMnist(DataRoom, frozen=True, tag_field="kind", tag="fashion_mnist"):
    """All of Fashion-MNIST, from IDX files: those of Debian's package, fetched if need be, or of the folder `path`."""

    path: str | None = None


class Digits(DataRoom, frozen=True, tag_field="kind", tag="digits"):
    """The 8x8 digits of scikit-learn."""


class Npz(DataRoom, frozen=True, tag_field="kind", tag="npz", kw_only=True):
    """An NPZ file with the arrays `train_inputs`, `train_labels`, `test_inputs` and `test_labels`."""

    path: str


class Text(DataRoom, frozen=True, tag_field="kind", tag="text"):
    """Passages of a text, one sequence of characters each; a random tenth of them are the test set.

    Attributes:
        name: which text (`data.corpus.read`): `bible`, `fortunes`, `policy`, or `file`.
        path: a file to read in its place.
        length: characters a sequence; longer passages are cut.
        seed: of the order in which passages are taken.
    """

    name: Literal["bible", "fortunes", "policy", "file"] = "bible"
    path: str | None = None
    length: Count = 64
    seed: Annotated[int, Meta(ge=0)] = 0


Images = FashionMnistExcerpt | FashionMnist | Digits | Npz
"""Where images come from, with a label each."""

Data = Images | Text
"""Where examples come from."""


class Mlp(Room, frozen=True, tag_field="kind", tag="mlp"):
    """A multilayer perceptron: the widths of its hidden layers, and what lies between them."""

    widths: tuple[Count, ...] = (64,)
    activation: Literal["relu", "gelu"] = "relu"


class ResNet9(Room, frozen=True, tag_field="kind", tag="resnet9"):
    """A ResNet-9: the channels of its first layer, and how it normalises."""

    width: Count = 64
    normalisation: Literal["batch", "group"] = "batch"


class Gpt(Room, frozen=True, tag_field="kind", tag="gpt"):
    """A decoder of sequences in the style of GPT-2 or of Llama (`models.gpt.Config`)."""

    style: Literal["gpt2", "llama"] = "gpt2"
    width: Count = 32
    layers: Count = 2
    heads: Count = 2
    scale: Positive = 0.02


Model = Mlp | ResNet9 | Gpt
"""What is trained."""


class Training(Room, frozen=True):
    """Stochastic gradient descent with momentum.

    Attributes:
        epochs: passes over the examples that a model is trained on.
        batch_size: examples a step.
        learning_rate: the highest rate of the schedule.
        momentum: of the gradient's running sum; not Nesterov's.
        weight_decay: times the parameters, added to the gradient before momentum.
        schedule: what the rate does after its rise: falls to zero on a line or on a cosine, or stays.
        peak: after which part of the steps the rate is highest.
    """

    epochs: Count = 30
    batch_size: Count = 250
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 0.0
    schedule: Literal["triangular", "cosine", "constant"] = "triangular"
    peak: Annotated[float, Meta(ge=0, lt=1)] = 0.25


class AdamTraining(Training, frozen=True):
    """Adam, with decoupled weight decay; `momentum` is β₁.

    Attributes:
        square_momentum: β₂, of the running mean of squares.
        epsilon_root: under the root of it; without one Adam has no derivative where a gradient is zero.
    """

    square_momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.99
    epsilon_root: NonNegative = 1e-8


class Source(NamedTuple):
    """A config before its types are checked.

    Attributes:
        file: the TOML file.
        table: its contents under the overrides.
        overrides: what the command line said, as one table: errors name the place that a key came from.
    """

    file: Path
    table: dict[str, Any]
    overrides: dict[str, Any]


def read(file: Path, overrides: Sequence[str] = ()) -> Source:
    """Read a TOML file and lay fragments such as `method.dim=8192` over it, later ones over earlier ones.

    A value that is not TOML is taken as text, so that `method.projection=dense` needs no quotes.  A fragment that sets
    another `kind` starts its table afresh: the file's other keys there belong to the kind that it chose.

    Raises:
        InvalidInputError: the file cannot be read, or it or a fragment is not TOML.
    """
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InvalidInputError(
            f"{file}: {reason}",
            expected="a readable TOML file",
            remedy="check the path; `jattrib list` names the configs that come with the package",
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidInputError(
            f"{file}: {error}", expected="a TOML file", remedy="mend that line; text values need quotes in a file"
        ) from error
    over: dict[str, Any] = {}
    for fragment in overrides:
        over = _merge(over, _fragment(fragment))
    return Source(file, _merge(table, over), over)


RoomT = TypeVar("RoomT", bound=Room)


def convert(source: Source, config_type: type[RoomT]) -> RoomT:
    """Return the config as a `config_type`, every key and type and range checked.

    Raises:
        InvalidInputError: a key is unknown or missing, or a value is not what its key expects.
    """
    _check(source, source.table, config_type, ())
    try:
        return msgspec.convert(source.table, config_type)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, JattribError):  # raised by a room's __post_init__
            raise error.__cause__ from None
        raise InvalidInputError(
            f"{source.file}: {error}", expected="keys that fit together", remedy="change one of them"
        ) from error


def plain(config: Room) -> dict[str, Any]:
    """Return a config as what JSON knows: tables, lists, numbers, text; defaults included."""
    return msgspec.json.decode(msgspec.json.encode(config))


def flatten(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables by their dotted keys, in order."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def close_match(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that `name` is most likely a slip of, if there is one."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None


def _fragment(fragment: str) -> dict[str, Any]:
    key, equals, value = fragment.partition("=")
    for text in (value, json.dumps(value.strip())):
        try:
            return tomllib.loads(f"{key}={text}") if equals and "\n" not in fragment else {}[key]
        except (tomllib.TOMLDecodeError, KeyError):
            continue
    raise InvalidInputError(
        f"override {fragment!r}",
        expected="key=value with a dotted key, as in method.dim=8192",
        remedy="write no spaces around `=`, and quote the whole for the shell if the value has any",
    )


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    afresh = "kind" in under and "kind" in over and over["kind"] != under["kind"]
    merged = {} if afresh else dict(under)
    for key, value in over.items():
        before = merged.get(key)
        merged[key] = _merge(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


Place = tuple[str, ...]


def _check(source: Source, value: Any, expected: Any, place: Place, default: Any = msgspec.NODEFAULT) -> None:
    """Hold a value of the raw table against its type, and tables key by key: msgspec would not name the known keys."""
    structs = [option for option in (get_args(expected) or (expected,)) if _is_struct(option)]
    if structs:
        if not isinstance(value, dict):
            _refuse_type(source, value, "a table", place, default)
        _check_table(source, value, structs, place)
        return
    try:
        found = msgspec.convert(value, expected)
        if isinstance(value, float) and not math.isfinite(value):
            raise msgspec.ValidationError
    except msgspec.ValidationError:
        _refuse_type(source, value, describe(expected), place, default)
    if isinstance(found, int) and not -(2**63) <= found < 2**63:
        _refuse_type(source, value, f"{describe(expected)} that fits 64 bits", place, default)


def _check_table(source: Source, table: dict[str, Any], structs: list[type[msgspec.Struct]], place: Place) -> None:
    tag_field = structs[0].__struct_config__.tag_field
    struct = structs[0]
    if tag_field is not None:
        tags = {str(option.__struct_config__.tag): option for option in structs}
        struct = tags.get(str(table.get(tag_field)))
        if struct is None:
            _refuse_tag(source, table, tag_field, list(tags), place)
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    known = [tag_field, *fields] if tag_field else list(fields)
    for key in table:
        if key not in known:
            _refuse_key(source, key, known, place)
    for name, field in fields.items():
        if name in table:
            _check(source, table[name], field.type, (*place, name), field.default)
        elif field.required:
            dotted = ".".join((*place, name))
            raise InvalidInputError(
                f"{source.file}: no {dotted}",
                expected=f"{dotted}, {describe(field.type)}",
                remedy=f"add it to the file, or to the command as {dotted}=...",
            )


def _refuse_key(source: Source, key: str, known: list[str], place: Place) -> NoReturn:
    match = close_match(key, known)
    dotted = ".".join((*place, key))
    where = f"[{'.'.join(place)}]" if place else "the top of the file"
    raise InvalidInputError(
        f"{_origin(source, (*place, key))}: unknown key {dotted}",
        expected=f"one of the keys of {where}: {', '.join(known)}",
        remedy=f"did you mean {'.'.join((*place, match))}?" if match else "remove it, or put it into its own table",
    )


def _refuse_tag(source: Source, table: dict[str, Any], tag_field: str, tags: list[str], place: Place) -> NoReturn:
    dotted = ".".join((*place, tag_field))
    tag = table.get(tag_field)
    match = close_match(str(tag), tags)
    raise InvalidInputError(
        f"{source.file}: no {dotted}" if tag is None else f"{_origin(source, (*place, tag_field))}: {dotted} = {tag!r}",
        expected=f"one of {', '.join(tags)}",
        remedy=f"did you mean {match}?" if match else f'write for example {dotted} = "{tags[0]}"',
    )


def _refuse_type(source: Source, value: Any, expected: str, place: Place, default: Any) -> NoReturn:
    dotted = ".".join(place)
    plain_default = isinstance(default, bool | int | float | str | tuple)
    raise InvalidInputError(
        f"{_origin(source, place)}: {dotted} = {_shown(value)}",
        expected=f"{dotted} to be {expected}",
        remedy=f"write for example {dotted} = {_shown(default)}" if plain_default else "change the value",
    )


def _origin(source: Source, place: Place) -> str:
    """Name where the key at `place` was written: on the command line or in the file."""
    table: Any = source.overrides
    for key in place:
        if not isinstance(table, dict) or key not in table:
            return str(source.file)
        table = table[key]
    return "command line"


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _is_struct(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, msgspec.Struct)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "left out"}
_BOUNDS = {
    "ge": "of at least {:g}", "gt": "above {:g}", "le": "of at most {:g}", "lt": "below {:g}",
    "min_length": "with at least {} of them", "max_length": "with at most {} of them",
}  # fmt: skip


def describe(expected: Any) -> str:
    """Say in words what a field of this type takes."""
    arguments = get_args(expected)
    if get_origin(expected) is Annotated:
        bounds = [
            words.format(limit)
            for meta in arguments[1:]
            for bound, words in _BOUNDS.items()
            if (limit := getattr(meta, bound, None)) is not None
        ]
        return " ".join([describe(arguments[0]), " and ".join(bounds)]).strip()
    if get_origin(expected) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if get_origin(expected) in (tuple, list):
        return f"a list, each entry {describe(arguments[0])}"
    structs = [option for option in (arguments or (expected,)) if _is_struct(option)]
    if structs:
        tags = [str(option.__struct_config__.tag) for option in structs if option.__struct_config__.tag_field]
        return f"a table of kind {', '.join(tags)}" if tags else "a table"
    if arguments:
        return " or ".join(describe(option) for option in arguments)
    return _NAMES.get(expected, getattr(expected, "__name__", str(expected)))
