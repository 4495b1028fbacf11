"""`config.json` of GPT-2 and Llama as a decoder's shape, and back: what this code cannot do is refused by name."""

from pathlib import Path
from typing import Any

from jattrib.core import files
from jattrib.core.errors import InvalidInputError
from jattrib.models import gpt

_GPT2_ONLY = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_LLAMA_ONLY = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1, None)}

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "max_position_embeddings", "hidden_size",
         "num_hidden_layers", "num_attention_heads", "intermediate_size"), (int,),
    ),
    **dict.fromkeys(("n_inner", "num_key_value_heads", "head_dim"), (int, type(None))),
    **dict.fromkeys(("layer_norm_epsilon", "rms_norm_eps", "rope_theta"), (float, int)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (dict, type(None))),
    "tie_word_embeddings": (bool,),
}  # fmt: skip


def read_config(directory: str | Path) -> gpt.Config:
    """Return the shape that `config.json` tells of.

    Raises:
        StoreError: there is no such file, or it is no JSON.
        InvalidInputError: it is of another kind of model, lacks a key, or has a setting that the decoder lacks.
    """
    path = Path(directory) / "config.json"
    told = files.read_json(path)
    kind = told.get("model_type") if isinstance(told, dict) else None
    if kind not in gpt.STYLES:
        raise InvalidInputError(
            f"{path}: model_type = {kind!r}", expected=f"one of {', '.join(gpt.STYLES)}", remedy="choose another model"
        )
    for key, known in (_GPT2_ONLY if kind == "gpt2" else _LLAMA_ONLY).items():
        if key in told and told[key] not in known:
            raise _unknown(path, key, told[key], f"{known[0]!r}")
    for key, types in _TYPES.items():
        if key in told and type(told[key]) not in types:
            raise InvalidInputError(
                f"{path}: {key} = {told[key]!r}",
                expected=" or ".join("null" if each is type(None) else each.__name__ for each in types),
                remedy="fetch it again; it is damaged or of another kind of model",
            )
    try:
        return _gpt2(told) if kind == "gpt2" else _llama(path, told)
    except KeyError as error:
        raise InvalidInputError(
            f"{path}: no {error.args[0]}", expected=f"the keys of a {kind} model", remedy="fetch it again"
        ) from error


def to_json(config: gpt.Config) -> dict[str, Any]:
    """Return what `config.json` says of a decoder.

    Raises:
        InvalidInputError: it has a setting that Hugging Face's GPT-2 lacks.
    """
    if config.style == "llama":
        theta: dict[str, Any] = {"rope_theta": config.theta}
        if config.scaling is not None:
            factor, low, high, original = config.scaling
            theta["rope_scaling"] = {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocabulary,
            "max_position_embeddings": config.context, "hidden_size": config.width,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
            "num_key_value_heads": config.groups, "head_dim": config.head, "intermediate_size": config.inner,
            "rms_norm_eps": config.epsilon, "tie_word_embeddings": config.tied, "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, **theta,
        }  # fmt: skip
    if config.groups != config.heads or config.head * config.heads != config.width:
        raise InvalidInputError(
            f"a gpt2 with {config.groups} heads of keys and values and {config.heads} of width {config.head}",
            expected=f"as many of the ones as of the others, {config.width} wide together",
            remedy="this layout has no word for it: save it with core.store.save_params",
        )
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocabulary,
        "n_positions": config.context, "n_embd": config.width, "n_layer": config.layers, "n_head": config.heads,
        "n_inner": config.inner, "layer_norm_epsilon": config.epsilon, "tie_word_embeddings": config.tied,
        "activation_function": "gelu_new",
    }  # fmt: skip


def _gpt2(told: dict[str, Any]) -> gpt.Config:
    return gpt.Config(
        "gpt2", told["vocab_size"], told["n_positions"], told["n_embd"], told["n_layer"], told["n_head"],
        hidden=told.get("n_inner"), tied=told.get("tie_word_embeddings", True),
        epsilon=told.get("layer_norm_epsilon", 1e-5),
    )  # fmt: skip


def _llama(path: Path, told: dict[str, Any]) -> gpt.Config:
    rotary = told.get("rope_parameters") or {}
    return gpt.Config(
        "llama", told["vocab_size"], told["max_position_embeddings"], told["hidden_size"], told["num_hidden_layers"],
        told["num_attention_heads"], hidden=told["intermediate_size"], kv_heads=told.get("num_key_value_heads"),
        head_width=told.get("head_dim"), tied=told.get("tie_word_embeddings", False),
        epsilon=told.get("rms_norm_eps", 1e-6), theta=float(rotary.get("rope_theta", told.get("rope_theta", 10_000.0))),
        scaling=_scaling(path, told.get("rope_scaling") or rotary),
    )  # fmt: skip


def _scaling(path: Path, told: dict[str, Any]) -> gpt.RotaryScaling | None:
    kind = told.get("rope_type", told.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise _unknown(path, "rope_scaling", kind, "'default' or 'llama3'")
    return gpt.RotaryScaling(
        told["factor"], told["low_freq_factor"], told["high_freq_factor"], told["original_max_position_embeddings"]
    )


def _unknown(path: Path, key: str, value: Any, known: str) -> InvalidInputError:
    return InvalidInputError(
        f"{path}: {key} = {value!r}", expected=known, remedy="the decoder has no such setting: choose another model"
    )
