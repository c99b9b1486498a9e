"""Splits a sequence that is being denoised into pieces of text, which the page marks by their kind."""

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int, Shaped

from sedd_jax import runs
from sedd_jax.sampling import generate

_GIVEN, _MASK, _NEW, _FILLED = range(4)
_KINDS = ("given", "mask", "new", "filled")


def pieces(
    run: runs.Run, row: Int[np.ndarray, "L"], is_given: Bool[np.ndarray, "L"], before: Int[np.ndarray, "L"]
) -> list[tuple[str, str]]:
    """Splits a sequence into stretches of one kind, each with its text.

    Without masks the texts together are the text of the whole sequence.

    Args:
        run: the run.
        row: the tokens.
        is_given: where they are given.
        before: the tokens one step earlier.

    Returns:
        Pairs of kind and text. The kind is given, mask (a `░` for each), new (changed since `before`) or filled.
    """
    masked = generate.is_mask(run, row)
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
    """Texts of adjacent stretches, which together are the text of all their tokens.

    A character may consist of tokens of two stretches, and a space may depend on the token after it. Such characters
    belong to the later stretch.
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
    """Length of the common prefix of two texts."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _stretches(values: Shaped[np.ndarray, "L"]) -> Iterator[tuple[int, int]]:
    """Start and end of each stretch of equal values."""
    borders = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return ((start, stop) for start, stop in itertools.pairwise(borders) if stop > start)
