"""Texts that anyone may use, as passages, and passages as sequences of bytes or characters.

Nothing is shipped: a text comes out of a Debian package, installed or fetched when it is first asked for, is kept in
a cache, and is checked by its SHA-256 whenever it is read.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Integer

from jattrib.core import files
from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.data import debian, lzw
from jattrib.data.vision import Dataset

PADDING = -1
"""The label of a place that counts nothing."""


class Passage(NamedTuple):
    """A piece of text, and what it is called where it comes from."""

    name: str
    text: str


class Origin(NamedTuple):
    """Where a text comes from.

    Attributes:
        package: Debian's.
        patterns: its files.
        join: makes their contents one text.
        sha256: of that text.
        cut: makes the text passages.
        licence: under which it may be used.
    """

    package: str
    patterns: tuple[str, ...]
    join: Callable[[list[bytes]], bytes]
    sha256: str
    cut: Callable[[str], list[Passage]]
    licence: str


def read(name: str, *, path: str | Path | None = None, cache: str | Path | None = None) -> list[Passage]:
    """Return the passages of a text.

    `bible`: the King James Version, 31,102 verses, in the public domain (outside the United Kingdom, where the Crown's
    patent lasts); Debian's `bible-kjv-text`.  `fortunes`: epigrams and quotations on science and wisdom, BSD; Debian's
    `fortunes`, 1:1.99.1.  `policy`: Debian's policy manual, version 4.6.2.0, by paragraphs, GPL-2 or later; Debian's
    `debian-policy`.  `file`: a file of your own, UTF-8, by lines.

    Args:
        name: which text.
        path: a file to read in its place: for `file`, and where there is no Debian.  It is cut into passages as the
            text of that name is, and its SHA-256 is not checked.
        cache: where texts are kept; without it, the folder that `JATTRIB_CACHE` names, or else `~/.cache/jattrib`.

    Raises:
        StoreError: the package cannot be had, the text is another than was expected, or a file cannot be read.
        InvalidInputError: there is no such text, the file is not UTF-8, has no passage, or a verse without words.
    """
    if name != "file" and name not in ORIGINS:
        raise InvalidInputError(
            f"the text {name!r}",
            expected=f"one of {', '.join((*ORIGINS, 'file'))}",
            remedy="give the path of a file of your own: read('file', path=...)",
        )
    if name == "file" and path is None:
        raise InvalidInputError("a file without its path", expected="path", remedy="read('file', path=...)")
    content = _fetched(name, ORIGINS[name], debian.cache(cache)) if path is None else _file(Path(path))
    where = name if path is None else str(path)
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{where}: {error}", expected="text in UTF-8", remedy="convert the file, for example with iconv"
        ) from error
    passages = (ORIGINS[name].cut if name in ORIGINS else _lines)(text)
    if not passages:
        raise InvalidInputError(f"{where} has no passage", expected="text", remedy="check the file")
    if bare := next((passage.name for passage in passages if not passage.text), None):
        raise InvalidInputError(
            f"{where}: a line with nothing but {bare[:40]!r}",
            expected="a verse's name and its words on each line after the title",
            remedy="mend that line, or read the file by lines: read('file', path=...)",
        )
    return passages


def alphabet(passages: Iterable[Passage]) -> str:
    """Return the characters that occur, in order, after a line's end: the vocabulary of `characters`.

    The line's end is 0, which `sequences` puts between passages.
    """
    found = set().union(*(passage.text for passage in passages))
    return "".join(["\n", *sorted(found - {"\n"})])


def characters(text: str, known: str) -> Int32[np.ndarray, " t"]:
    """Return the places of characters in an alphabet.

    >>> characters("abba", "ab").tolist()
    [0, 1, 1, 0]

    Raises:
        InvalidInputError: a character is not in it.
    """
    places = {character: place for place, character in enumerate(known)}
    for character in text:
        if character not in places:
            raise InvalidInputError(
                f"the character {character!r}", expected=f"one of {known!r}", remedy="take the alphabet of all passages"
            )
    return np.array([places[character] for character in text], np.int32)


def utf8(text: str) -> Int32[np.ndarray, " t"]:
    """Return the bytes of a text; there are 256.

    >>> utf8("é").tolist()
    [195, 169]
    """
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def sequences(tokens: Sequence[Integer[np.ndarray, " _"]], length: int, *, end: int = 0) -> Dataset:
    """Return one sequence a passage: its tokens as inputs, the tokens after them as labels.

    A passage that is longer than `length` is cut; after a shorter one `end` is to be predicted, and what remains is
    padding: 0 as input, −1 as label.

    Args:
        tokens: of the passages.
        length: of the sequences.
        end: the token that follows a passage; the one that comes before every passage too, so that its first token is
            predicted.

    Raises:
        InvalidInputError: a passage has no tokens, or `length` is not positive.
    """
    _check_length(length)
    inputs = np.zeros((len(tokens), length), np.int32)
    labels = np.full((len(tokens), length), PADDING, np.int32)
    for row, passage in enumerate(tokens):
        if len(passage) == 0:
            raise InvalidInputError(f"passage {row} is empty", expected="a token at least", remedy="leave it out")
        whole = np.concatenate([[end], passage, [end]]).astype(np.int32)[: length + 1]
        inputs[row, : len(whole) - 1], labels[row, : len(whole) - 1] = whole[:-1], whole[1:]
    return Dataset(inputs, labels)


def windows(tokens: Integer[np.ndarray, " t"], length: int) -> Dataset:
    """Cut a text into sequences of one length, each token but the first predicted once; what is left over is dropped.

    Raises:
        InvalidInputError: the text is shorter than a sequence, or `length` is not positive.
    """
    _check_length(length)
    count = (len(tokens) - 1) // length
    if count < 1:
        raise InvalidInputError(
            f"{len(tokens)} tokens", expected=f"at least {length + 1}", remedy="lower length, or give more text"
        )
    shape, used = (count, length), count * length
    return Dataset(tokens[:used].reshape(shape).astype(np.int32), tokens[1 : used + 1].reshape(shape).astype(np.int32))


def _check_length(length: int) -> None:
    if length < 1:
        raise InvalidInputError(f"length = {length}", expected="at least 1", remedy="raise length")


def _fetched(name: str, origin: Origin, cache: Path) -> bytes:
    file = cache / f"{name}-{origin.sha256[:12]}.txt"
    if files.is_there(file):
        content, remedy = _file(file), f"delete {file}, which was altered"
    else:
        own = f"read({name!r}, path=FILE) takes a text file in its place"
        content = origin.join(debian.fetch(origin.package, origin.patterns, remedy=own))
        remedy = f"{own}; this is what another version of {origin.package} has"
    got = hashlib.sha256(content).hexdigest()
    if got != origin.sha256:
        raise StoreError(f"{name}: SHA-256 {got}", expected=origin.sha256, remedy=remedy)
    if not files.is_there(file):
        files.write_atomic(file, content)
    return content


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror or error}", expected="a text file", remedy="check the path and its permissions"
        ) from error


def _lines(text: str) -> list[Passage]:
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [Passage(f"line {number}", line) for number, line in lines if line]


def _verses(text: str) -> list[Passage]:
    """Cut `Ge1:1 In the beginning …` after its name; the first line is a title, and blank ones are left out."""
    named = (line.strip().partition(" ") for line in text.splitlines()[1:])
    return [Passage(name, words.strip()) for name, _, words in named if name]


def _paragraphs(text: str) -> list[Passage]:
    joined = (" ".join(each.split()) for each in text.split("\n\n"))
    return [Passage(f"paragraph {number}", each) for number, each in enumerate(joined, 1) if each]


def _epigrams(text: str) -> list[Passage]:
    joined = (" ".join(each.split()) for each in text.split("\n%\n"))
    return [Passage(f"epigram {number}", each) for number, each in enumerate(joined, 1) if each]


def _bible(contents: list[bytes]) -> bytes:
    """Read the package's container: a magic number, sizes, and windows that were compressed one by one."""
    (data,) = contents
    count, table = int.from_bytes(data[0x58:0x5C], "big"), 0x5C
    if data[:4] != b"EC02" or len(data) < table + 4 * (count + 1):
        raise InvalidInputError(
            f"a file that begins with {data[:4]!r}", expected="b'EC02'", remedy="fetch bible-kjv-text again"
        )
    ends = struct.unpack(f">{count + 1}I", data[table : table + 4 * (count + 1)])
    parts = (lzw.expand(data[a:b], name="bible.data") for a, b in pairwise(ends))
    return b"".join(parts)


ORIGINS = {
    "bible": Origin(
        "bible-kjv-text",
        ("usr/lib/bible.data",),
        _bible,
        "e53aaf0af1e58f259e35d0d9f7ca1bbe154fd77bb95471279b37b34d3c397a98",
        _verses,
        "public domain",
    ),
    "fortunes": Origin(
        "fortunes",
        ("usr/share/games/fortunes/science", "usr/share/games/fortunes/wisdom"),
        b"\n%\n".join,
        "70e6b438c5fe6443ee9e5d20e307a5b8adbcaa323725852fc9acb648f64fdca3",
        _epigrams,
        "BSD",
    ),
    "policy": Origin(
        "debian-policy",
        ("usr/share/doc/debian-policy/policy.txt.gz",),
        b"".join,
        "89dba06600463ed858b4ccd3bdf4e72452c512589f1029548346e5284eb71374",
        _paragraphs,
        "GPL-2.0-or-later",
    ),
}
