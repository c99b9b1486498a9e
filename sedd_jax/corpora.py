"""Where text comes from: a source names a corpus, `read` gives the documents of one of its splits.

`python:docs`  English that every CPython carries: its language reference and the docstrings of its standard library.
`text:GLOB`    UTF-8 files (plain, .gz or .xz), in the order of their names; a form feed separates documents.
"""

import ast
import collections
import difflib
import functools
import glob
import gzip
import hashlib
import lzma
import pathlib
import sysconfig
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator

SPLITS = ("train", "valid", "test")

# Directories of the standard library that hold tests, tools with their own tests, or other people's packages.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})
_TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "•": "*", "→": "->"})
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_HELD_OUT_SHARE = 0.05


def read(source: str, split: str) -> Iterator[str]:
    """Documents of one split of `source` (`kind:argument`), never empty, always in the same order."""
    kind, _, argument = source.partition(":")
    if kind not in _READERS:
        nearest = difflib.get_close_matches(kind, _READERS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"source={source!r} is of no known kind: {hint}give one of {', '.join(_FORMS)}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist: choose one of {', '.join(SPLITS)}")
    empty = True
    for document in _READERS[kind](argument, split):
        empty = False
        yield document
    if empty:
        raise ValueError(f"the {split} split of source={source!r} holds no text: give it more text, or its own file")


def _read_text(pattern: str, split: str) -> Iterator[str]:
    """Documents of the files that match, split by their names where the pattern says `{split}`, else by position."""
    if "{split}" in pattern:
        for path in _matching(pattern.replace("{split}", split)):
            yield from _documents(_text_of(path))
        return
    texts = [_text_of(path) for path in _matching(pattern)]
    if not any(text.strip() for text in texts):
        raise ValueError(f"the files that match {pattern!r} hold no text: give files with text in them")
    yield from _documents(_part("\f".join(texts), split))


def _matching(pattern: str) -> list[str]:
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if pathlib.Path(path).is_file())
    if not paths:
        raise FileNotFoundError(f"no file matches {pattern!r} (seen from {pathlib.Path.cwd()}): correct the path")
    return paths


def _text_of(path: str) -> str:
    """One file's text with its line ends as newlines and without a byte order mark."""
    opener = _OPENERS.get(pathlib.Path(path).suffix, open)
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed ({error}): copy or compress it again") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start} of the "
            f"uncompressed text; convert it, for example with iconv -t utf-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _part(text: str, split: str) -> str:
    """The first 90 % of a text, the 5 % after it (valid) or the last 5 % (test), cut after a line."""
    valid_start, test_start = (_line_start(text, round(len(text) * (1 - parts * _HELD_OUT_SHARE))) for parts in (2, 1))
    parts = {"train": text[:valid_start], "valid": text[valid_start:test_start], "test": text[test_start:]}
    return parts[split]


def _line_start(text: str, position: int) -> int:
    """Start of the line that `position` lies in, so that a cut there separates whole lines."""
    return max(text.rfind("\n", 0, position), text.rfind("\f", 0, position)) + 1


def _documents(text: str) -> Iterator[str]:
    """Documents between form feeds, without the newlines around them; blank ones are left out."""
    return (document.strip("\n") for document in text.split("\f") if document.strip())


def _read_python(argument: str, split: str) -> Iterator[str]:
    if argument != "docs":
        raise ValueError(f"source='python:{argument}' does not exist: the only one of its kind is 'python:docs'")
    return iter(_python_docs()[split])


@functools.cache
def _python_docs() -> dict[str, list[str]]:
    """Documents of each split, one per topic of the language reference and one per module.

    A topic, and a top-level module with all its submodules, belongs to one split by the hash of its name. A paragraph
    that stands in an earlier split (train, valid, test) is dropped from the later ones: the language reference repeats
    whole topics inside others, and the standard library repeats docstrings, which would make held-out text known.
    """
    from pydoc_data import topics

    found = collections.defaultdict(list)
    for name, text in sorted(topics.topics.items()):
        found[_split_of(f"topic:{name}")].append([text])
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(place.parts):
            found[_split_of(f"module:{place.parts[0].removesuffix('.py')}")].append(_docstrings(path))
    seen = set()
    splits = {}
    for split in SPLITS:
        documents = [_without(_paragraphs(texts), seen) for texts in found[split]]
        splits[split] = ["\n\n".join(paragraphs) for paragraphs in documents if paragraphs]
        seen |= {_key(paragraph) for paragraphs in documents for paragraph in paragraphs}
    return splits


def _split_of(name: str) -> str:
    """Held-out split for 2 names in 20, by a hash that is the same in every process."""
    salted = f"23:{name}"  # of the first salts, the one whose held-out splits come nearest to 5 % of the text each
    bucket = int.from_bytes(hashlib.sha256(salted.encode()).digest()[:8], "big") % 20
    return {0: "valid", 1: "test"}.get(bucket, "train")


def _docstrings(path: pathlib.Path) -> list[str]:
    """Docstrings of a file's module, classes and functions, each once, read without running the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the parsed file's own escapes, which would depend on -W
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # the library carries files that are no Python on purpose, or Python 2
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return list(dict.fromkeys(text for text in texts if text))


def _paragraphs(texts: Iterable[str]) -> list[str]:
    """Paragraphs in printable ASCII: typography is spelled out, accents are dropped, what is left over is skipped."""
    paragraphs = []
    for text in texts:
        plain = unicodedata.normalize("NFKD", text.expandtabs().translate(_TYPOGRAPHY))
        plain = "".join(character for character in plain if not unicodedata.combining(character))
        lines = "\n".join(line.rstrip() for line in plain.splitlines())
        paragraphs += [part.strip("\n") for part in lines.split("\n\n") if part.strip()]
    return [part for part in paragraphs if part.isascii() and part.replace("\n", "").isprintable()]


def _without(paragraphs: list[str], seen: set[str]) -> list[str]:
    return [paragraph for paragraph in paragraphs if _key(paragraph) not in seen]


def _key(paragraph: str) -> str:
    """A paragraph without its indentation and line breaks, so that a rewrapped copy counts as the same."""
    return " ".join(paragraph.split())


_READERS = {"python": _read_python, "text": _read_text}
_FORMS = ("python:docs", "text:GLOB")
