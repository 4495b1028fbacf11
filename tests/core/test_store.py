import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattrib.core import files, store
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.store import Rows

ARRAYS = {"x/kernel": ((3,), np.float32), "flag": ((), np.bool_), "half": ((2, 2), jnp.bfloat16)}
IDENTITY = {"model": "abc", "projection": {"seed": 1, "dim": 4}}


def draw(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x/kernel": rng.normal(size=(count, 3)).astype(np.float32),
        "flag": rng.random(count) > 0.5,
        "half": rng.normal(size=(count, 2, 2)).astype(jnp.bfloat16),
    }


def cut(rows, start, stop):
    return {name: each[start:stop] for name, each in rows.items()}


@pytest.fixture
def rows():
    return draw(10)


@pytest.fixture
def filled(tmp_path, rows):
    made = Rows.create(tmp_path / "s", arrays=ARRAYS, length=10, chunk=4, identity=IDENTITY)
    made.write(0, cut(rows, 0, 8))
    made.write(8, cut(rows, 8, 10))
    return made


def data_file(made, name, *numbers):
    found = (made.path / "arrays" / name.replace("/", "%2F") / "c").joinpath(*map(str, numbers))
    assert found.is_file()
    return found


@given(data=st.data(), length=st.integers(1, 40), chunk=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_what_is_read_is_what_was_written(tmp_path_factory, data, length, chunk):
    path = tmp_path_factory.mktemp("rows") / "s"
    rows = draw(length, seed=length)
    made = Rows.create(path, arrays=ARRAYS, length=length, chunk=chunk)
    starts = data.draw(st.permutations(range(0, length, chunk)))
    done = data.draw(st.integers(1, len(starts)))
    for start in starts[:done]:
        made.write(start, cut(rows, start, start + chunk))
    opened = Rows.open(path)
    np.testing.assert_array_equal(np.flatnonzero(opened.completed) * chunk, sorted(starts[:done]))
    for start in starts[done:]:
        with pytest.raises(StoreError, match=f"rows {start}:.* of 'flag' .*are not there"):
            opened.read("flag", start, start + 1)
        opened.write(start, cut(rows, start, start + chunk))
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    indices = np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=8)), np.int64)
    for name, expected in rows.items():
        np.testing.assert_array_equal(opened.read(name, start, stop), expected[start:stop])
        np.testing.assert_array_equal(Rows.open(path).array(name), expected)
        np.testing.assert_array_equal(opened.take(indices)[name], expected[indices])


def test_layout_survives(filled):
    opened = Rows.open(filled.path, identity=IDENTITY)
    assert (len(opened), opened.chunk, opened.identity) == (10, 4, IDENTITY)
    assert opened.arrays == {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in ARRAYS.items()}
    assert store.row_arrays(
        jax.eval_shape(lambda: {"x": {"kernel": jnp.zeros((7, 3))}, "flag": jnp.zeros(7, bool)})
    ) == {
        "flag": ((), np.dtype(bool)),
        "x/kernel": ((3,), np.dtype(np.float32)),
    }


def test_extension_keeps_what_is_there(filled, rows):
    filled.extend(13)
    more = Rows.create_or_open(filled.path, arrays=ARRAYS, length=15, chunk=4, identity=IDENTITY)
    assert len(more) == 15
    np.testing.assert_array_equal(more.completed, [True, True, False, False])
    np.testing.assert_array_equal(more.read("flag", 0, 10), rows["flag"])
    with pytest.raises(StoreError, match="rows 10:11 of 'flag'"):
        more.read("flag", 7, 11)
    longer = draw(15, seed=5)
    more.write(8, cut(longer, 8, 15))
    assert more.completed.all()
    np.testing.assert_array_equal(
        Rows.open(filled.path).array("x/kernel"), np.concatenate([rows["x/kernel"][:8], longer["x/kernel"][8:]])
    )
    with pytest.raises(InvalidInputError, match=r"length = 14\n.*at least the 15 rows"):
        more.extend(14)
    with pytest.raises(StoreError, match="has 15 rows, this run has 12"):
        Rows.create_or_open(filled.path, arrays=ARRAYS, length=12, chunk=4, identity=IDENTITY)


