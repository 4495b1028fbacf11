import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jattrib.core import tree
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.data import safetensors
from jattrib.models import gpt, hf, hf_config

V, D, LAYERS, CONTEXT = 13, 8, 2, 6
GPT2 = {
    "model_type": "gpt2", "vocab_size": V, "n_positions": CONTEXT, "n_embd": D, "n_layer": LAYERS, "n_head": 2,
    "layer_norm_epsilon": 1e-3, "activation_function": "gelu_new",
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": V, "max_position_embeddings": CONTEXT, "hidden_size": D,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 12,
    "rms_norm_eps": 1e-3, "rope_theta": 30.0, "hidden_act": "silu", "head_dim": 4,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, V, (2, CONTEXT)).astype(np.int32)


def weights(told, seed=1):
    """Return random arrays under Hugging Face's names, with its shapes."""
    rng = np.random.default_rng(seed)
    if told["model_type"] == "gpt2":
        shapes = {"wte.weight": (V, D), "wpe.weight": (CONTEXT, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
        for i in range(LAYERS):
            own = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
            for name, shape in own.items():
                shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = shape, shape[1:]
            for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
                shapes[f"h.{i}.{name}"] = (D,)
        shapes = {f"transformer.{name}": shape for name, shape in shapes.items()}
    else:
        shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
        if not told.get("tie_word_embeddings", False):
            shapes["lm_head.weight"] = (V, D)
        for i in range(LAYERS):
            own = {
                "self_attn.q_proj": (16, D), "self_attn.k_proj": (8, D), "self_attn.v_proj": (8, D),
                "self_attn.o_proj": (D, 16), "mlp.gate_proj": (12, D), "mlp.up_proj": (12, D),
                "mlp.down_proj": (D, 12), "input_layernorm": (D,), "post_attention_layernorm": (D,),
            }  # fmt: skip
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in own.items()}
    return {name: (0.5 * rng.normal(size=shape) + 0.1).astype(np.float32) for name, shape in shapes.items()}


def save(directory, told, arrays, files=1):
    """Write files by hand, with bytes of their own."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(told))
    names, held = list(arrays), {}
    for number in range(files):
        file = "model.safetensors" if files == 1 else f"model-{number}.safetensors"
        header, data = {}, b""
        for name in names[number::files]:
            array, end = arrays[name], len(data)
            data += array.tobytes()
            kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[array.dtype.name]
            header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [end, len(data)]}
            held[name] = file
        text = json.dumps(header).encode()
        (directory / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    if files > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": held}))


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def attend(q, k, v):
    """Attention of one sequence on arrays [heads, t, width]."""
    logits = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    logits[:, np.triu(np.ones(logits.shape[1:], bool), 1)] = -np.inf
    mixed = softmax(logits) @ v
    return mixed.transpose(1, 0, 2).reshape(q.shape[1], -1)


def heads(x, count):
    return x.reshape(len(x), count, -1).transpose(1, 0, 2)


def gpt2_forward(w, tokens):
    w = {name.removeprefix("transformer."): leaf.astype(np.float64) for name, leaf in w.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for i in range(LAYERS):
        q, k, v = np.split(conv(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        x = x + conv(attend(*(heads(each, 2) for each in (q, k, v))), f"h.{i}.attn.c_proj")
        u = conv(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + conv(0.5 * u * (1 + np.tanh((2 / np.pi) ** 0.5 * (u + 0.044715 * u**3))), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def llama_forward(w, tokens):
    w = {name.removeprefix("model."): leaf.astype(np.float64) for name, leaf in w.items()}
    angles = np.outer(np.arange(len(tokens)), 1 / 30.0 ** (np.arange(0, 4, 2) / 4))
    cos, sin = (np.concatenate([f(angles)] * 2, axis=-1) for f in (np.cos, np.sin))

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * w[f"{name}.weight"]

    def rotate(x):
        half = np.concatenate([-x[..., 2:], x[..., :2]], axis=-1)
        return x * cos + half * sin

    x = w["embed_tokens.weight"][tokens]
    for i in range(LAYERS):
        at = f"layers.{i}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (y @ w[f"{at}.self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k, v = rotate(heads(q, 4)), rotate(heads(k, 2)).repeat(2, axis=0), heads(v, 2).repeat(2, axis=0)
        x = x + attend(q, k, v) @ w[f"{at}.self_attn.o_proj.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (y @ w[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "norm") @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


CASES = {"gpt2": (GPT2, gpt2_forward), "llama": (LLAMA, llama_forward)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("files", [1, 3])
def test_what_is_read_computes_what_the_names_mean(tmp_path, name, files):
    told, forward = CASES[name]
    arrays = weights(told)
    save(tmp_path, told, arrays, files)
    config, params = hf.read(tmp_path)
    logits, _ = jax.jit(gpt.decoder(config).apply)(params, {}, TOKENS)
    np.testing.assert_allclose(logits, [forward(arrays, tokens) for tokens in TOKENS], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_written_and_read_again_nothing_has_changed(tmp_path, name, dtype):
    told, _ = CASES[name]
    arrays = {key: leaf.astype(jnp.dtype(dtype)) for key, leaf in weights(told).items()}
    save(tmp_path / "a", told, arrays)
    config, params = hf.read(tmp_path / "a", dtype=None)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    hf.write(tmp_path / "b", config, params)
    again = safetensors.read(tmp_path / "b" / "model.safetensors")
    assert again.keys() == arrays.keys()
    for key, leaf in arrays.items():
        assert again[key].dtype == leaf.dtype
        np.testing.assert_array_equal(again[key], leaf)
    single = hf.read(tmp_path / "a")[1]  # float32, which holds the others exactly
    hf.write(tmp_path / "c", config, single, dtype=dtype, file_bytes=1000)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 2
    config_again, params_again = hf.read(tmp_path / "c", dtype=None)
    assert config_again == hf.read(tmp_path / "b")[0]
    assert tree.digest(params_again) == tree.digest(params)


def test_each_array_keeps_its_own_type(tmp_path):
    told, _ = CASES["llama"]
    arrays = {key: leaf.astype(np.float32 if "norm" in key else jnp.bfloat16) for key, leaf in weights(told).items()}
    save(tmp_path / "a", told, arrays)
    hf.write(tmp_path / "b", *hf.read(tmp_path / "a", dtype=None))
    again = safetensors.read(tmp_path / "b" / "model.safetensors")
    for key, leaf in arrays.items():
        assert again[key].dtype == leaf.dtype
        np.testing.assert_array_equal(again[key], leaf)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_names_without_prefix_buffers_and_tied_heads_are_understood(tmp_path):
    arrays = weights(GPT2)
    bare = {name.removeprefix("transformer."): leaf for name, leaf in arrays.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, CONTEXT, CONTEXT), np.float32)
    save(tmp_path / "bare", GPT2, bare | {"lm_head.weight": arrays["transformer.wte.weight"]})
    save(tmp_path / "full", GPT2, arrays)
    assert tree.digest(hf.read(tmp_path / "bare")[1]) == tree.digest(hf.read(tmp_path / "full")[1])
    tied = LLAMA | {"tie_word_embeddings": True}
    save(tmp_path / "tied", tied, weights(tied))
    config, params = hf.read(tmp_path / "tied")
    assert config.tied
    assert "head" not in params


@pytest.mark.parametrize("name", CASES)
def test_leaves_go_where_they_are_told_part_by_part(tmp_path, name):
    told, _ = CASES[name]
    save(tmp_path, told, weights(told))
    expected = hf.read(tmp_path)[1]
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def sharding(leaf):
        axes = ["data" if size % 2 == 0 and place else None for place, size in enumerate(leaf.shape)]
        axes[-1] = "model" if leaf.shape[-1] % 4 == 0 else None
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree.map(sharding, expected)
    got = hf.read(tmp_path, shardings=shardings)[1]
    for leaf, wanted, placed in zip(*map(jax.tree.leaves, (got, expected, shardings)), strict=True):
        assert leaf.sharding == placed
        np.testing.assert_array_equal(leaf, wanted)
    hf.write(tmp_path / "again", hf.read(tmp_path)[0], got)
    assert tree.digest(hf.read(tmp_path / "again")[1]) == tree.digest(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "'model.layers.1.mlp.up_proj.weight' is missing"),
        (lambda w: w.update({"model.layers.2.a": w["model.norm.weight"]}), "'model.layers.2.a' is one too many"),
        (
            lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:-1]}),
            r"'lm_head.weight' has the shape \(12, 8\), by config.json \(13, 8\)",
        ),
    ],
)
def test_another_tree_is_refused_by_its_first_name(tmp_path, change, message):
    arrays = weights(LLAMA)
    change(arrays)
    save(tmp_path, LLAMA, arrays)
    with pytest.raises(StoreError, match=message):
        hf.read(tmp_path)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (LLAMA | {"model_type": "mamba"}, "model_type = 'mamba'\n  expected: one of gpt2, llama"),
        (LLAMA | {"attention_bias": True}, "attention_bias = True\n  expected: False"),
        (LLAMA | {"hidden_act": "relu"}, "hidden_act = 'relu'\n  expected: 'silu'"),
        (LLAMA | {"rope_scaling": {"type": "yarn"}}, "rope_scaling = 'yarn'\n  expected: 'default' or 'llama3'"),
        (GPT2 | {"activation_function": "relu"}, "activation_function = 'relu'"),
        ({key: told for key, told in GPT2.items() if key != "n_head"}, "no n_head"),
        (GPT2 | {"n_embd": "8"}, "n_embd = '8'\n  expected: int"),
        (GPT2 | {"n_positions": 8.0}, "n_positions = 8.0\n  expected: int"),
        (LLAMA | {"num_hidden_layers": None}, "num_hidden_layers = None\n  expected: int"),
        (LLAMA | {"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6'\n  expected: float or int"),
        (LLAMA | {"rope_scaling": "llama3"}, "rope_scaling = 'llama3'\n  expected: dict or null"),
        (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false'\n  expected: bool"),
    ],
)
def test_settings_that_the_decoder_lacks_are_refused(tmp_path, told, message):
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(InvalidInputError, match=message):
        hf_config.read_config(tmp_path)


def test_configurations_come_back(tmp_path):
    scaling = gpt.RotaryScaling(8.0, 1.0, 4.0, 16)
    for config in (
        gpt.Config("llama", V, CONTEXT, D, LAYERS, 4, 12, 2, 4, tied=False, epsilon=1e-6, theta=5e5, scaling=scaling),
        gpt.Config("gpt2", V, CONTEXT, D, LAYERS, 4, 32, tied=False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(hf_config.to_json(config)))
        assert hf_config.read_config(tmp_path) == config
    newer = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    assert hf_config.read_config(tmp_path).theta == 7.0


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="a gpt2 with 1 heads of keys and values"):
        hf.write(tmp_path, gpt.Config("gpt2", V, CONTEXT, D, LAYERS, 2, kv_heads=1), {})
    config = gpt.Config("gpt2", V, CONTEXT, D, LAYERS, 2)
    like = jax.eval_shape(gpt.decoder(config).init, jax.random.key(0))[0]
    params = jax.tree.map(lambda leaf: np.zeros((*leaf.shape[:-1], 3), np.float32), like)
    with pytest.raises(InvalidInputError, match=r"embedding/positions of shape \(6, 3\)\n  expected: \(6, 8\)"):
        hf.write(tmp_path, config, params)


def test_a_model_written_over_another_is_the_one_that_is_read(tmp_path, monkeypatch):
    config = gpt.Config("gpt2", V, CONTEXT, D, LAYERS, 2)
    old, new = (gpt.decoder(config).init(jax.random.key(seed))[0] for seed in range(2))
    hf.write(tmp_path, config, old, file_bytes=1000)
    hf.write(tmp_path, config, new)
    assert tree.digest(hf.read(tmp_path)[1]) == tree.digest(new)
    hf.write(tmp_path, config, old, file_bytes=1000)
    assert tree.digest(hf.read(tmp_path)[1]) == tree.digest(old)

    write, written = safetensors.write, []

    def killed(path, *args, **options):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *args, **options)

    monkeypatch.setattr(safetensors, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        hf.write(tmp_path, config, new, file_bytes=1000)
    with pytest.raises(StoreError, match=r"config\.json cannot be read"):
        hf.read(tmp_path)


@pytest.mark.parametrize("told", [None, [], {}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_that_tells_of_no_files_is_refused(tmp_path, told):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(told))
    with pytest.raises(StoreError, match=r"index\.json tells of no files"):
        hf.read(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(StoreError, match=r"model\.safetensors: No such file"):
        hf.read(tmp_path)
