"""A document, and how a corpus divides into splits."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

SPLITS = ("train", "valid", "test")
HELD_OUT_SHARE = 0.05


class Document(NamedTuple):
    """A text and where it came from.

    Attributes:
        text: the text, empty where the corpus has an empty document.
        place: what a person looks up: file and line, or dataset, split and number.
        done: share of the split that is read once this document is.
    """

    text: str
    place: str
    done: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents by split.

    Attributes:
        splits: those it has.
        read: the documents of one of them, always in the same order.
        keeps_empty: whether an empty document counts, as a row of a published test set does.
    """

    splits: tuple[str, ...]
    read: Callable[[str], Iterator[Document]]
    keeps_empty: bool = False

    def texts(self) -> Iterator[str]:
        """Of every split."""
        for split in self.splits:
            yield from (document.text for document in self.read(split))


class Part(NamedTuple):
    """A part of one of the splits that a corpus came with, from one share of it to another."""

    native: str
    start: float
    stop: float

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == 1

    def indices(self, count: int) -> range:
        """The part of `count` things."""
        return range(round(self.start * count), round(self.stop * count))

    def progress(self, done: float) -> float:
        """The share of this part that is read, from that of the split it lies in."""
        return (done - self.start) / (self.stop - self.start)


def divide(native: Collection[str]) -> dict[str, Part]:
    """Every split as a part of those that a corpus came with: held-out text that is missing is cut off train's end.

    A corpus without train keeps what it has.
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
