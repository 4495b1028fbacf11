"""What the operations share at their doors: which implementation runs, what may be passed, and what `vmap` does."""

import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

Backend = Literal["auto", "reference", "pallas_tpu", "pallas_gpu", "interpret"]


def resolve(backend: Backend) -> Backend:
    """Return the implementation that `backend` means on the default platform.

    `auto` is the Pallas kernel on a TPU or a CUDA GPU and the reference elsewhere; `interpret` is the TPU kernel run by
    Pallas' interpreter; any other name is taken at its word.

    Raises:
        ValueError: `backend` is not a known name.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is not known; expected one of {', '.join(get_args(Backend))}")
    if backend != "auto":
        return backend
    platform = jax.default_backend()
    return {"tpu": "pallas_tpu", "gpu": "pallas_gpu", "cuda": "pallas_gpu"}.get(platform, "reference")  # type: ignore[return-value]


def refuse(got: str, *, expected: str, remedy: str) -> ValueError:
    """Return the error of this package: what came, what was expected, and what to do about it."""
    return ValueError(f"{got}\n  expected: {expected}\n  remedy:   {remedy}")


def check_rows(name: str, x: jax.Array) -> None:
    """Refuse anything but a matrix of floating-point rows."""
    if jnp.ndim(x) != 2 or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise refuse(
            f"`{name}` has shape {jnp.shape(x)} and type {jnp.result_type(x)}",
            expected="a matrix of floating-point rows, one for each example",
            remedy="reshape to (n, size); cast integers to float32",
        )
    check_size(f"the number of columns of `{name}`", jnp.shape(x)[1])


def check_key(key: jax.Array) -> None:
    """Refuse anything but the two words of a Threefry key."""
    if jnp.shape(key) != (2,) or jnp.result_type(key) != jnp.uint32:
        raise refuse(
            f"`key` has shape {jnp.shape(key)} and type {jnp.result_type(key)}",
            expected="two uint32 words",
            remedy="pass `jax.random.key_data(jax.random.key(seed))` of a threefry2x32 key",
        )


def check_size(name: str, size: int) -> None:
    """Refuse a size that is no positive integer, or that 32-bit indices do not reach."""
    if not isinstance(size, int | np.integer) or not 1 <= size < 2**31:
        raise refuse(
            f"`{name}` is {size!r}",
            expected="an integer with 1 <= size < 2**31",
            remedy="project more coordinates in parts, each with its `block_offset`",
        )


def offset_word(name: str, offset: jax.Array | int, *, span: int = 1, end: int = 2**32) -> jax.Array | np.uint32:
    """Return an offset as a uint32 scalar; of a number that is no array, all that it begins must be before `end`.

    Raises:
        ValueError: the offset is negative, `offset + span` is beyond `end`, or it is not an integer scalar.
    """
    if isinstance(offset, int | np.integer) and not 0 <= int(offset) <= end - span:
        raise refuse(
            f"`{name}` is {offset}",
            expected=f"0 <= {name} <= {end - span}, so that no number comes twice",
            remedy="use a key of its own for the rest",
        )
    if jnp.ndim(offset) != 0 or not jnp.issubdtype(jnp.result_type(offset), jnp.integer):
        raise refuse(
            f"`{name}` has shape {jnp.shape(offset)} and type {jnp.result_type(offset)}",
            expected="an integer scalar",
            remedy="pass one offset a call; vmap over several",
        )
    return np.uint32(offset) if isinstance(offset, int | np.integer) else jnp.asarray(offset, jnp.uint32)


def for_rows(backend: Backend, dtype: jnp.dtype) -> Backend:
    """Return the implementation that projects rows of a type; see `resolve`.

    Raises:
        ValueError: a kernel was asked for by name and does not have the type.
    """
    chosen = resolve(backend)
    if chosen == "reference" or dtype in (jnp.float32, jnp.bfloat16):
        return chosen
    if backend == "auto":
        return "reference"
    raise refuse(
        f"backend {backend!r} was asked to project {dtype} rows",
        expected="float32 or bfloat16",
        remedy="cast to float32, or use backend='reference'",
    )


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Return the type in which sums are kept: float32, or float64 for float64 rows."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def in_32_bits(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Trace a kernel with 32-bit indices, whatever the user's default: the hardware has no others."""

    def traced(*args: jax.Array) -> jax.Array:
        with jax.enable_x64(False):
            return f(*args)

    return traced


def cores(*operands: Any) -> int:
    """Return how many cores may share a call: one under a transformation, on an accelerator, or on several devices."""
    if any(isinstance(operand, Tracer) for operand in operands):
        return 1
    devices = {device for operand in operands if isinstance(operand, jax.Array) for device in operand.devices()}
    if jax.default_backend() != "cpu" or len(devices) > 1 or any(device.platform != "cpu" for device in devices):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ceil_to(size: int, unit: int) -> int:
    """Return `size` rounded up to whole units."""
    return -(-size // unit) * unit


def output(shape: tuple[int, ...], dtype: Any, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """Return a kernel's output type, which varies over the mesh axes (of `shard_map`) that an operand varies over."""
    return jax.eval_shape(
        lambda *xs: sum((x.reshape(-1)[0].astype(dtype) for x in xs), jnp.zeros(shape, dtype)), *operands
    )


def bfloat16_parts(x: jax.Array) -> list[jax.Array]:
    """Cut float32 numbers into three bfloat16 ones whose sum they are: 24 bits are three times 8.

    A product with ±1 is then three passes of a bfloat16 matrix unit instead of the six of float32 by float32.  Bits
    are masked, not rounded: XLA may take a rounding to bfloat16 and back for nothing.
    """
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(3):
        bits = lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return parts


def rowwise(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Give `f(rows, *seeds)`, which works on each row alone, a batching rule of its own.

    A batch of rows under one seed is a longer matrix; a batch of seeds is a loop, since one projection already fills
    the machine.  No rows are no call.
    """

    @jax.custom_batching.custom_vmap
    def mapped(rows, *seeds):
        if rows.shape[0]:
            return f(rows, *seeds)
        one = jax.eval_shape(f, jax.ShapeDtypeStruct((1, rows.shape[1]), rows.dtype), *seeds)
        return jnp.zeros((0, one.shape[1]), one.dtype)

    @mapped.def_vmap
    def rule(axis_size, in_batched, rows, *seeds):
        if not any(in_batched[1:]):
            _, n, size = rows.shape
            out = mapped(rows.reshape(axis_size * n, size), *seeds)
            return out.reshape(axis_size, n, out.shape[-1]), True
        args = (rows, *seeds)

        def one(i):
            return mapped(*(a[i] if batched else a for a, batched in zip(args, in_batched, strict=True)))

        return lax.map(one, jnp.arange(axis_size)), True

    return mapped
