import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError
from jattrib.data import lzw


def compress(data, clear_at=()):
    """Code by code into a string of bits, an encoder of its own; `clear_at` begins a new table before those places."""
    bits, table, width, word, group = [], {}, 9, b"", 0

    def emit(code):
        nonlocal group
        bits.extend((code >> k) & 1 for k in range(width))
        group += 1

    def pad():
        nonlocal group
        bits.extend([0] * (-group % 8 * width))
        group = 0

    def number(word):
        return word[0] if len(word) == 1 else table[word]

    for place in range(len(data)):
        byte = data[place : place + 1]
        if place in clear_at:
            emit(number(word))
            emit(256)
            pad()
            table, width, word = {}, 9, b""
        if len(word + byte) == 1 or word + byte in table:
            word += byte
            continue
        emit(number(word))
        if 257 + len(table) < 1 << 16:
            table[word + byte] = 257 + len(table)
        word = byte
        # The decoder is one entry behind: it widens when its own table is full.
        if 257 + len(table) - 1 == 1 << width and width < 16:
            pad()
            width += 1
    if word:
        emit(number(word))
    return bytes(sum(bit << k for k, bit in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8))


TEXT = " ".join(str(n * n) for n in range(3000)).encode()


@pytest.mark.parametrize(
    "data",
    [b"", b"a", b"abababababababa", bytes(600), TEXT, np.random.default_rng(0).bytes(3000)],
    ids=["nothing", "one", "its own end", "zeros", "text", "noise"],
)
def test_gives_back_what_was_compressed(data):
    assert lzw.expand(compress(data)) == data


def test_a_table_may_be_begun_anew():
    assert lzw.expand(compress(TEXT, clear_at=(1, 2000, 2001, 9000))) == TEXT


def test_bits_written_by_hand():
    # 97, 98, then 257 ("ab"), each of nine bits, the least significant first.
    bits = 97 | 98 << 9 | 257 << 18
    assert lzw.expand(bits.to_bytes(4, "little")) == b"abab"


def test_a_code_that_stands_for_nothing_is_refused():
    with pytest.raises(InvalidInputError, match="here: code 300 at bit 9\n  expected: one of the 257"):
        lzw.expand((97 | 300 << 9).to_bytes(3, "little"), name="here")
    with pytest.raises(InvalidInputError, match="code 257 at bit 0"):
        lzw.expand((257).to_bytes(2, "little"))
