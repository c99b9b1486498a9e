"""Prepared text in sequences, and batches of them as a pure function of (seed, step)."""

import dataclasses
import functools
import hashlib
import json
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from sedd_jax.data import shards, tokenizers
from sedd_jax.runtime import errors, storage

_DENSE_PAIRS = 2**22  # up to here a table of all pairs is smaller and faster than sorting the pairs that occur


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedSplit:
    """The tokens of one split, read in sequences of `length`, and counts of the text they stand for."""

    tokens: shards.Tokens
    length: int
    num_characters: int
    num_words: int
    sha256: str  # of the checksums of its shards

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        """Sequences in one epoch; the rest, shorter than one, is left out of it."""
        return self.num_tokens // self.length

    @property
    def characters_per_token(self) -> float:
        return self.num_characters / self.num_tokens

    @property
    def words_per_token(self) -> float:
        return self.num_words / self.num_tokens

    def sequences(self) -> Integer[np.ndarray, "S L"]:
        """Every sequence in the order of the text, without the tail shorter than one."""
        return self.tokens.read(0, self.num_sequences * self.length).reshape(-1, self.length)

    def batch(self, step: int, *, batch_size: int, seed: int, rows: slice = slice(None)) -> Int[np.ndarray, "rows L"]:
        """Rows of the training batch of a step (int32), a function of (seed, step) alone, whoever asks for which.

        Every epoch reads the text as a ring from a random start, cut into non-overlapping sequences in random order. So
        each token is equally likely to be among the few that an epoch leaves out, and no cut is the same twice. A batch
        at the end of an epoch is filled from the next one.
        """
        if step < 0 or batch_size < 1:
            raise ValueError(f"step={step}, batch_size={batch_size}: step counts from 0, and a batch holds 1 or more")
        epochs, places = np.divmod(step * batch_size + np.arange(batch_size)[rows], self.num_sequences)
        starts = np.concatenate(
            [
                _epoch_starts(seed, int(epoch), self.num_tokens, self.length)[places[epochs == epoch]]
                for epoch in np.unique(epochs)
            ]
        )
        return self.tokens.gather(starts, self.length)


@functools.lru_cache(maxsize=4)
def _epoch_starts(seed: int, epoch: int, num_tokens: int, length: int) -> Int[np.ndarray, " S"]:
    """Where each sequence of an epoch starts, in the order of training.

    Drawn from raw Philox bits, which numpy keeps for good, while it may change `permutation` between versions.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    start = bits.random_raw() % num_tokens
    order = np.argsort(bits.random_raw(num_tokens // length), kind="stable")
    return (start + order * length) % num_tokens


def open_split(
    directory: storage.Directory, split: str, length: int, *, tokenizer: tokenizers.Tokenizer | None = None
) -> PackedSplit:
    """One split of prepared text in sequences of `length`; a `tokenizer` must be the one it was prepared with."""
    header = shards.read_header(directory)
    if tokenizer is not None and tokenizer.fingerprint() != header["tokenizer_fingerprint"]:
        raise errors.UserError(
            f"{directory} was prepared with another tokenizer ({header['tokenizer']['kind']}) than this run's "
            f"({tokenizer.to_json()['kind']})",
            remedy=f"prepare {header['source']} again with the run's own",
        )
    counts, tokens = shards.open_split(directory, split)
    if not 1 <= length <= len(tokens):
        raise errors.UserError(
            f"the {split} split in {directory} has {len(tokens)} tokens, which length={length} does not fit",
            remedy="choose a length between 1 and that, or prepare more text",
        )
    return PackedSplit(
        tokens=tokens,
        length=length,
        num_characters=counts["num_characters"],
        num_words=counts["num_words"],
        sha256=hashlib.sha256(json.dumps(counts["shards"]).encode()).hexdigest(),
    )


class Entropies(NamedTuple):
    """Bits per token of a text under token counts (unigram) and under counts of a token after another (bigram)."""

    unigram: float
    bigram: float


def entropies(tokens: Integer[np.ndarray, " T"], num_ids: int) -> Entropies:
    """H(x1) and H(x2|x1) of the tokens' own counts: what a table that knows this very text would reach.

    `num_ids` is above every id. Pairs are held in memory at 8 bytes a token.
    """
    _, counts = _pair_counts(tokens, num_ids)
    first = np.bincount(tokens[:-1], minlength=num_ids)
    return Entropies(unigram=_entropy(np.bincount(tokens)), bigram=_entropy(counts) - _entropy(first))


def _pairs(tokens: np.ndarray, num_ids: int) -> np.ndarray:
    return tokens[:-1].astype(np.int64) * num_ids + tokens[1:]


def _pair_counts(tokens: np.ndarray, num_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that occur, in ascending order of their codes, and how often each does."""
    codes = _pairs(tokens, num_ids)
    if num_ids**2 > _DENSE_PAIRS:
        return np.unique(codes, return_counts=True)
    table = np.bincount(codes)
    occurring = np.flatnonzero(table)
    return occurring, table[occurring]


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(0 - (shares * np.log2(shares)).sum())
