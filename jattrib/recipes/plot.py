"""Pictures: small pure functions from arrays to figures, in one style, readable at 600 pixels of width.

Figures are made without `pyplot`, so nothing here touches the user's matplotlib.  Colours are Okabe and Ito's, which
people with colour vision deficiencies tell apart.
"""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from PIL import Image

WIDTH = 6.0
"""Inches: at 600 pixels on the screen a point of type is 1.4 of them."""

DPI = 200
INK, MUTED, RULE, PAPER = "#1f2328", "#5b636d", "#d9dde2", "#ffffff"
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
SERIES = (BLUE, VERMILION, GREEN, PURPLE)
DARK = {
    INK: "#e6e8eb", MUTED: "#a3abb5", RULE: "#343a43", PAPER: "#171a1f",
    BLUE: "#56b4e9", VERMILION: "#f08a3c", GREEN: "#35c9a0", PURPLE: "#dd9bc0",
}  # fmt: skip
"""What each colour becomes on a dark page."""

Theme = Literal["light", "dark"]

_STYLE: Any = {  # matplotlib types its keys one by one
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


class Labels(NamedTuple):
    """What a picture says about itself, units included."""

    x: str
    y: str
    title: str = ""


class Thumbnail(NamedTuple):
    """An image and the words under it.

    Attributes:
        image: pixels, with one channel or three.
        caption: what it shows: a class, as a rule.
        detail: what a reader may want to look up: an index, a score.
    """

    image: UInt8[np.ndarray, "h w c"]
    caption: str
    detail: str = ""


class Attribution(NamedTuple):
    """One query with the training images that helped and harmed it most, the strongest first."""

    query: Thumbnail
    helpful: tuple[Thumbnail, ...]
    harmful: tuple[Thumbnail, ...]


def line_with_band(
    x: Float[np.ndarray, " points"],
    mean: Float[np.ndarray, "*series points"],
    low: Float[np.ndarray, "*series points"],
    high: Float[np.ndarray, "*series points"],
    *,
    labels: Labels,
    names: Sequence[str] = (),
    references: Mapping[str, float] | None = None,
    log_x: bool = False,
) -> Figure:
    """Draw one or several lines with their intervals, and dashed reference lines, each with its name beside it."""
    figure, axes = _figure(labels, height=3.6)
    for row, (middle, bottom, top) in enumerate(zip(*map(np.atleast_2d, (mean, low, high)), strict=True)):
        colour = SERIES[row % len(SERIES)]
        axes.fill_between(x, bottom, top, color=colour, alpha=0.18, linewidth=0)
        if len(x) == 1:  # a band without width
            axes.vlines(x, bottom, top, color=colour, alpha=0.5, linewidth=1.4)
        dashed = "--" if row >= len(SERIES) else "-"  # colours come again then
        axes.plot(
            x, middle, dashed, color=colour, marker="o", markersize=4.5, label=_literal(names[row]) if names else None
        )
    levels = np.array(list((references or {}).values()))
    points = 180 / max(np.ptp(np.concatenate([np.ravel(low), np.ravel(high), levels])), 1e-30)
    if names:
        _name_ends(axes, x[-1], np.atleast_2d(mean)[:, -1], names, points=points)
    if log_x:
        axes.set_xscale("log")
    if len(x) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(x.tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for (name, value), lift in zip((references or {}).items(), _lifts(levels, points=points), strict=True):
        _reference(axes, name, value, lift=lift)
    axes.margins(y=0.1)
    return figure


def named_points(
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    low: Float[np.ndarray, " n"],
    high: Float[np.ndarray, " n"],
    *,
    names: Sequence[str],
    labels: Labels,
    references: Mapping[str, float] | None = None,
    log_x: bool = True,
) -> Figure:
    """Draw points with intervals, each with its name beside it, and dashed reference lines; `log_x` is the usual."""
    figure, axes = _figure(labels, height=4.6)
    if log_x:
        axes.set_xscale("log")
    axes.errorbar(x, y, yerr=[y - low, high - y], fmt="o", color=BLUE, ecolor=RULE, elinewidth=1.4, markersize=5)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.margins(x=0.3, y=0.08)
    for name, value in (references or {}).items():
        _reference(axes, name, value)
    figure.draw_without_rendering()  # places are known in points only then
    _name_points(
        axes, axes.transData.transform(np.stack([x, y], axis=1)) * 72 / DPI, list(zip(x, y, strict=True)), names
    )
    return figure


def scatter_predicted_actual(
    predicted: Float[np.ndarray, " n"], actual: Float[np.ndarray, " n"], *, labels: Labels, note: str = ""
) -> Figure:
    """Draw actual outputs against predicted ones with their least-squares line; `note` stands in a corner.

    Pairs of which one is not finite are neither drawn nor fitted; infinite ones are told.
    """
    figure, axes = _figure(labels, height=4.2)
    axes.grid(visible=True)
    _tell_infinite(axes, np.where(np.isinf(predicted), predicted, actual))
    finite = np.isfinite(predicted) & np.isfinite(actual)
    predicted, actual = predicted[finite], actual[finite]
    axes.scatter(predicted, actual, s=22, color=BLUE, alpha=0.65, linewidth=0)
    if len(predicted) and np.ptp(predicted) > 0:
        slope, intercept = np.polyfit(predicted, actual, 1)
        ends = np.array([predicted.min(), predicted.max()])
        axes.plot(ends, slope * ends + intercept, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
    if note:
        axes.margins(y=0.12)  # room for it above the highest point
        axes.text(0.02, 0.98, _literal(note), transform=axes.transAxes, va="top", color=INK, fontweight="bold")
    return figure


def histogram(
    values: Float[np.ndarray, " n"], *, labels: Labels, bins: int = 30, marks: Mapping[str, float] | None = None
) -> Figure:
    """Draw how values are spread, and vertical marks with their names; infinite values are told, not drawn."""
    figure, axes = _figure(labels, height=3.2)
    finite = values[np.isfinite(values)]
    axes.hist(finite, _edges(values, bins).tolist(), color=BLUE, alpha=0.8, rwidth=0.92)
    _tell_infinite(axes, values)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(y=0.22)
    for row, (name, value) in enumerate((marks or {}).items()):
        axes.axvline(value, color=VERMILION, linewidth=1.4)
        axes.annotate(
            _literal(name), (value, 1), (4, -4 - 12 * row), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", color=VERMILION, fontsize=8.5,
        )  # fmt: skip
    return figure


def overlaid_histograms(
    panels: Sequence[tuple[str, Mapping[str, Float[np.ndarray, " _"]]]], *, labels: Labels, bins: int = 20
) -> Figure:
    """Draw panels side by side, each with a title and named samples over one another, on bins of its own.

    Infinite values are told, not drawn.
    """
    with rc_context(_STYLE):
        figure = Figure((WIDTH, 2.9), DPI, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, samples) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
            edges = _edges(np.concatenate(list(samples.values())), bins)
            for colour, (name, values) in zip(itertools.cycle(SERIES), samples.items(), strict=False):
                finite, label = values[np.isfinite(values)], _literal(name)
                axes.hist(finite, edges, histtype="stepfilled", facecolor=colour, alpha=0.3, label=label)
                axes.hist(finite, edges, histtype="step", color=colour, linewidth=1.2)
            _tell_infinite(axes, *samples.values())
            axes.set_title(_literal(title), fontsize=8.5, color=INK)
            axes.tick_params(color=MUTED, labelcolor=MUTED, grid_color=RULE)
            axes.yaxis.set_visible(False)
            axes.spines["left"].set_visible(False)
        figure.supxlabel(_literal(labels.x), fontsize=9, color=MUTED)
        figure.supylabel(_literal(labels.y), fontsize=9, color=MUTED)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, labelcolor=INK)
    return figure


def bar_with_interval(
    names: Sequence[str],
    values: Float[np.ndarray, " n"],
    low: Float[np.ndarray, " n"],
    high: Float[np.ndarray, " n"],
    *,
    labels: Labels,
    strong: int = 0,
) -> Figure:
    """Draw a horizontal bar a name, with interval and value, the first on top; `labels.x` is the values' axis.

    The bar number `strong` is the one that a reader is to look at: it has a colour.
    """
    figure, axes = _figure(labels, height=1.3 + 0.42 * len(names))
    places = np.arange(len(names))
    axes.barh(places, values, height=0.62, color=np.where(places == strong, SERIES[0], MUTED).tolist(), alpha=0.85)
    axes.errorbar(values, places, xerr=[values - low, high - values], fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    for place, value, bottom, top in zip(places, values, low, high, strict=True):
        right = value >= 0
        axes.annotate(
            f"{value:.3g}".replace("-", "\N{MINUS SIGN}"), (top if right else bottom, place),
            (6 if right else -6, 0), textcoords="offset points",
            va="center", ha="left" if right else "right", color=INK, fontsize=8.5,
        )  # fmt: skip
    axes.axvline(0, color=MUTED, linewidth=0.8)
    _name_rows(axes, names)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    return figure


def ranked_points(
    names: Sequence[str],
    values: Float[np.ndarray, " n"],
    low: Float[np.ndarray, " n"],
    high: Float[np.ndarray, " n"],
    *,
    notes: tuple[str, Sequence[str]],
    groups: Mapping[str, Bool[np.ndarray, " n"]],
    references: Mapping[str, float],
    labels: Labels,
) -> Figure:
    """Draw a row a name, the least value on top: a point with its interval, and a note in a column of its own.

    Args:
        names: what each row is.
        values: positive; their axis is logarithmic.
        low: where each interval begins.
        high: where it ends.
        notes: the title of their column, and one a row.
        groups: which rows are drawn in a colour of their own, with its name in the legend; the first that has a row.
        references: named values that lines mark.
        labels: `labels.x` is the values' axis.
    """
    order = np.argsort(values, kind="stable")
    figure, axes = _figure(labels, height=1.2 + 0.21 * len(names))
    axes.set_xscale("log")
    free = np.ones(len(names), bool)
    for (title, members), color in zip(groups.items(), SERIES, strict=False):
        places = np.flatnonzero((members & free)[order])
        rows = order[places]
        spans = [values[rows] - low[rows], high[rows] - values[rows]]
        axes.errorbar(
            values[rows], places, xerr=spans, fmt="o", color=color, elinewidth=1.4, markersize=5,
            label=_literal(title),
        )  # fmt: skip
        free &= ~members
    for name, value in references.items():
        axes.axvline(value, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, label=_literal(name))
    _name_rows(axes, [names[int(row)] for row in order])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    column = axes.get_yaxis_transform()
    for place, row in enumerate(order):
        axes.text(1.02, place, _literal(notes[1][int(row)]), transform=column, va="center", color=INK, fontsize=8.5)
    axes.text(1.02, -0.9, _literal(notes[0]), transform=column, va="bottom", color=MUTED, fontsize=8.5)
    figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=8.5, handlelength=1.4)
    return figure


def image_strip(thumbnails: Sequence[Thumbnail], *, title: str = "") -> Figure:
    """Draw images side by side with their captions."""
    cell = WIDTH / max(len(thumbnails), 6)
    head = 0.3 if title else 0.05
    figure = _canvas(head + cell + 0.2, title)
    for column, thumbnail in enumerate(thumbnails):
        _show(figure, thumbnail, (column * cell, head, cell), size=7.5)
    return figure


def attribution_grid(attributions: Sequence[Attribution], *, title: str = "") -> Figure:
    """Draw one row a query: the query, the training images that helped it most, those that harmed it most."""
    helpful = max(len(row.helpful) for row in attributions)
    harmful = max(len(row.harmful) for row in attributions)
    gap = 0.35
    cell = WIDTH / (1 + helpful + harmful + 2 * gap)
    starts = {"query": 0.0, "most helpful": cell * (1 + gap), "most harmful": cell * (1 + helpful + 2 * gap)}
    head = 0.5 if title else 0.25
    figure = _canvas(head + (cell + 0.2) * len(attributions), title)
    for (name, left), colour in zip(starts.items(), (INK, BLUE, VERMILION), strict=True):
        height = figure.get_figheight()
        x, y = (left + 0.03) / WIDTH, 1 - (head - 0.06) / height
        figure.text(x, y, name, color=colour, fontsize=8.5, fontweight="bold")
    for index, row in enumerate(attributions):
        top = head + (cell + 0.2) * index
        for left, thumbnails in zip(starts.values(), ((row.query,), row.helpful, row.harmful), strict=True):
            for column, thumbnail in enumerate(thumbnails):
                _show(figure, thumbnail, (left + column * cell, top, cell), size=6.0)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        StoreError: the directory cannot be written.
    """
    from jattrib.core import files

    files.write_atomic(path, _png(figure))


def to_data_uri(picture: Figure | UInt8[np.ndarray, "h w c"], *, theme: Theme = "light") -> str:
    """Return a figure, or an image as it is, as a PNG data URI; a dark figure is a recoloured copy."""
    if isinstance(picture, Figure):
        content = _png(picture) if theme == "light" else _dark_png(picture)
    else:
        buffer = io.BytesIO()
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, "PNG", optimize=True)
        content = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _figure(labels: Labels, *, height: float) -> tuple[Figure, Axes]:
    with rc_context(_STYLE):
        figure = Figure((WIDTH, height), DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.grid(visible=True, axis="y")
        axes.set(xlabel=_literal(labels.x), ylabel=_literal(labels.y))
        axes.tick_params(color=MUTED, labelcolor=MUTED, grid_color=RULE)
        if labels.title:
            figure.suptitle(_literal(labels.title), x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure, axes


def _edges(values: Float[np.ndarray, " n"], bins: int) -> Float[np.ndarray, " edges"]:
    """Return the edges of bins of finite values; those that differ by their rounding alone get those of equal ones."""
    known = values[np.isfinite(values)]
    if known.size and np.ptp(known) <= 4 * bins * np.spacing(np.abs(known).max()):
        known = known[:1]
    return np.histogram_bin_edges(known.astype(np.float64), bins)


def _tell_infinite(axes: Axes, *samples: Float[np.ndarray, " _"]) -> None:
    count = sum(int(np.isinf(values).sum()) for values in samples)
    if count:
        axes.text(
            0.98, 0.98, f"{count} infinite, not shown", transform=axes.transAxes, ha="right", va="top", color=MUTED,
            fontsize=8.5,
        )  # fmt: skip


def _literal(text: str) -> str:
    """Return text that matplotlib shows as it is: between two dollars it would read mathematics."""
    return text.replace("$", r"\$")


def _canvas(height: float, title: str) -> Figure:
    """Return a figure without axes, for images that are placed by the inch."""
    with rc_context(_STYLE):
        figure = Figure((WIDTH, height), DPI)
        FigureCanvasAgg(figure)
        if title:
            figure.text(0.03 / WIDTH, 1 - 0.2 / height, _literal(title), fontsize=10, fontweight="bold")
    return figure


def _show(figure: Figure, thumbnail: Thumbnail, place: tuple[float, float, float], *, size: float) -> None:
    """Place an image by its left and top edges and its width, in inches from the top left corner; caption below."""
    left, top, width = place
    height, inner = figure.get_figheight(), width - 0.06
    with rc_context(_STYLE):
        axes = figure.add_axes(((left + 0.03) / WIDTH, 1 - (top + width) / height, inner / WIDTH, inner / height))
        axes.imshow(thumbnail.image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.axis("off")
        axes.text(
            0.5, -0.06, _literal(thumbnail.caption), transform=axes.transAxes, ha="center", va="top", fontsize=size
        )


def _reference(axes: Axes, name: str, value: float, *, lift: float = 0.0) -> None:
    axes.axhline(value, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1)
    axes.annotate(
        _literal(name), (0, value), (2, 3 + lift), xycoords=("axes fraction", "data"), textcoords="offset points",
        color=MUTED, fontsize=8.5,
    )  # fmt: skip


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Make the vertical axis one of names, with rules for the values alone."""
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.set_yticks(np.arange(len(names)), [_literal(name) for name in names])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)


def _name_points(
    axes: Axes, places: Float[np.ndarray, "n 2"], data: Sequence[tuple[float, float]], names: Sequence[str]
) -> None:
    """Write each point's name right or left of it, and up or down until it lies on no point and no other name."""
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places.tolist()]
    begins, ends = (float(edge) * 72 / DPI for edge in (axes.bbox.x0, axes.bbox.x1))
    for (x, y), point, name in sorted(zip(places.tolist(), data, names, strict=True), key=lambda item: -item[0][1]):
        note = axes.annotate(
            _literal(name), point, (0, 0), textcoords="offset points", va="center", color=INK, fontsize=8
        )
        note.set_in_layout(False)  # or the axes would give way to it, and nothing would lie where it was put
        width = float(note.get_window_extent().width) * 72 / DPI
        rises = sorted((2.0 * step for step in range(-30, 31)), key=abs)
        options = [(side, rise) for rise in rises for side in (7.0, -7.0 - width)]

        def free(option: tuple[float, float], x: float = x, y: float = y, width: float = width) -> bool:
            left, bottom = x + option[0], y + option[1] - 4
            return (
                begins < left
                and left + width < ends
                and all(
                    right <= left or left + width <= begin or top <= bottom or bottom + 8 <= under
                    for begin, under, right, top in taken
                )
            )

        side, rise = next(filter(free, options), options[0])
        taken.append((x + side, y + rise - 4, x + side + width, y + rise + 4))
        note.set_position((side, rise))


