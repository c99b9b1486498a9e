"""Run directories in a Google Cloud Storage bucket, gs://BUCKET/RUN.

A program works on a local copy in the user's cache, and uploads what it writes there. Only checkpoints are written to
the bucket and read from it directly.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from sedd_jax.runtime import errors, hosts, locks

Directory = pathlib.Path | epath.Path
CHECKPOINTS = "checkpoints"
PARTIAL = ".partial"  # A directory of this name is an unfinished one that a kill has left.
_MOVED = ".moved.json"  # Inside of it: the names that are being moved to their place.
_LAST = ("config.json", "header.json")  # These mark a run or prepared text as complete, so they are written last.
_LONGEST_DESCRIPTION = 2**26  # bytes; a SentencePiece model in a tokenizer's description takes a few million
_sent: dict[pathlib.Path, tuple[int, int]] = {}  # Size and time of each local file as it is in the bucket.


def directory(name: str | os.PathLike[str]) -> Directory:
    """The directory with this name, local or gs://.

    Raises:
        errors.UserError: if it is in a bucket and gcsfs is not installed, or its name is not UTF-8.
    """
    name = os.fspath(name)
    if not name.startswith("gs://"):
        found = hosts.local_path(name)
        try:
            str(found.absolute()).encode()
        except UnicodeEncodeError as error:
            raise errors.UserError(
                f"{name!r} is no name in UTF-8, and checkpoints cannot be written there", remedy="give another name"
            ) from error
        return found
    try:
        import fsspec
        import gcsfs  # noqa: F401, which fsspec finds
    except ImportError as error:
        raise errors.UserError(f"{name} needs gcsfs", remedy="pip install 'sedd_jax[gcs]'") from error
    # A cached listing would hide files that other processes write.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(name.rstrip("/"))


def is_remote(place: Directory) -> bool:
    """Whether a directory is in a bucket."""
    return not isinstance(place, pathlib.Path)


def local_copy(place: Directory) -> pathlib.Path:
    """The local directory in which this process works on a directory: the same one if it is local."""
    if isinstance(place, pathlib.Path):
        return place
    name = f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:12]}-{jax.process_index()}"
    return hosts.cache_directory() / "buckets" / name


def holds(place: Directory, name: str) -> bool:
    """Whether a directory contains a file or directory of this name."""
    if not is_remote(place):
        return (place / name).exists()
    with _bucket(place) as bucket:
        return bucket.exists(f"{place}/{name}")


def clear(place: Directory) -> None:
    """Deletes the local copy of a directory in a bucket."""
    if is_remote(place):
        shutil.rmtree(local_copy(place), ignore_errors=True)


def download(place: Directory, *names: str) -> None:
    """Makes files and directories of the local copy what they are in the bucket, where they may be missing.

    A directory of packed text is skipped if the local copy has the same header.json.

    Raises:
        errors.UserError: if an object has a name that leads out of the copy.
    """
    if not is_remote(place):
        return
    local = local_copy(place)
    with _bucket(place) as bucket:
        for name in names:
            header = local / name / "header.json"
            if header.exists() and header.read_bytes() == (place / name / "header.json").read_bytes():
                continue
            there = sorted(bucket.find(f"{place}/{name}"), key=_is_last)
            files = {found: local / _below(place, found) for found in there}
            _drop(local / name, set(files.values()))
            for found, file in files.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                # Another process may read the file that this one replaces.
                partial = local.with_name(f".{local.name}-{uuid.uuid4().hex}{PARTIAL}")
                try:
                    bucket.get_file(found, str(partial))
                    partial.replace(file)
                finally:
                    partial.unlink(missing_ok=True)
                _sent[file] = _version(file)


def upload(place: Directory, *patterns: str) -> None:
    """Uploads files of the local copy that have changed: all of them, or those that match a pattern.

    Pass patterns for what this program has written. The rest of the copy may be older than the bucket.
    """
    if not is_remote(place):
        return
    local = local_copy(place)
    with _bucket(place) as bucket:
        files = {path for pattern in patterns or ("**/*",) for path in local.glob(pattern) if path.is_file()}
        for file in sorted(files, key=lambda file: (*_is_last(str(file)), file)):
            version = _version(file)
            if _sent.get(file) != version:
                bucket.put_file(str(file), f"{place}/{file.relative_to(local)}")
                _sent[file] = version


def get_text(file: Directory) -> str | None:
    """The text of a small file, local or in a bucket; None if there is none."""
    content = get_bytes(file)
    return None if content is None else content.decode()


def get_bytes(file: Directory) -> bytes | None:
    """The content of a small file, local or in a bucket; None if there is none."""
    try:
        if isinstance(file, pathlib.Path):
            return file.read_bytes()
        with _bucket(file.parent) as bucket:
            return bucket.cat_file(str(file))
    except OSError as error:
        if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def put_text(file: Directory, text: str) -> None:
    """Writes a small file, local or in a bucket, as a whole."""
    if isinstance(file, pathlib.Path):
        replace_text(file, text, mark=f"-{uuid.uuid4().hex}")  # Others may write the same file at the same time.
    else:
        with _bucket(file.parent) as bucket:
            bucket.pipe_file(str(file), text.encode())


def remove(file: Directory) -> None:
    """Deletes a file, local or in a bucket."""
    if isinstance(file, pathlib.Path):
        file.unlink(missing_ok=True)
    else:
        with _bucket(file.parent) as bucket:
            bucket.rm_file(str(file))


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Bytes [start, stop) of each file in a bucket, all requested at once."""
    if not ranges:
        return []
    files, starts, stops = zip(*ranges, strict=True)
    with _bucket(epath.Path(files[0]).parent) as bucket:
        return bucket.cat_ranges(list(files), list(starts), list(stops), on_error="raise")


