"""Prepared text: token shards in a directory, and the header that says what they are.

header.json, which is written last, so that a directory without it was never finished:

    format_version        2
    source, tokenizer_spec   what `sedd prepare` was told
    tokenizer             what `tokenizers.from_json` reads
    tokenizer_fingerprint    equal for tokenizers that give every text the same ids
    dtype                 of the shards: "<u2" or "<u4", little-endian and nothing else in the file
    shard_tokens          tokens in every shard of a split but its last
    directory             where the shards are, if not here
    splits                for each: num_documents, num_empty (left out), num_characters, num_words, num_unknown,
                          num_tokens, and its shards in order: file and sha256
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Integer

from sedd_jax.data import documents, encoders, tokenizers
from sedd_jax.runtime import errors, storage

FORMAT_VERSION = 2
HEADER = "header.json"
SHARD_TOKENS = 2**26
_REPAIR = "remove the directory and prepare it again"
# Called with the split, the share of it that is done, and its tokens so far.
Report = Callable[[str, float, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """The tokens of a split, memory-mapped from its shards, or read by range from those in a bucket.

    Attributes:
        parts: each shard, as an array or its address in a bucket.
        dtype: of a token in a shard.
        shard_tokens: tokens in every part but the last.
        count: tokens in all.
    """

    parts: Sequence[Any]
    dtype: str
    shard_tokens: int
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " T"]:
        """Tokens [start, stop), a view of a shard where they lie in one."""
        pieces = self._fetch(list(self._pieces(start, stop - start)))
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])

    def gather(self, starts: Int[np.ndarray, " R"], length: int) -> Int[np.ndarray, "R length"]:
        """Rows of `length` tokens (int32) from each start on, the split taken as a ring."""
        rows = np.empty((len(starts), length), np.int32)
        pieces = [list(self._pieces(start, length)) for start in starts.tolist()]
        fetched = iter(self._fetch([piece for row in pieces for piece in row]))
        for row, its in zip(rows, pieces, strict=True):
            end = 0
            for _, first, last in its:
                begin, end = end, end + last - first
                row[begin:end] = next(fetched)
        return rows

    def _pieces(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Part, first and last of the stretches that `length` tokens from `start` on lie in."""
        while length:
            part, first = divmod(start, self.shard_tokens)
            count = min(length, self.shard_tokens - first, self.count - start)
            yield part, first, first + count
            start, length = (start + count) % self.count, length - count

    def _fetch(self, pieces: Sequence[tuple[int, int, int]]) -> list[Integer[np.ndarray, " _"]]:
        if isinstance(self.parts[0], np.ndarray):
            return [self.parts[part][first:last] for part, first, last in pieces]
        size = np.dtype(self.dtype).itemsize
        ranges = [(self.parts[part], first * size, last * size) for part, first, last in pieces]
        return [np.frombuffer(content, self.dtype) for content in storage.read_ranges(ranges)]


def pack(
    corpus: documents.Corpus,
    tokenizer: tokenizers.Tokenizer,
    directory: pathlib.Path,
    *,
    source: str,
    tokenizer_spec: str,
    num_workers: int = 1,
    report: Report | None = None,
) -> None:
    """Writes every split of a corpus as tokens into an empty directory, and the header when all of them are there.

    A tokenizer with an end of text puts it after each document, which adds no character. One without joins documents
    by a blank line, or by a space where it has no newline, and counts these as text.
    """
    dtype = encoders.dtype_of(tokenizer)
    splits = {}
    for split in corpus.splits:
        splits[split] = _pack_split(corpus, split, tokenizer, directory, num_workers, report or (lambda *_: None))
    header = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "tokenizer_spec": tokenizer_spec,
        "tokenizer": tokenizer.to_json(),
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "dtype": dtype,
        "shard_tokens": SHARD_TOKENS,
        "directory": None,
        "splits": splits,
    }
    _write_header(directory, header)


def _pack_split(
    corpus: documents.Corpus,
    split: str,
    tokenizer: tokenizers.Tokenizer,
    directory: pathlib.Path,
    num_workers: int,
    report: Report,
) -> dict[str, Any]:
    counts = dict.fromkeys(("num_documents", "num_characters", "num_words", "num_unknown", "num_tokens"), 0)
    empty: list[str] = []

    def texts() -> Iterator[documents.Document]:
        for document in corpus.read(split):
            if corpus.keeps_empty or (document.text and not document.text.isspace()):
                yield document
            else:
                empty.append(document.place)

    def tokens() -> Iterator[Integer[np.ndarray, " T"]]:
        for encoded in encoders.encode(texts(), tokenizer, num_workers=num_workers):
            for name in counts:
                counts[name] += len(encoded.tokens) if name == "num_tokens" else getattr(encoded, name)
            report(split, encoded.done, counts["num_tokens"])
            yield encoded.tokens
        report(split, 1.0, counts["num_tokens"])

    written = []
    for shard, pieces in itertools.groupby(_by_shard(tokens()), key=operator.itemgetter(0)):
        path, digest = directory / f"{split}-{shard:05d}.bin", hashlib.sha256()
        with path.open("wb") as file:
            for _, piece in pieces:
                content = piece.tobytes()
                file.write(content)
                digest.update(content)
            file.flush()
            os.fsync(file.fileno())
        written.append({"file": path.name, "sha256": digest.hexdigest()})
    if not written:
        raise errors.UserError(f"the {split} split holds no text", remedy="give it more text, or files of its own")
    return {**counts, "num_empty": len(empty), "first_empty": empty[0] if empty else None, "shards": written}


