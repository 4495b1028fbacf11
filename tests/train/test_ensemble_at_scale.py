"""Ensembles that outlive their process: killed, spread over processes, found again, and sized to fit."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib.core import mesh as meshes
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.store import Rows
from jattrib.train import ensemble, fit, recall
from tests.distributed import environment, run_two
from tests.train.margins import MODELS, margins
from tests.train.test_ensemble import N, assert_same_bits, data, small, subset_masks

__all__ = ["data"]  # a fixture


@pytest.fixture(scope="module")
def undisturbed():
    return margins(None)


@pytest.mark.parametrize("strategy", ["vmap", "processes"])
def test_killed_at_any_point_it_ends_with_the_same_margins(undisturbed, tmp_path, strategy):
    directory = tmp_path / "rows"
    script = Path(__file__).with_name("margins.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(directory), strategy], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    journal = directory / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = Rows.open(directory).completed
    assert kept[0]
    again = margins(directory, strategy=strategy)
    np.testing.assert_array_equal(again, margins(None, strategy=strategy))
    np.testing.assert_allclose(again, undisturbed, rtol=1e-4, atol=1e-5)


def test_two_processes_keep_the_margins_of_one(undisturbed, tmp_path):
    ranks = run_two(Path(__file__).with_name("margins.py"), tmp_path)
    np.testing.assert_array_equal(ranks[0]["margins"], ranks[1]["margins"])
    np.testing.assert_allclose(ranks[0]["margins"], undisturbed, rtol=1e-4, atol=1e-5)
    rows = Rows.open(tmp_path / "rows")
    assert rows.completed.all()
    assert len(rows) == MODELS
    np.testing.assert_array_equal(rows.array("outputs"), ranks[0]["margins"])


@pytest.fixture(scope="module")
def kept(data, tmp_path_factory):
    """Three subsets with two seeds each, trained in no order, four and then two more."""
    directory = tmp_path_factory.mktemp("kept") / "rows"
    masks = subset_masks.subsets(jax.random.key(1), N, alpha=0.5, count=3)
    subsets, seeds = np.array([2, 0, 1, 0, 2, 1]), np.array([1, 0, 0, 1, 0, 1])
    keys = ensemble.member_keys(jax.random.key(2), subsets, seeds)
    for count in (4, 6):
        trained = ensemble.train(small(), data, masks[subsets[:count]], keys[:count], directory=directory)
    return directory, masks, list(zip(subsets, seeds, strict=True)), trained


def test_members_are_read_by_subset_and_seed(kept):
    directory, masks, order, trained = kept
    subsets, seeds = np.array([0, 1, 2]), np.array([1, 1, 0])
    places = [order.index(pair) for pair in zip(subsets, seeds, strict=True)]
    found = recall.read(directory, jax.random.key(2), masks, subsets, seeds)
    np.testing.assert_array_equal(found["losses"], trained.losses[places])
    np.testing.assert_array_equal(
        found["outputs/params/layers/0/kernel"], trained.params["layers"]["0"]["kernel"][places]
    )


def test_a_member_is_trained_again_bit_for_bit(kept, data):
    directory, masks, order, trained = kept
    one = recall.again(directory, small(width=None), data, jax.random.key(2), masks, 1, 1)
    assert_same_bits(one, jax.tree.map(lambda leaf: leaf[order.index((1, 1))], trained))


def test_members_that_are_not_there_or_not_the_same_are_refused(kept, data):
    directory, masks, *_ = kept
    with pytest.raises(StoreError, match="no model of subset 1 with seed 2 among its 6"):
        recall.find(directory, jax.random.key(2), masks, np.array([0, 1]), np.array([0, 2]))
    other = data[0] + np.float32(0.1), data[1]
    with pytest.raises(StoreError, match=r"subset 0, seed 1, trained again, has losses that differ"):
        recall.again(directory, small(), other, jax.random.key(2), masks, 0, 1)


def test_a_directory_keeps_its_width(kept, data):
    directory, masks, order, trained = kept
    subsets, seeds = (np.array(each) for each in zip(*order, strict=True))
    keys = ensemble.member_keys(jax.random.key(2), subsets, seeds)
    assert_same_bits(ensemble.train(small(width=None), data, masks[subsets], keys, directory=directory), trained)


MODEL_BYTES = 4 * (6 * 5 + 5 + 5 * 3 + 3) + 2 * 4 + 32
"""Parameters, two losses and a digest: what a member of `small` leaves."""


@pytest.mark.slow
def test_the_plan_of_what_fits_is_as_wide_as_memory_allows(data):
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, data))
    one, two = (ensemble.fit(ensemble.whole, small(width=width), abstract, 100).memory for width in (1, 2))
    assert two.outputs - one.outputs == pytest.approx(MODEL_BYTES, abs=32)  # buffers are aligned
    assert one.arguments >= sum(leaf.nbytes for leaf in data) + N + 8 + 32
    capacity = one.total + 9 * (two.total - one.total)
    found = ensemble.fit(ensemble.whole, small(width=None), abstract, 100, capacity=capacity)
    assert found.fits
    assert found.memory.total <= capacity
    assert 5 <= found.width <= 10
    assert found.chunks == -(-100 // found.width)


def test_the_plan_of_a_mesh_is_for_each_of_its_devices(data):
    mesh = meshes.data_mesh()
    found = ensemble.fit(ensemble.whole, small(width=16), data, 100, mesh=mesh)
    assert (found.width, found.chunks, found.devices) == (16, 7, 8)
    single = ensemble.fit(ensemble.whole, small(width=2), data, 100)
    assert found.memory.outputs == single.memory.outputs


def test_a_model_that_does_not_fit_is_refused(data):
    with pytest.raises(InvalidInputError, match=r"for one model at a time(?s:.*)at most the 1,000 bytes"):
        ensemble.fit(ensemble.whole, small(width=None), data, 100, capacity=1000)


@pytest.mark.parametrize(("capacity", "expected"), [(10, 1), (29, 1), (30, 2), (99, 4), (10**6, 64)])
def test_the_width_is_lowered_where_the_line_promises_too_much(capacity, expected):
    asked = []

    def held(width):
        asked.append(width)
        return 10 * width + 5 * width * (width - 1)  # 10, 30, 60, 100: steeper than the line

    width = fit.widest(held, 64, capacity)
    assert held(width) <= capacity
    assert width <= expected
    assert width >= expected - 1
    assert len(asked) < 12


def test_a_described_device_has_the_memory_of_its_kind():
    chip = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite", memory_stats=lambda: None)
    assert fit.capacity(chip) == int(0.9 * 16 * 2**30)
    chip.device_kind = "TPU v99"
    with pytest.raises(InvalidInputError, match=r"TPU v99(?s:.*)pass capacity="):
        fit.capacity(chip)
