"""Token shards on disk, packed once, and batches of them as a pure function of (seed, step).

A packed directory holds train.bin, valid.bin and test.bin (all documents of a split as one row of little-endian ids)
and header.json, which is written last: a directory without it was never finished.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from sedd_jax import corpora, tokenizers

FORMAT_VERSION = 1
_HEADER = "header.json"
_REPAIR = "remove the directory and pack it again"
_DENSE_PAIRS = 2**22  # up to here a table of all pairs is smaller and faster than sorting the pairs that occur


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedSplit:
    """The tokens of one split, memory-mapped, read in sequences of `length`."""

    tokens: Integer[np.ndarray, " T"]
    length: int
    num_characters: int

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

    def sequences(self) -> Integer[np.ndarray, "S L"]:
        """Every sequence in the order of the text, as a view of the file without the tail shorter than one."""
        return self.tokens[: self.num_sequences * self.length].reshape(-1, self.length)

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
        return np.take(self.tokens, starts[:, None] + np.arange(self.length), mode="wrap").astype(np.int32)


@functools.lru_cache(maxsize=4)
def _epoch_starts(seed: int, epoch: int, num_tokens: int, length: int) -> Int[np.ndarray, " S"]:
    """Where each sequence of an epoch starts, in the order of training.

    Drawn from raw Philox bits, which numpy keeps for good, while it may change `permutation` between versions.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    start = bits.random_raw() % num_tokens
    order = np.argsort(bits.random_raw(num_tokens // length), kind="stable")
    return (start + order * length) % num_tokens


def pack(source: str, tokenizer: tokenizers.Tokenizer, directory: str | os.PathLike[str]) -> None:
    """Write every split of `source` into `directory` as tokens, and the header when all of them are there.

    A tokenizer with an end of text puts it after each document, which adds no character. One of characters joins
    documents by a blank line, or by a space where its alphabet has no newline, and counts these as text.
    """
    folder = pathlib.Path(directory)
    if is_packed(folder):
        raise FileExistsError(f"{folder} already holds packed text: use it, or choose another directory")
    dtype = "<u2" if tokenizers.num_ids(tokenizer) <= 2**16 else "<u4"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}): choose a directory that can") from error
    header = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "source": source,
        "tokenizer": tokenizer.to_json(),
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "splits": {split: _pack_split(source, split, tokenizer, folder, dtype) for split in corpora.SPLITS},
    }
    unfinished = folder / f"{_HEADER}.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(header, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / _HEADER)


def _pack_split(
    source: str, split: str, tokenizer: tokenizers.Tokenizer, folder: pathlib.Path, dtype: str
) -> dict[str, Any]:
    joiner = _joiner(tokenizer)
    digest = hashlib.sha256()
    num_tokens = num_characters = 0
    with _file(folder, split).open("wb") as file:
        for index, document in enumerate(corpora.read(source, split)):
            text = document if index == 0 else joiner + document
            ids = tokenizer.encode(text)
            if tokenizer.eos_id is not None:
                ids = np.append(ids, tokenizer.eos_id)
            content = ids.astype(dtype).tobytes()
            file.write(content)
            digest.update(content)
            num_tokens += len(ids)
            num_characters += len(text)
        file.flush()
        os.fsync(file.fileno())
    return {"num_tokens": num_tokens, "num_characters": num_characters, "sha256": digest.hexdigest()}


def _joiner(tokenizer: tokenizers.Tokenizer) -> str:
    if not isinstance(tokenizer, tokenizers.Characters):
        return ""
    return next((joiner for joiner in ("\n\n", " ") if joiner[0] in tokenizer.alphabet), "")


def is_packed(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds packed text that was finished."""
    return (pathlib.Path(directory) / _HEADER).exists()


def open_split(
    directory: str | os.PathLike[str], split: str, length: int, *, tokenizer: tokenizers.Tokenizer | None = None
) -> PackedSplit:
    """One split of a packed directory in sequences of `length`; `tokenizer`, where given, must be the one it holds."""
    folder = pathlib.Path(directory)
    header = _read_header(folder)
    if tokenizer is not None and tokenizer.fingerprint() != header["tokenizer_fingerprint"]:
        raise ValueError(
            f"{folder} was packed with another tokenizer ({header['tokenizer']['kind']}) than this run's "
            f"({tokenizer.to_json()['kind']}): pack {header['source']} again with the run's own"
        )
    if split not in corpora.SPLITS:
        raise ValueError(f"split={split!r} does not exist: choose one of {', '.join(corpora.SPLITS)}")
    counts = header["splits"][split]
    path = _file(folder, split)
    _check_size(path, counts["num_tokens"] * np.dtype(header["dtype"]).itemsize)
    if not 1 <= length <= counts["num_tokens"]:
        raise ValueError(
            f"the {split} split in {folder} has {counts['num_tokens']} tokens, which length={length} does not fit: "
            f"choose a length between 1 and that, or pack more text"
        )
    tokens = np.memmap(path, header["dtype"], mode="r")
    return PackedSplit(tokens=tokens, length=length, num_characters=counts["num_characters"])


def verify(directory: str | os.PathLike[str]) -> None:
    """Read every file of a packed directory and raise on the first that is not what was written."""
    folder = pathlib.Path(directory)
    header = _read_header(folder)
    for split in corpora.SPLITS:
        path, counts = _file(folder, split), header["splits"][split]
        _check_size(path, counts["num_tokens"] * np.dtype(header["dtype"]).itemsize)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != counts["sha256"]:
            raise ValueError(f"{path} is damaged (sha256 {found}, packed as {counts['sha256']}): {_REPAIR}")


def _file(folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f"{split}.bin"


def _read_header(folder: pathlib.Path) -> dict[str, Any]:
    if not is_packed(folder):
        raise FileNotFoundError(f"{folder} holds no finished {_HEADER}: pack the text into it (again) first")
    header = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
    if header["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{folder} has format {header['format_version']}, this reads {FORMAT_VERSION}: {_REPAIR}")
    return header


def _check_size(path: pathlib.Path, expected: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {_REPAIR}")
    if path.stat().st_size != expected:
        raise ValueError(f"{path} is damaged ({path.stat().st_size} bytes, packed as {expected}): {_REPAIR}")


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
    return float(-(shares * np.log2(shares)).sum())
