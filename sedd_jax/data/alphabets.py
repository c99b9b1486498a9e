"""Tokenizers with one token per character, per byte or per number."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Integer

from sedd_jax.runtime import errors, storage

_NUM_CODE_POINTS = 0x110000
_MAX_DIGITS = 4300  # int() refuses longer numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Characters:
    """One token per character. The id of a character is its index in `alphabet`."""

    alphabet: str
    unit: ClassVar[str] = "character"
    mask_id: ClassVar[None] = None
    eos_id: ClassVar[None] = None
    unk_id: ClassVar[None] = None
    special_ids: ClassVar[frozenset[int]] = frozenset()

    def __post_init__(self):
        if not isinstance(self.alphabet, str) or not self.alphabet or len(set(self.alphabet)) < len(self.alphabet):
            raise errors.UserError(
                f"alphabet={self.alphabet!r} is empty or repeats a character, or is no text",
                remedy="name each character once",
            )
        if wrong := re.search("[\ud800-\udfff]", self.alphabet):
            raise errors.UserError(
                f"the alphabet holds {wrong[0]!r}, half a surrogate pair, which no text has",
                remedy="name whole characters",
            )

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @functools.cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.alphabet)

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """Id of every Unicode code point; -1 for code points outside the alphabet."""
        ids = np.full(_NUM_CODE_POINTS, -1, np.int32)
        ids[self._code_points] = np.arange(self.vocab_size)
        return ids

    def encode(self, text: str) -> Int[np.ndarray, " L"]:
        """Token ids (int32) of the characters of `text`.

        Raises:
            errors.UserError: if a character is not in the alphabet.
        """
        ids = self._ids[_code_points(text)]
        unknown = ids < 0
        if unknown.any():
            position = int(unknown.argmax())
            raise errors.UserError(
                f"{text[position]!r} (U+{ord(text[position]):04X}) at position {position} is not in the alphabet "
                f"of {self.vocab_size} characters",
                remedy="remove it, or build the tokenizer from a text that holds it",
            )
        return ids

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """Text of `ids`, which must lie in [0, vocab_size)."""
        check_ids(ids, self.vocab_size)
        return self._code_points[ids].tobytes().decode("utf-32-le")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "characters", "alphabet": self.alphabet}

    def fingerprint(self) -> str:
        """Hash that is equal for tokenizers that give every text the same ids."""
        return fingerprint_of(self.to_json())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """One token per byte of UTF-8."""

    unit: ClassVar[str] = "byte"
    vocab_size: ClassVar[int] = 256
    mask_id: ClassVar[None] = None
    eos_id: ClassVar[None] = None
    unk_id: ClassVar[None] = None
    special_ids: ClassVar[frozenset[int]] = frozenset()

    def encode(self, text: str) -> Int[np.ndarray, " L"]:
        """Token ids (int32) of the UTF-8 bytes of `text`.

        Raises:
            errors.UserError: if the text holds half a surrogate pair, which UTF-8 cannot write.
        """
        return np.frombuffer(writable(text).encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """Text of `ids`, which must lie in [0, 256). Bytes that are not valid UTF-8 become U+FFFD."""
        check_ids(ids, self.vocab_size)
        return ids.astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def fingerprint(self) -> str:
        """Hash that is equal for tokenizers that give every text the same ids."""
        return fingerprint_of(self.to_json())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ids:
    """Token ids written as decimal numbers with spaces between them.

    This is the tokenizer of a checkpoint whose own tokenizer is unknown.
    """

    vocab_size: int
    unit: ClassVar[str] = "token"
    mask_id: ClassVar[None] = None
    eos_id: ClassVar[None] = None
    unk_id: ClassVar[None] = None
    special_ids: ClassVar[frozenset[int]] = frozenset()

    def __post_init__(self):
        if type(self.vocab_size) is not int or not 0 < self.vocab_size < 2**31:
            raise errors.UserError(
                f"vocab_size={self.vocab_size!r} is no number of tokens",
                remedy="give a whole number from 1 to 2**31 - 1",
            )

    def encode(self, text: str) -> Int[np.ndarray, " L"]:
        """The token ids (int32) that `text` spells out.

        Raises:
            errors.UserError: if a word is not a number in [0, vocab_size).
        """
        words = text.split()
        wrong = [word for word in words if not self._is_id(word)]
        if wrong:
            raise errors.UserError(
                f"{wrong[0]!r} is not an id",
                remedy=f"give numbers from 0 to {self.vocab_size - 1} with spaces between them",
            )
        return np.array([int(word) for word in words], np.int32)

    def _is_id(self, word: str) -> bool:
        is_number = word.isascii() and word.isdecimal() and len(word) <= _MAX_DIGITS
        return is_number and int(word) < self.vocab_size

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """`ids`, which must lie in [0, vocab_size), as decimal numbers."""
        check_ids(ids, self.vocab_size)
        return " ".join(map(str, ids.tolist()))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "ids", "vocab_size": self.vocab_size}

    def fingerprint(self) -> str:
        """Hash that is equal for tokenizers that give every text the same ids."""
        return fingerprint_of(self.to_json())


def check_ids(ids: Integer[np.ndarray, " L"], stop: int) -> None:
    """Raise ValueError for the first id outside [0, stop)."""
    outside = (ids < 0) | (ids >= stop)
    if outside.any():
        position = int(outside.argmax())
        raise ValueError(
            f"id {ids[position]} at position {position} is outside [0, {stop}): decode unmasked tokens only"
        )


def writable(text: str) -> str:
    """The text; raises errors.UserError if it holds half a surrogate pair, which UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise errors.UserError(
            f"{text[error.start]!r} at position {error.start} is half a surrogate pair", remedy="remove it"
        ) from error
    return text


def content(path: str) -> bytes:
    """Read a file of a tokenizer.

    Raises:
        errors.UserError: if there is none, it is a directory or another thing that is no file, or far too long.
    """
    if not pathlib.Path(path).exists():
        raise errors.UserError(
            f"the tokenizer's file {path} does not exist", remedy="put it back, or name where it is now"
        )
    storage.check_description(pathlib.Path(path))
    return pathlib.Path(path).read_bytes()


def fingerprint_of(description: dict[str, Any]) -> str:
    """SHA-256 of the description of a tokenizer."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
