"""Decoders in Hugging Face's layout: `config.json` and safetensors files, for GPT-2 and Llama, read and written.

Files are mapped into memory and read leaf by leaf; with shardings, every device reads its own part and nothing more.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Shaped

from jattrib.core import files, mesh, tree
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.types import Params
from jattrib.data import safetensors
from jattrib.models import gpt
from jattrib.models.hf_config import read_config, to_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 5_000_000_000

_UNUSED = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")
"""Ends of the names of arrays that are no parameters: masks and wavelengths."""


class _Place(NamedTuple):
    """Where a leaf lies: its name, whether it is transposed there, and which third of the last axis it is."""

    name: str
    turned: bool = False
    third: int | None = None


def read(
    directory: str | Path, *, dtype: Any = jnp.float32, shardings: PyTree[jax.sharding.Sharding] | None = None
) -> tuple[gpt.Config, Params]:
    """Read a model and return its shape and its parameters, for `gpt.decoder`.

    Args:
        directory: holds `config.json`, and `model.safetensors` or several files and their index.
        dtype: of the parameters; None keeps the files' own.
        shardings: where each leaf goes, a tree of the parameters' structure (`gpt_sharding.shardings`); without it,
            to the default device.

    Raises:
        StoreError: a file is missing or damaged; an array is missing, is one too many, or has another shape (the first
            such name is told).
        InvalidInputError: the configuration is of another model, or a file is not sound.
    """
    directory = Path(directory)
    config = read_config(directory)
    like, _ = jax.eval_shape(gpt.decoder(config).init, jax.random.key(0))
    wanted = tree.to_names(like)
    arrays = _arrays(directory)
    _check_names(directory, config, wanted, arrays)
    placed = None if shardings is None else tree.to_names(shardings)
    found = {
        name: _leaf(config, name, leaf.shape, arrays, dtype, None if placed is None else placed[name])
        for name, leaf in wanted.items()
    }
    return config, tree.from_names(like, found)


def write(
    directory: str | Path, config: gpt.Config, params: Params, *, dtype: Any = None, file_bytes: int = FILE_BYTES
) -> None:
    """Write a model as `read` reads it; while it is not complete, the directory has no `config.json`.

    Args:
        directory: is made if it is not there.
        config: the model's shape.
        params: its parameters; leaves may be sharded.
        dtype: of the files; None keeps the parameters' own.
        file_bytes: what a file holds at most, a single array apart; more files get an index.

    Raises:
        InvalidInputError: the layout has no word for the model, or the parameters are not of its shape.
        StoreError: the directory cannot be written.
    """
    directory = Path(directory)
    described = to_json(config)
    like, _ = jax.eval_shape(gpt.decoder(config).init, jax.random.key(0))
    named = tree.to_names(tree.from_names(like, tree.to_names(params)))
    for name, leaf in tree.to_names(like).items():
        if named[name].shape != leaf.shape:
            raise InvalidInputError(
                f"{name} of shape {named[name].shape}",
                expected=f"{leaf.shape}",
                remedy="pass the config it was made with",
            )
    kind = None if dtype is None else jnp.dtype(dtype)
    groups = list(_groups(config, named, kind, file_bytes))
    with files.writing(directory):  # what was there before must not be taken for a part of this one
        for name in ("config.json", INDEX):
            (directory / name).unlink(missing_ok=True)
    total, holders = 0, {}
    for number, names in enumerate(groups, 1):
        file = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        arrays = {name: _assemble(places, named, kind) for name, places in names.items()}
        safetensors.write(directory / file, arrays, metadata={"format": "pt"})
        total += sum(array.nbytes for array in arrays.values())
        holders |= dict.fromkeys(arrays, file)
    if len(groups) > 1:
        files.write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": holders})
    told = named["embedding/tokens"].dtype if kind is None else kind
    files.write_json(directory / "config.json", described | {"torch_dtype": told.name})


def _places(config: gpt.Config) -> dict[str, _Place]:
    """Return where each of our leaves lies; `{}` stands for the number of the layer."""
    if config.style == "llama":
        kernels = {
            "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj",
            "attention/value": "self_attn.v_proj", "attention/out": "self_attn.o_proj",
            "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj",
        }  # fmt: skip
        places = {
            f"layers/{ours}/kernel": _Place(f"model.layers.{{}}.{name}.weight", turned=True)
            for ours, name in kernels.items()
        }
        places["layers/attention_norm/scale"] = _Place("model.layers.{}.input_layernorm.weight")
        places["layers/mlp_norm/scale"] = _Place("model.layers.{}.post_attention_layernorm.weight")
        places["embedding/tokens"], places["norm/scale"] = (
            _Place("model.embed_tokens.weight"),
            _Place("model.norm.weight"),
        )
    else:
        whole = {"attention/out": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}
        places = {}
        for ours, name in (("kernel", "weight"), ("bias", "bias")):
            for third, part in enumerate(("query", "key", "value")):
                places[f"layers/attention/{part}/{ours}"] = _Place(f"h.{{}}.attn.c_attn.{name}", third=third)
            for part, place in whole.items():
                places[f"layers/{part}/{ours}"] = _Place(f"h.{{}}.{place}.{name}")
        for ours, name in (("scale", "weight"), ("bias", "bias")):
            places[f"layers/attention_norm/{ours}"] = _Place(f"h.{{}}.ln_1.{name}")
            places[f"layers/mlp_norm/{ours}"] = _Place(f"h.{{}}.ln_2.{name}")
            places[f"norm/{ours}"] = _Place(f"ln_f.{name}")
        places["embedding/tokens"], places["embedding/positions"] = _Place("wte.weight"), _Place("wpe.weight")
        places = {ours: place._replace(name=f"transformer.{place.name}") for ours, place in places.items()}
    return places if config.tied else places | {"head/kernel": _Place("lm_head.weight", turned=True)}


def _arrays(directory: Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return the arrays of all files, mapped; GPT-2's may lack the prefix of their names."""
    names = _indexed(directory / INDEX) if (directory / INDEX).is_file() else [WEIGHTS]
    found: dict[str, Any] = {}
    for name in names:
        found |= safetensors.read(directory / name)
    bare = any(name.startswith("h.") for name in found)
    return {f"transformer.{name}" if bare and name != "lm_head.weight" else name: leaf for name, leaf in found.items()}