def check_regular(path: pathlib.Path) -> None:
    """Raises errors.UserError if what is there is no file with an end: a directory, a pipe, or a device."""
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a pipe, a socket or a device"
        raise errors.UserError(f"{path} is {kind}, not a file", remedy="put the file there")


def read_description(path: pathlib.Path) -> str:
    """The text of a file that another program may have written to describe a model.

    Raises:
        errors.UserError: if it is not a regular file, or too long to be read.
        UnicodeDecodeError: if it is not UTF-8.
        OSError: as the system does.
    """
    check_description(path)
    return path.read_text(encoding="utf-8")


def check_description(path: pathlib.Path) -> None:
    """Raises errors.UserError if what describes a model is not a regular file, or too long to be read."""
    check_regular(path)
    if (size := path.stat().st_size) > _LONGEST_DESCRIPTION:
        raise errors.UserError(
            f"{path} has {size} bytes, more than the {_LONGEST_DESCRIPTION} of any description",
            remedy="put the right file there",
        )


def replace_text(path: pathlib.Path, text: str, mark: str = "") -> None:
    """Writes a local file. Another of this name stays until the whole one takes its place; `mark` is for its name."""
    partial = path.with_name(f".{path.name}{mark}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def is_free(place: Directory, *ours: str) -> bool:
    """Whether a directory can be made here: there is none, or an empty one, `ours` and what a kill has left aside."""
    if not place.exists():
        return True
    if not place.is_dir():
        return False
    names = {path.name for path in place.iterdir()} - {PARTIAL, locks.INSIDE, *ours}
    return not names or (names <= _moved(place) and names.isdisjoint(_LAST))


@contextlib.contextmanager
def new_directory(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary local directory that becomes `final` on success and is deleted on failure.

    It is beside `final` and renamed. If `final` is an empty directory, perhaps a mount point, a link or the current
    one, it is inside, and its content is moved, what marks it as complete last. A kill between these moves leaves a
    list of what is moved, so that the next try can start again.
    """
    named, final = final, pathlib.Path(os.path.realpath(final))
    is_inside = final.is_dir()
    partial = final / PARTIAL if is_inside else final.parent / f".{final.name}{PARTIAL}"
    try:
        if is_inside:
            for name in _moved(final):
                _remove(final / name)
        _remove(partial)  # Left by a process that was killed.
        partial.mkdir(parents=True)
    except OSError as error:
        raise errors.UserError(f"cannot write to {named} ({error.strerror})", remedy="use another directory") from error
    try:
        yield partial
        if not is_inside:
            partial.rename(final)
            return
        paths = sorted(partial.iterdir(), key=lambda path: (_is_last(path.name), path.name))
        (partial / _MOVED).write_text(json.dumps([path.name for path in paths]), encoding="utf-8")
        for path in paths:
            path.rename(final / path.name)
        shutil.rmtree(partial)
    except BaseException:
        # Threads of a save that failed may still write there. What they leave is removed at the next try.
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _moved(place: Directory) -> set[str]:
    """Names in a directory that `new_directory` was moving there when it was killed."""
    try:
        names = json.loads((place / PARTIAL / _MOVED).read_text(encoding="utf-8"))
        return {os.path.basename(name) for name in names} - {""}
    except (OSError, ValueError, TypeError):
        return set()


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _drop(name: pathlib.Path, kept: set[pathlib.Path]) -> None:
    """Deletes what a local copy has under a name beside the files that are kept."""
    for path in sorted(name.rglob("*"), reverse=True):  # What is in a directory comes before it.
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()
    if not kept:
        _remove(name)


@contextlib.contextmanager
def _bucket(place: Directory) -> Iterator[Any]:
    """The file system of buckets. Any failure of it becomes an OSError that names the directory."""
    import fsspec

    try:
        yield fsspec.filesystem("gcs")
    except errors.UserError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(place)) from error


def _below(place: Directory, found: str) -> str:
    """The name of an object within a directory. Unlike that of a file it may have any text between its slashes."""
    name = found.removeprefix(f"{place}/".removeprefix("gs://"))
    if name.startswith("/") or ".." in name.split("/"):
        raise errors.UserError(f"{place} holds {name!r}, which is no name of a file in it", remedy="remove that object")
    return name


def _is_last(path: str) -> tuple[bool, ...]:
    return tuple(path.rpartition("/")[2] == name for name in _LAST)


def _version(file: pathlib.Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
