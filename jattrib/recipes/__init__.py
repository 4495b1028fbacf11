"""Recipes: the only place that knows files and terminals.

A recipe turns one config into one directory of results.  It is a module with two names,

    class Config(config.Room, frozen=True, tag_field="recipe", tag="trak"):
        data: config.Data
        model: config.Model
        training: config.Training
        method: Method            # a Room of the recipe's own
        seed: int = 0

    def run(config: Config, directory: rundir.RunDir) -> None: ...

and one line in `RECIPES`.  The tag is what a config file says in its first line, `recipe = "trak"`.  `run` does three
things, all through the helpers of this package, so that every recipe resumes, reports and fails in the same way:

1. its work, in named stages.  `with rundir.stage(directory, "checkpoints") as folder:` yields a folder that is the
   stage's own and survives a kill; what a stage finds there it does not do again (`train.ensemble` and `core.store`
   resume from a folder by themselves).  The seconds of a stage add up over resumes.
2. its pictures and its report: `plot.save_png(figure, directory.path / "lds.png")` and `report.write(directory, ...)`.
3. last, `rundir.finish(directory, figures)`: the flat figures, by name, unit in the name.  It adds config, versions,
   device and seconds and writes `summary.json`, which is what says that the run is done.

`run` never looks whether the run is done, never catches what it cannot mend, and prints through `core.progress` alone;
`cli` opens the directory, refuses that of another config, and prints figures and errors.  Library functions below this
package take keywords, never a config: `build` translates the shared rooms.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jattrib.core.errors import InvalidInputError
from jattrib.recipes import config
from jattrib.recipes.config import Room
from jattrib.recipes.rundir import RunDir


class Recipe(NamedTuple):
    """What `RECIPES` knows of a recipe.

    Attributes:
        config_type: the struct that its configs are read into.
        run: does the work, and writes pictures, report and summary into the directory.
    """

    config_type: type[Room]
    run: Callable[[Any, RunDir], None]


def _trak() -> Recipe:
    from jattrib.recipes import trak

    return Recipe(trak.Config, trak.run)


def _comparison() -> Recipe:
    from jattrib.recipes import comparison

    return Recipe(comparison.Config, comparison.run)


def _magic() -> Recipe:
    from jattrib.recipes import magic

    return Recipe(magic.Config, magic.run)


def _magic_text() -> Recipe:
    from jattrib.recipes import magic_text

    return Recipe(magic_text.Config, magic_text.run)


def _datamodels() -> Recipe:
    from jattrib.recipes import datamodels

    return Recipe(datamodels.Config, datamodels.run)


def _influence() -> Recipe:
    from jattrib.recipes import influence

    return Recipe(influence.Config, influence.run)


def _influence_text() -> Recipe:
    from jattrib.recipes import influence_text

    return Recipe(influence_text.Config, influence_text.run)


def _dmm() -> Recipe:
    from jattrib.recipes import dmm

    return Recipe(dmm.Config, dmm.run)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "trak": _trak,
    "comparison": _comparison,
    "magic": _magic,
    "magic_text": _magic_text,
    "datamodels": _datamodels,
    "dmm": _dmm,
    "influence": _influence,
    "influence_text": _influence_text,
}
"""Every recipe by the name that configs give it; imported when asked for, since recipes import JAX."""


def load(file: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Room]:
    """Read a config, pick its recipe, and check every key against it.

    Raises:
        InvalidInputError: the file, an override, the recipe's name, a key or a value is not what it should be.
    """
    source = config.read(file, overrides)
    name = source.table.get("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        match = config.close_match(str(name), list(RECIPES))
        raise InvalidInputError(
            f"{file}: recipe = {name!r}" if "recipe" in source.table else f"{file}: no recipe",
            expected=f"one of {', '.join(RECIPES)}",
            remedy=f"did you mean {match}?" if match else f'write for example recipe = "{next(iter(RECIPES))}"',
        )
    recipe = RECIPES[name]()
    return recipe, config.convert(source, recipe.config_type)
