import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jattrib.core import mesh as meshes
from jattrib.core.errors import InvalidInputError


def test_the_axis_is_auto_and_takes_all_devices():
    mesh = meshes.data_mesh()
    assert mesh.axis_names == ("data",)
    assert mesh.axis_types == (AxisType.Auto,)
    assert meshes.width(mesh) == jax.device_count() == 8
    assert meshes.width(meshes.data_mesh(jax.devices()[:3])) == 3
    assert meshes.width(None) == 1


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_are_fetched_as_words_and_are_keys_again(impl):
    keys = jax.random.split(jax.random.key(3, impl=impl), 8)
    for placed in (keys, jax.device_put(keys, meshes.rows(meshes.data_mesh()))):
        found = meshes.fetch(placed)
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, jax.random.key_data(keys))
        for like in (keys, jax.eval_shape(lambda: keys)):
            again = meshes.keyed(found, like)
            assert jax.random.key_impl(again) == impl
            assert (again == keys).all()
    assert meshes.keyed(keys.shape, jnp.ones(8)) == (8,)


def test_rows_are_spread_and_fetched_whole():
    mesh = meshes.data_mesh()
    batch = {"x": np.arange(32, dtype=np.float32).reshape(16, 2), "y": np.arange(16, dtype=np.int32)}
    placed = meshes.place_rows(batch, mesh, 16)
    for device, shard in zip(mesh.devices.flat, placed["x"].addressable_shards, strict=True):
        assert shard.device == device
        np.testing.assert_array_equal(shard.data, batch["x"][shard.index])
        assert shard.data.shape == (2, 2)
    for name, leaf in placed.items():
        np.testing.assert_array_equal(meshes.fetch(leaf), batch[name])


def test_replicas_are_whole_everywhere():
    mesh = meshes.data_mesh()
    value, key = meshes.replicate((np.arange(3.0, dtype=np.float32), jax.random.key(7)), mesh)
    assert [shard.data.tolist() for shard in value.addressable_shards] == [[0.0, 1.0, 2.0]] * 8
    assert jax.random.key_data(key).tolist() == jax.random.key_data(jax.random.key(7)).tolist()
    assert isinstance(meshes.replicate(np.zeros(2), None), jax.Array)


def test_fetch_takes_anything():
    assert meshes.fetch(3.5) == 3.5
    np.testing.assert_array_equal(meshes.fetch(jnp.arange(3)), [0, 1, 2])


def test_one_process_holds_all_rows():
    np.testing.assert_array_equal(meshes.local_rows(meshes.data_mesh(), 16), np.arange(16))
    np.testing.assert_array_equal(meshes.local_rows(None, 5), np.arange(5))


@pytest.mark.parametrize(("count", "multiple", "padded"), [(0, 8, 0), (1, 8, 8), (8, 8, 8), (9, 8, 16), (5, 1, 5)])
def test_padded_size(count, multiple, padded):
    assert meshes.padded_size(count, multiple) == padded


def test_padded_size_needs_a_positive_multiple():
    with pytest.raises(InvalidInputError, match="multiple = 0"):
        meshes.padded_size(3, 0)
