import base64
import io
import itertools
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from jattrib.core.errors import StoreError
from jattrib.recipes import plot

LABELS = plot.Labels("checkpoints", "LDS", "It rises")
X = np.array([1.0, 2.0, 5.0, 20.0])
MEAN = np.array([[0.3, 0.4, 0.5, 0.6], [0.2, 0.3, 0.4, 0.59]])


def pixels(uri):
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def thumbnail(value, caption):
    return plot.Thumbnail(np.full((4, 4, 1), value, np.uint8), caption)


def scattered():
    """Twelve points in two crowded places."""
    rng = np.random.default_rng(1)
    x, y = np.repeat([1.0, 300.0], 6) * rng.uniform(0.8, 1.2, 12), rng.uniform(0.4, 0.5, 12)
    names = [f"method number {number}" for number in range(12)]
    return x, y, names, plot.named_points(
        x, y, y - 0.1, y + 0.2, names=names, labels=LABELS, references={"ceiling": 0.9}
    )  # fmt: skip


def figures():
    rng = np.random.default_rng(0)
    row = plot.Attribution(thumbnail(9, "query"), (thumbnail(1, "a"),), (thumbnail(2, "b"),))
    return {
        "lines": plot.line_with_band(X, MEAN, MEAN - 0.1, MEAN + 0.1, labels=LABELS, names=("a", "b")),
        "scatter": plot.scatter_predicted_actual(rng.normal(size=9), rng.normal(size=9), labels=LABELS, note="note"),
        "points": scattered()[-1],
        "histogram": plot.histogram(rng.normal(size=50), labels=LABELS, marks={"mean": 0.0}),
        "overlaid": plot.overlaid_histograms(
            [("one", {"before": rng.normal(size=9), "after": rng.normal(size=9)}), ("two", {"before": X, "after": X})],
            labels=LABELS,
        ),
        "bars": plot.bar_with_interval(["a", "b"], np.ones(2), np.zeros(2), 2 * np.ones(2), labels=LABELS),
        "strip": plot.image_strip([thumbnail(0, "a")], title="Strip"),
        "grid": plot.attribution_grid([row], title="Grid"),
    }


def test_points_bear_their_names_apart_from_one_another_and_inside():
    x, y, names, figure = scattered()
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.get_lines()[0].get_xydata(), np.stack([x, y], 1))
    (bars,) = axes.collections
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, np.stack([y - 0.1, y + 0.2], 1))
    assert axes.get_xscale() == "log"
    notes = {text.get_text(): text for text in axes.texts}
    assert notes.keys() == {*names, "ceiling"}
    figure.draw_without_rendering()
    boxes = [notes[name].get_window_extent() for name in names]
    for number, box in enumerate(boxes):
        assert notes[names[number]].xy == (x[number], y[number])
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= axes.bbox.x1
        assert not any(box.shrunk(0.9, 0.7).overlaps(other.shrunk(0.9, 0.7)) for other in boxes[:number])


def test_histograms_lie_over_one_another_on_common_bins():
    before, after = np.array([0.0, 0.1, 1.0]), np.array([0.9, 2.0])
    figure = plot.overlaid_histograms(
        [("one", {"before": before, "after": after}), ("two", {"before": after, "after": after})], labels=LABELS, bins=4
    )
    one, two = figure.axes
    assert (one.get_title(), two.get_title()) == ("one", "two")
    counts = [np.unique(polygon.get_xy()[:, 1]).tolist() for polygon in one.patches]
    assert counts == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1]]
    assert all(polygon.get_xy()[:, 0].min() == 0 and polygon.get_xy()[:, 0].max() == 2 for polygon in one.patches)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["before", "after"]


def test_points_may_lie_on_an_even_scale():
    figure = plot.named_points(X, X, X, X, names=list("abcd"), labels=LABELS, log_x=False)
    assert figure.axes[0].get_xscale() == "linear"


def test_lines_carry_their_data_bands_and_references():
    figure = plot.line_with_band(
        X, MEAN, MEAN - 0.1, MEAN + 0.2, labels=LABELS, names=("ridge", "none"), references={"ceiling": 0.9}, log_x=True
    )
    (axes,) = figure.axes
    first, second, ceiling = axes.get_lines()
    np.testing.assert_array_equal(first.get_xydata(), np.stack([X, MEAN[0]], 1))
    np.testing.assert_array_equal(second.get_ydata(), MEAN[1])
    assert set(ceiling.get_ydata()) == {0.9}
    for band, mean in zip(axes.collections, MEAN, strict=True):
        corners = band.get_paths()[0].vertices
        assert corners[:, 1].min() == pytest.approx(mean.min() - 0.1)
        assert corners[:, 1].max() == pytest.approx(mean.max() + 0.2)
    assert [text.get_text() for text in axes.texts] == ["ridge", "none", "ceiling"]
    assert axes.get_xscale() == "log"
    np.testing.assert_array_equal(axes.get_xticks(), X)
    assert (axes.get_xlabel(), axes.get_ylabel(), figure.get_suptitle()) == ("checkpoints", "LDS", "It rises")


