"""Forward and backward passes of billions of parameters, compiled for pods that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jattrib.models import gpt
from jattrib.models.gpt_sharding import shardings
from jattrib.train import loop
from tests.compile import topology

GIGABYTE = 2**30
LLAMA_1B = gpt.Config(
    "llama", 128_256, 8192, 2048, 16, 32, hidden=8192, kv_heads=8, theta=5e5, epsilon=1e-5, dtype="bfloat16", remat=True
)
LLAMA_8B = LLAMA_1B._replace(width=4096, layers=32, hidden=14_336, tied=False)

CASES = {
    "1 billion on v6e-256": (LLAMA_1B, "v6e:16x16", (32, 8), 256, 2048, 32),
    "8 billion on v5p-128": (LLAMA_8B, "v5p:4x4x8", (16, 8), 128, 2048, 95),
}
"""Shape, topology, mesh (data by model), sequences, tokens a sequence, and a chip's memory."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_fits_the_chips(name, capsys):
    config, pod, shape, batch, length, most = CASES[name]
    topology.tpu("v5e")  # skips where there is no compiler
    devices = np.array(topologies.get_topology_desc(pod, "tpu").devices)
    mesh = Mesh(devices.reshape(shape), ("data", "model"))
    model = gpt.decoder(config)
    loss = loop.classification_loss(model)
    like, _ = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like, shardings(like, mesh),
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))

    def run(params, inputs, labels):
        return jax.value_and_grad(lambda params: loss(params, {}, (inputs, labels))[0].mean())(params)

    compiled = topology.compile_for(mesh, run, params, tokens, tokens)
    held = topology.memory(compiled)
    total = sum(leaf.size for leaf in jax.tree.leaves(like))
    with capsys.disabled():
        parts = ", ".join(f"{part} {size / GIGABYTE:.2f}" for part, size in held._asdict().items())
        print(f"\n{name}: {total:,} parameters, {batch} x {length} tokens; GiB a chip: {parts}")
    assert held.arguments < 1.1 * 4 * total / devices.size + GIGABYTE / 10  # parameters are split, not copied
    assert sum(held) < most * GIGABYTE
