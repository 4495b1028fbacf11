import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattrib.core.errors import InvalidInputError
from jattrib.models import gpt
from jattrib.models.gpt_sharding import partition, shardings
from jattrib.train import loop

CONFIGS = {
    "gpt2": gpt.Config("gpt2", vocabulary=32, context=8, width=16, layers=2, heads=4),
    "llama": gpt.Config("llama", vocabulary=32, context=8, width=16, layers=2, heads=4, kv_heads=2, tied=False),
}


def mesh(shape=(2, 4), axes=("data", "model")):
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))


def abstract(config):
    return jax.eval_shape(gpt.decoder(config).init, jax.random.key(0))[0]


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_loss_and_gradient_do_not_move_with_sharding(name):
    loss = loop.classification_loss(gpt.decoder(CONFIGS[name]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(np.float32), abstract(CONFIGS[name]))
    tokens = rng.integers(0, 32, (4, 9)).astype(np.int32)
    batch = (tokens[:, :-1], tokens[:, 1:])

    @jax.jit
    @jax.value_and_grad
    def run(params, batch):
        return loss(params, {}, batch)[0].mean()

    expected = run(params, batch)
    placed = shardings(params, mesh())
    here = jax.device_put(params, placed), jax.device_put(batch, NamedSharding(mesh(), P("data")))
    got = run(*here)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), got, expected)
    kernel = here[0]["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 16)}
    assert got[1]["layers"]["mlp"]["up"]["kernel"].sharding.is_equivalent_to(kernel.sharding, 3)


def test_specs_by_hand():
    specs = partition(abstract(CONFIGS["gpt2"]), mesh())
    assert specs["embedding"] == {"tokens": P(("model", "data"), None), "positions": P(None, "data")}
    attention, mlp = specs["layers"]["attention"], specs["layers"]["mlp"]
    for into in (attention["query"], attention["key"], attention["value"], mlp["up"]):
        assert into == {"kernel": P(None, "data", "model"), "bias": P(None, "model")}
    for out in (attention["out"], mlp["down"]):
        assert out == {"kernel": P(None, "model", "data"), "bias": P()}
    assert specs["layers"]["mlp_norm"] == specs["norm"] == {"scale": P(), "bias": P()}
    assert partition(abstract(CONFIGS["llama"]), mesh())["head"]["kernel"] == P("data", "model")


def test_axes_may_be_left_out_joined_or_too_wide():
    params = abstract(CONFIGS["llama"])
    three = mesh((2, 2, 2), ("pod", "data", "model"))
    assert partition(params, three, data=None)["head"]["kernel"] == P(None, "model")
    assert partition(params, three, data=("pod", "data"))["head"]["kernel"] == P(("pod", "data"), "model")
    for vocabulary, wanted in ((36, P("model", "data")), (31, P(None, "data"))):  # 8 devices, 2 of them on `model`
        uneven = partition(abstract(CONFIGS["llama"]._replace(vocabulary=vocabulary)), mesh())
        assert uneven["embedding"]["tokens"] == wanted
    odd = abstract(CONFIGS["llama"]._replace(vocabulary=31))
    assert partition(odd, mesh())["head"]["kernel"] == P("data", None)
    with pytest.raises(InvalidInputError, match="the axis 'fsdp'\n  expected: one of the mesh's: data, model"):
        partition(params, mesh(), data="fsdp")
    with pytest.raises(InvalidInputError, match="the leaf 'layers/conv/weight'"):
        partition({"layers": {"conv": {"weight": np.zeros((2, 3))}}}, mesh())
