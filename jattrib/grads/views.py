"""How the entries of an array are those of a leaf: strided views, in integers alone.

A view gives each dimension of an array as a sequence of digits, the outermost first; a digit of `size` values moves by
`stride` entries in the leaf's row-major order, and one of stride 0 does not move: the leaf is repeated along it.
Transposes, reshapes, slices and broadcasts of a leaf are views of it, whatever their order.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

Digit = tuple[int, int]
"""A size and a stride."""


class View(NamedTuple):
    """An array of a leaf's entries.

    Attributes:
        dims: for each dimension its digits, without those of size 1, and with no two that one would do for.
        offset: the entry at index 0.
    """

    dims: tuple[tuple[Digit, ...], ...]
    offset: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(size(digits) for digits in self.dims)


class Box(NamedTuple):
    """A contiguous part of a leaf along each of its dimensions."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]


def whole(shape: Sequence[int]) -> View:
    """Return the view of a whole leaf.

    >>> whole((2, 3)).dims
    (((2, 3),), ((3, 1),))
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return View(tuple(joined([digit]) for digit in zip(shape, strides, strict=True)))


def size(digits: Iterable[Digit]) -> int:
    """Return how many values some digits take together."""
    return math.prod(count for count, _ in digits)


def joined(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """Return the fewest digits that count alike.

    >>> joined([(2, 12), (1, 7), (3, 4), (4, 1)])
    ((24, 1),)
    """
    found: list[Digit] = []
    for count, stride in digits:
        if count == 1:
            continue
        if found and found[-1][1] == count * stride:
            found[-1] = (found[-1][0] * count, stride)
        else:
            found.append((count, stride))
    return tuple(found)


def transpose(view: View, permutation: Sequence[int]) -> View:
    """Return the view whose dimension i is dimension `permutation[i]` of `view`."""
    return view._replace(dims=tuple(view.dims[axis] for axis in permutation))


def reshape(view: View, shape: Sequence[int]) -> View | None:
    """Return the view in another shape of the same size, or None where its digits do not split into it."""
    split = regrouped(list(chain.from_iterable(view.dims)), shape)
    return None if split is None else view._replace(dims=tuple(joined(digits) for digits in split))


def regrouped(digits: Sequence[Digit], shape: Sequence[int]) -> list[list[Digit]] | None:
    """Return the digits in groups that take the numbers of values in `shape`; None where one would be torn."""
    left, groups = list(digits), []
    for count in shape:
        group: list[Digit] = []
        while size(group) < count:
            if not left:
                return None
            have, stride = left.pop(0)
            need, rest = divmod(count, size(group))
            if rest:
                return None
            if have > need:
                inner, rest = divmod(have, need)
                if rest:
                    return None
                left.insert(0, (inner, stride))
                have, stride = need, stride * inner
            group.append((have, stride))
        if size(group) != count:
            return None
        groups.append(group)
    return groups


def cut(view: View, axis: int, start: int, count: int, step: int = 1) -> View | None:
    """Return the part `start, start + step, …` of `count` values along one dimension; None where digits are torn."""
    digits = view.dims[axis]
    if (start, count) == (0, size(digits)) and (step == 1 or count == 1):
        return view
    if len(digits) > 1 or start < 0 or step < 1:
        return None
    stride = digits[0][1] if digits else 0
    dims = (*view.dims[:axis], joined([(count, stride * step)]), *view.dims[axis + 1 :])
    return View(dims, view.offset + start * stride)


def repeat(view: View, axis: int, count: int) -> View:
    """Return the view with a new dimension at `axis` along which nothing moves."""
    return view._replace(dims=(*view.dims[:axis], joined([(count, 0)]), *view.dims[axis:]))


def box(digits: Iterable[Digit], offset: int, shape: Sequence[int]) -> Box | None:
    """Return the part of a leaf that some digits run through, once each; None where it is not a contiguous one."""
    by_axis: list[list[Digit]] = [[] for _ in shape]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for count, stride in digits:
        while count > 1:
            axis = next((i for i, each in enumerate(strides) if shape[i] > 1 and each <= stride < each * shape[i]), -1)
            if axis < 0:
                return None
            room, rest = divmod(strides[axis] * shape[axis], stride)
            if count > room and (rest or count % room):
                return None
            inner = min(count, room)
            by_axis[axis].append((inner, stride))
            count, stride = count // inner, stride * inner
    starts = tuple(offset // stride % length for stride, length in zip(strides, shape, strict=True))
    sizes = []
    for found, stride, start, length in zip(by_axis, strides, starts, shape, strict=True):
        one = joined(sorted(found, key=lambda digit: -digit[1]))
        if len(one) > 1 or (one and one[0][1] != stride) or start + size(one) > length:
            return None
        sizes.append(size(one))
    return Box(starts, tuple(sizes))


def disjoint(one: Box, other: Box) -> bool:
    """Return whether two parts of a leaf have no entry in common."""
    ends = zip(one.starts, one.sizes, other.starts, other.sizes, strict=True)
    return any(start + length <= begun or begun + width <= start for start, length, begun, width in ends)
