"""What fits: the memory of devices, there or described, and the widest program that they hold."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jattrib.core.errors import InvalidInputError

GIB = 2**30

DESCRIBED = {"TPU v5 lite": 16 * GIB, "TPU v5": 95 * GIB, "TPU v6 lite": 32 * GIB, "TPU7x": 96 * GIB}
"""Bytes of devices by kind, for those that are not there to be asked."""

SHARE = 0.9
"""Of a device's memory, what programs may plan with."""


class Memory(NamedTuple):
    """What a compiled program holds on each device, in bytes."""

    arguments: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Fit(NamedTuple):
    """A pass over models, as it fits the devices.

    Attributes:
        width: models in a chunk, over all devices.
        chunks: of that width.
        devices: over which the models of a chunk are spread.
        memory: of each device.
        capacity: bytes of each device.
    """

    width: int
    chunks: int
    devices: int
    memory: Memory
    capacity: int

    @property
    def fits(self) -> bool:
        """Whether a device holds its part of a chunk."""
        return self.memory.total <= self.capacity


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Return what a compiled program holds on each device; an argument that it may overwrite counts once."""
    found: Any = compiled.memory_analysis()
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(int(found.argument_size_in_bytes), int(kept), int(found.temp_size_in_bytes))


def capacity(device: Any) -> int:
    """Return the bytes that programs may plan with on a device: nine tenths of its memory, of a CPU's its share.

    Raises:
        InvalidInputError: the device is only described, and of an unknown kind.
    """
    if device.platform == "cpu":
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count("cpu")
        return int(SHARE * whole)
    try:
        stats = device.memory_stats() or {}
    except (NotImplementedError, jax.errors.JaxRuntimeError):  # described, not there
        stats = {}
    whole = stats.get("bytes_limit", DESCRIBED.get(device.device_kind))
    if whole is None:
        raise InvalidInputError(
            f"a device of the kind {device.device_kind!r}, which does not say how much memory it has",
            expected=f"a device that is there, or one of {', '.join(DESCRIBED)}",
            remedy="pass capacity=, in bytes",
        )
    return int(SHARE * whole)


def widest(held: Callable[[int], int], most: int, capacity: int) -> int:
    """Return a width up to `most` whose program a device holds, the largest by the line through widths 1 and 2.

    The program of the answer has been compiled and held: where the line promises too much, the width is lowered.

    Raises:
        InvalidInputError: not even a width of 1 fits.
    """
    one = held(1)
    if one > capacity:
        raise InvalidInputError(
            f"a program that holds {one:,} bytes on a device, for one model at a time",
            expected=f"at most the {capacity:,} bytes that programs may plan with there",
            remedy="lower the batch size or the model's, or keep less data on the device",
        )
    if most == 1:
        return 1
    each = max(held(2) - one, 1)
    width = min(most, 1 + (capacity - one) // each)
    while width > 2 and (found := held(width)) > capacity:
        width = max(2, min(width - 1, width * capacity // found))
    return width
