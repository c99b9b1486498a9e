"""Text is read whatever compressed it and whatever it is called; what is no text is refused by its name."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from sedd_jax.runtime import compressed, errors

TEXT = "".join(f"line {number * number} é\n" for number in range(1000)).encode()


def _zipped(names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, TEXT)
    return file.getvalue()


def _tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("book.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return file.getvalue()


def _parquet():
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), file)
    return file.getvalue()


COMPRESSED = {
    "gz": gzip.compress(TEXT),
    "two members": gzip.compress(TEXT[:100]) + gzip.compress(TEXT[100:]),
    "xz": lzma.compress(TEXT),
    "bz2": bz2.compress(TEXT),
    "zst": pyarrow.compress(TEXT, codec="zstd", asbytes=True),
    "zip": _zipped(["book.txt"]),
    "zip of a directory made on a Mac": _zipped(["books/", "books/book.txt", "__MACOSX/books/._book.txt"]),
}
NO_TEXT = {
    "tar archive": _tar(),
    "7z archive": b"7z\xbc\xaf\x27\x1c\0\4",
    "RAR archive": b"Rar!\x1a\x07\1\0",
    "Parquet file": _parquet(),
    "Arrow file": b"ARROW1\0\0",
    "SQLite database": b"SQLite format 3\0\x10\0",
    "PDF": b"%PDF-1.7\n",
    "text in UTF-16": "text".encode("utf-16"),
}


def _read(path):
    with compressed.opened(str(path)) as (_, file):
        return file.read()


@pytest.mark.parametrize("name", ["book", "BOOK.TXT.GZ", "book.txt"])
@pytest.mark.parametrize("kind", sorted(COMPRESSED))
def test_text_is_read_by_its_first_bytes(tmp_path, kind, name):
    (tmp_path / name).write_bytes(COMPRESSED[kind])
    assert _read(tmp_path / name) == TEXT


@pytest.mark.parametrize("wrap", [bytes, gzip.compress, lzma.compress, bz2.compress], ids=lambda fn: fn.__module__)
@pytest.mark.parametrize("kind", sorted(NO_TEXT))
def test_what_is_no_text_is_refused_by_its_name(tmp_path, kind, wrap):
    (tmp_path / "books").write_bytes(wrap(NO_TEXT[kind]))
    with pytest.raises(errors.UserError, match=rf"books is (an? )?{kind}, not text in UTF-8: \w+"):
        _read(tmp_path / "books")


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2", "zst", "zip"])
def test_a_cut_file_is_named(tmp_path, kind):
    (tmp_path / "book").write_bytes(COMPRESSED[kind][:-30])
    with pytest.raises(errors.UserError, match="book cannot be decompressed"):
        _read(tmp_path / "book")


def test_a_zip_archive_of_several_files_is_to_be_unpacked(tmp_path):
    (tmp_path / "books.zip").write_bytes(_zipped(["a", "b"]))
    with pytest.raises(errors.UserError, match=r"books.zip is a ZIP archive of 2 files, not of one: unpack it"):
        _read(tmp_path / "books.zip")


def test_plain_text_is_read_unless_its_name_promises_compression(tmp_path):
    for name in ("book", "book.txt.gz"):
        (tmp_path / name).write_bytes(TEXT)
    assert _read(tmp_path / "book") == TEXT
    with pytest.raises(errors.UserError, match=r"book.txt.gz cannot be decompressed"):
        _read(tmp_path / "book.txt.gz")


def test_what_the_system_refuses_stays_its_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        _read(tmp_path / "none")


def test_a_zip_archive_with_a_name_that_is_none_is_named(tmp_path):
    content = _zipped(["caf\u00e9"])
    (tmp_path / "books.zip").write_bytes(content.replace("caf\u00e9".encode(), b"caf\xff\xfe"))
    with pytest.raises(errors.UserError, match=r"books\.zip cannot be decompressed"):
        _read(tmp_path / "books.zip")