def flip(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("harm", [flip, truncate, os.remove])
@pytest.mark.parametrize("number", [1, 2])
def test_damaged_data_is_refused_by_name_and_can_be_computed_again(filled, rows, harm, number):
    harm(data_file(filled, "x/kernel", number, 0))
    start, stop = 4 * number, min(4 * number + 4, 10)
    match = rf"rows {start}:{stop} of 'x/kernel' in {filled.path} are damaged(.|\n)*discard\({start}, {stop}\)"
    opened = Rows.open(filled.path)
    with pytest.raises(StoreError, match=match):
        opened.array("x/kernel")
    with pytest.raises(StoreError, match=match):
        opened.take(np.array([stop - 1]))
    np.testing.assert_array_equal(opened.read("x/kernel", 0, 4), rows["x/kernel"][:4])
    np.testing.assert_array_equal(opened.array("flag"), rows["flag"])
    opened.discard(start, stop)
    assert Rows.open(filled.path).completed.tolist() == [each != number for each in range(3)]
    opened.write(start, cut(rows, start, stop))
    np.testing.assert_array_equal(Rows.open(filled.path).array("x/kernel"), rows["x/kernel"])


def test_a_missing_chunk_of_zeros_cannot_pass_for_another(tmp_path):
    made = Rows.create(tmp_path / "s", arrays={"x": ((2,), np.float32)}, length=4, chunk=2)
    made.write(0, {"x": np.zeros((4, 2), np.float32)})
    data_file(made, "x", 1, 0).write_bytes(np.full((2, 2), -0.0, np.float32).tobytes())
    with pytest.raises(StoreError, match="rows 2:4 of 'x'"):
        Rows.open(made.path).array("x")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda text: text.replace('"length": 10', '"length": 11'), "manifest.json is damaged or was altered"),
        (lambda text: text.replace('"seed": 1', '"seed": 2'), "manifest.json is damaged or was altered"),
        (lambda text: text[:-20], "manifest.json cannot be read"),
        (lambda text: "[]", "manifest.json is damaged or was altered"),
    ],
)
def test_an_edited_manifest_is_refused(filled, edit, match):
    manifest = filled.path / "manifest.json"
    manifest.write_text(edit(manifest.read_text()))
    with pytest.raises(StoreError, match=match):
        Rows.open(filled.path)


def test_an_edited_journal_is_refused_and_a_torn_line_is_forgotten(filled, rows):
    journal = filled.path / "journal.jsonl"
    whole = journal.read_text()
    journal.write_text(whole[:-30])  # killed while it wrote the last line
    opened = Rows.open(filled.path)
    assert opened.completed.tolist() == [True, True, False]
    opened.write(8, cut(rows, 8, 10))
    assert journal.read_text() == whole
    journal.write_text(whole.replace('"stop": 8', '"stop": 7'))
    with pytest.raises(StoreError, match=r"journal.jsonl is damaged or was altered: line 2"):
        Rows.open(filled.path)
    journal.unlink()
    with pytest.raises(StoreError, match=r"journal.jsonl is damaged or was altered: it cannot be read"):
        Rows.open(filled.path)


def test_damaged_metadata_is_refused(filled):
    metadata = filled.path / "arrays" / "flag" / "zarr.json"
    metadata.write_text(metadata.read_text().replace("bool", "uint8"))
    with pytest.raises(StoreError, match="the array 'flag' cannot be opened"):
        Rows.open(filled.path).array("flag")


def test_a_chunk_counts_only_once_it_is_recorded(filled, rows, monkeypatch):
    filled.discard(0, 4)

    def killed(path, records):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "append_journal", killed)
    with pytest.raises(KeyboardInterrupt):
        filled.write(0, cut(rows, 0, 4))
    assert Rows.open(filled.path).completed.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({**IDENTITY, "model": "xyz"}, "its model is 'abc', this run's is 'xyz'"),
        ({**IDENTITY, "data": "d"}, "its data is nothing, this run's is 'd'"),
        ({"model": "abc"}, r"its projection is \{'seed': 1, 'dim': 4\}, this run's is nothing"),
    ],
)
def test_another_identity_is_refused(filled, asked, match):
    with pytest.raises(StoreError, match=match):
        Rows.open(filled.path, identity=asked)
    with pytest.raises(StoreError, match=match):
        Rows.create_or_open(filled.path, arrays=ARRAYS, length=10, chunk=4, identity=asked)


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        ({"chunk": 5}, "its chunk is 4, this run's is 5"),
        ({"arrays": {**ARRAYS, "flag": ((), np.int8)}}, r"row of 'flag' is 'bool\[\]', this run's is 'int8\[\]'"),
    ],
)
def test_another_layout_is_refused(filled, layout, match):
    with pytest.raises(StoreError, match=match):
        Rows.create_or_open(filled.path, **{"arrays": ARRAYS, "length": 10, "chunk": 4, "identity": IDENTITY, **layout})