def _by_shard(chunks: Iterator[Integer[np.ndarray, " _"]]) -> Iterator[tuple[int, Integer[np.ndarray, " _"]]]:
    """The chunks' tokens in pieces, each with the number of the shard it lies in."""
    position = 0
    for tokens in chunks:
        while len(tokens):
            shard, used = divmod(position, SHARD_TOKENS)
            piece, tokens = tokens[: SHARD_TOKENS - used], tokens[SHARD_TOKENS - used :]
            position += len(piece)
            yield shard, piece


def link(directory: pathlib.Path, prepared: storage.Directory) -> None:
    """Makes `directory` stand for prepared text that stays where it is, in the state that it has now."""
    header = read_header(prepared)
    place = prepared if storage.is_remote(prepared) else pathlib.Path(prepared).absolute()
    place = header["directory"] or place  # What stands for another is not followed twice.
    directory.mkdir(parents=True)
    _write_header(directory, {**header, "directory": str(place)})


def is_packed(directory: storage.Directory) -> bool:
    """Whether a directory holds prepared text that was finished."""
    return storage.holds(directory, HEADER)


def read_header(directory: storage.Directory) -> dict[str, Any]:
    """What a directory of prepared text says of itself.

    Raises:
        errors.UserError: where there is none, or it is damaged or of another format.
    """
    if not is_packed(directory):
        raise errors.UserError(
            f"{directory} holds no finished {HEADER}", remedy=f"run `sedd prepare --out={directory}` (again)"
        )
    try:
        header = json.loads((directory / HEADER).read_text())
        version = header["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise errors.UserError(f"{directory / HEADER} is damaged ({error})", remedy=_REPAIR) from error
    if version != FORMAT_VERSION:
        raise errors.UserError(f"{directory} has format {version}, this reads {FORMAT_VERSION}", remedy=_REPAIR)
    return header


def open_split(directory: storage.Directory, split: str) -> tuple[dict[str, Any], Tokens]:
    """Counts and tokens of one split.

    Raises:
        errors.UserError: where the directory has no such split, a shard is missing or of the wrong size, or what the
            directory stands for has changed.
    """
    header, place = _follow(directory)
    if split not in header["splits"]:
        raise errors.UserError(
            f"the split {split!r} is not in {place}", remedy=f"choose one of {', '.join(header['splits'])}"
        )
    counts, dtype = header["splits"][split], header["dtype"]
    shards = [place / shard["file"] for shard in counts["shards"]]
    for number, shard in enumerate(shards):
        size = min(header["shard_tokens"], counts["num_tokens"] - number * header["shard_tokens"])
        _check_size(shard, size * np.dtype(dtype).itemsize)
    parts = [
        str(shard) if storage.is_remote(shard) else np.memmap(shard, dtype, mode="r").view(np.ndarray)
        for shard in shards
    ]
    return counts, Tokens(parts=parts, dtype=dtype, shard_tokens=header["shard_tokens"], count=counts["num_tokens"])


def verify(directory: storage.Directory) -> None:
    """Checks every shard: sizes in a bucket, which guards contents itself; contents elsewhere.

    Raises:
        errors.UserError: names the first shard that is not what was written.
    """
    header, place = _follow(directory)
    for split in header["splits"]:
        open_split(directory, split)
    if storage.is_remote(place):
        return
    shards = [shard for counts in header["splits"].values() for shard in counts["shards"]]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for shard, found in zip(shards, pool.map(lambda shard: _digest(place / shard["file"]), shards), strict=True):
            if found != shard["sha256"]:
                raise errors.UserError(
                    f"{place / shard['file']} is damaged (sha256 {found}, written as {shard['sha256']})", remedy=_REPAIR
                )


def _follow(directory: storage.Directory) -> tuple[dict[str, Any], storage.Directory]:
    """A directory's header, and where its shards are."""
    header = read_header(directory)
    if header["directory"] is None:
        return header, directory
    place = storage.directory(header["directory"])
    if {**read_header(place), "directory": header["directory"]} != header:
        raise errors.UserError(
            f"{place} has changed since this run began with it",
            remedy="put the text back as it was, or begin another run",
        )
    return header, place


def _digest(path: Any) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: storage.Directory, expected: int) -> None:
    if not path.exists():
        raise errors.UserError(f"{path} is missing", remedy=_REPAIR)
    size = epath.Path(path).stat().length
    if size != expected:
        raise errors.UserError(f"{path} is damaged ({size} bytes, written as {expected})", remedy=_REPAIR)


def _write_header(directory: pathlib.Path, header: dict[str, Any]) -> None:
    unfinished = directory / f"{HEADER}.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(header, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, directory / HEADER)
