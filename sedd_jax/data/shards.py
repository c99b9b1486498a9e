"""Prepared text: a directory of token shards, with a header that describes them.

A shard holds token ids and nothing else. The header, header.json, is written last. So a directory without it was never
finished. Its fields are:

    format_version           2
    source, tokenizer_spec   arguments of `sedd prepare`
    tokenizer                input of `tokenizers.from_json`. A file that it needs lies beside the shards, too.
    tokenizer_fingerprint    equal for tokenizers that give every text the same ids
    dtype                    of the token ids in a shard: "<u2" or "<u4" (little-endian)
    shard_tokens             tokens in every shard of a split, except its last
    directory                where the shards are, if they are in another directory
    splits                   for each split: num_documents, num_empty (documents left out), first_empty (the first of
                             these), num_characters, num_words, num_unknown, num_tokens, and shards in order, each
                             with file and sha256
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
from jaxtyping import Int, Integer

from sedd_jax.data import documents, encoders, tokenizers
from sedd_jax.runtime import errors, storage

FORMAT_VERSION = 2
HEADER = "header.json"
SHARD_TOKENS = 2**26
_REPAIR = "remove the directory and prepare it again"
_COUNTS = ("num_documents", "num_characters", "num_words", "num_unknown", "num_tokens")
_HEADER_KINDS: dict[str, Any] = {
    **dict.fromkeys(("source", "tokenizer_spec", "tokenizer_fingerprint"), str),
    "tokenizer": dict,
    "shard_tokens": int,
    "directory": str | None,
    "splits": dict,
}
# Called with the name of a split, the share of it that is done, and its number of tokens so far.
Report = Callable[[str, float, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """The tokens of a split. Local shards are memory-mapped; shards in a bucket are read by byte range.

    Attributes:
        parts: the shards in order, either arrays or addresses in a bucket.
        dtype: type of a token id in a shard.
        shard_tokens: tokens in every shard except the last.
        count: tokens in all shards.
    """

    parts: Sequence[np.ndarray | str]
    dtype: str
    shard_tokens: int
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " T"]:
        """Tokens [start, stop). If they lie in one local shard, the result is a view of it."""
        pieces = self._fetch(list(self._pieces(start, stop - start)))
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])

    def gather(self, starts: Int[np.ndarray, " R"], length: int) -> Int[np.ndarray, "R length"]:
        """Rows of `length` tokens (int32), one from each start. The split is read as a ring."""
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
        """Yield (shard, first, stop) of the contiguous pieces that make up `length` tokens from `start` on."""
        while length:
            part, first = divmod(start, self.shard_tokens)
            count = min(length, self.shard_tokens - first, self.count - start)
            yield part, first, first + count
            start, length = (start + count) % self.count, length - count

    def _fetch(self, pieces: Sequence[tuple[int, int, int]]) -> list[Integer[np.ndarray, " _"]]:
        if not isinstance(self.parts[0], str):
            return [np.asarray(self.parts[part])[first:last] for part, first, last in pieces]
        size = np.dtype(self.dtype).itemsize
        ranges = [(str(self.parts[part]), first * size, last * size) for part, first, last in pieces]
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
    """Write every split of a corpus as token shards into an empty directory, and then the header.

    If the tokenizer has an end of text, that token follows each document and counts as no character. Otherwise a joiner
    (`tokenizers.joiner`) stands between documents and counts as text.

    Args:
        corpus: the documents.
        tokenizer: encodes them.
        directory: an empty local directory.
        source: recorded in the header.
        tokenizer_spec: recorded in the header.
        num_workers: processes that tokenize.
        report: called as the work goes on.

    Raises:
        errors.UserError: if a split holds no text, or a document cannot be read or tokenized.
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
    tokenizers.write_file(tokenizer, directory)
    _write_header(directory, header)


def _pack_split(
    corpus: documents.Corpus,
    split: str,
    tokenizer: tokenizers.Tokenizer,
    directory: pathlib.Path,
    num_workers: int,
    report: Report,
) -> dict[str, Any]:
    counts = dict.fromkeys(_COUNTS, 0)
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
    """Cut chunks of tokens at shard boundaries. Yields (shard number, tokens)."""
    position = 0
    for tokens in chunks:
        while len(tokens):
            shard, used = divmod(position, SHARD_TOKENS)
            piece, tokens = tokens[: SHARD_TOKENS - used], tokens[SHARD_TOKENS - used :]
            position += len(piece)
            yield shard, piece


def link(directory: pathlib.Path, prepared: storage.Directory) -> None:
    """Make `directory` a link to prepared text, which stays where it is.

    The link holds a copy of the header. If the prepared text changes later, opening the link fails.
    """
    header = read_header(prepared)
    place = prepared if storage.is_remote(prepared) else pathlib.Path(prepared).absolute()
    place = header["directory"] or place  # A link to a link points to the shards themselves.
    directory.mkdir(parents=True, exist_ok=True)
    _write_header(directory, {**header, "directory": str(place)})


def is_same(first: storage.Directory, second: storage.Directory) -> bool:
    """Whether two directories hold the same prepared text, by its checksums and its tokenizer's."""
    ours, theirs = read_header(first), read_header(second)
    return all(ours[name] == theirs[name] for name in ("tokenizer_fingerprint", "dtype", "shard_tokens", "splits"))


