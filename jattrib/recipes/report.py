"""The report of a run: one HTML file that carries its style and its pictures with it and needs nothing else.

It follows the reader's light or dark preference, prints, and reads well without its pictures.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from jattrib.recipes import plot, rundir


class KeyFigure(NamedTuple):
    """A figure with its interval and its meaning.

    Attributes:
        name: what a reader calls it; not its key in the summary.
        value: a number, or text.
        low: the lower end of its 95% interval, if it has one.
        high: the upper end.
        meaning: a few words on how to read it.
        unit: written after the value.
    """

    name: str
    value: float | int | str
    low: float | None = None
    high: float | None = None
    meaning: str = ""
    unit: str = ""


class Picture(NamedTuple):
    """A figure as data URIs for light and dark pages, in words (`alt`), and with a caption: what to see in it."""

    light: str
    dark: str
    width: int
    height: int
    alt: str
    caption: str


class Gallery(NamedTuple):
    """Queries with the training images that helped and harmed them."""

    attributions: tuple[plot.Attribution, ...]
    caption: str = ""


class Quotation(NamedTuple):
    """A passage: what it is called, its words, and a detail, such as a score.

    Attributes:
        name: what it is called.
        text: its words.
        detail: a few words more.
        shades: a number from −1 to 1 for each of the first characters, which are shaded as harmful or helpful.
    """

    name: str
    text: str
    detail: str = ""
    shades: tuple[float, ...] = ()


class Quotations(NamedTuple):
    """Passages that were attributed, each with those that helped and harmed it most, the strongest first."""

    queries: tuple[tuple[Quotation, tuple[Quotation, ...], tuple[Quotation, ...]], ...]
    caption: str = ""


class Listing(NamedTuple):
    """A table: its columns' names, its rows, a caption; the first column names the rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    caption: str = ""


STYLE = Path(__file__).with_suffix(".css").read_text("utf-8")

Block = str | Picture | Gallery | Quotations | Listing
"""What a section is made of; a string is a paragraph."""


class Section(NamedTuple):
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


class Report(NamedTuple):
    """What a recipe has to say.

    Attributes:
        title: what was done, in a line.
        lead: what to conclude, in two sentences.
        headlines: two to four figures that carry the conclusion.
        figures: the other figures that a reader compares.
        sections: pictures and text.
        method: how the figures were measured, one paragraph each.
    """

    title: str
    lead: str
    headlines: tuple[KeyFigure, ...]
    figures: tuple[KeyFigure, ...]
    sections: tuple[Section, ...]
    method: tuple[str, ...]


def picture(figure: Figure, *, alt: str, caption: str) -> Picture:
    """Return a figure for a report; `alt` says what it shows to those who do not see it."""
    width, height = (round(side * 100) for side in figure.get_size_inches())
    return Picture(plot.to_data_uri(figure), plot.to_data_uri(figure, theme="dark"), width, height, alt, caption)


def write(directory: rundir.RunDir, report: Report) -> Path:
    """Write `report.html` into a run's directory, atomically, with the run's config, versions, device and cost.

    Raises:
        StoreError: the directory cannot be written.
    """
    from jattrib.core import files

    path = directory.path / "report.html"
    text = render(
        report,
        config=directory.config,
        versions=rundir.versions(),
        device=rundir.device(),
        seconds=rundir.seconds(directory),
    )
    files.write_atomic(path, text.encode("utf-8", "backslashreplace"))  # a path may hold what is no text
    return path


