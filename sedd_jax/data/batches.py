"""Prepared tokens read as sequences, and training batches as a pure function of (seed, step)."""

import dataclasses
import functools
import hashlib
import json
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from sedd_jax.data import shards, tokenizers
from sedd_jax.runtime import errors, storage

MEASURED_TOKENS = 2**24  # enough for the entropies, whose pairs then take half a gigabyte with GPT-2's tokens
_DENSE_PAIRS = 2**22  # up to this many pairs, a full table is smaller and faster than sorting the pairs that occur


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedSplit:
    """The tokens of one split, read as sequences of `length` tokens.

    Attributes:
        tokens: the tokens of the split.
        length: tokens per sequence.
        num_characters: characters of the text that the tokens stand for.
        num_words: words of that text.
        sha256: hash of the checksums of the split's shards.
        tokenizer: if given, ids that are none of its tokens are refused when they are read.
    """

    tokens: shards.Tokens
    length: int
    num_characters: int
    num_words: int
    sha256: str
    tokenizer: tokenizers.Tokenizer | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        """Sequences in one epoch. Each epoch leaves out the remaining tokens, fewer than `length`."""
        return self.num_tokens // self.length

    @property
    def characters_per_token(self) -> float:
        return self.num_characters / self.num_tokens

    @property
    def words_per_token(self) -> float:
        return self.num_words / self.num_tokens

    def sequences(self) -> Integer[np.ndarray, "S L"]:
        """All sequences in the order of the text, without the last tokens that do not fill a sequence."""
        return self._checked(self.tokens.read(0, self.num_sequences * self.length).reshape(-1, self.length))

    def spread(self, most: int) -> Int[np.ndarray, "S L"]:
        """At most so many of `sequences`, at equal distances (int32). Nothing else is read."""
        every = -(-self.num_sequences // most)
        return self._checked(self.tokens.gather(np.arange(0, self.num_sequences, every) * self.length, self.length))

    def batch(self, step: int, *, batch_size: int, seed: int, rows: slice = slice(None)) -> Int[np.ndarray, "rows L"]:
        """Rows `rows` of the training batch at `step` (int32).

        The batch is a function of (seed, step), whichever process asks for which rows. The stream of sequences is the
        same for every `batch_size`.

        Each epoch reads the text as a ring from a random start. It cuts the ring into sequences that do not overlap and
        shuffles them. So every token is equally likely to be among the few that an epoch leaves out, and every epoch
        cuts the text at other places. A batch at the end of an epoch is filled with sequences of the next epoch.
        """
        if step < 0 or batch_size < 1:
            raise ValueError(f"step={step}, batch_size={batch_size}: step counts from 0, batch_size from 1")
        epochs, places = np.divmod(step * batch_size + np.arange(batch_size)[rows], self.num_sequences)
        starts = np.concatenate(
            [
                _epoch_starts(seed, int(epoch), self.num_tokens, self.length)[places[epochs == epoch]]
                for epoch in np.unique(epochs)
            ]
        )
        return self._checked(self.tokens.gather(starts, self.length))

    def _checked(self, ids: Integer[np.ndarray, "rows L"]) -> Integer[np.ndarray, "rows L"]:
        if self.tokenizer is not None:
            tokenizers.check_encoded(ids, self.tokenizer)
        return ids


@functools.lru_cache(maxsize=4)
def _epoch_starts(seed: int, epoch: int, num_tokens: int, length: int) -> Int[np.ndarray, " S"]:
    """Position where each sequence of an epoch starts, in training order.

    The positions are drawn from raw Philox bits. NumPy promises never to change these bits, whereas it may change
    `permutation` between versions.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    start = bits.random_raw() % num_tokens
    order = np.argsort(bits.random_raw(num_tokens // length), kind="stable")
    return (start + order * length) % num_tokens


def open_split(
    directory: storage.Directory, split: str, length: int, *, tokenizer: tokenizers.Tokenizer | None = None
) -> PackedSplit:
    """Open one split of prepared text as sequences of `length` tokens.

    Args:
        directory: prepared text.
        split: train, valid or test.
        length: tokens per sequence.
        tokenizer: if given, it must be the tokenizer that the text was prepared with.

    Raises:
        errors.UserError: if the tokenizer is another one, or the split has fewer than `length` tokens.
    """
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
        tokenizer=tokenizer,
    )


class Entropies(NamedTuple):
    """Entropies of a text in bits per token.

    Attributes:
        unigram: H(x1), under the frequencies of single tokens.
        bigram: H(x2 | x1), under the frequencies of a token given the one before.
    """

    unigram: float
    bigram: float


def entropies(tokens: Integer[np.ndarray, " T"], num_ids: int) -> Entropies:
    """Unigram and bigram entropy of `tokens` under their own frequencies, in bits per token.

    A table of frequencies fitted to this very text would reach these values. `num_ids` must be larger than every id.
    The pairs take 8 bytes of memory per token.
    """
    _, counts = _pair_counts(tokens, num_ids)
    first = np.bincount(tokens[:-1], minlength=num_ids)
    return Entropies(unigram=_entropy(np.bincount(tokens)), bigram=_entropy(counts) - _entropy(first))


def _pairs(tokens: np.ndarray, num_ids: int) -> np.ndarray:
    return tokens[:-1].astype(np.int64) * num_ids + tokens[1:]


def _pair_counts(tokens: np.ndarray, num_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the pairs that occur, in ascending order, and how often each occurs."""
    codes = _pairs(tokens, num_ids)
    if num_ids**2 > _DENSE_PAIRS:
        return np.unique(codes, return_counts=True)
    table = np.bincount(codes)
    occurring = np.flatnonzero(table)
    return occurring, table[occurring]


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(0 - (shares * np.log2(shares)).sum())
