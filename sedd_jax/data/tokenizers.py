"""Tokenizers: text to token ids and back. Each is a frozen value that JSON can store in a run directory.

Every tokenizer has these attributes:

    vocab_size     number of real tokens, N
    mask_id        id of its own mask; if None, the diffusion appends its mask as id N
    eos_id         id of the end of text; None if nothing ends a document
    unk_id         id of text that has no token; if None, such text is an error
    special_ids    ids that stand for no text: the three above, and others that a vocabulary keeps for its own use
"""

import json
import pathlib
import string
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Integer

from sedd_jax.data import alphabets, subwords
from sedd_jax.runtime import errors, hosts, storage

Tokenizer = (
    alphabets.Characters | alphabets.Bytes | alphabets.Ids | subwords.GPT2 | subwords.WordPiece | subwords.SentencePiece
)
Documents = Callable[[], Iterable[str]]

FORMS = (
    "characters",
    "text8",
    "bytes",
    "gpt2",
    "gpt2:FILE",
    "sentencepiece:N",
    "sentencepiece:FILE",
    "wordpiece:FILE",
    "ids:N",
)
# Files that some kinds of tokenizer read beside their description.
FILES = {"gpt2": "gpt2.tiktoken", "wordpiece": "vocab.txt"}
_REPAIR = "copy it again from where it was written"
_GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of GPT-2's own ranks
# Tokens of each kind, masks excluded. The number of characters depends on the corpus and is assumed to be 100.
VOCAB_SIZES = {"gpt2": 50_257, "text8": 27, "bytes": 256, "wordpiece": 30_521, "characters": 100}


def build(spec: str, documents: Documents) -> Tokenizer:
    """Make the tokenizer that `spec` names, one of `FORMS`.

    `characters` (the sorted characters of the corpus) and `sentencepiece:N` (N pieces) are learned from `documents()`.
    For `characters`, give the documents of every split. Then evaluations meet no character without an id, and the
    tokenizer learns nothing from held-out text but its set of characters. `text8` is a space (id 0) and a to z.

    Raises:
        errors.UserError: if the spec is malformed, or a file or a package that it needs is missing.
    """
    kind, argument = _parse(spec)
    return _BUILDERS[kind](argument, documents)


def check(spec: str) -> None:
    """Raises errors.UserError if a spec is malformed. Takes no time, unlike reading the documents for `build`."""
    _parse(spec)


def is_learned(spec: str) -> bool:
    """Whether a spec names a tokenizer that is learned from the documents."""
    kind, argument = _parse(spec)
    return kind == "characters" or (kind == "sentencepiece" and argument.isdecimal())


def vocab_size_of(spec: str) -> int:
    """Number of tokens, mask excluded, of the tokenizer that a spec names. Needs no documents."""
    kind, argument = _parse(spec)
    if kind in VOCAB_SIZES:
        return VOCAB_SIZES[kind]
    return int(argument) if is_learned(spec) else _BUILDERS[kind](argument, lambda: ()).vocab_size


def fingerprint(spec: str) -> str:
    """Fingerprint of a tokenizer that is not learned. That of `gpt2` is known without its ranks, so without a network.

    Raises:
        errors.UserError: as `build` does.
    """
    if spec == "gpt2":
        return alphabets.fingerprint_of({"kind": "gpt2", "sha256": _GPT2_SHA256})
    return build(spec, lambda: ()).fingerprint()


def from_json(description: dict[str, Any]) -> Tokenizer:
    """Make a tokenizer from the description that its `to_json` returned. A file it reads must be unchanged."""
    fields = dict(description)
    kind = fields.pop("kind")
    if kind not in _KINDS:
        raise errors.UserError(f"tokenizer kind={kind!r} is unknown", remedy=f"this version reads {', '.join(_KINDS)}")
    return _KINDS[kind](**fields)


def write(tokenizer: Tokenizer, path: pathlib.Path) -> None:
    """Write a tokenizer for `read`: its description in JSON, and beside it the file that it needs, if any (`FILES`)."""
    description = tokenizer.to_json()
    if name := write_file(tokenizer, path.parent):
        description["path"] = name
    path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def write_file(tokenizer: Tokenizer, directory: pathlib.Path) -> str | None:
    """Write the file that a tokenizer needs into a directory. Returns its name; None if it needs none."""
    if not isinstance(tokenizer, subwords.GPT2 | subwords.WordPiece):
        return None
    name = FILES[tokenizer.to_json()["kind"]]
    (directory / name).write_bytes(tokenizer.file())
    return name


def read(path: pathlib.Path) -> Tokenizer:
    """Read a tokenizer that `write` wrote.

    Raises:
        errors.UserError: if the description is damaged, or names another file than the one beside it.
    """
    description, file = _described(path)
    if file is not None:
        if not file.exists():
            raise errors.UserError(
                f"the tokenizer's file {file} is missing",
                remedy=f"put it back, or train on with {errors.name('config.data.tokenizer')}="
                f"{description['kind']}:FILE, which puts it back",
            )
        description["path"] = str(file)
    try:
        tokenizer = from_json(description)
        is_empty = num_ids(tokenizer) < 1
    except TypeError as error:
        raise errors.UserError(f"{path} is damaged: {error}", remedy=_REPAIR) from error
    except errors.UserError as error:
        raise error.at(str(path)) from error
    if is_empty:
        raise errors.UserError(f"{path} is damaged: it has no tokens", remedy=_REPAIR)
    return tokenizer


