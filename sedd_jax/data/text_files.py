"""Corpora in local files: plain text, one document per line, JSON lines and Parquet.

A source names files by a glob pattern. If the pattern contains {split}, each split reads the files that match with its
name in that place. The valid split may also be called validation, dev or heldout.
"""

import functools
import glob
import itertools
import json
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sedd_jax.data import documents
from sedd_jax.runtime import compressed, errors, hosts

_ANY_FOLDERS = re.compile(r"(?<![^/])\*\*(?:/\*\*)*(?![^/])")
_MEMORY_OF_TEXT = 16  # bytes that it takes to hold a character and make tokens of it
_NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev", "heldout"), "test": ("test",)}
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
    """Open text files in UTF-8, which may be compressed; see `compressed.opened`.

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
    pattern, field = _divided(pattern)
    parse = functools.partial(_json_field, field=field)
    return _corpus(pattern, functools.partial(_records, parse=parse, skips_blank=True))


def read_parquet(pattern: str) -> documents.Corpus:
    """Open Parquet files: GLOB#column, by default the column text."""
    pattern, column = _divided(pattern)
    return _corpus(pattern, functools.partial(_parquet, column=column))


def _divided(pattern: str) -> tuple[str, str]:
    """The pattern of files, and the field that holds the text. A # before a / belongs to the pattern."""
    files, _, field = pattern.rpartition("#")
    return (pattern, "text") if not files or "/" in field else (files, field or "text")


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
    """The files that match, sorted, each once whatever links lead to it. A name that exists as written is no pattern.

    Raises:
        errors.UserError: if a link leads nowhere, a directory may not be listed, or the name is not that of a file.
    """
    pattern = os.path.expanduser(pattern.replace("{split}", split))
    if os.path.lexists(pattern):
        _check_file(pattern)
        return [pattern]
    for part in itertools.accumulate(pathlib.Path(pattern).parent.parts, os.path.join):
        for folder in _expanded(part):
            _check_listed(folder)
    found = [path for path in _expanded(pattern) if not os.path.isdir(path)]
    for path in found:
        _check_file(path)
    # The last name of a file counts: one that is no link, and the first of these.
    last = sorted(found, key=lambda path: (os.path.islink(path), path), reverse=True)
    return sorted({os.path.realpath(path): path for path in last}.values())


def _expanded(pattern: str) -> Iterator[str]:
    """The names that match, in which ** stands for any folders. Links are followed, to each folder once."""
    found = _ANY_FOLDERS.search(pattern)
    if found is None:
        yield from glob.glob(pattern)
        return
    above, below = pattern[: found.start()], pattern[found.end() :].lstrip("/")
    for top in glob.glob(above) if above else [""]:
        for folder in _folders(top):
            yield from _expanded(glob.escape(folder) + (below or "*"))


def _folders(top: str) -> Iterator[str]:
    """A folder and all below it that are not hidden, each once: by a name without a link if it has one.

    A link to a folder that it is in adds nothing, even if that lies above `top`.
    """
    folders, links, seen = [top], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        place = os.path.realpath(folder or ".")
        if place in seen:
            continue
        seen.add(place)
        yield folder
        _check_listed(folder or ".")
        for name in sorted(os.listdir(folder or "."), reverse=True):
            inner = f"{folder}{name}/"
            if name.startswith(".") or not os.path.isdir(inner):
                continue
            if not os.path.islink(inner[:-1]):
                folders.append(inner)
            elif not pathlib.Path(place).is_relative_to(os.path.realpath(inner)):
                links.append(inner)


def _check_listed(folder: str) -> None:
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise errors.UserError(f"{folder} may not be listed, and files in it may match", remedy="make it readable")


def _check_file(path: str) -> None:
    if not os.path.exists(path):
        raise errors.UserError(
            f"{path} is a link to {os.readlink(path)}, which does not exist", remedy="mend or remove it"
        )
    if os.path.isdir(path):
        raise errors.UserError(f"{path} is a directory", remedy=f"name the files in it, as in {path.rstrip('/')}/*")
    if not os.path.isfile(path):
        raise errors.UserError(f"{path} is not a regular file, and text is read twice", remedy="write it to a file")


def _text(paths: Sequence[str], part: documents.Part) -> Iterator[documents.Document]:
    """Documents made of the lines whose last character is in a part of all characters.

    If all files together have only one line, the line itself is cut where the part begins and ends.
    """
    wanted = None
    if not part.is_whole:
        number, size = 0, 0
        for line in lines(paths):
            number, size = number + 1, size + len(line.text)
        wanted = part.indices(size)
        if number == 1:
            line = next(lines(paths))
            yield from _joined([line._replace(text=line.text[wanted.start : wanted.stop])], part)
            return
    end, path, held, size, largest = 0, "", [], 0, _largest()
    for line in lines(paths):
        end += len(line.text)
        if wanted is not None and not wanted.start < end <= wanted.stop:
            continue
        if line.path != path:
            yield from _joined(held, part)
        path, size = line.path, len(line.text) + (size if held else 0)
        held.append(line)
        if size > largest:
            raise errors.UserError(
                f"{held[0].place} begins a document of over {largest:,} characters, too long for this machine's memory",
                remedy="end it by a form feed, or name it as lines:FILE, where each line is a document",
            )
        if line.text.endswith("\f"):
            yield from _joined(held, part)
    yield from _joined(held, part)


