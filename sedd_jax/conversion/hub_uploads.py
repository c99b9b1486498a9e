"""Uploads of checkpoints to the Hugging Face Hub: the files that were shown are sent, and nothing else."""

import contextlib
import dataclasses
import hashlib
import pathlib
import re
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from typing import Any

from sedd_jax import runs
from sedd_jax.conversion import convert, measured, published_checkpoints
from sedd_jax.data import tokenizers
from sedd_jax.runtime import errors, storage

_NEEDED = ("config.json", "model.safetensors", "README.md", *convert.CODE)
_ALLOWED = {
    *_NEEDED,
    measured.PICTURE,
    published_checkpoints.TOKENIZER,
    *tokenizers.FILES.values(),
    "tokenizer.model",
    "score.stablehlo",
    "example.py",
}
_PICTURE = re.compile(r"(curve|frontier)-[0-9a-f]+\.png")
# Bytes. Smaller files are sent as they were read when they were listed. The Hub takes larger ones by their hash only.
_IN_MEMORY = 2**24
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A file to upload, as it was when it was listed.

    Attributes:
        path: where it is.
        size: number of bytes.
        sha256: of its content.
        content: the bytes of a small file; None for a large one, which is read again.
    """

    path: pathlib.Path
    size: int
    sha256: str
    content: bytes | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upload:
    """What goes where.

    Attributes:
        repository: OWNER/NAME.
        is_public: whether everybody may see it.
        files: what is uploaded.
        left_out: names of what else is in the directory.
    """

    repository: str
    is_public: bool
    files: Sequence[File]
    left_out: Sequence[str]


def library() -> types.ModuleType:
    """The package huggingface_hub; raises errors.UserError if it is not installed."""
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise errors.UserError("the Hub needs a package", remedy="pip install 'sedd_jax[hub]'") from error
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def check_name(repository: str) -> None:
    """Raises errors.UserError if this is no name that a repository on the Hub can have."""
    hub = library()
    try:
        is_fine = published_checkpoints.is_hub_name(repository)
        hub.utils.validate_repo_id(repository)
    except hub.errors.HFValidationError:
        is_fine = False
    if not is_fine:
        raise errors.UserError(
            "is no name of a repository", field="to", value=repository, remedy="give OWNER/NAME, such as ada/my-sedd"
        )


@contextlib.contextmanager
def written(source: storage.Directory) -> Iterator[tuple[pathlib.Path, str]]:
    """The directory of a checkpoint for PyTorch: the source, or what `convert` makes of a run in a temporary place.

    Yields:
        The directory, and what was converted in words ("" if nothing was).

    Raises:
        errors.UserError: if the source is neither.
    """
    if not isinstance(source, pathlib.Path):
        raise errors.UserError(
            "is in a bucket", field="from", value=source, remedy="copy it and give a local directory"
        )
    if (source / storage.CHECKPOINTS).is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            directory = pathlib.Path(scratch) / "written"
            result = convert.convert(source, convert.Target(directory=directory))
            yield directory, convert.describe(result | {"to": "what is listed below"})
        return
    if missing := [name for name in _NEEDED if not (source / name).is_file()]:
        raise errors.UserError(
            f"is neither a run directory nor a checkpoint that `sedd convert` wrote: it has no {missing[0]}",
            field="from",
            value=source,
            remedy="give one of these",
        )
    yield source, ""


def plan(directory: pathlib.Path, repository: str, *, is_public: bool) -> Upload:
    """Reads what a written checkpoint holds and decides what is uploaded: only files of the names that `convert` uses.

    Raises:
        errors.UserError: if a file says where it was made.
    """
    paths = sorted(directory.iterdir())
    is_sent = lambda path: path.is_file() and not path.is_symlink() and _is_allowed(path.name)
    files = [_read(path) for path in paths if is_sent(path)]
    left_out = [path.name for path in paths if not is_sent(path)]
    if lost := [name for name in _NEEDED if name in left_out]:
        raise errors.UserError(f"{directory / lost[0]} is a link", remedy="put the file itself there")
    config = runs.read_json(directory / "config.json")
    if config != measured.without_directories(config):
        raise errors.UserError(
            f"{directory / 'config.json'} names a directory of this machine, as earlier versions wrote it",
            remedy="convert the run again",
        )
    home = f"{pathlib.Path.home()}/".encode()
    for file in files:
        if len(home) > 2 and file.content is not None and home in file.content:
            raise errors.UserError(f"{file.path} names {home.decode()}", remedy="remove that from it")
    return Upload(repository=repository, is_public=is_public, files=files, left_out=left_out)


def describe(upload: Upload) -> str:
    """Every file with its size, and where all of them go."""
    wide = max(len(file.path.name) for file in upload.files)
    count = max(len(f"{file.size:,}") for file in upload.files)
    kind = "public" if upload.is_public else "private"
    lines = [f"to the {kind} repository {upload.repository} on {library().constants.ENDPOINT}:"]
    lines += [f"  {file.path.name:<{wide}}  {file.size:>{count},} bytes" for file in upload.files]
    lines.append(f"{len(upload.files)} files, {sum(file.size for file in upload.files):,} bytes")
    if upload.left_out:
        lines.append(f"not uploaded: {', '.join(upload.left_out)}")
    return "\n".join(lines)


def look(upload: Upload) -> str:
    """What the Hub has under the name of the repository, in words.

    Raises:
        errors.UserError: if it is public and was not to be, or the Hub cannot be asked.
    """
    is_private = _is_private(upload)
    if is_private is None:
        return f"{upload.repository} does not exist yet and will be made"
    if not is_private and not upload.is_public:
        raise errors.UserError(
            "is a public repository, so nothing was uploaded",
            field="to",
            value=upload.repository,
            remedy=f"give {errors.name('public')} if everybody may see the files, or another name",
        )
    kept = ", and stays so" if is_private and upload.is_public else ""
    return (
        f"{upload.repository} exists and is {'private' if is_private else 'public'}{kept}; files of the same names are "
        "replaced"
    )


def send(upload: Upload) -> str:
    """Uploads the files in one commit, makes the repository if there is none, and returns the address of the commit.

    Raises:
        errors.UserError: if a file is not what was shown, or the Hub refuses.
    """
    for file in upload.files:
        if not file.path.is_file() or _read(file.path).sha256 != file.sha256:
            raise _changed(file)
    hub = library()
    operations = [
        hub.CommitOperationAdd(file.path.name, str(file.path) if file.content is None else file.content)
        for file in upload.files
    ]
    is_new = _is_private(upload) is None
    with _asking(upload) as api:
        if is_new:
            api.create_repo(upload.repository, private=not upload.is_public)
    look(upload)  # Its owner may have settings of their own for new repositories.
    with _asking(upload) as api:
        # What is sent before the commit, nobody sees without it.
        api.preupload_lfs_files(upload.repository, operations)
    for file, operation in zip(upload.files, operations, strict=True):
        if operation.upload_info.sha256.hex() != file.sha256:
            raise _changed(file)
    with _asking(upload) as api:
        done = api.create_commit(
            upload.repository, operations, commit_message="Upload a model that sedd_jax has trained or converted"
        )
    return done.commit_url


def _is_private(upload: Upload) -> bool | None:
    """Whether the repository is private; None if there is none."""
    with _asking(upload) as api:
        try:
            return bool(api.model_info(upload.repository).private)
        except library().errors.RepositoryNotFoundError as error:
            if error.response.status_code == 404:
                return None
            raise


@contextlib.contextmanager
def _asking(upload: Upload) -> Iterator[Any]:
    """A client of the Hub with the user's token. Whatever it raises becomes an error of one line without the token."""
    hub = library()
    token = hub.get_token()
    if token is None:
        raise errors.UserError("there is no token for the Hub, so nothing was uploaded", remedy=_LOG_IN)
    try:
        yield hub.HfApi(token=token)
    except Exception as error:
        chain: list[Any] = [error]
        while chain[-1].__cause__ is not None:  # A thread that uploads wraps what it meets.
            chain.append(chain[-1].__cause__)
        refused = next((each for each in chain if isinstance(each, hub.errors.HfHubHTTPError)), None)
        lost = next((each for each in chain if isinstance(each, hub.errors.HTTPError | ConnectionError)), None)
        owner = upload.repository.partition("/")[0]
        if refused is None and lost is not None:
            raise errors.UserError(
                f"{hub.constants.ENDPOINT} does not answer ({type(lost).__name__})",
                remedy="connect to the network, or correct HF_ENDPOINT and HF_HUB_OFFLINE",
            ) from error
        if refused is None:
            said = f"{type(chain[-1]).__name__}: {chain[-1]}".replace(token, "***")
            raise errors.UserError(f"the upload failed ({said[:300]})", remedy="mend that and try again") from error
        status, said = refused.response.status_code, (refused.server_message or "no reason").replace(token, "***")
        problem, remedy = {
            401: ("the Hub does not accept the token", _LOG_IN),
            403: (f"the token may not write to {upload.repository}", f"use one that may write for {owner}"),
            404: (f"the Hub has no {upload.repository}, or the token may not see it", "correct the name or the token"),
        }.get(status, (f"the Hub refuses with status {status} ({said[:300]})", "mend that, or try again later"))
        raise errors.UserError(problem, remedy=remedy) from error


def _changed(file: File) -> errors.UserError:
    return errors.UserError(
        f"{file.path} has changed since it was shown, so nothing was uploaded", remedy="give the command again"
    )


def _read(path: pathlib.Path) -> File:
    size = path.stat().st_size
    if size < _IN_MEMORY:
        content = path.read_bytes()
        return File(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest(), content=content)
    with path.open("rb") as file:
        return File(path=path, size=size, sha256=hashlib.file_digest(file, "sha256").hexdigest(), content=None)


def _is_allowed(name: str) -> bool:
    return name in _ALLOWED or _PICTURE.fullmatch(name) is not None
