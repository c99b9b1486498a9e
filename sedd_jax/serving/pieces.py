"""A sequence on its way from noise to text, in pieces that a page can mark."""

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int

from sedd_jax import runs

_GIVEN, _MASK, _NEW, _FILLED = range(4)
_KINDS = ("given", "mask", "new", "filled")


def pieces(
    run: runs.Run, row: Int[np.ndarray, "L"], is_given: Bool[np.ndarray, "L"], before: Int[np.ndarray, "L"]
) -> list[tuple[str, str]]:
    """A row as stretches of one kind and their text: given, mask (`░` for each), new since `before`, or filled.

    Where no token is masked the texts together are what the tokenizer makes of the whole row.
    """
    masked = row == (run.graph.mask_id if run.graph.has_mask else -1)
    kinds = np.select([is_given, masked, row != before], [_GIVEN, _MASK, _NEW], _FILLED)
    found = []
    for start, stop in _stretches(kinds == _MASK):
        if kinds[start] == _MASK:
            found.append((_MASK, "░" * (stop - start)))
            continue
        inner = [(start + first, start + last) for first, last in _stretches(kinds[start:stop])]
        found += zip((int(kinds[first]) for first, _ in inner), _texts(run, row, inner), strict=True)
    return [(_KINDS[kind], text) for kind, text in found if text]


def _texts(run: runs.Run, row: Int[np.ndarray, "L"], stretches: list[tuple[int, int]]) -> list[str]:
    """Texts of adjoining stretches, which together are the text of all of their tokens.

    A character may be made of tokens of two stretches, or a space depend on the token after it. It is the later's then.
    """
    start, stop = stretches[0][0], stretches[-1][1]
    whole = run.tokenizer.decode(row[start:stop])
    texts = [run.tokenizer.decode(row[first:last]) for first, last in stretches]
    if "".join(texts) == whole:
        return texts
    ends = [_num_common(whole, run.tokenizer.decode(row[start:last])) for _, last in stretches[:-1]]
    ends = [0, *np.maximum.accumulate(ends).tolist(), len(whole)]
    return [whole[first:last] for first, last in itertools.pairwise(ends)]


def _num_common(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _stretches(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of each stretch of equal values."""
    borders = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return ((start, stop) for start, stop in itertools.pairwise(borders) if stop > start)
