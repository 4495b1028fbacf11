"""Tokens: shards of them on disk, mapped into memory and cut into sequences of one length; tokenizers."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int32, Integer, UInt

from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.sources import check_indices


@dataclass(frozen=True, eq=False)
class TokenShards:
    """A `Source` of sequences of `length` tokens, from files of uint16 or uint32 tokens; made by `token_shards`.

    Each shard is cut from its beginning; what is left at its end, less than a sequence, is not used, so that no
    sequence spans two shards.
    """

    shards: tuple[UInt[np.ndarray, " _"], ...]
    length: int

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(shard) // self.length for shard in self.shards])

    def __len__(self) -> int:
        """Return the number of sequences."""
        return int(self._ends[-1])

    def take(self, indices: Integer[np.ndarray, " m"], /) -> Int32[np.ndarray, "m length"]:
        """Return the sequences at `indices`, which count through the shards in their order.

        Raises:
            InvalidInputError: an index is out of range or no whole number, or a token does not fit int32.
        """
        indices = np.asarray(indices)
        check_indices(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise InvalidInputError(
                f"sequences {indices.min()} to {indices.max()} of {len(self)}",
                expected=f"indices from 0 to {len(self) - 1}",
                remedy="count sequences, not tokens, through the shards in their order",
            )
        out = np.empty((len(indices), self.length), np.int32)
        which = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(which):
            rows = np.flatnonzero(which == shard)
            first = self._ends[shard - 1] if shard else 0
            starts = (indices[rows] - first) * self.length
            out[rows] = self.shards[shard][starts[:, None] + np.arange(self.length)]
        if out.size and out.min() < 0:
            raise InvalidInputError(
                "tokens of 2**31 and more", expected="tokens that fit int32", remedy="check the dtype of .bin files"
            )
        return out


def token_shards(
    paths: Sequence[str | Path],
    *,
    length: int,
    dtype: Literal["uint16", "uint32"] = "uint16",
    vocabulary: int | None = None,
) -> TokenShards:
    """Open shards of tokens: `.npy` files of one dimension, or raw little-endian `.bin` files.

    Nothing is read but headers, and all tokens once if `vocabulary` is given.

    Args:
        paths: the shards, in order.
        length: tokens a sequence.
        dtype: the type of the tokens in `.bin` files; `.npy` files carry theirs.
        vocabulary: the number of tokens there are, if tokens are to be checked against it.

    Raises:
        StoreError: a shard is missing or unreadable.
        InvalidInputError: a shard is not one-dimensional uint16 or uint32, has half a token at its end, is shorter than
            a sequence, or has a token outside the vocabulary.
    """
    if not paths or length < 1:
        raise InvalidInputError(
            f"{len(paths)} shards, sequences of {length} tokens",
            expected="at least one shard and one token a sequence",
            remedy="give the paths of .bin or .npy files",
        )
    shards = tuple(_open(Path(path), np.dtype(dtype).newbyteorder("<")) for path in paths)
    for path, shard in zip(paths, shards, strict=True):
        if len(shard) < length:
            raise InvalidInputError(
                f"{path}: {len(shard)} tokens",
                expected=f"at least one sequence of {length}",
                remedy="lower length, or join short shards",
            )
        if vocabulary is not None and (top := int(shard.max())) >= vocabulary:
            raise InvalidInputError(
                f"{path}: token {top}",
                expected=f"tokens below {vocabulary}",
                remedy="use the tokenizer that made the shards, or check the dtype of .bin files",
            )
    return TokenShards(shards, length)


def _open(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            tokens = np.lib.format.open_memmap(path, mode="r")
        elif (size := path.stat().st_size) % dtype.itemsize == 0:
            tokens = np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)
        else:
            raise InvalidInputError(
                f"{path}: {size:,} bytes",
                expected=f"a multiple of {dtype.itemsize}, whole {dtype.name} tokens",
                remedy="check dtype; if it is right, the file is truncated",
            )
    except InvalidInputError:
        raise
    except Exception as error:  # format errors of many types
        raise StoreError(
            f"{path}: {error}",
            expected="a readable .npy or .bin file",
            remedy="check the path, or write the file again",
        ) from error
    if tokens.ndim != 1 or tokens.dtype.kind != "u" or tokens.dtype.itemsize not in (2, 4):
        raise InvalidInputError(
            f"{path}: {tokens.dtype} of shape {tokens.shape}",
            expected="one dimension of uint16 or uint32",
            remedy="save with numpy.save(path, tokens.astype(numpy.uint16))",
        )
    return tokens


def tokenizer(path: str | Path) -> Callable[[str], Int32[np.ndarray, " t"]]:
    """Return the function from a text to its tokens, as a `tokenizer.json` in Hugging Face's format says.

    No token is added at either end, and none left out, whatever the file says of padding and truncation:
    `corpus.sequences` puts its own between passages, and cuts them.

    Args:
        path: the file, or the directory of a model that has it.

    Raises:
        InvalidInputError: the package `tokenizers` (the extra `text`) is not installed.
        StoreError: the file is missing, or is no tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InvalidInputError(
            "a tokenizer, without the package tokenizers",
            expected="tokenizers",
            remedy="pip install 'jattrib[text]', or take `corpus.characters` or `corpus.utf8`, which need nothing",
        ) from error
    file = Path(path) / "tokenizer.json" if os.path.isdir(path) else Path(path)
    try:
        known = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more particular
        raise StoreError(
            f"{file}: {error}", expected="a tokenizer.json in Hugging Face's format", remedy="check the path"
        ) from error

    known.no_padding()
    known.no_truncation()

    def tokens(text: str) -> Int32[np.ndarray, " t"]:
        return np.array(known.encode(text, add_special_tokens=False).ids, np.int32)

    return tokens