def render(
    report: Report,
    *,
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    device: str,
    seconds: Mapping[str, float],
) -> str:
    """Return the report as HTML.

    Args:
        report: what to say.
        config: the run's config, with its recipe's name under `recipe`.
        versions: of what computed it.
        device: what it was computed on.
        seconds: what each stage took, and `total`.
    """
    sections = [
        _section("Figures", _key_figures(report.figures)) if report.figures else "",
        *(_section(section.title, "".join(map(_block, section.blocks))) for section in report.sections),
        _section("How it was measured", "".join(map(_block, report.method))) if report.method else "",
        _section("Cost", _cost(seconds, device)),
        _section("Configuration", f"<pre>{escape(_toml(config))}</pre>"),
        _section("Versions", _pairs(versions)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="kicker">jattrib · {escape(str(config.get("recipe", "report")))}</p>\n'
        f'<h1>{escape(report.title)}</h1>\n<p class="lead">{escape(report.lead)}</p>\n'
        f"{_headlines(report.headlines)}</header>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def number(value: float | int | str | np.generic) -> str:
    """Return a figure as a reader wants it: three decimals below 10, fewer above, thousands apart, a true minus.

    What is rounded to zero has no sign.

    >>> number(-0.0004)
    '0.000'
    """
    plain: float | int | str = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, str | bool):
        return str(plain)
    if isinstance(plain, int):
        return f"{plain:,}".replace("-", "\N{MINUS SIGN}")
    decimals = 3 if abs(plain) < 10 else 1 if abs(plain) < 1000 else 0
    return f"{plain:z,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def counted(number: int, name: str) -> str:
    """Return a number of things, one of them in the singular; `name` is what one is called."""
    plural = f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"
    return f"{number:,} {name if number == 1 else plural}"


def percent(part: float) -> str:
    """Return a part as a reader wants it, in percent: three digits, and none that say nothing."""
    return f"{100 * part:.3g}%"


def duration(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds, the two largest that there are."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}</section>\n"


def _value(figure: KeyFigure) -> str:
    unit = f' <span class="unit">{escape(figure.unit)}</span>' if figure.unit else ""
    return f"{escape(number(figure.value))}{unit}"


def _interval(figure: KeyFigure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{number(figure.low)} to {number(figure.high)}"


def _headlines(figures: Sequence[KeyFigure]) -> str:
    if not figures:
        return ""
    tiles = [
        f'<div><dt>{escape(figure.name)}</dt><dd class="value">{_value(figure)}</dd>'
        + (f'<dd class="interval">95% interval {_interval(figure)}</dd>' if _interval(figure) else "")
        + (f"<dd>{escape(figure.meaning)}</dd>" if figure.meaning else "")
        + "</div>\n"
        for figure in figures
    ]
    return f'<dl class="headlines">\n{"".join(tiles)}</dl>\n'


def _key_figures(figures: Sequence[KeyFigure]) -> str:
    rows = [
        _head(figure.name, "row")
        + f'<td class="number">{_value(figure)}</td><td class="number">{_interval(figure)}</td>'
        + f"<td>{escape(figure.meaning)}</td>"
        for figure in figures
    ]
    columns = (("Figure", False), ("Value", True), ("95% interval", True), ("How to read it", False))
    return _table([_head(name, "col", numeric=numeric) for name, numeric in columns], rows)


def _table(head: Sequence[str], rows: Sequence[str], caption: str = "") -> str:
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{top}\n<thead><tr>{"".join(head)}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _head(text: str, scope: str, *, numeric: bool = False) -> str:
    kind = ' class="number"' if numeric else ""
    return f'<th scope="{scope}"{kind}>{escape(text)}</th>'


def _cell(value: Any) -> str:
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return f'<td class="number">{number(value)}</td>'
    return f"<td>{escape(str(value))}</td>"


def _block(block: Block) -> str:
    match block:
        case Picture():
            return _picture(block)
        case Gallery():
            cards = "".join(map(_card, block.attributions))
            note = f'<p class="caption">{escape(block.caption)}</p>\n' if block.caption else ""
            return f'<div class="gallery">\n{cards}</div>\n{note}'
        case Quotations():
            cards = "".join(_quoted(*row) for row in block.queries)
            note = f'<p class="caption">{escape(block.caption)}</p>\n' if block.caption else ""
            return f'<div class="quotations">\n{cards}</div>\n{note}'
        case Listing():
            return _listing(block)
        case str():
            return f"<p>{escape(block)}</p>\n"


def _picture(block: Picture) -> str:
    return (
        f'<figure>\n<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{block.dark}">'
        f'<img src="{block.light}" width="{block.width}" height="{block.height}" alt="{escape(block.alt)}"></picture>\n'
        f"<figcaption>{escape(block.caption)}</figcaption>\n</figure>\n"
    )


def _card(row: plot.Attribution) -> str:
    groups = [
        f'<div class="{kind}"><h4>{title}</h4><ol>'
        + "".join(f"<li>{_thumbnail(thumbnail, role)}</li>" for thumbnail in thumbnails)
        + "</ol></div>\n"
        for kind, title, role, thumbnails in (
            ("helpful", "Most helpful", "helpful training image", row.helpful),
            ("harmful", "Most harmful", "harmful training image", row.harmful),
        )
    ]
    query = _thumbnail(row.query, "query")
    return f'<article>\n<div class="query">{query}</div>\n<div class="sources">{"".join(groups)}</div>\n</article>\n'


def _quoted(query: Quotation, helpful: Sequence[Quotation], harmful: Sequence[Quotation]) -> str:
    groups = [
        f'<div class="{kind}"><h4>{title}</h4><ol>'
        + "".join(f"<li>{_quotation(each)}</li>" for each in group)
        + "</ol></div>\n"
        for kind, title, group in (("helpful", "Most helpful", helpful), ("harmful", "Most harmful", harmful))
    ]
    return (
        f'<article>\n<div class="query">{_quotation(query)}</div>\n'
        f'<div class="sources">{"".join(groups)}</div>\n</article>\n'
    )


def _quotation(each: Quotation) -> str:
    detail = f" <small>{escape(each.detail)}</small>" if each.detail else ""
    words = _shaded(each.text, each.shades) if each.shades else escape(each.text)
    return f"<blockquote>{words}</blockquote><cite>{escape(each.name)}</cite>{detail}"


def _shaded(text: str, shades: Sequence[float]) -> str:
    """Return text with its first characters shaded; neighbours of one shade share an element."""
    percents = [round(20 * min(max(shade, -1), 1)) * 5 for shade in shades[: len(text)]]
    parts = []
    for percent, group in itertools.groupby(zip(percents, text, strict=False), key=lambda pair: pair[0]):
        words = escape("".join(character for _, character in group))
        kind = "up" if percent > 0 else "down"
        parts.append(f'<mark class="{kind}" style="--shade:{abs(percent)}%">{words}</mark>' if percent else words)
    return "".join(parts) + escape(text[len(percents) :])


def _thumbnail(thumbnail: plot.Thumbnail, role: str) -> str:
    height, width, _ = thumbnail.image.shape
    hover = f' title="{escape(thumbnail.detail)}"' if thumbnail.detail else ""
    detail = f"<small>{escape(thumbnail.detail)}</small>" if thumbnail.detail and role == "query" else ""
    return (
        f'<img src="{plot.to_data_uri(thumbnail.image)}" width="{width}" height="{height}" '
        f'alt="{role}: {escape(thumbnail.caption)}"{hover}><span>{escape(thumbnail.caption)}</span>{detail}'
    )


def _listing(block: Listing) -> str:
    numeric = [all(isinstance(row[column], int | float) for row in block.rows) for column in range(len(block.columns))]
    head = [_head(name, "col", numeric=numeric[i] and i > 0) for i, name in enumerate(block.columns)]
    rows = [_head(number(row[0]), "row") + "".join(map(_cell, row[1:])) for row in block.rows]
    return _table(head, rows, block.caption)


def _cost(seconds: Mapping[str, float], device: str) -> str:
    total = seconds.get("total", 0.0)
    stages = sorted(((name, spent) for name, spent in seconds.items() if name != "total"), key=lambda item: -item[1])

    def row(name: str, spent: float) -> str:
        width = 100 * spent / max(total, spent, 1e-9)
        bar = f'<td class="share" aria-hidden="true"><span style="width:{width:.1f}%"></span></td>'
        return f'<tr>{_head(name.replace("_", " "), "row")}<td class="number">{duration(spent)}</td>{bar}</tr>\n'

    rows = "".join(row(*stage) for stage in stages)
    table = f'<table class="cost">\n<tbody>\n{rows}</tbody></table>\n' if stages else ""
    return f"<p>{duration(total)} on {escape(device)}, resumed runs included.</p>\n{table}"


def _pairs(values: Mapping[str, str]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="pairs">{items}</dl>\n'


def _toml(config: Mapping[str, Any], prefix: str = "") -> str:
    """Return plain tables as TOML, as a config file would say it, values that are left out apart."""
    flat = [
        f"{key} = {json.dumps(v, ensure_ascii=False)}" for key, v in config.items() if not isinstance(v, dict | None)
    ]
    tables = [
        f"\n[{prefix}{key}]\n{_toml(value, f'{prefix}{key}.')}"
        for key, value in config.items()
        if isinstance(value, dict)
    ]
    return "\n".join([*flat, *tables])
