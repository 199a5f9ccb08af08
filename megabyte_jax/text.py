"""Bytes as text: what a terminal can show of them, and how many words they are."""

import codecs
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from megabyte_jax.data.corpus import Corpus

_CONTINUATIONS = bytes(range(0x80, 0xC0))  # the bytes of a letter in UTF-8 after its first


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


def count_words(corpus: Corpus) -> int:
    """Counts the words of a corpus of text, as runs of bytes between white space.

    Args:
        corpus: the documents.

    Returns:
        Their number; 0 if a document is not text, which is UTF-8 without a NUL byte. A letter cut
        by either end of a document, as a split by bytes may, is no objection.
    """
    try:
        return sum(_count_words(document.data) for document in corpus)
    except UnicodeDecodeError:
        return 0


def _count_words(data: NDArray[np.uint8], piece_size: int = 2**20) -> int:
    decoder = codecs.getincrementaldecoder("utf-8")()
    words, inside = 0, False
    for start in range(0, len(data), piece_size):
        piece = data[start : start + piece_size].tobytes()
        if b"\0" in piece:
            raise UnicodeDecodeError("utf-8", piece, 0, 1, "NUL is not text")
        decoder.decode(piece if start else piece[:3].lstrip(_CONTINUATIONS) + piece[3:])
        words += len(piece.split()) - (inside and not piece[:1].isspace())
        inside = not piece[-1:].isspace()
    return words
