"""Corpora in local files: plain text, one document per line, JSON lines and Parquet.

A source names files by a glob pattern. If the pattern contains {split}, each split reads the files that match with its
name in that place. The valid split may also be called validation, dev or heldout.
"""

import contextlib
import functools
import glob
import gzip
import json
import lzma
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from sedd_jax.data import documents
from sedd_jax.runtime import errors

_NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev", "heldout"), "test": ("test",)}
_DECOMPRESSION_ERRORS = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error)
Reader = Callable[[Sequence[str], documents.Part], Iterator[documents.Document]]


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        text: its text, with the newline or form feed at its end.
        path: the file.
        number: line number in the file, from 1.
        done: share of all files that has been read.
    """

    text: str
    path: str
    number: int
    done: float

    @property
    def place(self) -> str:
        return f"{self.path}:{self.number}"


def read_text(pattern: str) -> documents.Corpus:
    """Open text files in UTF-8, which may be compressed as .gz, .xz or .zip.

    A form feed or the end of a file ends a document. Blank documents are left out. If held-out splits have no files of
    their own, they are cut off the end of train at a line, which may be inside a document.
    """
    return _corpus(pattern, _text)


def read_lines(pattern: str) -> documents.Corpus:
    """Open text files with one document per line."""
    return _corpus(
        pattern, functools.partial(_records, parse=lambda line: line.text.removesuffix("\n").removesuffix("\f"))
    )


def read_jsonl(pattern: str) -> documents.Corpus:
    """Open files with one JSON object per line, which may be compressed: GLOB#field, by default the field text.

    Blank lines are left out.
    """
    pattern, _, field = pattern.partition("#")
    parse = functools.partial(_json_field, field=field or "text")
    return _corpus(pattern, functools.partial(_records, parse=parse, skips_blank=True))


def read_parquet(pattern: str) -> documents.Corpus:
    """Open Parquet files: GLOB#column, by default the column text."""
    pattern, _, column = pattern.partition("#")
    return _corpus(pattern, functools.partial(_parquet, column=column or "text"))


def _corpus(pattern: str, reader: Reader) -> documents.Corpus:
    names = _NAMES if "{split}" in pattern else {"train": ("",)}
    # A pattern such as {split}*.txt matches validation.txt for valid and for validation; each file counts once.
    files = {
        split: list(dict.fromkeys(p for name in names[split] for p in _matching(pattern, name))) for split in names
    }
    parts = documents.divide({split for split, paths in files.items() if paths})
    if not parts:
        raise errors.UserError(
            f"no file matches {pattern!r} (seen from {pathlib.Path.cwd()})", remedy="correct the path"
        )
    read = lambda split: reader(files[parts[split].native], parts[split])
    return documents.Corpus(splits=tuple(parts), read=read)


def _matching(pattern: str, split: str) -> list[str]:
    found = glob.glob(pattern.replace("{split}", split), recursive=True)
    return sorted(path for path in found if pathlib.Path(path).is_file())


def _text(paths: Sequence[str], part: documents.Part) -> Iterator[documents.Document]:
    """Documents made of the lines whose last character is in a part of all characters.

    If all files together have only one line, the line itself is cut where the part begins and ends.
    """
    wanted = None
    if not part.is_whole:
        number, size = 0, 0
        for line in _lines(paths):
            number, size = number + 1, size + len(line.text)
        wanted = part.indices(size)
        if number == 1:
            line = next(_lines(paths))
            yield from _joined([line._replace(text=line.text[wanted.start : wanted.stop])], part)
            return
    end, path, lines = 0, "", []
    for line in _lines(paths):
        end += len(line.text)
        if wanted is not None and not wanted.start < end <= wanted.stop:
            continue
        if line.path != path:
            yield from _joined(lines, part)
        path = line.path
        lines.append(line)
        if line.text.endswith("\f"):
            yield from _joined(lines, part)
    yield from _joined(lines, part)


def _joined(lines: list[Line], part: documents.Part) -> Iterator[documents.Document]:
    """The document that `lines` make, unless it is blank. Empties the list."""
    text = "".join(line.text for line in lines).removesuffix("\f").strip("\n")
    if text.strip():
        place = next(line.place for line in lines if line.text.strip())
        yield documents.Document(text, place, part.progress(lines[-1].done))
    lines.clear()


