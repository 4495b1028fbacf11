import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattrib_kernels.random import Stream, fold_in, threefry2x32
from tests.kernels import matrices

# Random123's known-answer file, threefry2x32 with 20 rounds.
KNOWN = (
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
)


def words(values):
    return tuple(jnp.array(v, jnp.uint32) for v in values)


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_threefry_gives_the_known_answers(key, counter, expected):
    assert tuple(int(w) for w in threefry2x32(words(key), words(counter))) == expected
    assert tuple(int(w) for w in matrices.threefry(key, counter)) == expected


def test_threefry_equals_the_oracle_on_arrays():
    rng = np.random.default_rng(0)
    counter = tuple(rng.integers(0, 2**32, (5, 7), dtype=np.uint32) for _ in range(2))
    key = (0xDEADBEEF, 7)
    for got, expected in zip(threefry2x32(words(key), words(counter)), matrices.threefry(key, counter), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected)


def test_fold_in_is_the_hash_of_the_number_and_that_of_jax():
    key = (123, 2**32 - 1)
    data = [0, 1, 4, 2**32 - 1]
    got = fold_in(words(key), jnp.array(data, jnp.uint32))
    for i, number in enumerate(data):
        expected = matrices.stream(key, number)
        assert (int(got[0][i]), int(got[1][i])) == tuple(int(w) for w in expected)
        typed = jax.random.fold_in(jax.random.wrap_key_data(jnp.array(key, jnp.uint32)), np.uint32(number))
        assert jax.random.key_data(typed).tolist() == [int(w) for w in expected]
    single = fold_in(words(key), 4)
    assert [int(single[0]), int(single[1])] == [int(got[0][2]), int(got[1][2])]


def test_streams_share_no_number():
    assert sorted(int(s) for s in Stream) == [1, 2, 3, 4, 5]
