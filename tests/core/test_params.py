import errno
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

from jattrib.core import files, params, store
from jattrib.core.errors import InvalidInputError, StoreError

TREE = {
    "layers": [{"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": jnp.ones(3, jnp.bfloat16)}],
    "step": jnp.asarray(7),
    "empty": jnp.zeros((0, 2)),
    "host": np.arange(3, dtype=np.int64),
}


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_there_and_back(tmp_path, capfd):
    level = logging.getLogger("absl").level
    store.save_params(tmp_path / "p", TREE, {"seed": 1})
    found = store.load_params(tmp_path / "p", TREE, {"seed": 1})
    same(found, TREE)
    assert isinstance(found["step"], jax.Array)
    assert isinstance(found["host"], np.ndarray)
    abstract = jax.eval_shape(
        lambda: {key: leaf for key, leaf in TREE.items() if key != "host"} | {"host": jnp.zeros(3)}
    )
    with pytest.raises(StoreError, match="at 'host' it has int64"):
        store.load_params(tmp_path / "p", abstract)
    assert logging.getLogger("absl").level == level
    assert capfd.readouterr().err == ""


def test_abstract_trees_are_enough(tmp_path):
    tree = {"w": jnp.arange(4.0), "s": 2.5}
    store.save_params(tmp_path / "p", tree)
    found = store.load_params(tmp_path / "p", jax.eval_shape(lambda: {"w": jnp.zeros(4), "s": jnp.zeros(())}))
    np.testing.assert_array_equal(found["w"], [0, 1, 2, 3])
    assert float(found["s"]) == 2.5


def test_nothing_at_all(tmp_path):
    store.save_params(tmp_path / "p", {})
    assert store.load_params(tmp_path / "p", {}) == {}


def test_double_precision(tmp_path, x64):
    tree = {"w": jnp.asarray(1 / 3, jnp.float64)}
    store.save_params(tmp_path / "p", tree)
    same(store.load_params(tmp_path / "p", tree), tree)


def test_saving_again_replaces_it_and_leaves_nothing_behind(tmp_path):
    for number in range(3):
        store.save_params(tmp_path / "p", {"w": jnp.full(2, float(number))}, {"number": number})
        (tmp_path / "p" / f"arrays-{number + 2}.orbax-checkpoint-tmp").mkdir()  # a save that was killed
    assert float(store.load_params(tmp_path / "p", {"w": jnp.zeros(2)}, {"number": 2})["w"][0]) == 2.0
    store.save_params(tmp_path / "p", {"w": jnp.zeros(2)})
    assert len(os.listdir(tmp_path / "p")) == 2