def _records(
    paths: Sequence[str], part: documents.Part, *, parse: Callable[[Line], str], skips_blank: bool = False
) -> Iterator[documents.Document]:
    """Documents of one line each."""
    records = lambda: (line for line in _lines(paths) if not (skips_blank and line.text.isspace()))
    wanted = None if part.is_whole else part.indices(sum(1 for _ in records()))
    for index, line in enumerate(records()):
        if wanted is None or index in wanted:
            yield documents.Document(parse(line), line.place, part.progress(line.done))


def _json_field(line: Line, field: str) -> str:
    try:
        record = json.loads(line.text.strip())
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"{line.place} is not JSON ({error})", remedy="correct or remove the line") from error
    if not isinstance(record, dict) or field not in record:
        found = f"its fields are {', '.join(record)}" if isinstance(record, dict) else "it is not an object"
        raise errors.UserError(
            f"{line.place} has no field {field!r}, {found}",
            remedy=f"name the field that holds the text, as in #{field}",
        )
    return _checked(record[field], f"{line.place}, field {field!r},")


def _parquet(paths: Sequence[str], part: documents.Part, *, column: str) -> Iterator[documents.Document]:
    files = {path: _parquet_file(path, column) for path in paths}
    total = sum(file.metadata.num_rows for file in files.values())
    wanted = part.indices(total)
    index = 0
    for path, file in files.items():
        for row, value in enumerate(_parquet_values(path, file, column)):
            if index in wanted:
                place = f"{path} row {row}"
                text = _checked(value, f"{place}, column {column!r},")
                yield documents.Document(text, place, part.progress((index + 1) / total))
            index += 1


def _parquet_file(path: str, column: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise errors.UserError(
            f"{path} is not a Parquet file ({error})", remedy="give another, or copy it again"
        ) from error
    if column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise errors.UserError(
            f"{path} has no column {column!r}, its columns are {names}",
            remedy=f"name the one that holds the text, as in #{column}",
        )
    return file


def _parquet_values(path: str, file: Any, column: str) -> Iterator[object]:
    import pyarrow

    try:
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{path} is damaged ({error})", remedy="copy it again") from error


def _checked(value: object, what: str) -> str:
    """`value`, if it is text that UTF-8 can write. `what` describes it in the error."""
    if not isinstance(value, str):
        raise errors.UserError(f"{what} holds {type(value).__name__}, not text", remedy="correct or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise errors.UserError(
            f"{what} holds half a surrogate pair at character {error.start}", remedy="remove it"
        ) from error
    return value


def _lines(paths: Sequence[str]) -> Iterator[Line]:
    """Yield every line of files. A byte order mark is dropped, and \r\n becomes \n."""
    total = sum(map(os.path.getsize, paths))
    before = 0
    for path in paths:
        try:
            with open(path, "rb") as raw, _OPENERS.get(pathlib.Path(path).suffix, contextlib.nullcontext)(raw) as file:
                for number, content in enumerate(file, start=1):
                    text = _decoded(content, path, number)
                    done = (before + raw.tell()) / total
                    for part in [text] if "\f" not in text else re.findall("[^\f]*\f|[^\f]+", text):
                        yield Line(part, path, number, done)
        except _DECOMPRESSION_ERRORS as error:
            raise errors.UserError(
                f"{path} cannot be decompressed ({error})", remedy="copy or compress it again"
            ) from error
        before += os.path.getsize(path)


def _decoded(content: bytes, path: str, number: int) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.UserError(
            f"{path}:{number} is not UTF-8: byte {content[error.start]:#04x} at byte {error.start} of the line",
            remedy="convert the file, for example with iconv -t utf-8",
        ) from error
    text = text.removeprefix("\ufeff") if number == 1 else text
    return text[:-2] + "\n" if text.endswith("\r\n") else text


def _unzipped(raw: BinaryIO) -> Any:
    """Open the only file of a ZIP archive."""
    try:
        archive = zipfile.ZipFile(raw)
        if len(archive.namelist()) != 1:
            raise zipfile.BadZipFile(f"it holds {len(archive.namelist())} files, not one")
        return archive.open(archive.namelist()[0])
    except (NotImplementedError, OSError, RuntimeError) as error:
        raise zipfile.BadZipFile(str(error)) from error


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".zip": _unzipped}
