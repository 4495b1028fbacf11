import struct
import sys

import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.core.types import Source
from jattrib.data import text


@pytest.fixture
def shards(tmp_path):
    """Three shards of 7, 4 and 9 tokens, numbered on: sequences of 3 leave out tokens 6, 10 and none."""
    np.arange(7).astype("<u2").tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", np.arange(7, 11, dtype=np.uint32))
    np.save(tmp_path / "c.npy", np.arange(11, 20, dtype=np.uint16))
    return [tmp_path / name for name in ("a.bin", "b.npy", "c.npy")]


def test_sequences_are_cut_shard_by_shard(shards):
    source = text.token_shards(shards, length=3)
    assert isinstance(source, Source)
    starts = [0, 3, 7, 11, 14, 17]
    assert len(source) == len(starts)
    expected = np.array([[s, s + 1, s + 2] for s in starts])
    order = np.array([5, 0, 2, 2, 4, 1, 3])
    taken = source.take(order)
    assert taken.dtype == np.int32
    np.testing.assert_array_equal(taken, expected[order])
    assert source.take(np.array([], int)).shape == (0, 3)


def test_raw_tokens_of_four_bytes(tmp_path):
    np.array([1, 70_000, 3]).astype("<u4").tofile(tmp_path / "a.bin")
    source = text.token_shards([tmp_path / "a.bin"], length=3, dtype="uint32")
    np.testing.assert_array_equal(source.take(np.array([0])), [[1, 70_000, 3]])


def test_an_index_out_of_range_is_refused(shards):
    source = text.token_shards(shards, length=3)
    for index in (-1, 6):
        with pytest.raises(InvalidInputError, match="of 6\n  expected: indices from 0 to 5"):
            source.take(np.array([index]))


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_mask_is_not_taken_for_numbers_of_sequences(shards):
    with pytest.raises(InvalidInputError, match="indices of dtype bool"):
        text.token_shards(shards, length=3).take(np.array([True, False]))


def test_a_token_of_the_wrong_width_is_refused(tmp_path):
    np.array([1, 2**31], "<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(InvalidInputError, match=r"tokens of 2\*\*31 and more"):
        text.token_shards([tmp_path / "a.bin"], length=1, dtype="uint32").take(np.array([1]))


def test_tokens_outside_the_vocabulary_are_refused_by_shard(shards):
    text.token_shards(shards, length=3, vocabulary=20)
    with pytest.raises(InvalidInputError, match=r"c\.npy: token 19\n  expected: tokens below 19"):
        text.token_shards(shards, length=3, vocabulary=19)


def test_unsound_shards_are_refused_by_name(tmp_path, shards):
    with pytest.raises(InvalidInputError, match="0 shards, sequences of 3"):
        text.token_shards([], length=3)
    with pytest.raises(InvalidInputError, match=r"b\.npy: 4 tokens\n  expected: at least one sequence of 5"):
        text.token_shards(shards, length=5)
    (tmp_path / "odd.bin").write_bytes(b"\0\0\0")
    with pytest.raises(InvalidInputError, match=r"odd\.bin: 3 bytes\n  expected: a multiple of 2, whole uint16 tokens"):
        text.token_shards([tmp_path / "odd.bin"], length=1)
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"empty\.bin: 0 tokens"):
        text.token_shards([tmp_path / "empty.bin"], length=1)
    np.save(tmp_path / "signed.npy", np.arange(4))
    with pytest.raises(InvalidInputError, match=r"signed\.npy: int64 of shape \(4,\)"):
        text.token_shards([tmp_path / "signed.npy"], length=1)
    (tmp_path / "cut.npy").write_bytes(shards[2].read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"cut\.npy"):
        text.token_shards([tmp_path / "cut.npy"], length=1)
    with pytest.raises(StoreError, match="missing"):
        text.token_shards([tmp_path / "missing.bin"], length=1)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999,)}",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (True,)}",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (4,",
        b"[" * 9000,
    ],
)
def test_damaged_headers_of_npy_shards_are_refused_by_name(tmp_path, header):
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + b"\0" * 8
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(StoreError, match=r"a\.npy: .*\n[\s\S]*a readable \.npy or \.bin file"):
        text.token_shards([tmp_path / "a.npy"], length=1)


def test_npy_shards_that_are_empty_or_archives_are_refused_by_name(tmp_path):
    (tmp_path / "empty.npy").write_bytes(b"")
    with (tmp_path / "archive.npy").open("wb") as stream:
        np.savez(stream, tokens=np.arange(4, dtype=np.uint16))
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    for name in ("empty", "archive", "objects"):
        with pytest.raises(StoreError, match=rf"{name}\.npy: .*\n[\s\S]*a readable \.npy or \.bin file"):
            text.token_shards([tmp_path / f"{name}.npy"], length=1)


def test_a_tokenizer_of_words_and_its_errors(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = Tokenizer(models.WordLevel({"<s>": 0, "?": 1, "the": 2, "cat": 3}, unk_token="?"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    known.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    known.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokens = text.tokenizer(path)("the cat saw the cat")
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, [2, 3, 1, 2, 3])  # without <s>
    known.enable_truncation(3)
    known.enable_padding(length=8)
    known.save(str(tmp_path / "cut.json"))
    np.testing.assert_array_equal(text.tokenizer(tmp_path / "cut.json")("the cat saw the cat"), [2, 3, 1, 2, 3])
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(StoreError, match=rf"{name}[\s\S]*a tokenizer\.json in Hugging Face's format"):
            text.tokenizer(tmp_path / name)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'jattrib\[text\]'"):
        text.tokenizer(tmp_path)
