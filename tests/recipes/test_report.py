import os
import re
import tomllib
from html.parser import HTMLParser

import numpy as np
import pytest

from jattrib.recipes import config, plot, report, rundir

VOID = {"meta", "img", "source"}


class Page(HTMLParser):
    """What a test asks of a page: elements with their attributes, text by enclosing tag, and that tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else None, data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self, tag):
        return [text for inside, text in self.texts if inside == tag]


def thumbnail(name, detail=""):
    return plot.Thumbnail(np.zeros((28, 28, 1), np.uint8), name, detail)


CONFIG = {
    "recipe": "trak", "seed": 0, "left_out": None, "note": "a & b", "data": {"size": 9},
    "model": {"kind": "mlp", "widths": [64], "head": {"kind": "linear", "norm": {"kind": "batch"}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def text():
    figure = plot.histogram(np.arange(9.0), labels=plot.Labels("x", "y"))
    whole = report.Report(
        title="Is <TRAK> true & good?",
        lead="It is. Mostly.",
        headlines=(report.KeyFigure("LDS", 0.6841, 0.66, 0.7, "of 1"), report.KeyFigure("Accuracy", 86.1, unit="%")),
        figures=(report.KeyFigure("Change", -2.125, -2.5, -1.75, "logits"), report.KeyFigure("Models", 12345)),
        sections=(
            report.Section(
                "Pictures",
                (
                    "A paragraph with <b>.",
                    report.picture(figure, alt='A "spread"', caption="See the spread."),
                    report.Gallery(
                        (
                            plot.Attribution(
                                thumbnail("Boot", "margin 3"), (thumbnail("Coat", "image 5"),), (thumbnail("Bag"),)
                            ),
                        ),
                        "Of one query.",
                    ),
                    report.Listing(("count", "LDS"), ((1, 0.5), (20, 0.75)), "By count"),
                ),
            ),
        ),
        method=("It was measured.",),
    )
    return report.render(
        whole, config=CONFIG, versions={"jax": "1.2"}, device="cpu (2 cores)", seconds={"total": 200.0, "a_b": 150.0}
    )


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_it_needs_nothing_but_itself(text, page):
    assert "http" not in text
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not page.all("script")
    assert not page.all("link")
    sources = [a["src"] for a in page.all("img")] + [a["srcset"] for a in page.all("source")]
    assert len(sources) == 5
    assert all(re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", source) for source in sources)
    assert "url(" not in text
    assert "@import" not in text


def test_every_image_has_words_for_those_who_do_not_see_it_and_a_size(page):
    assert [a["alt"] for a in page.all("img")] == [
        'A "spread"',
        "query: Boot",
        "helpful training image: Coat",
        "harmful training image: Bag",
    ]
    assert [(a["width"], a["height"]) for a in page.all("img")] == [("600", "320"), *[("28", "28")] * 3]


def test_dark_pages_get_dark_pictures_on_the_screen_alone(text, page):
    (source,) = page.all("source")
    assert source["media"] == "screen and (prefers-color-scheme: dark)"
    assert source["srcset"] != page.all("img")[0]["src"]
    assert "@media print" in text


def test_it_is_a_page_with_an_outline(page):
    assert page.all("html") == [{"lang": "en"}]
    assert page.said("h1") == page.said("title") == ["Is <TRAK> true & good?"]
    assert page.said("h2") == ["Figures", "Pictures", "How it was measured", "Cost", "Configuration", "Versions"]
    assert page.said("p")[:2] == ["jattrib · trak", "It is. Mostly."]
    assert "A paragraph with <b>." in page.said("p")
    assert page.said("figcaption") == ["See the spread."]
    assert all(a["scope"] in ("row", "col") for a in page.all("th"))


def test_figures_have_value_interval_unit_and_meaning(page):
    assert page.said("dd")[:4] == ["0.684", "95% interval 0.660 to 0.700", "of 1", "86.1 "]
    cells = page.said("td")
    assert cells[:3] == ["−2.125", "−2.500 to −1.750", "logits"]
    assert cells[3] == "12,345"
    assert "%" in page.said("span")


def test_listings_are_tables_with_a_caption(page):
    assert page.said("caption") == ["By count"]
    assert [text for text in page.said("td") if text in ("0.500", "0.750")] == ["0.500", "0.750"]


def test_details_are_read_under_a_query_and_on_hovering_over_a_source(page):
    assert page.said("small") == ["margin 3"]
    assert page.all("img")[2]["title"] == "image 5"


def test_cost_config_and_versions_are_told(page):
    assert "3 min 20 s on cpu (2 cores), resumed runs included." in page.said("p")
    assert "a b" in page.said("th")
    assert "2 min 30 s" in page.said("td")
    assert {"style": "width:75.0%"} in page.all("span")
    (shown,) = page.said("pre")
    assert tomllib.loads(shown) == {key: value for key, value in CONFIG.items() if value is not None}
    assert "jax" in page.said("dt")


def test_what_is_empty_leaves_no_heading():
    bare = report.Report("T", "L", (), (), (), ())
    page = Page(report.render(bare, config={}, versions={}, device="d", seconds={}))
    assert page.said("h2") == ["Cost", "Configuration", "Versions"]
    assert not page.all("table")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.123"), (-0.5, "−0.500"), (12.345, "12.3"), (1234.5, "1,234"), (1234567, "1,234,567"),
        (-3, "−3"), ("text", "text"), (True, "True"), (np.int64(5), "5"), (np.int32(-1234), "−1,234"),
        (np.float32(2.5), "2.500"), (np.bool_(True), "True"), (-1e-5, "0.000"), (-0.0, "0.000"), (-0.0006, "−0.001"),
        (np.float64(-1e-9), "0.000"), (float("-inf"), "−inf"), (np.uint8(7), "7"),
    ],
)  # fmt: skip
def test_numbers_are_shown_as_a_reader_wants_them(value, shown):
    assert report.number(value) == shown


@pytest.mark.parametrize(
    ("part", "shown"), [(0.01, "1%"), (0.005, "0.5%"), (1e-4, "0.01%"), (0.125, "12.5%"), (0.999, "99.9%")]
)
def test_parts_are_shown_in_percent_however_small(part, shown):
    assert report.percent(part) == shown


@pytest.mark.parametrize(
    ("number", "name", "shown"),
    [(1, "query", "1 query"), (2, "query", "2 queries"), (1000, "epoch", "1,000 epochs"), (0, "run", "0 runs")],
)
def test_one_thing_is_in_the_singular(number, name, shown):
    assert report.counted(number, name) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(3.14, "3.1 s"), (59.4, "59 s"), (60.0, "1 min 0 s"), (3599.6, "1 h 0 min"), (5400.0, "1 h 30 min")],
)
def test_durations_are_shown_by_their_two_largest_parts(seconds, shown):
    assert report.duration(seconds) == shown


class Fake(config.Room, frozen=True, tag_field="recipe", tag="fake"):
    seed: int = 5


def test_it_is_written_into_the_run_with_what_made_it(tmp_path):
    with rundir.opened(tmp_path, Fake()) as directory:
        with rundir.stage(directory, "training_models"):
            pass
        path = report.write(directory, report.Report("T", "L", (), (), (), ()))
    page = Page(path.read_text("utf-8"))
    assert path == tmp_path / "report.html"
    assert page.said("pre") == ['recipe = "fake"\nseed = 5']
    assert "training models" in page.said("th")
    assert rundir.versions()["jax"] in page.said("dd")


def test_a_path_that_is_no_text_is_told_as_it_can_be(tmp_path):
    with rundir.opened(tmp_path, Fake()) as directory:
        named = directory._replace(config={"path": os.fsdecode(b"caf\xe9")})
        path = report.write(named, report.Report("T", "L", (), (), (), ()))
    assert Page(path.read_text("utf-8")).said("pre") == ['path = "caf\\udce9"']
