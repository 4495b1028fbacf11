"""The passes of EK-FAC over billions of parameters, compiled for pods that are not here, and for one H200."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jattrib.core import mesh as meshes
from jattrib.core import stream, tree
from jattrib.curvature import ekfac
from jattrib.grads import taps
from jattrib.models import gpt
from jattrib.models.gpt_sharding import partition
from jattrib.models.outputs import Logits, draw_label, label_loss
from tests.compile import topology
from tests.compile.test_factored import AXES, LENGTH, LLAMA_1B, LLAMA_8B
from tests.compile.topology import Program


def build(config, batch, step, mesh):
    """One chunk of covariances or eigenvalues of every leaf: parameters, factors and rotations are all split."""
    model = gpt.decoder(config)
    like, state = jax.eval_shape(model.init, jax.random.key(0))
    loss = ekfac.true_fisher(Logits(model.apply, state), label_loss, draw_label, key=jax.random.key(0))
    specs = tree.to_names(partition(like, mesh))
    params = tree.from_names(like, {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, specs[path]))
        for path, leaf in tree.to_names(like).items()
    })  # fmt: skip
    row = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
    rows, numbers = (jax.ShapeDtypeStruct((batch, *shape), jnp.int32) for shape in ((LENGTH,), ()))
    numbered, valid = ((rows, rows), numbers), jax.ShapeDtypeStruct((batch,), bool)
    layers = taps.find(loss, like, ((row, row), jax.ShapeDtypeStruct((), jnp.int32)))
    statistic = ekfac.moments(layers, loss, params, numbered, valid)
    if step == "eigenvalues":

        def vectors(moment):
            if len(moment.shape) == 2:  # a diagonal
                return None
            return jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=meshes.spread(mesh, moment.shape))

        sides = jax.eval_shape(statistic.init)
        rotations = {name: tuple(vectors(side) for side in both) for name, both in sides.items()}
        statistic = ekfac.squares(layers, rotations, loss, params, numbered, valid)
    return stream.lower_fold(statistic, numbered, chunk=batch, mesh=mesh)


PROGRAMS = [
    Program("ekfac", f"llama-{size} {step}", chip, pod, partial(build, config, batch, step), (), AXES, shape, slice_)
    for size, config, chip, pod, batch, shape, slice_ in (
        ("8b", LLAMA_8B, "v5p", True, 16, (16, 8), "v5p:4x4x8"),
        ("8b", LLAMA_8B, "v6e", True, 32, (32, 8), None),
        ("1b", LLAMA_1B, "h200", False, 1, None, None),
    )
    for step in ("covariances", "eigenvalues")
]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_it_fits_each_chip(program, tmp_path):
    row, text = topology.measure(program, tmp_path)
    topology.check(program, row, text)