def test_the_old_one_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    store.save_params(tmp_path / "p", {"w": jnp.zeros(2)}, {"number": 0})

    def killed(path, manifest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            store.save_params(tmp_path / "p", {"w": jnp.ones(2)}, {"number": 1})
    found = store.load_params(tmp_path / "p", {"w": jnp.ones(2)}, {"number": 0})
    np.testing.assert_array_equal(found["w"], [0, 0])


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_nothing_on_it(tmp_path, monkeypatch, caplog):
    store.save_params(tmp_path / "p", {"w": jnp.zeros(2)})

    def full(self, path, *args, **options):
        unfinished = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
        unfinished.mkdir()
        (unfinished / "part").write_bytes(b"0")
        logging.getLogger("absl").error("No space left on device")
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(orbax.checkpoint.Checkpointer, "save", full)
        with pytest.raises(StoreError, match=r"p cannot be written: .*No space left(.|\n)*free some space"):
            store.save_params(tmp_path / "p", {"w": jnp.ones(2)})
    assert sorted(os.listdir(tmp_path / "p")) == ["arrays-1", "manifest.json"]
    np.testing.assert_array_equal(store.load_params(tmp_path / "p", {"w": jnp.ones(2)})["w"], [0, 0])
    assert caplog.records == []


def test_a_file_that_cannot_be_finished_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.write_json(tmp_path / "summary.json", {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_in_json_are_their_words(tmp_path, impl):
    key = jax.random.key(3, impl=impl)
    store.write_json(tmp_path / "a.json", {"key": key})
    assert store.read_json(tmp_path / "a.json") == {"key": jax.random.key_data(key).tolist()}


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_there_and_back(tmp_path, impl):
    keys = {"one": jax.random.key(3, impl=impl), "many": jax.random.split(jax.random.key(4, impl=impl), 3)}
    store.save_params(tmp_path / "p", keys)
    for like in (keys, jax.eval_shape(lambda: keys)):
        found = store.load_params(tmp_path / "p", like)
        for name, key in keys.items():
            assert found[name].dtype == key.dtype
            np.testing.assert_array_equal(jax.random.key_data(found[name]), jax.random.key_data(key))
    other = {**keys, "one": jax.random.key(3, impl="unsafe_rbg")}
    with pytest.raises(StoreError, match=r"at 'one' it has key<\w+>\[\], this model has key<urbg>\[\]"):
        store.load_params(tmp_path / "p", other)


def test_any_byte_order_is_saved(tmp_path):
    value = np.array([1.0, 2.5], ">f4")
    store.save_params(tmp_path / "p", {"w": value})
    for like in (value, np.zeros(2, np.float32)):
        found = store.load_params(tmp_path / "p", {"w": like})["w"]
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, [1.0, 2.5])


@pytest.mark.parametrize("leaf", ["gelu", np.array(["a"]), np.array([None]), 2**70])
def test_what_is_no_number_is_refused_by_its_path(tmp_path, leaf):
    with pytest.raises(InvalidInputError, match=r"the leaf 'a/b'(.|\n)*write_json"):
        store.save_params(tmp_path / "p", {"a": {"b": leaf}})
    assert os.listdir(tmp_path) == []


def test_removal_takes_nothing_else(tmp_path):
    store.save_params(tmp_path / "p", {"w": jnp.zeros(2)})
    (tmp_path / "p" / "notes").write_text("mine")
    (tmp_path / "p" / "arrays-of-mine").mkdir()
    params.remove(tmp_path / "p")
    assert sorted(os.listdir(tmp_path / "p")) == ["arrays-of-mine", "notes"]
    store.save_params(tmp_path / "q", {"w": jnp.zeros(2)})
    params.remove(tmp_path / "q")
    assert not (tmp_path / "q").exists()
    params.remove(tmp_path / "q")


@pytest.mark.parametrize(
    ("like", "match"),
    [
        ({"a": jnp.zeros(2), "b": jnp.zeros((2, 2))}, r"at 'b' it has float32\[2\], this model has float32\[2, 2\]"),
        ({"a": jnp.zeros(2, jnp.int32), "b": jnp.zeros(2)}, "at 'a' it has float32.* this model has int32"),
        ({"a": jnp.zeros(2)}, r"at 'b' it has float32\[2\], this model has nothing"),
        ({"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}, "at 'c' it has nothing"),
    ],
)
def test_another_tree_is_refused_by_its_first_path(tmp_path, like, match):
    store.save_params(tmp_path / "p", {"a": jnp.zeros(2), "b": jnp.zeros(2)})
    with pytest.raises(StoreError, match=match):
        store.load_params(tmp_path / "p", like)


def test_another_identity_is_refused(tmp_path):
    store.save_params(tmp_path / "p", {"w": jnp.zeros(2)}, {"seed": 1})
    with pytest.raises(StoreError, match="its seed is 1, this run's is 2"):
        store.load_params(tmp_path / "p", {"w": jnp.zeros(2)}, {"seed": 2})


def test_altered_parameters_are_refused(tmp_path):
    value = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    store.save_params(tmp_path / "p", {"w": value})
    largest = max((tmp_path / "p").rglob("d/*"), key=lambda each: each.stat().st_size)
    whole = largest.read_bytes()
    for content in (whole[:4000] + bytes([whole[4000] ^ 1]) + whole[4001:], whole[:-2000], None):
        if content is None:
            largest.unlink()
        else:
            largest.write_bytes(content)
        with pytest.raises(StoreError, match="arrays-1 is damaged or was altered"):
            store.load_params(tmp_path / "p", {"w": value})


def test_missing_or_unwritable(tmp_path):
    with pytest.raises(StoreError, match=r"holds no parameters(.|\n)*train again"):
        store.load_params(tmp_path, {})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="cannot be written"):
        store.save_params(tmp_path / "file" / "p", {"w": jnp.zeros(2)})


def test_json_there_and_back(tmp_path):
    value = {"lds": np.float32(0.5), "counts": jnp.arange(3), "where": tmp_path, "flag": np.bool_(True), "none": None}
    store.write_json(tmp_path / "new" / "summary.json", value)
    assert store.read_json(tmp_path / "new" / "summary.json") == {
        "lds": 0.5, "counts": [0, 1, 2], "where": str(tmp_path), "flag": True, "none": None,
    }  # fmt: skip
    assert os.listdir(tmp_path / "new") == ["summary.json"]


@pytest.mark.parametrize(
    ("value", "match"),
    [({"a": {"b": [1.0, float("nan")]}}, "a/b/1 = nan"), ({"a": np.inf}, "a = inf"), ({"f": print}, "f = <built-in")],
)
def test_json_has_no_word_for_it(tmp_path, value, match):
    with pytest.raises(InvalidInputError, match=match):
        store.write_json(tmp_path / "summary.json", value)
    assert os.listdir(tmp_path) == []


def test_json_that_is_none(tmp_path):
    (tmp_path / "half.json").write_text('{"a": ')
    for name in ("half.json", "missing.json"):
        with pytest.raises(StoreError, match=rf"{name} cannot be read"):
            store.read_json(tmp_path / name)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(StoreError, match=r"deep\.json cannot be read"):
        store.read_json(tmp_path / "deep.json")
    with pytest.raises(StoreError, match="cannot be written"):
        store.write_json(tmp_path / "half.json" / "summary.json", {})
