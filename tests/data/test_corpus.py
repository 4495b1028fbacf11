import gzip
import hashlib
import shutil

import numpy as np
import pytest

from jattrib.core.errors import InvalidInputError, StoreError
from jattrib.data import corpus, debian
from jattrib.data.corpus import Passage

POLICY = b"The Manual\n**********\n\nA package must\nhave a name.\n\n\n\nAnd more.\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without packages, whose apt-get and dpkg are what a test writes; and a text whose digest fits."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "root").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(debian.CACHE, raising=False)
    monkeypatch.setattr(debian, "SYSTEM", tmp_path / "root")
    own = corpus.ORIGINS["policy"]._replace(sha256=hashlib.sha256(POLICY).hexdigest())
    monkeypatch.setitem(corpus.ORIGINS, "policy", own)
    return tmp_path


def command(machine, name, script):
    path = machine / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def install(root):
    folder = root / "usr/share/doc/debian-policy"
    folder.mkdir(parents=True)
    (folder / "policy.txt.gz").write_bytes(gzip.compress(POLICY))


EXPECTED = [
    Passage("paragraph 1", "The Manual **********"),
    Passage("paragraph 2", "A package must have a name."),
    Passage("paragraph 4", "And more."),
]


def test_an_installed_package_is_read_and_kept(machine):
    install(machine / "root")
    assert corpus.read("policy") == EXPECTED
    shutil.rmtree(machine / "root")
    assert corpus.read("policy") == EXPECTED
    (kept,) = (machine / "home" / ".cache" / "jattrib").iterdir()
    kept.write_bytes(POLICY + b".")
    with pytest.raises(
        StoreError, match=r"policy: SHA-256 .*\n  expected: .*\n  remedy:   delete .*, which was altered"
    ):
        corpus.read("policy")


def test_a_package_is_fetched_without_root(machine, monkeypatch):
    install(machine / "there")
    command(machine, "apt-get", '[ "$1 $2" = "download debian-policy" ] && echo > debian-policy_1_all.deb')
    command(machine, "dpkg", f'[ "$1 $2" = "-x debian-policy_1_all.deb" ] && /bin/cp -r {machine}/there "$3"')
    monkeypatch.setenv(debian.CACHE, str(machine / "kept"))
    assert corpus.read("policy") == EXPECTED
    (machine / "bin" / "apt-get").unlink()
    assert corpus.read("policy") == EXPECTED  # out of the folder that the environment names
    with pytest.raises(StoreError, match="no apt-get on this machine"):
        corpus.read("policy", cache=machine / "empty")
    assert corpus.read("policy", cache=machine / "kept") == EXPECTED


@pytest.mark.parametrize(
    ("apt", "dpkg", "message"),
    [
        (None, None, "there is no apt-get on this machine"),
        ("echo 'W: hm' >&2; echo 'E: Unable to locate package' >&2; exit 100", None, "apt-get download: E: Unable to"),
        ("exit 100", None, "apt-get download: 100"),
        ("true", None, "apt-get left no package behind"),
        ("echo > a.deb", None, "there is no dpkg on this machine"),
        ("echo > a.deb", "true", "it has no file usr/share/doc/debian-policy/policy.txt.gz"),
    ],
)
def test_without_apt_or_network_the_remedy_is_a_path(machine, apt, dpkg, message):
    for name, script in (("apt-get", apt), ("dpkg", dpkg)):
        if script is not None:
            command(machine, name, script)
    with pytest.raises(StoreError, match=message) as error:
        corpus.read("policy")
    assert error.value.remedy == "read('policy', path=FILE) takes a text file in its place"
    assert "network" in error.value.expected
    file = machine / "own.txt"
    file.write_text("One.\n\nTwo.")
    assert corpus.read("policy", path=file) == [Passage("paragraph 1", "One."), Passage("paragraph 2", "Two.")]


def test_another_version_of_a_package_is_refused_and_not_kept(machine):
    install(machine / "root")
    file = machine / "root/usr/share/doc/debian-policy/policy.txt.gz"
    file.write_bytes(gzip.compress(POLICY + b"New.\n"))
    with pytest.raises(
        StoreError, match=r"SHA-256(.|\n)*path=FILE\) .*; this is what another version of debian-policy"
    ):
        corpus.read("policy")
    assert not (machine / "home").exists()
    file.write_bytes(b"\x1f\x8b damaged")
    with pytest.raises(InvalidInputError, match=r"policy\.txt\.gz: .*\n  expected: a file as it was packaged"):
        corpus.read("policy")


