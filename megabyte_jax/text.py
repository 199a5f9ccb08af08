"""Bytes as text that a terminal can show, whatever they are."""

import codecs
from collections.abc import Iterable, Iterator


def printable(data: bytes) -> str:
    r"""Decodes UTF-8; bytes that are not and control characters become escapes such as \xff.

    Args:
        data: any bytes.
    """
    return "".join(printable_stream([data]))


def printable_stream(parts: Iterable[bytes]) -> Iterator[str]:
    """Does the same piece by piece; a character is given once its last byte has come.

    Args:
        parts: any bytes, cut anywhere.

    Yields:
        Text, possibly empty.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
    for part in parts:
        yield "".join(map(_escaped, decoder.decode(part)))
    yield "".join(map(_escaped, decoder.decode(b"", final=True)))


def _escaped(character: str) -> str:
    # Control characters could move the cursor or recolour the terminal.
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode()
