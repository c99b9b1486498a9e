"""Corpora of tensorflow-datasets and of the Hugging Face hub."""

import http.client
import os
import pathlib
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sedd_jax.data import documents
from sedd_jax.runtime import errors

_NAMES = {"validation": "valid", "dev": "valid"}
_ROWS_AT_ONCE = 1024
_SECONDS_TO_ANSWER = 10
_HF = "https://huggingface.co"
_GENERAL_HOST = "https://storage.googleapis.com"  # tensorflow-datasets looks here if a dataset lists no address


def read_tfds(spec: str) -> documents.Corpus:
    """Open NAME[/config][#feature] of tensorflow-datasets, which is downloaded if it is not on this machine.

    The dataset is stored as array_record and read without TensorFlow. The dataset `text_files` reads local files, see
    `tfds_text_files`.

    Raises:
        errors.UserError: if the package or the dataset is missing, or the dataset has no such feature.
    """
    name, _, feature = spec.partition("#")
    tfds = _import_tfds(spec)
    try:
        builder = tfds.builder(name, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise errors.UserError(
            f"tfds:{spec} is not registered without TensorFlow ({str(error).splitlines()[0]})",
            remedy="correct the name, or export its text and name the files",
        ) from error
    texts = [key for key, value in builder.info.features.items() if isinstance(value, tfds.features.Text)]
    column = _column(f"tfds:{spec}", feature, texts)
    if not builder.is_prepared():
        _prepare(spec, tfds, builder)
    sources = {split: builder.as_data_source(split) for split in builder.info.splits}
    read_rows = lambda rows, indices: [row[column].decode() for row in rows.__getitems__(indices)]
    return _corpus(f"tfds:{builder.info.full_name}", sources, read_rows)


def _import_tfds(spec: str) -> types.ModuleType:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise errors.UserError(
            f"tfds:{spec} needs tensorflow-datasets", remedy="pip install tensorflow-datasets"
        ) from error
    from sedd_jax.data import tfds_text_files  # noqa: F401, which registers itself

    return tensorflow_datasets


def _prepare(spec: str, tfds: types.ModuleType, builder: Any) -> None:
    """Download a dataset and write it to disk.

    If the host does not answer, this fails at once. tensorflow-datasets itself would try again and again first.
    """
    addresses = [url for url in builder.url_infos or () if url.startswith("http")] or [_GENERAL_HOST]
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS is None and not _answers(addresses[0]):
        raise errors.UserError(
            f"tfds:{spec} is not in {builder.data_path.parent}, and {addresses[0]} does not answer",
            remedy="connect to the network, or copy the prepared dataset there",
        )
    try:
        builder.download_and_prepare()
    except (tfds.download.DownloadError, AssertionError, OSError) as error:
        raise errors.UserError(f"tfds:{spec} cannot be prepared: {error}") from error


def _answers(address: str) -> bool:
    """Whether the host of the Hub's address answers.

    Raises:
        errors.UserError: if that is no address.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_SECONDS_TO_ANSWER):
            return True
    except urllib.error.HTTPError:
        return True  # An error status is an answer too. The download will report it.
    except (ValueError, http.client.InvalidURL) as error:
        raise errors.UserError(
            f"the environment has HF_ENDPOINT={address!r}, which is no address ({error})",
            remedy=f"set it to one such as {_HF}, or unset it",
        ) from error
    except (OSError, http.client.HTTPException):
        return False


def read_hf(spec: str) -> documents.Corpus:
    """Open OWNER/NAME[/config][#column] of the Hugging Face hub, or of a local directory OWNER/NAME.

    The files must be Parquet or JSON.

    Raises:
        errors.UserError: if the package or the dataset is missing, or the dataset has no such column.
    """
    name, _, column = spec.partition("#")
    owner, _, rest = name.partition("/")
    if not rest:
        raise errors.UserError(f"hf:{spec} names no owner", remedy="give one as in hf:OWNER/NAME")
    dataset, _, config = rest.partition("/")
    repository = f"{owner}/{dataset}"
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise errors.UserError(f"hf:{spec} needs the package datasets", remedy="pip install 'sedd_jax[hf]'") from error
    if not pathlib.Path(repository).is_dir() and not _answers(os.environ.get("HF_ENDPOINT") or _HF):
        # Cached datasets still load, and others fail at once. Both packages read HF_HUB_OFFLINE only when imported.
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        sources: Any = datasets.load_dataset(repository, config or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # Where a file is damaged, the reason is the cause.
        raise errors.UserError(
            f"hf:{spec} cannot be loaded ({error.__cause__ or error})",
            remedy="check the name and the network; if a script makes the dataset, look for a copy in Parquet, because "
            "scripts are no longer run",
        ) from error
    features = next(iter(sources.values())).features
    texts = [key for key, value in features.items() if getattr(value, "dtype", None) in ("string", "large_string")]
    column = _column(f"hf:{spec}", column, texts)
    return _corpus(f"hf:{name}", sources, lambda rows, indices: rows[indices.start : indices.stop][column])


def _column(spec: str, wanted: str, texts: Sequence[str]) -> str:
    """Name of the column to read: the wanted one, else `text`, else the only column of text."""
    column = wanted or ("text" if "text" in texts or len(texts) != 1 else texts[0])
    if not texts:
        raise errors.UserError(f"{spec} has no column of text", remedy="give another dataset")
    if column not in texts:
        raise errors.UserError(
            f"{spec} has no text in {column!r}", remedy=f"name one of {', '.join(texts)}, as in #{texts[0]}"
        )
    return column


def _corpus(
    spec: str, sources: Mapping[str, Any], read_rows: Callable[[Any, range], Sequence[str]]
) -> documents.Corpus:
    # Of several names of one split the last in this order counts: "valid" before "validation" before "dev".
    native = {_NAMES.get(name, name): name for name in sorted(sources, key=[*reversed(_NAMES), *sources].index)}
    parts = documents.divide(native)
    if not parts:
        raise errors.UserError(
            f"{spec} has the splits {', '.join(sources)}, none of train, validation and test",
            remedy="give another dataset",
        )

    def read(split: str) -> Iterator[documents.Document]:
        part = parts[split]
        name = native[part.native]
        indices = part.indices(len(sources[name]))
        for start in range(0, len(indices), _ROWS_AT_ONCE):
            some = indices[start : start + _ROWS_AT_ONCE]
            for index, text in zip(some, read_rows(sources[name], some), strict=True):
                done = part.progress((index + 1) / len(sources[name]))
                yield documents.Document(text or "", f"{spec} {name} {index}", done)

    return documents.Corpus(splits=tuple(parts), read=read)
