"""Opens a text file, whatever compressed it, and refuses what is no text. Both are seen by the first bytes."""

import bz2
import contextlib
import gzip
import io
import lzma
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from sedd_jax.runtime import errors

_DAMAGES = (EOFError, lzma.LZMAError, zipfile.BadZipFile, zlib.error, OSError)
_UNPACK = "unpack it, and name the files"
# Kinds of files that are no text: how they begin, what they are, and what to do.
_NO_TEXT = (
    (rb".{257}ustar", "a tar archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (rb"PAR1", "a Parquet file", "name it as parquet:FILE"),
    (rb"ARROW1|FEA1", "an Arrow file", "write it as Parquet, and name that as parquet:FILE"),
    (rb"SQLite format 3\0", "an SQLite database", "export its text"),
    (rb"%PDF-", "a PDF", "extract its text"),
    (rb"\xff\xfe|\xfe\xff", "text in UTF-16", "convert it, as in iconv -f utf-16 -t utf-8 FILE > NEW"),
)


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a text file that gzip, xz, bzip2, Zstandard or ZIP may have compressed.

    Yields:
        The file as it is on disk, whose position says how much has been read, and its text as bytes.

    Raises:
        errors.UserError: if the file is damaged, an archive, or no text. Also if reading shows that it is damaged.
    """
    try:
        with open(path, "rb") as raw, _decompressed(path, raw) as file:
            head = file.peek(512)
            for pattern, kind, remedy in _NO_TEXT:
                if re.match(pattern, head, re.DOTALL):
                    raise errors.UserError(f"{path} is {kind}, not text in UTF-8", remedy=remedy)
            yield raw, file
    except _DAMAGES as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The system's, not the decompressor's.
        raise errors.UserError(
            f"{path} cannot be decompressed ({error})", remedy="copy or compress it again"
        ) from error


def _decompressed(path: str, raw: io.BufferedReader) -> io.BufferedReader:
    head, suffix = raw.peek(16), pathlib.Path(path).suffix.lower()
    found = [opener for pattern, _, opener in _COMPRESSIONS if re.match(pattern, head, re.DOTALL)]
    # A name that promises compression is believed, so that a damaged beginning is seen.
    found += [opener for _, promised, opener in _COMPRESSIONS if head and suffix == promised]
    return io.BufferedReader(found[0](raw)) if found else raw


def _unzipped(raw: BinaryIO) -> Any:
    """Opens the only file of a ZIP archive."""
    try:
        archive = zipfile.ZipFile(raw)
        # macOS adds files of its own.
        names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
        if len(names) != 1:
            raise errors.UserError(f"{raw.name} is a ZIP archive of {len(names)} files, not of one", remedy=_UNPACK)
        return archive.open(names[0])
    # It is encrypted, packed in an unknown way, or has a name that is none.
    except (NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        raise zipfile.BadZipFile(str(error)) from error


def _from_zstandard(raw: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.input_stream(raw, compression="zstd")


# How compressed files begin, the suffix that names them, and what opens them.
_COMPRESSIONS: tuple[tuple[bytes, str, Callable[[Any], Any]], ...] = (
    (rb"\x1f\x8b", ".gz", gzip.open),
    (rb"\xfd7zXZ\0", ".xz", lzma.open),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", ".bz2", bz2.open),
    (rb"\x28\xb5\x2f\xfd", ".zst", _from_zstandard),
    (rb"PK(\x03\x04|\x05\x06)", ".zip", _unzipped),
)