def _indexed(index: Path) -> list[str]:
    told = files.read_json(index)
    holders = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(holders, dict) or not all(isinstance(name, str) for name in holders.values()):
        raise StoreError(
            f"{index} tells of no files",
            expected="weight_map, from the names of arrays to those of files",
            remedy="fetch it again; it is damaged",
        )
    return sorted(set(holders.values()))


def _check_names(directory: Path, config: gpt.Config, wanted: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    shapes = {}
    for ours, place in _places(config).items():
        for number in range(config.layers) if "{}" in place.name else (0,):
            shape = wanted[ours].shape[1:] if "{}" in place.name else wanted[ours].shape
            shape = shape if place.third is None else (*shape[:-1], 3 * shape[-1])
            shapes[place.name.format(number)] = shape[::-1] if place.turned else shape
    spare = {name for name in arrays if name.endswith(_UNUSED) or (config.tied and name == "lm_head.weight")}
    for name in sorted(shapes.keys() | (arrays.keys() - spare)):
        has, wants = arrays[name].shape if name in arrays else None, shapes.get(name)
        if has != wants:
            raise StoreError(
                f"{directory} holds another model: {name!r} has the shape {has}, by config.json {wants}"
                if has is not None and wants is not None
                else f"{directory} holds another model: {name!r} is {'missing' if has is None else 'one too many'}",
                expected="the arrays that config.json tells of",
                remedy="fetch config.json and weights of the same model again",
            )


def _leaf(
    config: gpt.Config,
    name: str,
    shape: tuple[int, ...],
    arrays: Mapping[str, np.ndarray],
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    place = _places(config)[name]
    layered = "{}" in place.name
    views = [_view(arrays[place.name.format(number)], place) for number in range(config.layers if layered else 1)]
    kind = views[0].dtype if dtype is None else jnp.dtype(dtype)

    def part(index: Any) -> np.ndarray:
        if not layered:
            return np.asarray(views[0][index]).astype(kind)
        return np.stack([np.asarray(view[index[1:]]).astype(kind) for view in views[index[0]]])

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, part)


def _view(array: Shaped[np.ndarray, "..."], place: _Place) -> Shaped[np.ndarray, "..."]:
    array = array.T if place.turned else array
    if place.third is None:
        return array
    width = array.shape[-1] // 3
    return array[..., place.third * width : (place.third + 1) * width]


Pieces = list[tuple[str, int | None, bool]]
"""Of an array: our leaves, the layer, and whether they are transposed."""


def _groups(
    config: gpt.Config, named: Mapping[str, Any], dtype: np.dtype | None, most: int
) -> Iterator[dict[str, Pieces]]:
    """Yield what each file holds."""
    pieces: dict[str, Pieces] = {}
    for ours, place in sorted(_places(config).items(), key=lambda item: item[1].third or 0):
        for number in range(config.layers) if "{}" in place.name else (None,):
            name = place.name if number is None else place.name.format(number)
            pieces.setdefault(name, []).append((ours, number, place.turned))
    group, held = {}, 0
    for name in sorted(pieces):
        size = sum(
            named[ours].size
            // (1 if number is None else config.layers)
            * (named[ours].dtype if dtype is None else dtype).itemsize
            for ours, number, _ in pieces[name]
        )
        if group and held + size > most:
            yield group
            group, held = {}, 0
        group[name], held = pieces[name], held + size
    yield group


def _assemble(pieces: Pieces, named: Mapping[str, Any], dtype: np.dtype | None) -> Shaped[np.ndarray, "..."]:
    parts = []
    for ours, number, turned in pieces:
        leaf = mesh.fetch(named[ours] if number is None else named[ours][number])
        parts.append((leaf.T if turned else leaf).astype(leaf.dtype if dtype is None else dtype))
    return np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