def _joined(held: list[Line], part: documents.Part) -> Iterator[documents.Document]:
    """The document that held lines make, unless it is blank. Empties the list."""
    text = "".join(line.text for line in held).removesuffix("\f").strip("\n")
    if text.strip():
        place = next(line.place for line in held if line.text.strip())
        yield documents.Document(text, place, part.progress(held[-1].done))
    held.clear()


def _records(
    paths: Sequence[str], part: documents.Part, *, parse: Callable[[Line], str], skips_blank: bool = False
) -> Iterator[documents.Document]:
    """Documents of one line each."""
    records = lambda: (line for line in lines(paths) if not (skips_blank and line.text.isspace()))
    wanted = None if part.is_whole else part.indices(sum(1 for _ in records()))
    for index, line in enumerate(records()):
        if wanted is None or index in wanted:
            yield documents.Document(parse(line), line.place, part.progress(line.done))


def _json_field(line: Line, field: str) -> str:
    text = line.text.strip()
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse_array(line)
        raise errors.UserError(f"{line.place} is not JSON ({error})", remedy="correct or remove the line") from error
    if not isinstance(record, dict) or field not in record:
        if isinstance(record, list):
            _refuse_array(line)
        if not isinstance(record, dict) or not record:
            raise errors.UserError(f"{line.place} has no field {field!r}", remedy="correct or remove the line")
        raise errors.UserError(
            f"{line.place} has no field {field!r}, its fields are {', '.join(record)}",
            remedy=f"name the field that holds the text, as in #{next(iter(record))}",
        )
    return _checked(record[field], f"{line.place}, field {field!r},")


def _refuse_array(line: Line) -> None:
    """Raises errors.UserError if a line that is no object is the start of a JSON file without lines."""
    if line.number == 1 and re.match(r"\s*(\[|\{\s*$)", line.text):
        whole, one_by_one = ("an array", "'.[]'") if line.text.lstrip().startswith("[") else ("objects over lines", ".")
        raise errors.UserError(
            f"{line.path} is JSON, but {whole}, not an object on each line",
            remedy=f"jq -c {one_by_one} {shlex.quote(line.path)} > {shlex.quote(pathlib.Path(line.path).stem)}.jsonl",
        )


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
            remedy=f"name the one that holds the text, as in #{file.schema_arrow.names[0]}"
            if names
            else "give another",
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
    """`value`, if it is text that UTF-8 can write, and "" for null. `what` describes it in the error."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise errors.UserError(f"{what} holds {type(value).__name__}, not text", remedy="correct or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise errors.UserError(
            f"{what} holds half a surrogate pair at character {error.start}", remedy="remove it"
        ) from error
    _refuse_null(value, what)
    return value


def lines(paths: Sequence[str]) -> Iterator[Line]:
    """Yields every line of text files, which may be compressed. A byte order mark is dropped, and \\r\\n becomes \\n.

    Raises:
        errors.UserError: if a file is damaged or no text; see `compressed.opened`.
    """
    total = sum(map(os.path.getsize, paths))
    before = 0
    largest = _largest()
    for path in paths:
        with compressed.opened(path) as (raw, file):
            for number, content in enumerate(iter(functools.partial(file.readline, largest + 1), b""), start=1):
                if len(content) > largest:
                    raise errors.UserError(
                        f"{path}:{number} is a line of over {largest:,} bytes, too long for this machine's memory",
                        remedy="cut it, for example with fold -s, or give text if this is none",
                    )
                text = _decoded(content, path, number)
                # Files of the system have text and no size, and a log may grow while it is read.
                done = min(1.0, (before + raw.tell()) / max(1, total))
                for part in [text] if "\f" not in text else re.findall("[^\f]*\f|[^\f]+", text):
                    yield Line(part, path, number, done)
        before += os.path.getsize(path)


def _largest() -> int:
    """The most bytes of a line, and characters of a document, that this machine has the memory to tokenize."""
    return hosts.memory_bytes() // _MEMORY_OF_TEXT


def _decoded(content: bytes, path: str, number: int) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.UserError(
            f"{path}:{number} is not UTF-8: byte {content[error.start]:#04x} at byte {error.start} of the line",
            remedy="convert the file, for example with iconv -f latin1 -t utf-8 FILE > NEW",
        ) from error
    text = text.removeprefix("\ufeff") if number == 1 else text
    text = text[:-2] + "\n" if text.endswith("\r\n") else text
    _refuse_null(text, f"{path}:{number}")
    return text


def _refuse_null(text: str, what: str) -> None:
    """Raises errors.UserError if a text has a character that no text has, as what is not text does."""
    if "\0" in text:
        raise errors.UserError(
            f"{what} holds U+0000 at character {text.index(chr(0))}", remedy="remove it, or give text if this is none"
        )