def test_where_a_store_cannot_be(tmp_path):
    layout = {"arrays": ARRAYS, "length": 4, "chunk": 2}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    with pytest.raises(StoreError, match=r"cannot be written: Not a directory(.|\n)*choose another directory"):
        Rows.create(tmp_path / "file" / "s", **layout)
    for make in (Rows.create, Rows.create_or_open):
        with pytest.raises(StoreError, match="taken exists and is not empty"):
            make(tmp_path / "taken", **layout)
    with pytest.raises(StoreError, match="holds no store"):
        Rows.open(tmp_path / "taken")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "taken"]
    (tmp_path / "empty").mkdir()
    assert not Rows.create(tmp_path / "empty", **layout).completed.any()


def test_only_chunks_that_hold_the_rows_are_discarded(filled):
    before = (filled.path / "journal.jsonl").stat().st_size
    filled.discard(5, 5)
    filled.discard(-8, 0)
    filled.discard(10, 10**9)
    assert filled.completed.all()
    assert (filled.path / "journal.jsonl").stat().st_size == before
    filled.discard(9, 10**9)
    assert Rows.open(filled.path).completed.tolist() == [True, True, False]


def test_an_extension_that_was_killed_does_not_bind_the_next_one(filled, rows, monkeypatch):
    def killed(path, manifest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            filled.extend(20)
    again = Rows.open(filled.path)
    again.extend(15)
    assert len(Rows.open(filled.path)) == 15
    np.testing.assert_array_equal(again.read("flag", 0, 10), rows["flag"])


def test_an_extension_sees_that_of_another_process(filled):
    Rows.open(filled.path).extend(20)
    with pytest.raises(InvalidInputError, match=r"length = 15\n  expected: at least the 20 rows"):
        filled.extend(15)


def test_a_change_of_directory_leads_nowhere_else(filled, rows, monkeypatch):
    monkeypatch.chdir(filled.path.parent)
    opened = Rows.open(Path(filled.path.name))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(opened.array("flag"), rows["flag"])


def test_rows_and_parameters_are_not_taken_for_one_another(filled, rows, tmp_path):
    for attempt in (store.save_params, store.load_params):
        with pytest.raises(StoreError, match=r"holds rows, no parameters(.|\n)*Rows.open"):
            attempt(filled.path, {"w": np.zeros(2)})
    np.testing.assert_array_equal(Rows.open(filled.path).array("flag"), rows["flag"])
    store.save_params(tmp_path / "p", {"w": np.zeros(2)})
    with pytest.raises(StoreError, match=r"holds parameters, no rows(.|\n)*load_params"):
        Rows.open(tmp_path / "p")


def test_where_nothing_can_be_looked_at_is_said(tmp_path):
    nowhere = tmp_path / ("x" * 300)
    for attempt in (
        lambda: Rows.create(nowhere, arrays=ARRAYS, length=10, chunk=4),
        lambda: Rows.create_or_open(nowhere, arrays=ARRAYS, length=10, chunk=4),
        lambda: Rows.open(nowhere),
        lambda: store.save_params(nowhere, {}),
        lambda: store.load_params(nowhere, {}),
    ):
        with pytest.raises(StoreError, match="File name too long"):
            attempt()


def test_a_link_to_itself_is_no_place_for_a_store(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(StoreError, match="link cannot be written"):
        Rows.create(tmp_path / "link", arrays=ARRAYS, length=10, chunk=4)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_leads_to_the_store(tmp_path, rows, there):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "s").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "s")
    Rows.create(tmp_path / "link", arrays=ARRAYS, length=10, chunk=4).write(0, rows)
    assert (tmp_path / "link").is_symlink()
    np.testing.assert_array_equal(Rows.open(tmp_path / "disk" / "s").array("flag"), rows["flag"])


def test_any_byte_order_is_stored(tmp_path):
    made = Rows.create(tmp_path / "s", arrays={"x": ((), np.dtype(">f4"))}, length=2, chunk=2)
    made.write(0, {"x": np.array([1.0, 2.5], ">f4")})
    np.testing.assert_array_equal(Rows.open(made.path).array("x"), np.array([1.0, 2.5], np.float32))