def test_names_of_lines_do_not_lie_on_one_another():
    """The ends .59 and .6 are 6 points of type apart, too few for two lines of it."""
    figure = plot.line_with_band(X, MEAN, MEAN, MEAN, labels=LABELS, names=("a", "b"))
    figure.canvas.draw()
    upper, lower = (text.get_window_extent() for text in figure.axes[0].texts)
    assert upper.y0 > lower.y1
    apart = np.array([[0.3, 0.9], [0.2, 0.1]])
    figure = plot.line_with_band(X[:2], apart, apart, apart, labels=LABELS, names=("a", "b"))
    assert [text.get_position()[1] for text in figure.axes[0].texts] == [0.0, 0.0]


@pytest.mark.parametrize("mean", [X / 20, np.full(4, 0.6)])
def test_names_of_references_do_not_lie_on_one_another(mean):
    levels = {"ceiling": 0.6, "similarity": 0.59, "again": 0.6, "random": 0.0}
    figure = plot.line_with_band(X, mean, mean, mean, labels=LABELS, references=levels)
    figure.canvas.draw()
    names = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(names) == 4
    assert all(upper.y0 > lower.y1 for lower, upper in itertools.pairwise(names))


def test_one_line_needs_no_name_and_may_be_flat():
    figure = plot.line_with_band(X, np.zeros(4), np.zeros(4), np.zeros(4), labels=LABELS)
    assert len(figure.axes[0].get_lines()) == 1
    assert not figure.axes[0].texts


def test_one_point_has_its_interval_as_a_bar():
    ones = np.ones((2, 1))
    (axes,) = plot.line_with_band(X[:1], ones, ones - [[0.5], [0.2]], ones + 1, labels=LABELS, names=("a", "b")).axes
    bars = [part.get_segments()[0] for part in axes.collections if isinstance(part, LineCollection)]
    np.testing.assert_array_equal(bars, [[[1, 0.5], [1, 2]], [[1, 0.8], [1, 2]]])


@pytest.mark.parametrize("actual", [[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [3.0, 3.0, -90.0]])
def test_the_note_of_a_scatter_lies_on_no_point(actual):
    figure = plot.scatter_predicted_actual(np.arange(3.0), np.array(actual), labels=LABELS, note="ρ = −.95")
    figure.canvas.draw()
    (axes,) = figure.axes
    highest = axes.transData.transform((0, max(actual)))[1]
    assert axes.texts[0].get_window_extent().y0 > highest + 3 * plot.DPI / 72  # a point's radius


def test_a_scatter_carries_points_and_their_least_squares_line():
    predicted = np.array([0.0, 1.0, 2.0, 3.0])
    actual = np.array([1.0, 2.0, 2.0, 5.0])
    figure = plot.scatter_predicted_actual(predicted, actual, labels=LABELS, note="ρ = .95")
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), np.stack([predicted, actual], 1))
    (line,) = axes.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[0, 0.7], [3, 4.3]], atol=1e-12)
    assert axes.texts[0].get_text() == "ρ = .95"
    assert not plot.scatter_predicted_actual(np.ones(3), np.ones(3), labels=LABELS).axes[0].get_lines()


def test_a_histogram_counts():
    figure = plot.histogram(np.array([0.0, 0.1, 0.9, 1.0]), labels=LABELS, bins=2, marks={"mean": 0.5})
    (axes,) = figure.axes
    assert [patch.get_height() for patch in axes.patches] == [2, 2]
    assert set(axes.get_lines()[0].get_xdata()) == {0.5}
    assert axes.texts[0].get_text() == "mean"


@pytest.mark.parametrize("values", [np.float32([5, np.nextafter(np.float32(5), 6)]), np.array([1, 1 + 2.3e-16])])
def test_histograms_of_values_that_are_equal_to_rounding(values):
    single = plot.histogram(values, labels=LABELS)
    overlaid = plot.overlaid_histograms([("one", {"before": values, "after": values})], labels=LABELS)
    assert sum(bar.get_height() for bar in single.axes[0].patches) == 2
    assert overlaid.axes[0].get_xlim()[0] < values[0] - 0.4


