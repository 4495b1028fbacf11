import msgspec
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.recipes import config


class Method(config.Room, frozen=True):
    dim: config.Count = 1024
    alpha: config.Fraction = 0.5
    projection: str = "sketch"
    sizes: tuple[config.Count, ...] = (1,)
    exact: bool = False
    limit: config.Count | None = None


class Whole(config.Room, frozen=True, tag_field="recipe", tag="whole"):
    data: config.Data
    model: config.Model = config.Mlp()
    training: config.Training = config.Training()
    method: Method = Method()
    seed: int = 0


GOOD = """
recipe = "whole"
seed = 3

[data]
kind = "fashion_mnist"
path = "somewhere"

[method]
dim = 64
"""


@pytest.fixture
def load(tmp_path):
    def from_text(text, *overrides):
        file = tmp_path / "case.toml"
        file.write_text(text, "utf-8")
        return config.convert(config.read(file, overrides), Whole)

    return from_text


def test_a_file_sets_what_it_names_and_leaves_the_rest(load):
    got = load(GOOD)
    assert got == Whole(config.FashionMnist(path="somewhere"), method=Method(dim=64), seed=3)
    assert got.training.momentum == 0.9


def test_plain_and_back_is_the_same(load):
    got = load(GOOD, "model={kind='resnet9', width=16}")
    assert msgspec.convert(config.plain(got), Whole) == got
    assert config.plain(got)["model"] == {"kind": "resnet9", "width": 16, "normalisation": "batch"}


def test_overrides_lie_over_the_file_and_later_ones_over_earlier_ones(load):
    got = load(GOOD, "method.dim=8192", "seed=1", "method.projection=dense", "method.sizes=[2, 3]", "seed=2")
    assert got.method == Method(dim=8192, projection="dense", sizes=(2, 3))
    assert got.seed == 2
    assert load(GOOD, "data.path=/a/b-c").data == config.FashionMnist(path="/a/b-c")


def test_another_kind_starts_its_table_afresh(load):
    assert load(GOOD, "data.kind=digits", "data.train_size=9").data == config.Digits(train_size=9)
    assert load(GOOD, "data.train_size=9", "data.kind=fashion_mnist").data == config.FashionMnist(
        path="somewhere", train_size=9
    )


def test_rooms_are_frozen(load):
    with pytest.raises(AttributeError):
        load(GOOD).seed = 4


def message(load, text, *overrides):
    with pytest.raises(InvalidInputError) as caught:
        load(text, *overrides)
    return caught.value


def test_an_unknown_key_is_named_with_file_known_keys_and_a_close_match(load):
    error = message(load, GOOD.replace("dim", "dimm"))
    assert error.got.endswith("case.toml: unknown key method.dimm")
    assert error.expected == "one of the keys of [method]: dim, alpha, projection, sizes, exact, limit"
    assert error.remedy == "did you mean method.dim?"


def test_an_unknown_key_of_the_command_line_is_told_from_one_of_the_file(load):
    error = message(load, GOOD, "zzz=1")
    assert error.got == "command line: unknown key zzz"
    assert error.expected == "one of the keys of the top of the file: recipe, data, model, training, method, seed"
    assert error.remedy == "remove it, or put it into its own table"


def test_keys_are_those_of_the_kind(load):
    error = message(load, GOOD.replace('"fashion_mnist"', '"digits"'))
    assert error.got.endswith("unknown key data.path")
    assert error.expected == "one of the keys of [data]: kind, train_size, test_size"


