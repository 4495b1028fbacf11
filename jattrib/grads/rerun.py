"""Run the gradient's program on a batch, without the products that make the leaves' gradients.

The batch is an explicit axis: of a value that depends on the example, the first (the second of what a scan stacks).
What no one needs any more is not run; the rest runs as it stands, vmapped.  Only the scans, branches and calls that
hold a site are opened, to let its factors out, or what a reducer makes of them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core as jax_core
from jax import lax
from jaxtyping import Array, Bool, PyTree

from jattrib.grads import sites
from jattrib.grads.layers import Source, inner
from jattrib.grads.program import INLINE, Program, is_literal


class Value(NamedTuple):
    """An array and which of its axes is the batch; None where it does not depend on the example."""

    array: Array
    axis: int | None


class Job(NamedTuple):
    """What to make of the factors of a site.

    Attributes:
        source: where they come from.
        function: of a state and the factors (see `taps.Reducer`).
        state: its arrays, with a leading stack axis, cut to the iterations of the scans that one is in.
        keep: whether positions are kept apart.
    """

    source: Source
    function: Callable[[PyTree, Array, Array], PyTree]
    state: PyTree
    keep: bool


Results = dict[int, PyTree]
"""Of each job, by its number."""


def run(
    program: Program, params: Sequence[Array], example: Sequence[Array], jobs: Sequence[Job], plain: Sequence[int]
) -> tuple[Array, list[Array], Results]:
    """Return the outputs, the gradients of the leaves in `plain`, and the results of the jobs, of a batch.

    Args:
        program: the program of one example.
        params: the leaves of the parameters.
        example: the leaves of the batch.
        jobs: what to make of the sites' factors.
        plain: the numbers of leaves whose gradients are wanted as they are.
    """
    closed, size = program.closed, len(example[0])
    inputs = [Value(leaf, None) for leaf in params] + [Value(leaf, 0) for leaf in example]
    need = [True] + [number in plain for number in range(program.leaves)]
    runner = _Runner(size, jobs)
    at = _At(0, None, {number: job.state for number, job in enumerate(jobs)})
    inputs.append(Value(jnp.ones((), closed.jaxpr.outvars[0].aval.dtype), None))
    outs, results = runner.run(closed.jaxpr, closed.consts, inputs, range(len(jobs)), need, at)
    rows = [runner.rows(value) for value in outs if value is not None]
    return rows[0], rows[1:], results


class _At(NamedTuple):
    """Where one is: how deep, for which examples, with which states."""

    depth: int
    mask: Bool[Array, " b"] | None
    states: dict[int, PyTree]


class _Runner:
    """Runs programs on batches of one size; it holds what does not change on the way down."""

    def __init__(self, size: int, jobs: Sequence[Job]):
        self.size, self.jobs = size, jobs

    def rows(self, value: Value) -> Array:
        """Return a value with the batch leading."""
        if value.axis is None:
            return jnp.broadcast_to(value.array, (self.size, *value.array.shape))
        return jnp.moveaxis(value.array, value.axis, 0)

    def array(self, value: Value | None, batched: bool) -> Array | None:
        """Return a value's array, with the batch leading if it is to have one."""
        return None if value is None else self.rows(value) if batched else value.array

    def run(
        self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value | None], jobs: Sequence[int],
        need: Sequence[bool], at: _At,
    ) -> tuple[list[Value | None], Results]:  # fmt: skip
        """Return the outputs that are needed, and the results of the jobs that are somewhere in this program."""
        env = {var: value for var, value in zip(jaxpr.invars, inputs, strict=True) if value is not None}
        env |= {var: Value(const, None) for var, const in zip(jaxpr.constvars, consts, strict=True)}
        live, _ = self.live(jaxpr, need, jobs, at.depth)
        results: Results = {}
        pending: list[int] = []
        for number in [i for i, alive in enumerate(live) if alive]:
            inside = self.inside(jobs, number, at.depth)
            if not inside:
                pending.append(number)
                continue
            self.segment(jaxpr, pending, live, need, jobs, env, at.depth)
            pending = []
            equation = jaxpr.eqns[number]
            later = self.wanted(jaxpr, live, need, jobs, at.depth, after=number)
            wanted = [var in later for var in equation.outvars]
            values = [Value(jnp.asarray(a.val), None) if is_literal(a) else env.get(a) for a in equation.invars]
            outs, found = self.enter(equation, values, inside, wanted, at)
            env |= {var: out for var, out in zip(equation.outvars, outs, strict=True) if out is not None}
            results |= found
        self.segment(jaxpr, pending, live, need, jobs, env, at.depth)
        for number in jobs:
            if len(self.jobs[number].source.site.trail) == at.depth:
                results[number] = self.reduce(number, env, at)
        read = [Value(jnp.asarray(a.val), None) if is_literal(a) else env.get(a) for a in jaxpr.outvars]
        return [value if wanted else None for value, wanted in zip(read, need, strict=True)], results

    def reduce(self, number: int, env: dict[Any, Value], at: _At) -> PyTree:
        """Return what a job makes of its site's factors."""
        source, function, _, _ = self.jobs[number]

        def read(atom: Any) -> Array:
            return self.rows(Value(jnp.asarray(atom.val), None) if is_literal(atom) else env[atom])

        a, s = sites.factors(source.site, source.equation, source.recipe, read, mask=at.mask, bias=source.bias)
        return function(at.states[number], *((s, a) if source.swapped else (a, s)))

    def inside(self, jobs: Iterable[int], equation: int, depth: int) -> list[int]:
        """Return the jobs that are in an equation's program."""
        trails = {number: self.jobs[number].source.site.trail for number in jobs}
        return [number for number, trail in trails.items() if len(trail) > depth and trail[depth].equation == equation]

    def operands(self, jobs: Iterable[int], depth: int) -> set[Any]:
        """Return the variables from which jobs at this depth make their factors."""
        found = set()
        for number in jobs:
            source = self.jobs[number].source
            if len(source.site.trail) == depth:
                found.update([source.site.variable] if source.equation is None else source.equation.invars[-2:])
        return {atom for atom in found if not is_literal(atom)}

    def live(self, jaxpr: Any, need: Sequence[bool], jobs: Sequence[int], depth: int) -> tuple[list[bool], list[bool]]:
        """Return which equations must run, and which inputs they need."""
        wanted = {var for var, flag in zip(jaxpr.outvars, need, strict=True) if flag and not is_literal(var)}
        wanted |= self.operands(jobs, depth)
        live = [False] * len(jaxpr.eqns)
        for number in reversed(range(len(jaxpr.eqns))):
            equation = jaxpr.eqns[number]
            inside = self.inside(jobs, number, depth)
            out = [var in wanted for var in equation.outvars]
            if any(out) or inside or equation.effects:
                live[number] = True
                needs = self.needs(equation, out, inside, depth) if inside else [True] * len(equation.invars)
                wanted |= {a for a, flag in zip(equation.invars, needs, strict=True) if flag and not is_literal(a)}
        return live, [var in wanted for var in jaxpr.invars]

    def needs(self, equation: Any, out: Sequence[bool], inside: Sequence[int], depth: int) -> list[bool]:
        """Return which operands an equation needs that holds jobs."""
        if equation.primitive.name == "scan":
            return self.scan_needs(equation, out, inside, depth)[0]
        branches = range(len(equation.params["branches"])) if equation.primitive.name == "cond" else [0]
        each = []
        for branch in branches:
            here = [i for i in inside if self.jobs[i].source.site.trail[depth].branch == branch]
            each.append(self.live(_open(inner(equation, branch)), out, here, depth + 1)[1])
        needs = [any(flags) for flags in zip(*each, strict=True)]
        return [True, *needs] if equation.primitive.name == "cond" else needs

    def scan_needs(
        self, equation: Any, out: Sequence[bool], inside: Sequence[int], depth: int
    ) -> tuple[list[bool], list[bool]]:
        """Return which operands a scan needs, and which of its carries and outputs: all that a carry needs, again."""
        consts, carries = equation.params["num_consts"], equation.params["num_carry"]
        out = list(out)
        while True:
            _, needs = self.live(equation.params["jaxpr"].jaxpr, out, inside, depth + 1)
            more = [a or b for a, b in zip(out, needs[consts : consts + carries], strict=False)] + out[carries:]
            if more == out:
                return needs[:consts] + out[:carries] + needs[consts + carries :], out
            out = more

    def wanted(
        self, jaxpr: Any, live: Sequence[bool], need: Sequence[bool], jobs: Sequence[int], depth: int, after: int
    ) -> set[Any]:
        """Return the variables that are still read after an equation."""
        found = {var for var, flag in zip(jaxpr.outvars, need, strict=True) if flag and not is_literal(var)}
        found |= self.operands(jobs, depth)
        for number in range(after + 1, len(jaxpr.eqns)):
            if live[number]:
                found.update(a for a in jaxpr.eqns[number].invars if not is_literal(a))
        return found

    def segment(
        self, jaxpr: Any, numbers: Sequence[int], live: Sequence[bool], need: Sequence[bool], jobs: Sequence[int],
        env: dict[Any, Value], depth: int,
    ) -> None:  # fmt: skip
        """Run equations that hold no job: those that depend on the example as one vmapped program, after the others."""
        if not numbers:
            return
        batched, reached = [], {var for var, value in env.items() if value.axis is not None}
        single = []
        for number in numbers:
            equation = jaxpr.eqns[number]
            if any(not is_literal(a) and a in reached for a in equation.invars):
                reached.update(equation.outvars)
                batched.append(equation)
            else:
                single.append(equation)
        later = self.wanted(jaxpr, live, need, jobs, depth, after=numbers[-1])
        for equations, axes in ((single, None), (batched, 0)):
            if not equations:
                continue
            made = {var for equation in equations for var in equation.outvars}
            read = list(
                dict.fromkeys(a for eqn in equations for a in eqn.invars if not is_literal(a) and a not in made)
            )
            outside = (
                later
                if equations is batched
                else later | {a for eqn in batched for a in eqn.invars if not is_literal(a)}
            )
            kept = [var for var in dict.fromkeys(v for eqn in equations for v in eqn.outvars) if var in outside]
            part = jaxpr.replace(constvars=[], invars=read, outvars=kept, eqns=equations)
            function = partial(jax_core.eval_jaxpr, part, ())
            out_axes: list[int | None] = [axes] * len(kept)
            if axes is not None:
                stacked = {v for eqn in equations if eqn.primitive.name == "scan"
                           for v in eqn.outvars[eqn.params["num_carry"] :]}  # fmt: skip
                out_axes = [1 if var in stacked else 0 for var in kept]
                function = jax.vmap(
                    function, in_axes=[env[a].axis for a in read], out_axes=out_axes, axis_size=self.size
                )
            outs = function(*(env[a].array for a in read))
            env |= {var: Value(out, axis) for var, out, axis in zip(kept, outs, out_axes, strict=True)}

    def enter(
        self, equation: Any, values: Sequence[Value | None], inside: Sequence[int], need: Sequence[bool], at: _At
    ) -> tuple[list[Value | None], Results]:
        """Run an equation that holds jobs."""
        name = equation.primitive.name
        if name == "scan":
            return self.scan(equation, values, inside, need, at)
        if name == "cond":
            return self.cond(equation, values, inside, need, at)
        assert name in INLINE, name
        closed = inner(equation, 0)
        if equation.params.get("prevent_cse"):  # a rematerialised program must not share with the one before it
            held = [value.array for value in values if value is not None]
            arrays = iter(lax.optimization_barrier(held))
            values = [value and Value(next(arrays), value.axis) for value in values]
        below = at._replace(depth=at.depth + 1)
        return self.run(_open(closed), getattr(closed, "consts", ()), values, inside, need, below)

    def cond(
        self, equation: Any, values: Sequence[Value | None], inside: Sequence[int], need: Sequence[bool], at: _At
    ) -> tuple[list[Value | None], Results]:
        """Run the branch of all examples; where they differ, every branch, each for its own examples."""
        branches, index, operands = equation.params["branches"], values[0], values[1:]
        assert index is not None
        trails = {number: self.jobs[number].source.site.trail[at.depth].branch for number in inside}
        spread = [[value is not None and value.axis is not None for value in operands]] * len(branches)
        flags = [
            any(each)
            for each in zip(*(_spread(b.jaxpr, f) for b, f in zip(branches, spread, strict=True)), strict=True)
        ]
        flags = [flag or index.axis is not None for flag in flags]

        def branch(which: int, mask: Bool[Array, " b"] | None) -> tuple[list[Any], Results]:
            here = [number for number in inside if trails[number] == which]
            below = at._replace(depth=at.depth + 1, mask=mask)
            outs, results = self.run(branches[which].jaxpr, branches[which].consts, operands, here, need, below)
            arrays = [self.array(value, flag) for value, flag in zip(outs, flags, strict=True) if value is not None]
            others = {
                number: self.nothing(number, at.depth + 1, at.states[number]) for number in inside if number not in here
            }
            return arrays, results | others

        chosen = jnp.clip(index.array, 0, len(branches) - 1)
        if index.axis is None:
            arrays, results = lax.switch(chosen, [partial(branch, which, at.mask) for which in range(len(branches))])
        else:
            own = [chosen == which for which in range(len(branches))]
            each = [branch(which, mask if at.mask is None else mask & at.mask) for which, mask in enumerate(own)]
            arrays = [lax.select_n(jnp.broadcast_to(_like(chosen, rows[0]), rows[0].shape), *rows)
                      for rows in zip(*(arrays for arrays, _ in each), strict=True)]  # fmt: skip
            results = {number: each[which][1][number] for number, which in trails.items()}
        given = iter(arrays)
        return [Value(next(given), 0 if flag else None) if wanted else None
                for flag, wanted in zip(flags, need, strict=True)], results  # fmt: skip

    def scan(
        self, equation: Any, values: Sequence[Value | None], inside: Sequence[int], need: Sequence[bool], at: _At
    ) -> tuple[list[Value | None], Results]:
        """Run a scan whose iterations hold jobs: what they give is stacked, or summed where the leaf is shared."""
        params, closed = equation.params, equation.params["jaxpr"]
        k, c, length = params["num_consts"], params["num_carry"], params["length"]
        _, wanted = self.scan_needs(equation, need, inside, at.depth)
        frames = {number: self.jobs[number].source.site.trail[at.depth].frame for number in inside}
        summed = [number for number in inside if frames[number] == "positions" and not self.jobs[number].keep]
        sliced = {number: jax.tree.map(lambda leaf: leaf.reshape(length, -1, *leaf.shape[1:]), at.states[number])
                  for number in inside if frames[number] == "stack"}  # fmt: skip
        flags = self.carried(closed.jaxpr, values, k, c)
        begun = [value if keep else None for value, keep in zip(values[k : k + c], wanted, strict=False)]
        first = [self.array(value, flag) for value, flag in zip(begun, flags, strict=True)]
        rows = [value and (value.array if value.axis is None else jnp.moveaxis(value.array, value.axis, 1))
                for value in values[k + c :]]  # fmt: skip
        stacked_axes: list[int | None] = []

        def step(carry: Any, row: Any) -> Any:
            before, sums = carry
            state = [
                None if a is None else Value(a, 0 if flag else None) for a, flag in zip(before, flags, strict=True)
            ]
            here = [None if a is None else Value(a, None if value.axis is None else 0)  # type: ignore[union-attr]
                    for a, value in zip(row[0], values[k + c :], strict=True)]  # fmt: skip
            below = at._replace(depth=at.depth + 1, states=at.states | row[1])
            outs, results = self.run(closed.jaxpr, closed.consts, [*values[:k], *state, *here], inside, wanted, below)
            after = [self.array(value, flag) for value, flag in zip(outs[:c], flags, strict=True)]
            stacked_axes[:] = [value and value.axis for value in outs[c:]]
            sums = {number: jax.tree.map(jnp.add, sums[number], results.pop(number)) for number in sums}
            return (after, sums), ([value and value.array for value in outs[c:]], results)

        sums = {number: self.nothing(number, at.depth + 1, at.states[number]) for number in summed}
        (last, sums), (stacked, results) = lax.scan(
            step, (first, sums), (rows, sliced), length=length, reverse=params["reverse"], unroll=params["unroll"]
        )
        joined = {number: jax.tree.map(partial(_joined, frames[number]), each) for number, each in results.items()}
        outs = [None if a is None else Value(a, 0 if flag else None) for a, flag in zip(last, flags, strict=True)]
        outs += [None if a is None else Value(a, None if axis is None else axis + 1)
                 for a, axis in zip(stacked, stacked_axes, strict=True)]  # fmt: skip
        return [out if flag else None for out, flag in zip(outs, need, strict=True)], joined | sums

    def carried(self, jaxpr: Any, values: Sequence[Value | None], k: int, c: int) -> list[bool]:
        """Return which carries of a scan come to depend on the example."""
        given = [value is not None and value.axis is not None for value in values]
        while True:
            more = [a or b for a, b in zip(given[k : k + c], _spread(jaxpr, given)[:c], strict=True)]
            if more == given[k : k + c]:
                return more
            given[k : k + c] = more

    def nothing(self, number: int, depth: int, state: PyTree) -> PyTree:
        """Return what a job gives, from this depth on, where its site is not come by: zeros."""
        source, function, _, keep = self.jobs[number]
        steps = source.site.trail[depth:]
        a, s = sites.abstract(source.site, source.equation, source.recipe, self.size, bias=source.bias)
        count = math.prod(step.length for step in steps if step.frame == "stack")
        own = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] // count, *leaf.shape[1:]), leaf.dtype), state
        )
        called = partial(function)  # JAX keeps weak references, which not every callable has
        result = jax.eval_shape(called, own, *((s, a) if source.swapped else (a, s)))
        times = math.prod(step.length for step in steps if step.frame == "positions") if keep else 1

        def zeros(leaf: Any) -> Array:
            shape = [leaf.shape[0] * count, *leaf.shape[1:]]
            if keep:
                shape[2] *= times
            return jnp.zeros(shape, leaf.dtype)

        return jax.tree.map(zeros, result)


def _open(program: Any) -> Any:
    return getattr(program, "jaxpr", program)


def _like(index: Array, rows: Array) -> Array:
    return index.reshape(-1, *[1] * (rows.ndim - 1))


def _joined(frame: str | None, leaf: Array) -> Array:
    """Return what the iterations of a scan gave, `[iteration, stack, b, positions, …]`, without their axis."""
    if frame == "stack":
        return leaf.reshape(-1, *leaf.shape[2:])
    leaf = jnp.moveaxis(leaf, 0, 2)
    return leaf.reshape(*leaf.shape[:2], -1, *leaf.shape[4:])


def _spread(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
    reached = {var for var, flag in zip(jaxpr.invars, inputs, strict=True) if flag}
    for equation in jaxpr.eqns:
        if any(not is_literal(a) and a in reached for a in equation.invars):
            reached.update(equation.outvars)
    return [not is_literal(var) and var in reached for var in jaxpr.outvars]
