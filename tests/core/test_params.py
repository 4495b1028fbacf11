import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
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
    with pytest.raises(StoreError, match="cannot be written"):
        store.write_json(tmp_path / "half.json" / "summary.json", {})