@pytest.mark.parametrize(
    ("override", "got", "expected", "remedy"),
    [
        ("method.dim=many", 'method.dim = "many"', "a whole number of at least 1", "method.dim = 1024"),
        ("method.dim=0", "method.dim = 0", "a whole number of at least 1", "method.dim = 1024"),
        ("method.dim=8.5", "method.dim = 8.5", "a whole number of at least 1", "method.dim = 1024"),
        ("method.alpha=1", "method.alpha = 1", "a number above 0 and below 1", "method.alpha = 0.5"),
        ("method.alpha=nan", "method.alpha = NaN", "a number above 0 and below 1", "method.alpha = 0.5"),
        ("method.exact=1", "method.exact = 1", "true or false", "method.exact = false"),
        ("method.projection=1", "method.projection = 1", "text", 'method.projection = "sketch"'),
        ("method.sizes=[4, 0]", "method.sizes = [4, 0]", "a list, each entry a whole number", "method.sizes = [1]"),
        ("method.limit=0", "method.limit = 0", "a whole number of at least 1 or left out", "change the value"),
        ("training.schedule=linear", 'training.schedule = "linear"', "one of triangular, cosine", '"triangular"'),
        ("training.learning_rate=inf", "training.learning_rate = Infinity", "a number above 0", "= 0.1"),
        ("training=3", "training = 3", "a table", "change the value"),
        ("seed=9223372036854775808", "seed = 9223372036854775808", "a whole number that fits 64 bits", "seed = 0"),
        ("seed=-9223372036854775809", "seed = -9223372036854775809", "a whole number that fits 64 bits", "seed = 0"),
        (
            "training.epochs=1_000_000_000_000_000_000_000",
            "training.epochs = 1000000000000000000000",
            "of at least 1 that fits 64 bits",
            "= 30",
        ),
        ("data={kind='text', seed=-1}", "data.seed = -1", "a whole number of at least 0", "data.seed = 0"),
        ("data={kind='text', seed=18446744073709551616}", "data.seed = 18446744073709551616", "fits 64 bits", "= 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_its_key_takes(load, override, got, expected, remedy):
    error = message(load, GOOD, override)
    assert error.got == f"command line: {got}"
    assert expected in error.expected
    assert remedy in error.remedy


def test_seeds_are_of_64_bits(load):
    for seed in (-(2**63), -1, 0, 2**63 - 1):
        assert load(GOOD, f"seed={seed}").seed == seed
    assert load(GOOD, f"data={{kind='text', seed={2**63 - 1}}}").data.seed == 2**63 - 1


def test_an_integer_is_a_number(load):
    assert load(GOOD, "training.learning_rate=1").training.learning_rate == 1.0


def test_an_unknown_kind_lists_the_kinds(load):
    error = message(load, GOOD, "model.kind=resnet")
    assert error.got == "command line: model.kind = 'resnet'"
    assert error.expected == "one of mlp, resnet9, gpt"
    assert error.remedy == "did you mean resnet9?"


def test_a_table_without_its_kind(load):
    error = message(load, GOOD.replace('kind = "fashion_mnist"', ""))
    assert error.got.endswith("case.toml: no data.kind")
    assert error.remedy == 'write for example data.kind = "fashion_mnist_excerpt"'


def test_a_missing_table_and_a_missing_key(load):
    error = message(load, 'recipe = "whole"')
    assert error.got.endswith("case.toml: no data")
    assert error.expected == "data, a table of kind fashion_mnist_excerpt, fashion_mnist, digits, npz, text"
    error = message(load, 'recipe = "whole"\ndata.kind = "npz"')
    assert error.got.endswith("no data.path")
    assert error.expected == "data.path, text"
    assert error.remedy == "add it to the file, or to the command as data.path=..."


def test_toml_that_is_none_names_the_line(load):
    error = message(load, "recipe = trak")
    assert "line 1" in error.got
    assert error.expected == "a TOML file"


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InvalidInputError, match=r"nowhere.toml: No such file(.|\n)*jattrib list"):
        config.read(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInputError, match=r"binary.toml: not UTF-8 text"):
        config.read(tmp_path / "binary.toml")


@pytest.mark.parametrize("fragment", ["method.dim", "=3", "a b=3", "method.dim=\n3", "method..dim=3"])
def test_an_override_that_is_none(load, fragment):
    error = message(load, GOOD, fragment)
    assert error.got == f"override {fragment!r}"
    assert "method.dim=8192" in error.expected


def test_a_rooms_own_check_keeps_its_error(tmp_path):
    class Strict(config.Room, frozen=True):
        low: int
        high: int

        def __post_init__(self):
            if self.low > self.high:
                raise InvalidInputError(f"low {self.low}", expected="at most high", remedy="exchange them")

    (tmp_path / "s.toml").write_text("low = 2\nhigh = 1")
    with pytest.raises(InvalidInputError, match="low 2\n  expected: at most high\n  remedy:   exchange them"):
        config.convert(config.read(tmp_path / "s.toml"), Strict)


def test_flatten_keeps_order():
    assert list(config.flatten({"b": {"y": 1, "x": {"z": [2]}}, "a": 3})) == [("b.y", 1), ("b.x.z", [2]), ("a", 3)]
