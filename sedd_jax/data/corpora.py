"""Find a corpus by its source: KIND:ARGUMENT, such as text:books/*.txt, or a published name, such as wikitext2."""

from collections.abc import Callable

from sedd_jax.data import documents, hub_corpora, published_corpora, python_corpora, text_files
from sedd_jax.runtime import errors

_READERS: dict[str, Callable[[str], documents.Corpus]] = {
    "text": text_files.read_text,
    "lines": text_files.read_lines,
    "jsonl": text_files.read_jsonl,
    "parquet": text_files.read_parquet,
    "tfds": hub_corpora.read_tfds,
    "hf": hub_corpora.read_hf,
    "python": python_corpora.read,
}
FORMS = (
    "text:GLOB",
    "lines:GLOB",
    "jsonl:GLOB#field",
    "parquet:GLOB#column",
    "tfds:NAME[/config][#feature]",
    "hf:OWNER/NAME[/config][#column]",
    "python:docs",
    "python:stdlib",
    *published_corpora.PUBLISHED,
)


def find(source: str) -> documents.Corpus:
    """Open the corpus that `source` names, one of `FORMS`. What is not on this machine is downloaded.

    A published name alone, such as wikitext2, downloads that corpus. NAME:SOURCE reads the rows of that corpus from
    another source.

    Raises:
        errors.UserError: if the kind is unknown, or what the source names is missing or malformed.
    """
    kind, _, argument = source.partition(":")
    if kind in published_corpora.PUBLISHED:
        return published_corpora.read(kind, find(argument or published_corpora.PUBLISHED[kind].source()))
    if kind not in _READERS:
        hint = errors.nearest(kind, [*_READERS, *published_corpora.PUBLISHED])
        raise errors.UserError(
            f"the source {source!r} is of no known kind", remedy=f"{hint}give one of {', '.join(FORMS)}"
        )
    return _READERS[kind](argument)