def test_own_files_are_cut_into_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(" First. \n\nThird é.\n", encoding="utf-8")
    assert corpus.read("file", path=file) == [Passage("line 1", "First."), Passage("line 3", "Third é.")]
    file.write_text("\ufeffFirst.", encoding="utf-8")  # the mark that some editors begin a file with
    assert corpus.read("file", path=file) == [Passage("line 1", "First.")]
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidInputError, match=r"a\.txt: .*\n  expected: text in UTF-8"):
        corpus.read("file", path=file)
    file.write_bytes(b" \n")
    with pytest.raises(InvalidInputError, match="has no passage"):
        corpus.read("file", path=file)
    with pytest.raises(StoreError, match="none: No such file"):
        corpus.read("file", path=tmp_path / "none")
    with pytest.raises(InvalidInputError, match="a file without its path"):
        corpus.read("file")
    with pytest.raises(InvalidInputError, match="the text 'koran'\n  expected: one of bible, fortunes, policy, file"):
        corpus.read("koran")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        ("policy", ["A", "name.", "", "More."], [("paragraph 1", "A name."), ("paragraph 2", "More.")]),
        ("fortunes", ["Be", "brief.", "%", "Be gone."], [("epigram 1", "Be brief."), ("epigram 2", "Be gone.")]),
        ("bible", ["Title", "Ge1:1 In it.", "", " ", "Re2:3  So."], [("Ge1:1", "In it."), ("Re2:3", "So.")]),
        ("file", ["First.", "", "Third."], [("line 1", "First."), ("line 3", "Third.")]),
    ],
)
def test_own_files_are_cut_alike_whatever_ends_their_lines(tmp_path, end, name, lines, expected):
    file = tmp_path / "a.txt"
    file.write_bytes("".join(line + end for line in lines).encode())
    assert corpus.read(name, path=file) == [Passage(*each) for each in expected]


def test_a_verse_without_words_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"Title\nGe1:1 In it.\nGe1:2\n")
    with pytest.raises(
        InvalidInputError, match=r"a\.txt: a line with nothing but 'Ge1:2'\n.*a verse's name and its words"
    ):
        corpus.read("bible", path=file)


def test_the_bibles_container_by_hand():
    """Two windows, of the text that follows a title, each of nine-bit codes for single bytes."""
    windows = []
    for part in (b"Title\nGe1:1 In ", b"it.\nRe2:3 So."):
        bits = sum(byte << 9 * place for place, byte in enumerate(part))
        windows.append(bits.to_bytes(-(-9 * len(part) // 8), "little"))
    start = 0x5C + 12
    ends = np.cumsum([start, *map(len, windows)]).astype(">u4").tobytes()
    head = b"EC02".ljust(0x58, b"\0") + (2).to_bytes(4, "big")
    content = corpus.ORIGINS["bible"].join([head + ends + b"".join(windows)])
    assert corpus.ORIGINS["bible"].cut(content.decode()) == [Passage("Ge1:1", "In it."), Passage("Re2:3", "So.")]
    with pytest.raises(InvalidInputError, match="a file that begins with b'EC01'"):
        corpus.ORIGINS["bible"].join([b"EC01" + head[4:] + ends])


def test_epigrams_are_cut_at_their_signs():
    cut = corpus.ORIGINS["fortunes"].cut("Be\nbrief.\n%\n\n%\nBe gone.\n")
    assert cut == [Passage("epigram 1", "Be brief."), Passage("epigram 3", "Be gone.")]


def test_characters_and_their_alphabet():
    known = corpus.alphabet([Passage("", "banana"), Passage("", "bé")])
    assert known == "\nabné"
    np.testing.assert_array_equal(corpus.characters("née", "\nabneé"), [3, 5, 4])
    with pytest.raises(InvalidInputError, match="the character 'z'"):
        corpus.characters("zebra", known)


def test_a_sequence_a_passage():
    tokens = [np.array([5, 6, 7]), np.array([8]), np.array([9, 10, 11, 12])]
    inputs, labels = corpus.sequences(tokens, 4)
    np.testing.assert_array_equal(inputs, [[0, 5, 6, 7], [0, 8, 0, 0], [0, 9, 10, 11]])
    np.testing.assert_array_equal(labels, [[5, 6, 7, 0], [8, 0, -1, -1], [9, 10, 11, 12]])
    inputs, labels = corpus.sequences(tokens[1:2], 3, end=2)
    np.testing.assert_array_equal([inputs[0], labels[0]], [[2, 8, 0], [8, 2, -1]])
    with pytest.raises(InvalidInputError, match="passage 1 is empty"):
        corpus.sequences([np.array([1]), np.array([], int)], 4)


def test_windows_predict_every_token_once():
    inputs, labels = corpus.windows(np.arange(12), 3)
    np.testing.assert_array_equal(inputs, np.arange(9).reshape(3, 3))
    np.testing.assert_array_equal(labels, inputs + 1)
    with pytest.raises(InvalidInputError, match="3 tokens\n  expected: at least 4"):
        corpus.windows(np.arange(3), 3)
    for length in (0, -1):
        with pytest.raises(InvalidInputError, match=f"length = {length}"):
            corpus.windows(np.arange(3), length)
        with pytest.raises(InvalidInputError, match=f"length = {length}"):
            corpus.sequences([np.arange(3)], length)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs Debian's package client")
def test_the_texts_themselves(tmp_path):
    verses = corpus.read("bible", cache=tmp_path)
    assert len(verses) == 31_102
    assert verses[0] == Passage("Ge1:1", "In the beginning God created the heaven and the earth.")
    assert min(verses, key=lambda verse: len(verse.text)) == Passage("John11:35", "Jesus wept.")
    assert len(corpus.alphabet(verses)) == 63
    assert corpus.read("bible", cache=tmp_path) == verses