def put_file_back(path: pathlib.Path, spec: str) -> None:
    """Write the file of a tokenizer that `write` wrote once more if it is missing, from the same one that `spec` names.

    Raises:
        errors.UserError: if the spec names another tokenizer, or the description is damaged.
    """
    description, file = _described(path)
    if file is None or file.exists():
        return
    tokenizer = None if is_learned(spec) else build(spec, lambda: ())
    if tokenizer is None or tokenizer.to_json().get("sha256") != description.get("sha256"):
        raise errors.UserError(
            f"is another tokenizer than the run's, whose file {file} is missing",
            field="config.data.tokenizer",
            value=spec,
            remedy=f"name the {description['kind']} file with sha256 {description.get('sha256')}",
        )
    write_file(tokenizer, path.parent)


def _described(path: pathlib.Path) -> tuple[dict[str, Any], pathlib.Path | None]:
    """The description in a file of `write`, and the file beside it that it needs, if any."""
    try:
        description = json.loads(storage.read_description(path))
        name = FILES.get(description["kind"])
    except errors.UserError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise errors.UserError(f"{path} is damaged: {error!r}", remedy=_REPAIR) from error
    if name is None:
        return description, None
    if description.get("path") != name:
        raise errors.UserError(
            f"{path} names the file {description.get('path')!r}, but its own is {name}, beside it", remedy=_REPAIR
        )
    return description, path.absolute().parent / name


def num_ids(tokenizer: Tokenizer) -> int:
    """Number of ids of a tokenizer: its real tokens, and its own mask if it has one."""
    return tokenizer.vocab_size + (tokenizer.mask_id is not None)


def check_encoded(ids: Integer[np.ndarray, "*p"], tokenizer: Tokenizer) -> None:
    """Raises errors.UserError if ids that stand for text are no tokens: graphs have no state for them.

    Args:
        ids: what a tokenizer or prepared text holds.
        tokenizer: the tokenizer.
    """
    stop = num_ids(tokenizer)
    wrong = (ids < 0) | (ids >= stop)
    if tokenizer.mask_id is not None:
        wrong |= ids == tokenizer.mask_id
    if wrong.any():
        raise errors.UserError(
            f"id {ids[wrong][0]} is no token of this tokenizer, which has ids below {stop}"
            + ("" if tokenizer.mask_id is None else f", of which {tokenizer.mask_id} is the mask"),
            remedy="prepare the text again, with a tokenizer file that is whole",
        )


def joiner(tokenizer: Tokenizer) -> str:
    """Text between documents for tokenizers of characters or bytes; empty for other tokenizers.

    It is a blank line, or a space if the alphabet has no newline.
    """
    if isinstance(tokenizer, alphabets.Bytes):
        return "\n\n"
    if not isinstance(tokenizer, alphabets.Characters):
        return ""
    return next((joiner for joiner in ("\n\n", " ") if joiner[0] in tokenizer.alphabet), "")


def _parse(spec: str) -> tuple[str, str]:
    """Split the spec of a tokenizer into kind and argument, and check both."""
    kind, colon, argument = spec.partition(":")
    if kind not in _BUILDERS:
        hint = errors.nearest(kind, _BUILDERS)
        raise errors.UserError(
            f"the tokenizer {spec!r} is of no known kind", remedy=f"{hint}give one of {', '.join(FORMS)}"
        )
    takes = {":" in form for form in FORMS if form.partition(":")[0] == kind}
    if bool(argument) not in takes or bool(colon) != bool(argument):
        raise errors.UserError(
            f"the tokenizer {spec!r} lacks an argument, or has one too many", remedy=f"give one of {', '.join(FORMS)}"
        )
    return kind, argument


def _characters(documents: Documents) -> alphabets.Characters:
    found = set()
    for text in documents():
        found.update(text)
    alphabet = "".join(sorted(found))
    if not alphabet:
        raise errors.UserError("there is no text to take characters from", remedy="give files with text in them")
    return alphabets.Characters(alphabet=alphabet)


def _sentence_piece(argument: str, documents: Documents) -> subwords.SentencePiece:
    if argument.isdecimal():
        return subwords.learn_sentence_piece(int(argument), documents())
    return subwords.load_sentence_piece(_absolute(argument))


def _absolute(name: str) -> str:
    return str(hosts.local_path(name).absolute())


def _ids(count: str) -> alphabets.Ids:
    if not (count.isascii() and count.isdecimal() and int(count) > 0):
        raise errors.UserError(
            f"the tokenizer 'ids:{count}' names no number of tokens", remedy="give at least 1, as in ids:50257"
        )
    return alphabets.Ids(vocab_size=int(count))


_KINDS = {
    "characters": alphabets.Characters,
    "bytes": alphabets.Bytes,
    "ids": alphabets.Ids,
    "gpt2": subwords.GPT2,
    "wordpiece": subwords.WordPiece,
    "sentencepiece": subwords.SentencePiece,
}
_TEXT8 = alphabets.Characters(alphabet=" " + string.ascii_lowercase)
_BUILDERS: dict[str, Callable[[str, Documents], Tokenizer]] = {
    "characters": lambda argument, documents: _characters(documents),
    "text8": lambda argument, documents: _TEXT8,
    "bytes": lambda argument, documents: alphabets.Bytes(),
    "gpt2": lambda argument, documents: subwords.gpt2(_absolute(argument) if argument else None),
    "wordpiece": lambda argument, documents: subwords.word_piece(_absolute(argument)),
    "sentencepiece": _sentence_piece,
    "ids": lambda argument, documents: _ids(argument),
}
