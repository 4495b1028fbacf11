"""The configs that come with the package, and what their headers say.

The comment lines at the top of a config are its header, one entry a line, continued on lines that are indented more:

    # title:      TRAK on Fashion-MNIST
    # reproduces: what it shows, or which published figure
    # hardware:   what it was run on
    # cost:       how long it took there
    # expected:   lds_expected = 0.68 ± 0.03
    #             lds_ceiling >= 0.85
    # command:    jattrib run configs/attribution/trak_fashion_mnist.toml --out runs/trak

An expected value names a figure of `summary.json` and gives the range that it should fall into.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

from jattrib.core.errors import InvalidInputError
from jattrib.recipes import config as configs

ENTRIES = ("title", "reproduces", "hardware", "cost", "expected", "command")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_AROUND = re.compile(rf"(\w+)\s*=\s*({_NUMBER})\s*(?:±|\+/-)\s*({_NUMBER})")
_BOUND = re.compile(rf"(\w+)\s*(>=|<=|≥|≤)\s*({_NUMBER})")


class Expected(NamedTuple):
    """The range that a figure should fall into, both ends included.

    Attributes:
        figure: its name in `summary.json`.
        low: the lower end, or minus infinity.
        high: the upper end, or infinity.
        text: the range as the header has it.
    """

    figure: str
    low: float
    high: float
    text: str


class Header(NamedTuple):
    """What a config says of itself; an entry that it leaves out is empty."""

    title: str
    reproduces: str
    hardware: str
    cost: str
    expected: tuple[Expected, ...]
    command: str


def root() -> Path:
    """Return the folder of the shipped configs: in the installed package, or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Return the shipped configs by their paths below `root`, sorted."""
    return sorted(file.relative_to(root()).as_posix() for file in root().rglob("*.toml"))


def find(name: str) -> Path:
    """Return the file that a command names: a path, or a shipped config by its path below `configs` or its name alone.

    Raises:
        InvalidInputError: there is no such file; the error lists the shipped configs.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = names()
    by_stem = {Path(known).stem: known for known in shipped}
    wanted = Path(name.removeprefix("configs/"))
    wanted = by_stem.get(name, wanted.with_suffix(".toml").as_posix() if wanted.name else "")
    if wanted in shipped:
        return root() / wanted
    match = by_stem.get(configs.close_match(Path(name).stem, list(by_stem)) or "")
    raise InvalidInputError(
        f"no config {name}",
        expected=f"a TOML file, or one that comes with the package: {', '.join(shipped) or 'none was found'}",
        remedy=f"did you mean {match}?" if match else "check the path; `jattrib list` says what each of them does",
    )


def read_header(file: Path) -> Header:
    """Read the header of a config.

    Raises:
        InvalidInputError: an expected value cannot be understood.
    """
    return parse_header(file.read_text("utf-8"), name=str(file))


def parse_header(text: str, *, name: str = "config") -> Header:
    """Parse the comment lines at the top of `text`; comments that are no entry are passed over."""
    entries: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        entry = re.match(r"# ?(\w+):\s*(.*)", line)
        if entry and entry[1] in ENTRIES:
            current = entries.setdefault(entry[1], [])
            current.append(entry[2].strip())
        elif current is not None and line.startswith("#  "):
            current.append(line.removeprefix("#").strip())
        else:
            current = None
    expected = tuple(_expected(part, name) for part in entries.pop("expected", ()) if part)
    joined = {key: " ".join(filter(None, lines)) for key, lines in entries.items()}
    return Header(expected=expected, **{key: joined.get(key, "") for key in ENTRIES if key != "expected"})


def _expected(text: str, name: str) -> Expected:
    if around := _AROUND.fullmatch(text):
        value, tolerance = float(around[2]), float(around[3])
        return Expected(around[1], value - tolerance, value + tolerance, f"{around[2]} ± {around[3]}")
    if bound := _BOUND.fullmatch(text):
        value, least = float(bound[3]), bound[2] in (">=", "≥")
        ends = (value, math.inf) if least else (-math.inf, value)
        return Expected(bound[1], *ends, f"{'≥' if least else '≤'} {bound[3]}")
    raise InvalidInputError(
        f"{name}: expected: {text}",
        expected="one figure a line, as in `lds_expected = 0.68 ± 0.03` or `lds_ceiling >= 0.85`",
        remedy="write the expected values so, and the rest under another entry of the header",
    )