INFINITE = np.array([0.0, np.inf, 0.1, 0.9, -np.inf, 1.0, np.nan])


def test_infinite_values_are_told_and_not_drawn():
    single = plot.histogram(INFINITE, labels=LABELS, bins=2).axes[0]
    assert [patch.get_height() for patch in single.patches] == [2, 2]
    assert [text.get_text() for text in single.texts] == ["2 infinite, not shown"]
    figure = plot.overlaid_histograms(
        [("one", {"before": INFINITE, "after": np.array([2.0])}), ("two", {"none": np.full(3, np.inf)})],
        labels=LABELS, bins=2,
    )  # fmt: skip
    one, two = figure.axes
    counts = [np.unique(polygon.get_xy()[:, 1]).tolist() for polygon in one.patches]
    assert counts == [[0, 1, 3], [0, 1, 3], [0, 1], [0, 1]]
    assert [axes.texts[0].get_text() for axes in (one, two)] == ["2 infinite, not shown", "3 infinite, not shown"]
    pixels(plot.to_data_uri(figure))


def test_a_scatter_with_infinite_values_is_that_of_the_others():
    actual = np.array([1.0, 5.0, 1.2, 2.8, np.inf, 3.0, 4.0])
    axes = plot.scatter_predicted_actual(INFINITE, actual, labels=LABELS).axes[0]
    finite = np.array([0, 2, 3, 5])
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), np.stack([INFINITE, actual], 1)[finite])
    np.testing.assert_allclose(axes.get_lines()[0].get_xydata(), [[0, 1], [1, 3]], atol=0.1)
    assert [text.get_text() for text in axes.texts] == ["2 infinite, not shown"]
    none = plot.scatter_predicted_actual(np.full(3, np.inf), np.ones(3), labels=LABELS)
    assert not none.axes[0].get_lines()
    pixels(plot.to_data_uri(none))


def literal():
    """Every picture, with text that is no mathematics and yet between two dollars."""
    text, x, every = "$a^$ or $_{$", np.array([1.0, 2.0, 3.0]), np.ones(3, bool)
    names, labels, marks = [text] * 3, plot.Labels(text, text, text), {text: 2.0}
    thumb = thumbnail(3, text)
    return {
        "lines": plot.line_with_band(x, x, x, x, labels=labels, names=[text], references=marks),
        "points": plot.named_points(x, x, x, x, names=names, labels=labels, references=marks),
        "scatter": plot.scatter_predicted_actual(x, x, labels=labels, note=text),
        "histogram": plot.histogram(x, labels=labels, marks=marks),
        "overlaid": plot.overlaid_histograms([(text, {text: x})], labels=labels),
        "bars": plot.bar_with_interval(names, x, x, x, labels=labels),
        "ranked": plot.ranked_points(
            names, x, x, x, notes=(text, names), groups={text: every}, references=marks, labels=labels
        ),
        "strip": plot.image_strip([thumb], title=text),
        "grid": plot.attribution_grid([plot.Attribution(thumb, (thumb,), (thumb,))], title=text),
    }


def test_text_between_dollars_is_shown_as_it_is():
    for name, figure in literal().items():
        pixels(plot.to_data_uri(figure))
        shown = [text for text in figure.findobj(Text) if "or" in text.get_text()]
        assert shown, name
        assert {text._preprocess_math(text.get_text()) for text in shown} == {("$a^$ or $_{$", False)}, name


def test_bars_carry_values_and_intervals_the_first_on_top():
    values, low, high = np.array([-2.0, 0.5]), np.array([-2.5, 0.25]), np.array([-1.0, 1.0])
    figure = plot.bar_with_interval(["helpful", "random"], values, low, high, labels=LABELS)
    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches] == [-2.0, 0.5]
    (whiskers,) = axes.collections
    np.testing.assert_allclose(
        [segment[:, 0] for segment in whiskers.get_segments()], np.stack([low, high], 1), rtol=1e-12
    )
    assert [text.get_text() for text in axes.texts] == ["−2", "0.5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["helpful", "random"]
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_one_bar_has_a_colour():
    ones = np.ones(3)
    for strong in range(3):
        (axes,) = plot.bar_with_interval(["a", "b", "c"], ones, ones, ones, labels=LABELS, strong=strong).axes
        colours = [to_rgb(patch.get_facecolor()[:3]) for patch in axes.patches]
        assert [place for place, colour in enumerate(colours) if colour == to_rgb(plot.BLUE)] == [strong]


def test_ranked_points_stand_in_order_with_their_notes():
    values, groups = np.array([3.0, 1.0, 2.0]), {"ours": np.array([False, True, True]), "others": np.ones(3, bool)}
    figure = plot.ranked_points(
        ["c", "a", "b"], values, values - 0.5, values + 1, notes=("cost", ["x", "y", "z"]), groups=groups,
        references={"floor": 0.9}, labels=LABELS,
    )  # fmt: skip
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axes.texts] == ["y", "z", "x", "cost"]
    points = [line.get_xydata().tolist() for line in axes.get_lines()]
    drawn = [bar.get_label() for bar in axes.containers]
    assert drawn == ["ours", "others"]
    assert [[1.0, 0.0], [2.0, 1.0]] in points
    assert [[3.0, 2.0]] in points
    whiskers = [segment[:, 0].tolist() for bars in axes.collections for segment in bars.get_segments()]
    assert whiskers == [[0.5, 2.0], [1.5, 3.0], [2.5, 4.0]]
    assert axes.get_xscale() == "log"


