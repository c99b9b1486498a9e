"""Text that comes with every CPython: its documentation in English, and the source code of its library."""

import ast
import collections
import functools
import hashlib
import pathlib
import sysconfig
import tokenize
import unicodedata
import warnings
from collections.abc import Iterable, Iterator

from sedd_jax.data import documents
from sedd_jax.runtime import errors

# Directories of the standard library with tests, tools that have their own tests, or third-party packages.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})
_TABLES = frozenset({"encodings", "pydoc_data"})  # tables of characters and help topics: data, not code
_TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "•": "*", "→": "->"})


def read(name: str) -> documents.Corpus:
    """Open a corpus that comes with CPython.

    Args:
        name: docs (the language reference, and docstrings of the standard library) or stdlib (source code of the
            standard library, one document per file).

    Raises:
        errors.UserError: if the name is another one.
    """
    if name not in _CORPORA:
        known = " or ".join(f"python:{known}" for known in _CORPORA)
        raise errors.UserError(f"the source 'python:{name}' does not exist", remedy=f"give {known}")
    splits = _CORPORA[name]()
    return documents.Corpus(splits=documents.SPLITS, read=lambda split: iter(splits[split]))


@functools.cache
def _stdlib() -> dict[str, list[documents.Document]]:
    """Source files of each split. A top-level module and its submodules belong to one split, the same as in `_docs`."""
    found = collections.defaultdict(list)
    for place, path in _modules():
        if place.parts[0] not in _TABLES and _parsed(path) is not None:
            with tokenize.open(path) as file:
                found[_module_split(place)].append((file.read(), place))
    return {split: _numbered(found[split]) for split in documents.SPLITS}


def _modules() -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Yield the files of the standard library in order: path relative to its root, and full path."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(place.parts):
            yield place, path


def _module_split(place: pathlib.Path) -> str:
    return _split_of(f"module:{place.parts[0].removesuffix('.py')}")


def _numbered(texts: list[tuple[str, object]]) -> list[documents.Document]:
    """Documents made of (text, place) pairs."""
    return [documents.Document(text, str(place), (index + 1) / len(texts)) for index, (text, place) in enumerate(texts)]


@functools.cache
def _docs() -> dict[str, list[documents.Document]]:
    """Documents of each split, one per topic of the language reference and one per module.

    The hash of its name assigns each topic to a split, and each top-level module with all its submodules. The splits
    are ordered train, valid, test. A paragraph of an earlier split is dropped from the later ones. Otherwise held-out
    text would also be training text: the language reference repeats whole topics inside others, and the standard
    library repeats docstrings.
    """
    from pydoc_data import topics

    found = collections.defaultdict(list)
    for name, text in sorted(topics.topics.items()):
        found[_split_of(f"topic:{name}")].append(([text], f"topic {name}"))
    for place, path in _modules():
        found[_module_split(place)].append((_docstrings(path), f"docstrings of {place}"))
    seen = set()
    splits = {}
    for split in documents.SPLITS:
        kept = [(_without(_paragraphs(texts), seen), place) for texts, place in found[split]]
        splits[split] = _numbered([("\n\n".join(paragraphs), place) for paragraphs, place in kept if paragraphs])
        seen |= {_key(paragraph) for paragraphs, _ in kept for paragraph in paragraphs}
    return splits


def _split_of(name: str) -> str:
    """Split of a name: valid for 1 name in 20, test for 1 in 20, else train, by a hash that never changes."""
    salted = f"23:{name}"  # Of the first salts, this one gives held-out splits nearest to 5 % of the text each.
    bucket = int.from_bytes(hashlib.sha256(salted.encode()).digest()[:8], "big") % 20
    return {0: "valid", 1: "test"}.get(bucket, "train")


def _docstrings(path: pathlib.Path) -> list[str]:
    """Docstrings of a file's module, classes and functions, each once. The file is parsed, not run."""
    tree = _parsed(path)
    if tree is None:
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return list(dict.fromkeys(text for text in texts if text))


def _parsed(path: pathlib.Path) -> ast.Module | None:
    """Syntax tree of a file. None for files of Python 2, and for those that are invalid on purpose."""
    try:
        with warnings.catch_warnings():
            # The file's own escape sequences may warn, and `python -W error` would turn that into a failure.
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _paragraphs(texts: Iterable[str]) -> list[str]:
    """Paragraphs in printable ASCII, after typography is spelled out and accents are dropped; others are skipped."""
    paragraphs = []
    for text in texts:
        plain = unicodedata.normalize("NFKD", text.expandtabs().translate(_TYPOGRAPHY))
        plain = "".join(character for character in plain if not unicodedata.combining(character))
        lines = "\n".join(line.rstrip() for line in plain.splitlines())
        paragraphs += [part.strip("\n") for part in lines.split("\n\n") if part.strip()]
    return [part for part in paragraphs if part.isascii() and part.replace("\n", "").isprintable()]


def _without(paragraphs: list[str], seen: set[str]) -> list[str]:
    """Paragraphs whose key has not been seen."""
    return [paragraph for paragraph in paragraphs if _key(paragraph) not in seen]


def _key(paragraph: str) -> str:
    """A paragraph without indentation and line breaks, so that a rewrapped copy counts as the same."""
    return " ".join(paragraph.split())


_CORPORA = {"docs": _docs, "stdlib": _stdlib}
