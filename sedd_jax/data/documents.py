"""Documents, and the division of a corpus into the splits train, valid and test."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

SPLITS = ("train", "valid", "test")
HELD_OUT_SHARE = 0.05  # of train, for each held-out split that a corpus lacks


class Document(NamedTuple):
    """A document and where it came from.

    Attributes:
        text: its text, which may be empty.
        place: where a person finds it: file and line, or dataset, split and number.
        done: share of the split that has been read after this document.
    """

    text: str
    place: str
    done: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """The documents of a corpus by split.

    Attributes:
        splits: names of the splits that the corpus has.
        read: yields the documents of a split, always in the same order.
        keeps_empty: whether empty documents count. They do in published test sets.
    """

    splits: tuple[str, ...]
    read: Callable[[str], Iterator[Document]]
    keeps_empty: bool = False

    def texts(self) -> Iterator[str]:
        """Texts of the documents of all splits."""
        for split in self.splits:
            yield from (document.text for document in self.read(split))


class Part(NamedTuple):
    """A contiguous part of a native split, which is a split that the corpus came with.

    Attributes:
        native: name of the native split.
        start: share of the native split before the part.
        stop: share of the native split up to the end of the part.
    """

    native: str
    start: float
    stop: float

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == 1

    def indices(self, count: int) -> range:
        """Indices of this part, if the native split has `count` items."""
        return range(round(self.start * count), round(self.stop * count))

    def progress(self, done: float) -> float:
        """Share of this part that has been read, given the share `done` of its native split."""
        return (done - self.start) / (self.stop - self.start)


def divide(native: Collection[str]) -> dict[str, Part]:
    """Map each split to a part of the native splits.

    A missing held-out split is cut off the end of train (`HELD_OUT_SHARE` of it). A corpus without train keeps the
    splits that it has.
    """
    if "train" not in native:
        return {split: Part(split, 0, 1) for split in SPLITS if split in native}
    missing = [split for split in SPLITS if split not in native]
    stop = 1 - HELD_OUT_SHARE * len(missing)
    parts = {split: Part(split, 0, stop if split == "train" else 1) for split in SPLITS if split in native}
    for split in missing:
        parts[split] = Part("train", stop, stop + HELD_OUT_SHARE)
        stop += HELD_OUT_SHARE
    return parts