def test_strips_and_grids_show_every_image_with_its_caption():
    figure = plot.image_strip([thumbnail(value, f"{value}") for value in (0, 100, 255)])
    assert [axes.images[0].get_array()[0, 0] for axes in figure.axes] == [0, 100, 255]
    assert all(axes.images[0].get_clim() == (0, 255) for axes in figure.axes)
    rows = [
        plot.Attribution(
            thumbnail(10 * n, f"query {n}"),
            tuple(thumbnail(10 * n + k, f"helps {n}{k}") for k in (1, 2, 3)),
            tuple(thumbnail(10 * n + k, f"harms {n}{k}") for k in (4, 5)),
        )
        for n in (1, 2)
    ]
    figure = plot.attribution_grid(rows, title="Grid")
    shown = {axes.texts[0].get_text(): axes.images[0].get_array()[0, 0] for axes in figure.axes}
    assert shown == {
        "query 1": 10, "helps 11": 11, "helps 12": 12, "helps 13": 13, "harms 14": 14, "harms 15": 15,
        "query 2": 20, "helps 21": 21, "helps 22": 22, "helps 23": 23, "harms 24": 24, "harms 25": 25,
    }  # fmt: skip
    assert {text.get_text() for text in figure.texts} == {"Grid", "query", "most helpful", "most harmful"}
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert all(
        width == pytest.approx(height) for width, height in (box.size * figure.get_size_inches() for box in boxes)
    )


@pytest.mark.parametrize("name", list(figures()))
def test_a_dark_figure_has_none_of_the_light_colours_and_leaves_the_figure_as_it_was(name):
    figure = figures()[name]
    light = plot.to_data_uri(figure)
    dark = pixels(plot.to_data_uri(figure, theme="dark"))
    assert plot.to_data_uri(figure) == light
    before = pixels(light)
    assert dark.shape == before.shape
    assert dark.shape[1] == plot.WIDTH * plot.DPI
    for colour, exchanged in plot.DARK.items():
        count = area(before, colour)
        assert area(dark, colour) <= 0.02 * count + 40, "blending at the edges of type may meet a colour by chance"
        assert area(dark, exchanged) == pytest.approx(count, rel=0.1, abs=40)
    assert area(before, plot.PAPER) > 0
    assert area(before, plot.INK) > 0


def area(image, colour):
    return int(np.all(image == np.round(255 * np.array(to_rgb(colour))), axis=-1).sum())


def luminance(colour):
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_type_and_lines_stand_out_from_the_page():
    """Contrast as WCAG 2 has it: 4.5 for type, 3 for lines and marks."""
    for page, map_colour in ((plot.PAPER, lambda colour: colour), (plot.DARK[plot.PAPER], plot.DARK.get)):
        for colour, least in [(plot.INK, 7), (plot.MUTED, 4.5), *((colour, 2.6) for colour in plot.SERIES)]:
            bright, dim = sorted((luminance(page), luminance(map_colour(colour))), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) > least, colour


def test_png_files_are_those_of_the_data_uri(tmp_path):
    figure = figures()["histogram"]
    plot.save_png(figure, tmp_path / "sub" / "a.png")
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "sub" / "a.png").convert("RGB")), pixels(plot.to_data_uri(figure))
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        plot.save_png(figure, tmp_path / "file" / "a.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_becomes_its_own_pixels(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    np.testing.assert_array_equal(pixels(plot.to_data_uri(image)), np.broadcast_to(image, (5, 7, 3)))


def test_the_users_matplotlib_is_left_alone():
    before = dict(mpl.rcParams)
    for figure in figures().values():
        plot.to_data_uri(figure, theme="dark")
    assert dict(mpl.rcParams) == before
    code = "import sys; import jattrib.recipes.plot; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
