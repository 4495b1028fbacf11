import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattrib.core import mesh as meshes
from jattrib.core import params, store, stream
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.store import Rows
from jattrib.core.types import Fold, Source

MATRIX = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
ARRAYS = {"product": ((2,), np.float32), "label": ((), np.int32)}


def draw(count):
    rng = np.random.default_rng(count)
    return rng.normal(size=(count, 3)).astype(np.float32), rng.integers(0, 9, count).astype(np.int32)


def project(matrix, batch):
    inputs, labels = batch
    return {"product": inputs @ matrix, "label": labels + 1}


def projected(data):
    return {"product": data[0].astype(np.float64) @ MATRIX, "label": data[1] + 1}


def gram(batch, valid):
    inputs, labels = batch
    kept = jnp.where(valid[:, None], inputs, jnp.zeros_like(inputs))
    return {"gram": kept.T @ kept, "labels": jnp.sum(jnp.where(valid, labels, jnp.zeros_like(labels)), dtype=jnp.int32)}


def zero():
    return {"gram": jnp.zeros((3, 3), jnp.float32), "labels": jnp.zeros((), jnp.int32)}


GRAM = Fold(zero, gram, lambda state: state)


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


class Counting:
    """A source that counts what is read, and fails at one row if told to."""

    def __init__(self, batch, failing_at=None):
        self.inner, self.failing_at, self.read = stream.InMemory(batch), failing_at, []

    def __len__(self):
        return len(self.inner)

    def take(self, indices, /):
        if self.failing_at in indices:
            raise RuntimeError("the source failed")
        self.read.extend(indices.tolist())
        return self.inner.take(indices)


@given(count=st.integers(1, 60), chunk=st.integers(1, 70), devices=st.sampled_from([None, 1, 3, 8]))
@settings(max_examples=15, deadline=None)
def test_any_chunk_and_any_mesh_give_numpys_answer(count, chunk, devices):
    data = draw(count)
    mesh = None if devices is None else meshes.data_mesh(jax.devices()[:devices])
    keep = {"chunk": chunk, "mesh": mesh, "progress": False}
    source = stream.InMemory(data)
    close(stream.map_rows(project, MATRIX, source, **keep), projected(data))
    exact = data[0].astype(np.float64)
    close(stream.fold(GRAM, source, **keep), {"gram": exact.T @ exact, "labels": data[1].sum()})