def _name_ends(axes: Axes, x: float, ends: Float[np.ndarray, " n"], names: Sequence[str], *, points: float) -> None:
    """Write each line's name at its end; `points` of type are a unit of y."""
    for row, (name, end, lift) in enumerate(zip(names, ends, _lifts(ends, points=points), strict=True)):
        colour = SERIES[row % len(SERIES)]
        axes.annotate(_literal(name), (x, end), (8, lift), textcoords="offset points", color=colour, va="center")


def _lifts(places: Float[np.ndarray, " n"], *, points: float) -> Float[np.ndarray, " n"]:
    """Return by how many points each name is lifted from its place, so as not to lie on the one below."""
    heights = (places - places.min(initial=np.inf)) * points
    lifted = np.array(heights)
    for lower, upper in itertools.pairwise(np.argsort(places)):
        lifted[upper] = max(lifted[upper], lifted[lower] + 12)
    return lifted - heights


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _dark_png(figure: Figure) -> bytes:
    """Draw the figure with every colour of the style exchanged, and put them back."""
    undo = [change for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for change in _recolour_ticks(axis)]
    undo += [change for artist in figure.findobj() for change in _recolour(artist)]
    try:
        return _png(figure)
    finally:
        for put, before in reversed(undo):
            put(before)


def _recolour_ticks(axis: Axis) -> list[tuple[Any, Any]]:
    """Exchange the colours of an axis' ticks, those included that are only made when it is drawn."""
    names = ("color", "labelcolor", "grid_color")
    before: dict[str, Any] = {name: colour for name, colour in axis.get_tick_params().items() if name in names}
    after: dict[str, Any] = {name: DARK.get(colour, colour) for name, colour in before.items()}
    axis.set_tick_params(**after)
    return [(lambda colours: axis.set_tick_params(**colours), before)]


def _recolour(artist: Any) -> list[tuple[Any, Any]]:
    """Exchange an artist's colours, and return the calls that put the old ones back."""
    undo = []
    for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
        get, put = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
        if get is None or put is None:
            continue
        before = get()
        colours = to_rgba_array(before).tolist()
        after = [(*to_rgb(DARK.get(to_hex(rgba), to_hex(rgba))), rgba[3]) for rgba in colours]
        if any(to_hex(rgba) in DARK for rgba in colours):
            put(after if len(after) > 1 else after[0])
            undo.append((put, before))
    return undo
