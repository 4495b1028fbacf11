import math
import re
import tomllib
from pathlib import Path

import jax
import pytest

from jattrib import recipes
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.recipes import build, cli, rundir, shipped

HEADER = """\
# A line that is no entry.
# title:      What it is
# reproduces: a figure of a paper,
#             continued: here
# expected:   lds = 0.68 ± 0.03
#             ceiling >= .85
#             loss <= 1e-3
# note: not an entry
#   and what follows it neither
# command:    jattrib run x.toml

# title: not in the header any more
seed = 1
"""


def test_a_header_is_read_entry_by_entry():
    header = shipped.parse_header(HEADER)
    assert header.title == "What it is"
    assert header.reproduces == "a figure of a paper, continued: here"
    assert header.command == "jattrib run x.toml"
    assert header.hardware == ""


def test_expected_values_are_ranges():
    around, least, most = shipped.parse_header(HEADER).expected
    assert (around.figure, around.text) == ("lds", "0.68 ± 0.03")
    assert (around.low, around.high) == pytest.approx((0.65, 0.71))
    assert least == ("ceiling", 0.85, math.inf, "≥ .85")
    assert most == ("loss", -math.inf, 1e-3, "≤ 1e-3")


def test_an_expected_value_that_is_none():
    with pytest.raises(InvalidInputError, match=r"mine: expected: about \.7\n.*lds_expected = 0.68 ± 0.03"):
        shipped.parse_header("# expected: about .7", name="mine")


def test_a_shipped_config_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = shipped.root() / "attribution" / "trak_fashion_mnist.toml"
    for name in ("configs/attribution/trak_fashion_mnist.toml", "attribution/trak_fashion_mnist"):
        assert shipped.find(name) == wanted
    (tmp_path / "own.toml").write_text("")
    assert shipped.find("own.toml") == Path("own.toml")


def test_a_config_that_is_not_there_lists_those_that_are():
    with pytest.raises(InvalidInputError) as caught:
        shipped.find("configs/trak_fashion_mnits.toml")
    assert caught.value.got == "no config configs/trak_fashion_mnits.toml"
    assert "attribution/trak_fashion_mnist.toml" in caught.value.expected
    assert caught.value.remedy == "did you mean attribution/trak_fashion_mnist.toml?"
    with pytest.raises(InvalidInputError, match="`jattrib list` says what each of them does"):
        shipped.find("qqqq.toml")


@pytest.mark.parametrize("name", shipped.names())
def test_every_shipped_config_is_whole(name):
    """The header has every entry and names this file; the config loads; its model can be evaluated on its data."""
    header = shipped.read_header(shipped.root() / name)
    assert all(header)
    assert f"configs/{name}" in header.command
    _, config = recipes.load(shipped.root() / name)
    try:
        train, test = build.load_data(config.data)
    except StoreError as error:  # a text that is fetched when it is first used
        pytest.skip(f"no data here: {error.got}")
    count = build.classes(train, test)
    model = build.build_model(config.model, train.inputs.shape[1:], count)

    def logits(key):
        params, state = model.init(key)
        return model.apply(params, state, train.inputs[:2])[0]

    assert jax.eval_shape(logits, jax.random.key(0)).shape == (2, *train.labels.shape[1:], count)
    assert len(build.class_names(config.data, count)) == count


def test_the_list_shows_every_config_with_a_command_to_copy(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["list"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name in shipped.names():
        header = shipped.read_header(shipped.root() / name)
        for part in (name, header.title, header.command, *(entry.text for entry in header.expected)):
            assert part in printed
        assert re.sub(r"\s+", " ", header.cost) in re.sub(r"\s+", " ", printed)


def test_the_wheel_carries_every_config():
    tables = tomllib.loads((shipped.root().parent / "pyproject.toml").read_text())
    assert tables["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"configs": "jattrib/configs"}
    files = [file.relative_to(shipped.root()).as_posix() for file in shipped.root().glob("**/*.toml")]
    assert shipped.names() == sorted(files) != []


def test_an_installed_package_finds_its_own(tmp_path, monkeypatch):
    (tmp_path / "jattrib" / "recipes").mkdir(parents=True)
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "jattrib" / "recipes" / "shipped.py"))
    assert shipped.root() == tmp_path / "configs"
    (tmp_path / "jattrib" / "configs").mkdir()
    assert shipped.root() == tmp_path / "jattrib" / "configs"
    assert shipped.names() == []


PARTS = {
    "attribution/comparison_fashion_mnist.toml": "evaluation.fixed_fraction=1e-5",
    "attribution/influence_fashion_mnist.toml": "evaluation.fixed_fraction=1e-5",
    "attribution/influence_text.toml": "method.fraction=1e-5",
    "attribution/magic_fashion_mnist.toml": "method.fractions=[0.01, 1e-5]",
    "attribution/magic_text.toml": "method.smoothness_fraction=1e-5",
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_without_an_example_is_named_before_anything_is_trained(name, tmp_path):
    text, out = tmp_path / "lines.txt", tmp_path / "out"
    text.write_text("".join(f"line {number} of a text\n" for number in range(500)))
    own = ["data.name=file", f"data.path={text}"] if "text" in name else []
    recipe, config = recipes.load(shipped.root() / name, [PARTS[name], "data.train_size=400", *own])
    with pytest.raises(InvalidInputError, match=rf"{PARTS[name].split('=')[0]}\S* = 1e-05 of 400 training examples"):
        recipe.run(config, rundir.RunDir(out, {}, 0.0, 0.0))
    assert not out.exists()


@pytest.mark.parametrize("name", [name for name in shipped.names() if "text" not in name])
def test_a_recipe_that_shows_images_takes_no_text(name):
    with pytest.raises(InvalidInputError, match=r"data.kind = 'text'\n.*one of fashion_mnist_excerpt, fashion_mnist"):
        recipes.load(shipped.root() / name, ["data.kind=text"])


@pytest.mark.parametrize(("name", "least"), [("magic_fashion_mnist", 3), ("magic_text", 3), ("influence_text", 3)])
def test_an_lds_has_models_enough(name, least):
    with pytest.raises(InvalidInputError, match=rf"method.subsets = 2\n.*of at least {least}"):
        recipes.load(shipped.root() / f"attribution/{name}.toml", ["method.subsets=2"])
