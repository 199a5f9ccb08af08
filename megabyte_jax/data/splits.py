"""Which documents, or parts of documents, are for training, validation and test."""

import hashlib
import os
from collections.abc import Collection
from dataclasses import replace

from megabyte_jax.data.corpus import Corpus, Document
from megabyte_jax.errors import EmptySplitError, UserError

_ALIASES = {"valid": ("valid", "validation", "val")}


def find_names(name: str, names: Collection[str]) -> list[str]:
    """Returns those of the names that a name stands for: `valid` for validation and val too.

    Args:
        name: of a split, as the user gave it.
        names: that there are.

    Returns:
        The name itself if there is none of them.
    """
    return [alias for alias in _ALIASES.get(name, ()) if alias in names] or [name]


def check_sizes(by: str, valid_size: float, test_size: float) -> None:
    """Checks of the sizes of splits what does not depend on the documents.

    Args:
        by: see `split_corpus`.
        valid_size: see `split_corpus`.
        test_size: see `split_corpus`.

    Raises:
        UserError: a size is out of range.
    """
    sizes = {"data.split.valid_size": valid_size, "data.split.test_size": test_size}
    for option, size in sizes.items():
        if by == "document" and not 0 <= size < 1:
            raise UserError(
                f"{option}={size}: accepted: a fraction of the documents, 0 <= size < 1"
            )
        if by == "bytes" and not (0 <= size < 1 or size >= 1 and float(size).is_integer()):
            raise UserError(
                f"{option}={size}: accepted: a fraction, 0 <= size < 1, or a whole number of bytes"
            )
    if by == "document" and valid_size + test_size >= 1:
        raise UserError(
            f"data.split.valid_size={valid_size} and data.split.test_size={test_size}: nothing is "
            "left to train on; accepted: fractions whose sum is below 1"
        )


def split_corpus(
    corpus: Corpus,
    split: str,
    *,
    by: str,
    valid_size: float,
    test_size: float,
    train: str = "train",
    valid: str = "valid",
    test: str = "test",
) -> Corpus:
    """Returns the documents, or the parts of documents, that belong to one split.

    Args:
        corpus: What to split.
        split: Which part to return. The three are disjoint.
        by: `document`: a hash of its name places a document, whatever the others are; the sizes are
            expected fractions of the documents. `bytes`: the concatenated documents are cut into
            train, valid and test, in this order; empty documents go to none. `name`: the
            sub-folders `train`, `valid` and `test` decide and the sizes play no part; other
            documents go to none.
        valid_size: A fraction below 1 or, by bytes, a whole number of bytes.
        test_size: The same for the test split.
        train: The sub-folder of the training split.
        valid: That of the validation split; see `find_names`.
        test: That of the test split.

    Raises:
        UserError: A size is out of range.
        EmptySplitError: The split holds no byte.
    """
    sizes = {"data.split.valid_size": valid_size, "data.split.test_size": test_size}
    check_sizes(by, valid_size, test_size)
    if by == "document":
        documents = _split_by_document(corpus, split, sizes)
        hint = "another data.split.{}_size or data.split.by=bytes"
    elif by == "bytes":
        documents = _split_by_bytes(corpus, split, sizes)
        hint = "another data.split.{}_size"
    elif by == "name":
        folders = {d.name.split("/")[0] for d in corpus}
        names = find_names({"train": train, "valid": valid, "test": test}[split], folders)
        documents = [d for d in corpus if d.name.split("/")[0] in names]
        hint = f"files in a sub-folder {names[0]}, another data.split.{split} or data.split.by"
    else:
        raise UserError(f"data.split.by={by!r}: unknown; accepted: document, bytes, name")
    if not any(map(len, documents)):
        sized = "valid" if split == "train" else split
        raise EmptySplitError(
            f"data.split.by={by!r}: the {split} split of {corpus.name!r} is empty; "
            f"accepted: {hint.format(sized)}"
        )
    return Corpus(corpus.name, tuple(documents), corpus.bad_records)


def _split_by_document(corpus: Corpus, split: str, sizes: dict[str, float]) -> list[Document]:
    valid, test = sizes.values()

    def place(document: Document) -> str:
        digest = hashlib.blake2b(os.fsencode(document.name), digest_size=8).digest()
        position = int.from_bytes(digest, "big") / 2**64
        return "test" if position < test else "valid" if position < test + valid else "train"

    return [document for document in corpus if place(document) == split]


def _split_by_bytes(corpus: Corpus, split: str, sizes: dict[str, float]) -> list[Document]:
    total = corpus.num_bytes
    valid, test = (round(size * total) if size < 1 else int(size) for size in sizes.values())
    train = total - valid - test
    if train <= 0:
        raise UserError(
            f"data.split.valid_size={sizes['data.split.valid_size']} and data.split.test_size="
            f"{sizes['data.split.test_size']}: nothing is left to train on; "
            f"accepted: sizes whose sum is below the {total} bytes of {corpus.name!r}"
        )
    cuts = {"train": (0, train), "valid": (train, train + valid), "test": (train + valid, total)}
    low, high = cuts[split]
    parts = []
    for document, offset in zip(corpus, corpus.offsets[:-1].tolist(), strict=True):
        start = document.start + max(low - offset, 0)
        stop = min(document.stop, document.start + high - offset)
        if start < stop:
            parts.append(replace(document, start=start, stop=stop))
    return parts
