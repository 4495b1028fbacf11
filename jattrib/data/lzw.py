"""What `compress` wrote: LZW codes of 9 to 16 bits, least significant bit first, in groups of eight."""

from jattrib.core.errors import InvalidInputError

_CLEAR = 256
_NARROW, _WIDE = 9, 16


def expand(codes: bytes, *, name: str = "LZW data") -> bytes:
    """Return what `compress` made into `codes`, its three-byte header taken off (16 bits, block mode).

    Code 256 begins a new table.  Whenever codes change their width, those of the old width are padded to a group.

    Args:
        codes: the data.
        name: what an error calls it.

    Raises:
        InvalidInputError: a code stands for nothing yet.

    Source: Welch 1984, "A technique for high-performance data compression".
    """
    words, width, previous, out = _fresh(), _NARROW, b"", []
    start = at = 0  # bits: where codes of this width begin, and where the next one is
    while at + width <= 8 * len(codes):
        low = at >> 3
        code = (int.from_bytes(codes[low : low + 4], "little") >> (at & 7)) & ((1 << width) - 1)
        at += width
        if code == _CLEAR:
            at = start = _group_end(start, at, width)
            words, width, previous = _fresh(), _NARROW, b""
            continue
        if code > len(words) or (code == len(words) and not previous):
            raise InvalidInputError(
                f"{name}: code {code} at bit {at - width}",
                expected=f"one of the {len(words)} that stand for something there",
                remedy="fetch it again; it is damaged",
            )
        word = words[code] if code < len(words) else previous + previous[:1]
        if previous and len(words) < 1 << _WIDE:
            words.append(previous + word[:1])
        out.append(word)
        previous = word
        if len(words) == 1 << width and width < _WIDE:
            at = start = _group_end(start, at, width)
            width += 1
    return b"".join(out)


def _fresh() -> list[bytes]:
    return [bytes([value]) for value in range(256)] + [b""]


def _group_end(start: int, at: int, width: int) -> int:
    group = 8 * width
    return start + -(-(at - start) // group) * group
