"""Run directories in a Google Cloud Storage bucket, gs://BUCKET/RUN.

A program works on a local copy in the user's cache, and brings into the bucket what it writes there. Only checkpoints
go to the bucket and back directly.
"""

import contextlib
import hashlib
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from sedd_jax.runtime import errors, hosts

Directory = pathlib.Path | epath.Path
CHECKPOINTS = "checkpoints"
_LAST = ("config.json", "header.json")  # What makes a directory a run's, or prepared text, is written last.
_sent: dict[pathlib.Path, tuple[int, int]] = {}  # Size and time of each local file as the bucket has it.


def directory(name: str) -> Directory:
    """The directory of a name, gs:// or local.

    Raises:
        errors.UserError: where gs:// is asked for without gcsfs.
    """
    if not name.startswith("gs://"):
        return pathlib.Path(name)
    try:
        import fsspec
        import gcsfs  # noqa: F401, which fsspec finds
    except ImportError as error:
        raise errors.UserError(f"{name} needs gcsfs", remedy="pip install 'sedd_jax[gcs]'") from error
    # What other processes write must be seen.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(name.rstrip("/"))


def is_remote(place: Directory) -> bool:
    """Whether a directory is in a bucket."""
    return not isinstance(place, pathlib.Path)


def local_copy(place: Directory) -> pathlib.Path:
    """Where this process works on a directory: the place itself where it is local."""
    if isinstance(place, pathlib.Path):
        return place
    name = f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:12]}-{jax.process_index()}"
    return hosts.cache_directory() / "buckets" / name


def holds(place: Directory, name: str) -> bool:
    """Whether a directory has a file or directory of this name."""
    if not is_remote(place):
        return (place / name).exists()
    with _bucket(place) as bucket:
        return bucket.exists(f"{place}/{name}")


def clear(place: Directory) -> None:
    """Removes the local copy of a directory in a bucket."""
    if is_remote(place):
        shutil.rmtree(local_copy(place), ignore_errors=True)


def download(place: Directory, *names: str) -> None:
    """Brings files and directories of a bucket into the local copy; packed text only where it is another one there."""
    if not is_remote(place):
        return
    local = local_copy(place)
    with _bucket(place) as bucket:
        for name in names:
            header = local / name / "header.json"
            if header.exists() and header.read_bytes() == (place / name / "header.json").read_bytes():
                continue
            for found in sorted(bucket.find(f"{place}/{name}"), key=_is_last):
                file = local / found.removeprefix(f"{place}/".removeprefix("gs://"))
                file.parent.mkdir(parents=True, exist_ok=True)
                bucket.get_file(found, str(file))
                _sent[file] = _version(file)


def upload(place: Directory, *patterns: str) -> None:
    """Brings files of the local copy that have changed into the bucket: all, or those that match.

    Name what this program has written: the rest of the copy may be older than what the bucket holds.
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


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Bytes [start, stop) of files in a bucket, all of them asked for at once."""
    if not ranges:
        return []
    files, starts, stops = zip(*ranges, strict=True)
    with _bucket(epath.Path(files[0]).parent) as bucket:
        return bucket.cat_ranges(list(files), list(starts), list(stops), on_error="raise")


@contextlib.contextmanager
def new_directory(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """A local directory beside `final` that takes its name on success and vanishes on failure."""
    partial = final.parent / f".{final.name}.partial"
    try:
        if partial.exists():
            shutil.rmtree(partial)  # What a kill has left.
        partial.mkdir(parents=True)
    except OSError as error:
        raise errors.UserError(f"cannot write to {final} ({error.strerror})", remedy="use another directory") from error
    try:
        yield partial
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial)
        raise


@contextlib.contextmanager
def _bucket(place: Directory) -> Iterator[Any]:
    """The file system of buckets, whose failures name the directory."""
    import fsspec

    try:
        yield fsspec.filesystem("gcs")
    except Exception as error:
        raise OSError(f"{place}: {type(error).__name__}: {error}") from error


def _is_last(path: str) -> tuple[bool, ...]:
    return tuple(path.rpartition("/")[2] == name for name in _LAST)


def _version(file: pathlib.Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