def is_whole_link(directory: storage.Directory) -> bool:
    """Whether the prepared text that a directory is a link to is where it was, and has not been prepared again."""
    header = read_header(directory)
    place = storage.directory(header["directory"] or directory)
    return is_packed(place) and _is_as_linked(place, header)


def _is_as_linked(place: storage.Directory, header: dict[str, Any]) -> bool:
    """Whether the text in a place is still what the header of a link to it says."""
    return {**read_header(place), "directory": header["directory"]} == header


def is_packed(directory: storage.Directory) -> bool:
    """Whether a directory holds finished prepared text."""
    return storage.holds(directory, HEADER)


def read_header(directory: storage.Directory) -> dict[str, Any]:
    """Read the header of prepared text.

    Raises:
        errors.UserError: if there is no header, or it is damaged or has another format version.
    """
    if not is_packed(directory):
        remedy = f"run `sedd prepare --data=SOURCE --tokenizer=KIND --out={directory}`"
        if directory.exists():
            # What is not ours is not to be removed.
            is_ours = directory.is_dir() and any(directory.glob("*-00000.bin"))
            remedy = f"remove it, and {remedy}" if is_ours else "name a directory that `sedd prepare` has made"
        raise errors.UserError(f"{directory} holds no finished {HEADER}", remedy=remedy)
    try:
        header = json.loads((directory / HEADER).read_text())
        version = header["format_version"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise errors.UserError(f"{directory / HEADER} is damaged ({error})", remedy=_REPAIR) from error
    if version != FORMAT_VERSION:
        raise errors.UserError(
            f"{directory} has format {version}, and this version reads {FORMAT_VERSION}", remedy=_REPAIR
        )
    if not _is_whole(header):
        raise errors.UserError(f"{directory / HEADER} is damaged (a field is missing or wrong)", remedy=_REPAIR)
    return header


def _is_whole(header: dict[str, Any]) -> bool:
    """Whether the header has all that is read of it, in the right types."""
    has = lambda found, kinds: all(name in found and isinstance(found[name], kind) for name, kind in kinds.items())
    is_shard = lambda found: isinstance(found, dict) and has(found, {"file": str, "sha256": str})
    is_split = lambda found: (
        isinstance(found, dict)
        and has(found, {**dict.fromkeys(_COUNTS, int), "shards": list})
        and all(map(is_shard, found["shards"]))
        and len(found["shards"]) == -(-found["num_tokens"] // header["shard_tokens"])
    )
    return (
        has(header, _HEADER_KINDS)
        and header.get("dtype") in ("<u2", "<u4")
        and header["shard_tokens"] > 0
        and all(map(is_split, header["splits"].values()))
    )


def open_split(directory: storage.Directory, split: str) -> tuple[dict[str, Any], Tokens]:
    """Open one split of prepared text. Returns its entry in the header (see above), and its tokens.

    Raises:
        errors.UserError: if there is no such split, a shard is missing or has the wrong size, or the directory is a
            link to prepared text that has changed.
    """
    header, place = follow(directory)
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
    """Check every shard: its size, and also its content if it is local. A bucket guards contents itself.

    Raises:
        errors.UserError: if a shard is missing or damaged. The message names the first one.
    """
    header, place = follow(directory)
    for split in header["splits"]:
        open_split(directory, split)
    if storage.is_remote(place):
        return
    shards = [shard for counts in header["splits"].values() for shard in counts["shards"]]
    paths = [pathlib.Path(place) / shard["file"] for shard in shards]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for path, shard, found in zip(paths, shards, pool.map(_digest, paths), strict=True):
            if found != shard["sha256"]:
                raise errors.UserError(
                    f"{path} is damaged (sha256 {found}, written as {shard['sha256']})", remedy=_REPAIR
                )


def follow(directory: storage.Directory) -> tuple[dict[str, Any], storage.Directory]:
    """Header of a directory, and the directory that holds its shards."""
    header = read_header(directory)
    if header["directory"] is None:
        return header, directory
    place = storage.directory(header["directory"])
    if not is_packed(place):
        raise errors.UserError(
            f"{place}, the text of this run, holds no finished {HEADER}",
            remedy=f"put it back, or train on with {errors.name('config.data.source')}=prepared:DIR, where it is now",
        )
    if not _is_as_linked(place, header):
        raise errors.UserError(
            f"{place} has changed since this run began with it",
            remedy="put the text back as it was, or begin another run",
        )
    return header, place


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: storage.Directory, expected: int) -> None:
    if not path.exists():
        raise errors.UserError(f"{path} is missing", remedy=_REPAIR)
    # The stat of epath looks up the owner's name, and there may be none.
    size = path.stat().st_size if isinstance(path, pathlib.Path) else path.stat().length
    if size != expected:
        raise errors.UserError(f"{path} is damaged ({size} bytes, written as {expected})", remedy=_REPAIR)


def _write_header(directory: pathlib.Path, header: dict[str, Any]) -> None:
    unfinished = directory / f"{HEADER}.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(header, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, directory / HEADER)