@given(
    count=st.integers(1, 40),
    chunk=st.integers(1, 20),
    stored=st.integers(1, 20),
    failing_at=st.integers(0, 39),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_a_store_gets_the_same_bits_whatever_was_there_before(tmp_path_factory, count, chunk, stored, failing_at, data):
    batch = draw(count)
    into = Rows.create(tmp_path_factory.mktemp("rows") / "s", arrays=ARRAYS, length=count, chunk=stored)
    keep = {"chunk": chunk, "progress": False}
    whole = stream.map_rows(project, MATRIX, stream.InMemory(batch), **keep)
    for first in data.draw(st.sets(st.sampled_from(range(0, count, stored)))):  # some are there already
        into.write(first, {name: each[first : first + stored] for name, each in whole.items()})
    wanted = {row for n in np.flatnonzero(~into.completed) for row in range(n * stored, min((n + 1) * stored, count))}
    fails = any(row // chunk == failing_at // chunk for row in wanted)
    if failing_at < count and fails:
        with pytest.raises(RuntimeError, match="the source failed"):
            stream.map_rows(project, MATRIX, Counting(batch, failing_at), into=into, **keep)
    before = Rows.open(into.path).completed
    source = Counting(batch)
    assert stream.map_rows(project, MATRIX, source, into=into, **keep) is into
    opened = Rows.open(into.path)
    for name, value in whole.items():
        np.testing.assert_array_equal(opened.array(name), value)
    done = np.repeat(before, stored)[:count]
    needed = {row // chunk for row in np.flatnonzero(~done)}
    assert {row // chunk for row in source.read} == needed


def test_rows_on_eight_devices_go_to_a_store(tmp_path):
    data = draw(43)
    into = Rows.create(tmp_path / "s", arrays=ARRAYS, length=43, chunk=7)
    stream.map_rows(project, MATRIX, stream.InMemory(data), chunk=10, mesh=meshes.data_mesh(), into=into)
    close({name: Rows.open(into.path).array(name) for name in ARRAYS}, projected(data))


def test_a_store_is_a_source_and_grows(tmp_path):
    data = draw(30)
    path, keep = tmp_path / "s", {"chunk": 8, "progress": False}
    short = Rows.create(path, arrays=ARRAYS, length=18, chunk=4)
    stream.map_rows(project, MATRIX, stream.InMemory((data[0][:18], data[1][:18])), into=short, **keep)
    longer = Rows.create_or_open(path, arrays=ARRAYS, length=30, chunk=4)
    source = Counting(data)
    stream.map_rows(project, MATRIX, source, into=longer, **keep)
    assert min(source.read) == 16
    assert isinstance(longer, Source)

    def total(batch, valid):
        return jnp.sum(jnp.where(valid[:, None], batch["product"], jnp.zeros_like(batch["product"])), axis=0)

    found = stream.fold(Fold(lambda: jnp.zeros(2), total, lambda s: s), longer, chunk=5, progress=False)
    np.testing.assert_allclose(found, projected(data)["product"].sum(axis=0), rtol=1e-4, atol=1e-4)


def test_a_bare_array_goes_into_the_only_array(tmp_path):
    into = Rows.create(tmp_path / "s", arrays={"features": ((2,), np.float32)}, length=9, chunk=4)
    data = draw(9)[0]
    stream.map_rows(lambda m, b: b @ m, MATRIX, stream.InMemory(data), into=into, chunk=4)
    np.testing.assert_allclose(into.array("features"), data.astype(np.float64) @ MATRIX, rtol=1e-5, atol=1e-5)
    bare = stream.map_rows(lambda m, b: b @ m, MATRIX, stream.InMemory(data), chunk=4)
    np.testing.assert_array_equal(bare, into.array("features"))


@pytest.mark.parametrize("devices", [None, 8])
def test_new_operands_lengths_and_bound_arrays_do_not_compile_again(devices):
    mesh = None if devices is None else meshes.data_mesh()
    traces = []

    def scaled(factor, operand, batch):
        traces.append("rows")
        return factor * (batch @ operand)

    def summed(factor, batch, valid):
        traces.append("fold")
        return factor * jnp.sum(jnp.where(valid[:, None], batch, jnp.zeros_like(batch)))

    for number, count in enumerate((5, 30, 100)):
        factor, data = jnp.asarray(float(number)), draw(count)[0]
        keep = {"chunk": 16, "mesh": mesh, "progress": False}
        function = jax.tree_util.Partial(scaled, factor)
        rows = stream.map_rows(function, MATRIX * number, stream.InMemory(data), **keep)
        np.testing.assert_allclose(rows, number**2 * (data.astype(np.float64) @ MATRIX), rtol=1e-4, atol=1e-5)
        statistic = Fold(lambda: jnp.zeros(()), jax.tree_util.Partial(summed, factor), float)
        total = stream.fold(statistic, stream.InMemory(data), **keep)
        assert total == pytest.approx(number * data.sum(dtype=np.float64), rel=1e-4, abs=1e-4)
    assert traces == ["rows", "fold"]


def test_each_device_sees_its_own_rows_only():
    def first_of_batch(operand, batch):
        return jnp.broadcast_to(batch[:1], batch.shape)

    rows = np.arange(16, dtype=np.float32)
    found = stream.map_rows(first_of_batch, (), stream.InMemory(rows), chunk=16, mesh=meshes.data_mesh())
    np.testing.assert_array_equal(found, rows // 2 * 2)


def test_the_next_chunk_is_read_before_the_last_one_is_kept():
    source, seen = Counting(np.arange(12, dtype=np.float32)), []
    stream.map_rows(
        lambda operand, batch: batch,
        (),
        source,
        chunk=4,
        check=lambda first, rows: seen.append((first, len(source.read))),
    )
    assert seen == [(0, 8), (4, 12), (8, 12)]


def test_a_check_that_fails_keeps_the_chunk_out(tmp_path):
    into = Rows.create(tmp_path / "s", arrays={"x": ((), np.float32)}, length=10, chunk=4)

    def check(first, rows):
        if first == 4:
            assert rows.tolist() == [4, 5, 6, 7]
            raise FloatingPointError("no")

    with pytest.raises(FloatingPointError):
        stream.map_rows(
            lambda _, b: b, (), stream.InMemory(np.arange(10, dtype=np.float32)), chunk=4, into=into, check=check
        )
    assert Rows.open(into.path).completed.tolist() == [True, False, False]


def test_a_function_may_stay_as_it_is():
    def host(operand, batch):
        return np.asarray(batch) + operand  # needs numbers, not tracers

    source = stream.InMemory(np.arange(5, dtype=np.float32))
    found = stream.map_rows(host, np.float32(1), source, chunk=2, compiled=False)
    np.testing.assert_array_equal(found, [1, 2, 3, 4, 5])
    with pytest.raises(InvalidInputError, match="compiled=False on a mesh"):
        stream.map_rows(host, np.float32(1), source, compiled=False, mesh=meshes.data_mesh())


def test_double_precision_stays(x64):
    data = np.random.default_rng(0).normal(size=(50, 3))
    rows = stream.map_rows(lambda m, b: b @ m, MATRIX.astype(np.float64), stream.InMemory(data), chunk=16)
    assert rows.dtype == np.float64
    np.testing.assert_allclose(rows, data @ MATRIX.astype(np.float64), rtol=1e-13)
    statistic = Fold(lambda: jnp.zeros((3, 3)), lambda b, v: (b * v[:, None].astype(b.dtype)).T @ b, lambda s: s)
    for mesh in (None, meshes.data_mesh()):
        found = stream.fold(statistic, stream.InMemory(data), chunk=7, mesh=mesh)
        np.testing.assert_allclose(found, data.T @ data, rtol=1e-12)


@pytest.mark.parametrize("devices", [None, 8])
def test_half_precision_is_summed_in_single(devices):
    statistic = Fold(
        lambda: jnp.zeros(2, jnp.bfloat16), lambda b, v: (b * v[:, None].astype(b.dtype)).sum(0), lambda s: s
    )
    source = stream.InMemory(np.ones((4000, 2), jnp.bfloat16))
    found = stream.fold(statistic, source, chunk=8, mesh=None if devices is None else meshes.data_mesh())
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [4000, 4000])  # in half precision, 256


@pytest.mark.parametrize("devices", [None, 8])
def test_an_interrupted_fold_goes_on_with_the_same_bits(tmp_path, devices):
    mesh = None if devices is None else meshes.data_mesh()
    data = draw(70)
    keep = {"chunk": 8, "mesh": mesh, "progress": False}
    whole = stream.fold(GRAM, stream.InMemory(data), **keep)
    keep |= {"checkpoint": tmp_path / "sum", "checkpoint_every": 0.0, "identity": {"seed": 1}}
    with pytest.raises(RuntimeError, match="the source failed"):
        stream.fold(GRAM, Counting(data, failing_at=42), **keep)
    source = Counting(data)
    found = stream.fold(GRAM, source, **keep)
    assert min(source.read) == 40
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"identity": {"seed": 2}}, "its seed is 1, this run's is 2"),
        ({"chunk": 9}, "its chunk is 8, this run's is 9"),
        ({"source": stream.InMemory(draw(71))}, "its source length is 70, this run's is 71"),
        ({"statistic": Fold(lambda: {**zero(), "more": jnp.zeros(2)}, gram, lambda s: s)}, "at 'state/more'"),
    ],
)
def test_the_checkpoint_of_another_fold_is_refused(tmp_path, change, match):
    keep = {"chunk": 8, "checkpoint": tmp_path / "sum", "checkpoint_every": 0.0, "identity": {"seed": 1}}
    with pytest.raises(RuntimeError, match="the source failed"):
        stream.fold(GRAM, Counting(draw(70), failing_at=42), **keep)
    call = {"statistic": GRAM, "source": stream.InMemory(draw(70)), **keep, **change}
    with pytest.raises(StoreError, match=match):
        stream.fold(call.pop("statistic"), call.pop("source"), **call)
    assert params.exists(tmp_path / "sum")