@pytest.mark.parametrize("dtype", ["U3", "S3", object, "datetime64[s]", "V8", [("a", "f4")]])
def test_rows_of_no_numbers_are_refused_by_name(tmp_path, dtype):
    with pytest.raises(InvalidInputError, match=r"a store of .* rows 'words'\n  expected: numbers"):
        Rows.create(tmp_path / "s", arrays={"words": ((), np.dtype(dtype))}, length=2, chunk=2)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_with_a_remedy(filled, rows):
    shutil.rmtree(filled.path / "arrays" / "flag" / "c")
    (filled.path / "arrays" / "flag" / "c").write_text("no directory")
    with pytest.raises(StoreError, match=rf"{filled.path} cannot be written(.|\n)*free some space"):
        filled.write(0, cut(rows, 0, 4))


def test_a_later_format_is_refused(filled):
    manifest = files.read_manifest(filled.path / "manifest.json")
    files.write_manifest(filled.path / "manifest.json", {**manifest, "format": 99})
    with pytest.raises(StoreError, match="has the format 99"):
        Rows.open(filled.path)


@pytest.mark.parametrize(
    ("start", "change", "match"),
    [
        (2, lambda rows: rows, r"rows 2:6 for .*\n.*whole chunks of 4 of 10 rows"),
        (8, lambda rows: rows, "rows 8:12"),
        (-4, lambda rows: rows, "rows -4:0"),
        (0, lambda rows: cut(rows, 0, 3), "rows 0:3"),
        (0, lambda rows: cut(rows, 0, 0), "rows 0:0"),
        (0, lambda rows: {**rows, "flag": rows["flag"][:3]}, r"bool\[3\] 'flag'"),
        (0, lambda rows: {**rows, "flag": rows["flag"].astype(np.int8)}, r"int8\[4\] 'flag'(.|\n)*bool\[4\] 'flag'"),
        (0, lambda rows: {**rows, "half": rows["half"][:, 0]}, r"bfloat16\[4, 2\] 'half'"),
        (0, lambda rows: {"flag": rows["flag"]}, r"the rows bool\[4\] 'flag' for"),
        (0, lambda rows: {**rows, "more": rows["flag"]}, "'more'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(filled, rows, start, change, match):
    with pytest.raises(InvalidInputError, match=match):
        filled.write(start, change(cut(rows, 0, 4)))


@pytest.mark.parametrize(
    "layout",
    [
        {"arrays": {}, "length": 1, "chunk": 1},
        {"arrays": {"..": ((), np.int8)}, "length": 1, "chunk": 1},
        {"arrays": {"x": ((), np.int8)}, "length": 0, "chunk": 1},
        {"arrays": {"x": ((), np.int8)}, "length": 1, "chunk": 0},
    ],
)
def test_a_store_of_nothing_is_refused(tmp_path, layout):
    with pytest.raises(InvalidInputError, match="a store of the arrays"):
        Rows.create(tmp_path / "s", **layout)


@pytest.mark.parametrize(("name", "start", "stop"), [("y", 0, 1), ("flag", -1, 2), ("flag", 3, 2), ("flag", 0, 11)])
def test_rows_that_are_not_in_it_cannot_be_read(filled, name, start, stop):
    with pytest.raises(InvalidInputError, match=rf"rows {start}:{stop} of '{name}'"):
        filled.read(name, start, stop)


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_mask_is_not_taken_for_row_numbers(filled):
    with pytest.raises(InvalidInputError, match=r"indices of dtype bool(.|\n)*np.flatnonzero\(mask\)"):
        filled.take(np.array([True, False, True]))


def test_empty_rows_are_rows(tmp_path):
    made = Rows.create(tmp_path / "s", arrays={"none": ((0, 2), np.float32), "all": ((), np.int64)}, length=3, chunk=2)
    made.write(0, {"none": np.zeros((3, 0, 2), np.float32), "all": np.arange(3)})
    opened = Rows.open(made.path)
    assert opened.array("none").shape == (3, 0, 2)
    np.testing.assert_array_equal(opened.array("all"), [0, 1, 2])
    assert opened.read("all", 2, 2).shape == (0,)


def test_names_that_look_alike_are_kept_apart(tmp_path):
    arrays = {"a/b": ((), np.int32), "a%2Fb": ((), np.int32), "a": ((), np.int32)}
    made = Rows.create(tmp_path / "s", arrays=arrays, length=2, chunk=2)
    made.write(0, {name: np.full(2, number, np.int32) for number, name in enumerate(arrays)})
    assert [Rows.open(made.path).array(name)[0] for name in arrays] == [0, 1, 2]


def test_the_journal_is_one_line_a_chunk(filled):
    lines = (filled.path / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line[9:]) for line in lines]
    assert [(each["start"], each["stop"]) for each in records] == [(0, 4), (4, 8), (8, 10)]
    assert all(each["sha256"].keys() == ARRAYS.keys() for each in records)
