"""What a replay needs in memory, before it is launched: its programs are compiled, and none is run."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jattrib.core import mesh as meshes
from jattrib.core import tree
from jattrib.core.types import Batch
from jattrib.train import cuts, pullback
from jattrib.train.replay import Checkpoints, Inputs, Output, Run


class Memory(NamedTuple):
    """What a replay needs on each device, in bytes.

    Attributes:
        data: the training set and the schedule.
        checkpoints: the carries at the starts of segments, as many as are kept at a time.
        trace: the carries of one segment.
        cotangents: of the queries of one device, and the sums over steps.
        working: what the largest program needs beside its arguments and results.
        peak: all of them together.
    """

    data: int
    checkpoints: int
    trace: int
    cotangents: int
    working: int
    peak: int


def memory(
    output: Output,
    run: Run,
    inputs: Inputs,
    queries: Batch,
    *,
    segment: int | None = None,
    block: int | None = None,
    checkpoints: Checkpoints = "device",
    mesh: Mesh | None = None,
) -> Memory:
    """Return what `replay.metagradient` needs with these arguments.

    Any array may be abstract (`jax.eval_shape`, `jax.ShapeDtypeStruct`), and the mesh may be of devices that are
    described and not there.

    Raises:
        InvalidInputError: as `replay.metagradient` says of queries, segment, block and mesh.
    """
    where = cuts.cut(run.order, queries, segment, block, mesh)
    lowered = programs(output, run, inputs, queries, segment=segment, block=block, mesh=mesh)
    analyses = [each.compile().memory_analysis() for each in lowered.values()]
    working = max(0 if each is None else each.temp_size_in_bytes for each in analyses)
    start = _start(pullback.Program(run.loss, run.optimizer), inputs)
    inner = where.segments - 1
    kept = {"device": inner, "host": min(inner, 1), "recompute": inner.bit_length()}[checkpoints]
    share = where.blocks * (where.block // meshes.width(mesh))
    parts = {
        "data": tree.nbytes((run.data, cuts.rows_like(run.order, inputs.weights))),
        "checkpoints": (1 + kept) * tree.nbytes(start),
        "trace": (1 + where.segment) * tree.nbytes(start),
        "cotangents": share * (tree.nbytes(pullback.split(start)[0]) + tree.nbytes((inputs.weights, inputs.hyper))),
        "working": int(working),
    }
    return Memory(**parts, peak=sum(parts.values()))


def programs(
    output: Output,
    run: Run,
    inputs: Inputs,
    queries: Batch,
    *,
    segment: int | None = None,
    block: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, jax.stages.Lowered]:
    """Return the four large programs of a replay, by name, ready to be compiled; arguments are those of `memory`."""
    where = cuts.cut(run.order, queries, segment, block, mesh)
    program = pullback.Program(run.loss, run.optimizer, mesh)
    whole = None if mesh is None else meshes.replicated(mesh)
    spread = None if mesh is None else meshes.rows(mesh, axis=1)
    start = _abstract(_start(program, inputs), whole)
    data, hyper, function = _abstract((run.data, inputs.hyper, tree.callable_tree(output)), whole)
    part = cuts.rows_like(run.order, inputs.weights, where.segment)
    part = part if mesh is None else jax.tree.map(_placed, part, cuts.row_shardings(part, mesh))
    asked = _abstract(jax.eval_shape(partial(cuts.blocked, where=where), queries), spread)
    _, cotangent = jax.eval_shape(partial(pullback.read, program), function, asked, start)
    zeros = partial(pullback.zeros, blocks=where.blocks, queries=where.block)
    total = jax.tree.map(
        lambda leaf: _placed(leaf, None if mesh is None else meshes.rows(mesh, axis=leaf.ndim - 1)),
        jax.eval_shape(zeros, inputs.weights, inputs.hyper),
    )
    carries = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((where.segment, *leaf.shape), leaf.dtype), start)
    forward = (program, data, hyper, start, part)
    return {
        "advance": pullback.advance.lower(*forward),
        "trace": pullback.trace.lower(*forward),
        "read": pullback.read.lower(program, function, asked, start),
        "pull": pullback.pull.lower(
            program, data, hyper, _abstract(carries, whole), part, _abstract(cotangent, spread), total
        ),
    }


def _start(program: pullback.Program, inputs: Inputs) -> Any:
    return jax.eval_shape(partial(pullback.begin, program), inputs.params, inputs.state, inputs.hyper)


def _abstract(value: PyTree, sharding: Any) -> PyTree:
    return jax.tree.map(lambda leaf: _placed(leaf, sharding), value)


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=sharding)