def test_init_is_not_consumed():
    start = {"x": jnp.ones(3), "y": jnp.ones(3)}
    start["y"] = start["x"]  # one array twice, and kept by the caller
    statistic = Fold(lambda: start, lambda b, v: {"x": jnp.ones(3), "y": 2.0 * jnp.ones(3)}, lambda s: s)
    for _ in range(2):
        found = stream.fold(statistic, stream.InMemory(np.zeros(4, np.float32)), chunk=2, progress=False)
        np.testing.assert_array_equal(found["x"], [3, 3, 3])
        np.testing.assert_array_equal(found["y"], [5, 5, 5])


@pytest.mark.parametrize(
    ("update", "match"),
    [
        (lambda b, v: {"gram": jnp.zeros((3, 3))}, r"nothing at 'labels', where its state has int32\[\]"),
        (lambda b, v: {**zero(), "gram": jnp.zeros((3, 3), jnp.int32)}, r"int32\[3, 3\] at 'gram'"),
        (lambda b, v: {**zero(), "gram": jnp.zeros(3)}, r"float32\[3\] at 'gram', where its state has float32\[3, 3\]"),
    ],
)
def test_increments_unlike_the_state_are_refused(update, match):
    with pytest.raises(InvalidInputError, match=match):
        stream.fold(Fold(zero, update, lambda s: s), stream.InMemory(draw(4)))


@pytest.mark.parametrize("compiled", [True, False])
def test_sums_are_no_rows(compiled):
    with pytest.raises(InvalidInputError, match=r"shape \[3\] at 'a' for a batch of 4(.|\n)*fold"):
        stream.map_rows(
            lambda _, b: {"a": jnp.sum(b, axis=0)}, (), stream.InMemory(draw(8)[0]), chunk=4, compiled=compiled
        )


