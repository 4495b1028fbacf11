from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattrib.core.errors import InvalidInputError
from jattrib.data import masks


@pytest.mark.parametrize(("n", "alpha", "size"), [(100, 0.5, 50), (7, 0.3, 2), (1000, 0.99, 990), (3, 0.4, 1)])
def test_every_subset_has_exactly_its_size(key, n, alpha, size):
    drawn = masks.subsets(key, n, alpha=alpha, count=20)
    assert drawn.dtype == bool
    np.testing.assert_array_equal(drawn.sum(1), np.full(20, size))


def test_a_larger_count_keeps_the_earlier_rows_across_chunks(key, monkeypatch):
    few, many = (masks.subsets(key, 50, alpha=0.5, count=count) for count in (3, 11))
    np.testing.assert_array_equal(many[:3], few)
    monkeypatch.setattr(masks, "CHUNK_WORDS", 200)
    np.testing.assert_array_equal(masks.subsets(key, 50, alpha=0.5, count=11), many)
    assert len({row.tobytes() for row in many}) == 11


def test_all_subsets_are_equally_likely(key):
    draws = masks.subsets(key, 5, alpha=0.4, count=20_000)
    counts = Counter(row.tobytes() for row in draws)
    assert len(counts) == 10
    chi_squared = sum((count - 2000) ** 2 / 2000 for count in counts.values())
    assert chi_squared < 27.9  # the 99.9th percentile at 9 degrees of freedom


def test_the_same_key_gives_the_same_masks_on_every_version():
    drawn = masks.subsets(jax.random.key(7), 8, alpha=0.5, count=3)
    assert ["".join(str(int(kept)) for kept in row) for row in drawn] == ["00110101", "00111100", "11101000"]


def test_equal_words_leave_the_size_exact():
    kept = masks._lowest(np.array([[5, 5, 5, 5], [9, 0, 9, 9]], np.uint32), 2)
    np.testing.assert_array_equal(kept, [[True, True, False, False], [True, True, False, False]])


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=12), data=st.data())
def test_the_lowest_words_are_those_of_a_stable_sort(words, data):
    size = data.draw(st.integers(1, len(words) - 1))
    expected = np.zeros(len(words), bool)
    expected[sorted(range(len(words)), key=lambda i: words[i])[:size]] = True
    np.testing.assert_array_equal(masks._lowest(np.array([words], np.uint32), size)[0], expected)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.001, -1.0, 2.0, float("nan"), float("inf")])
def test_subsets_of_nothing_or_everything_are_refused(key, alpha):
    with pytest.raises(InvalidInputError, match=r"subsets of -?\d+ of 100 examples(.|\n)*choose alpha between 0 and 1"):
        masks.subsets(key, 100, alpha=alpha, count=2)


def test_no_masks_at_all_are_refused(key):
    with pytest.raises(InvalidInputError, match="count = 0"):
        masks.subsets(key, 10, alpha=0.5, count=0)


def test_leave_out_takes_groups_of_any_sizes():
    left = masks.leave_out(5, [np.array([0]), np.array([1, 3, 3])])
    np.testing.assert_array_equal(left, [[0, 1, 1, 1, 1], [1, 0, 1, 0, 1]])
    np.testing.assert_array_equal(masks.leave_out(3, np.arange(3)[:, None]), ~np.eye(3, dtype=bool))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "no groups"),
        ([np.array([1]), np.array([], int)], "mask 1 of 2 is all ones: it keeps all 4 examples"),
        ([np.arange(4)], "mask 0 of 1 is empty"),
        ([np.array([0]), np.array([2, 4])], "indices from 2 to 4 in group 1\n  expected: indices from 0 to 3"),
        ([np.array([-1])], "indices from -1 to -1 in group 0"),
        (np.eye(4, dtype=bool), r"indices of dtype bool(.|\n)*np.flatnonzero\(mask\)"),
        ([np.array([1.7])], "indices of dtype float64"),
    ],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_leave_out_refuses_unsound_groups(groups, message):
    with pytest.raises(InvalidInputError, match=message):
        masks.leave_out(4, groups)


def test_check_names_the_first_unsound_mask():
    sound = np.array([[True, False], [False, True]])
    assert masks.check(sound) is sound
    with pytest.raises(InvalidInputError, match=r"mask 1 of 2 is empty(.|\n)*drop that row"):
        masks.check(np.array([[True, False], [False, False]]))
    with pytest.raises(InvalidInputError, match="mask 0 of 2 is all ones: it keeps all 2 examples"):
        masks.check(np.array([[True, True], [False, False]]))