def test_empty_sources_and_chunks_are_refused():
    for call in (lambda s, c: stream.fold(GRAM, s, chunk=c), lambda s, c: stream.map_rows(project, MATRIX, s, chunk=c)):
        with pytest.raises(InvalidInputError, match="a source of 0 examples in chunks of 4"):
            call(stream.InMemory(draw(0)), 4)
        with pytest.raises(InvalidInputError, match="a source of 5 examples in chunks of 0"):
            call(stream.InMemory(draw(5)), 0)


def test_a_store_of_another_length_is_refused(tmp_path):
    into = Rows.create(tmp_path / "s", arrays=ARRAYS, length=9, chunk=4)
    with pytest.raises(InvalidInputError, match=r"a source of 8 examples for .* which has 9 rows"):
        stream.map_rows(project, MATRIX, stream.InMemory(draw(8)), into=into)


def test_sources_select_and_stack():
    inputs, labels = draw(20)
    whole = stream.InMemory({"x": inputs, "y": labels})
    part = stream.Subset(whole, np.array([7, 3, 11]))
    items = stream.Items([{"x": inputs[i], "y": labels[i]} for i in range(20)])
    assert (len(whole), len(part), len(items)) == (20, 3, 20)
    assert all(isinstance(each, Source) for each in (whole, part, items))
    chosen = np.array([2, 0])
    for found in (part.take(chosen), items.take(np.array([11, 7])), whole.take(np.array([11, 7]))):
        np.testing.assert_array_equal(found["x"], inputs[[11, 7]])
        np.testing.assert_array_equal(found["y"], labels[[11, 7]])
        assert found["y"].dtype == labels.dtype
    with pytest.raises(InvalidInputError, match="the index 20 into 20 examples"):
        stream.Subset(whole, np.array([1, 20]))
    with pytest.raises(InvalidInputError, match="the index -1 into"):
        stream.Subset(whole, np.array([-1]))
    for batch in ((inputs, labels[:3]), (), (inputs, np.float32(1.0))):
        with pytest.raises(InvalidInputError, match="arrays of the lengths"):
            stream.InMemory(batch)


def draws(scale, batch):
    return jax.vmap(lambda row: scale * jax.random.normal(row["key"]) + row["x"])(batch)


def test_no_rows_at_all_are_refused():
    with pytest.raises(InvalidInputError, match="a function whose result has no array"):
        stream.map_rows(lambda operand, batch: {"none": None}, None, stream.InMemory(np.zeros(3)), progress=False)


def test_whole_numbers_that_would_be_cut_are_refused():
    for values in ([0, 2**40], [-(2**31) - 1], np.uint64([2**32])):
        with pytest.raises(InvalidInputError, match=r"fit u?int32, which is what JAX makes of them"):
            stream.InMemory(np.array(values))
    small = stream.InMemory(np.array([2**31 - 1, -(2**31)]))
    assert stream.map_rows(lambda operand, batch: batch, None, small, progress=False).tolist() == [2**31 - 1, -(2**31)]


def test_any_byte_order_is_read():
    source = stream.InMemory(np.array([1.0, 2.5], ">f4"))
    assert stream.map_rows(lambda operand, batch: batch, None, source, progress=False).tolist() == [1.0, 2.5]


def test_examples_may_have_keys():
    keys = jax.random.split(jax.random.key(0), 5)
    whole = stream.InMemory({"key": keys, "x": np.arange(5.0)})
    items = stream.Items([{"key": key, "x": np.float64(number)} for number, key in enumerate(keys)])
    for source in (whole, items, stream.Subset(whole, np.arange(5))):
        drawn = stream.map_rows(draws, np.float32(2), source, chunk=2, progress=False)
        expected = 2 * np.stack([jax.random.normal(key) for key in keys]) + np.arange(5)
        np.testing.assert_allclose(drawn, expected, rtol=1e-6)


@pytest.mark.parametrize("indices", [np.array([True, False, True]), np.array([0.0])])
@pytest.mark.usefixtures("shapes_unchecked")
def test_a_mask_is_not_taken_for_the_numbers_of_examples(indices):
    with pytest.raises(InvalidInputError, match=r"indices of dtype (.|\n)*np.flatnonzero\(mask\)"):
        stream.Subset(stream.Items([1.0, 2.0, 3.0]), indices)


def test_the_layout_of_a_store_comes_from_the_function(tmp_path):
    data = draw(11)
    arrays = store.row_arrays(jax.eval_shape(project, MATRIX, data))
    into = Rows.create(tmp_path / "s", arrays=arrays, length=11, chunk=4)
    close({name: stream.map_rows(project, MATRIX, stream.InMemory(data), into=into).array(name) for name in arrays},
          projected(data))  # fmt: skip
