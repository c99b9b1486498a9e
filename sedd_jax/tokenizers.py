"""Text to token ids and back; each tokenizer is a frozen value that JSON carries, so that a run directory can hold it.

`vocab_size` is N, the number of real tokens. `mask_id` is None where the diffusion appends its mask as id N.
"""

import base64
import dataclasses
import difflib
import functools
import hashlib
import json
import pathlib
import string
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Integer

# How GPT-2 cuts text before it merges bytes: contractions, words, numbers and signs with one space before them, space.
_GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_END_OF_TEXT = "<|endoftext|>"
_NUM_CODE_POINTS = 0x110000

# Tokens of the tokenizers, masks left out; a corpus' own characters are taken to be 100.
VOCAB_SIZES = {"gpt2": 50_257, "text8": 27, "wordpiece": 30_521, "characters": 100}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Characters:
    """One token a character; a character's id is its place in the alphabet."""

    alphabet: str
    unit: ClassVar[str] = "character"
    mask_id: ClassVar[None] = None
    eos_id: ClassVar[None] = None

    def __post_init__(self):
        if not self.alphabet or len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError(f"alphabet={self.alphabet!r} is empty or repeats a character: name each character once")

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @functools.cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.alphabet)

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """The id of every code point, -1 for those outside the alphabet."""
        ids = np.full(_NUM_CODE_POINTS, -1, np.int32)
        ids[self._code_points] = np.arange(self.vocab_size)
        return ids

    def encode(self, text: str) -> Int[np.ndarray, " L"]:
        """Ids (int32) of the characters of a text."""
        ids = self._ids[_code_points(text)]
        unknown = ids < 0
        if unknown.any():
            position = int(unknown.argmax())
            raise ValueError(
                f"{text[position]!r} (U+{ord(text[position]):04X}) at position {position} is not in the alphabet "
                f"of {self.vocab_size} characters: remove it, or build the tokenizer from a text that holds it"
            )
        return ids

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """The text that ids in [0, vocab_size) stand for."""
        _check_ids(ids, self.vocab_size)
        return self._code_points[ids].tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "characters", "alphabet": self.alphabet}

    def fingerprint(self) -> str:
        """Equal for tokenizers that give every text the same ids."""
        return _sha256_of_json(self.to_json())


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2:
    """Byte pairs cut by GPT-2's pattern; the end of text is the id after the last rank (50256 for GPT-2's own ranks).

    `path` is a file in tiktoken's format (base64 bytes and rank, one a line), or None for tiktoken's own copy of
    GPT-2's ranks; `sha256` is that of the ranks written in this format, so that both name the same tokenizer.
    """

    path: str | None
    sha256: str
    unit: ClassVar[str] = "token"
    mask_id: ClassVar[None] = None

    def __post_init__(self):
        found = _sha256_of_ranks(self._ranks)
        if found != self.sha256:
            raise ValueError(f"the ranks in {self.path} have sha256 {found}, not {self.sha256}: put the same file back")

    @functools.cached_property
    def _ranks(self) -> dict[bytes, int]:
        return _read_ranks(self.path)

    @functools.cached_property
    def _encoding(self):
        import tiktoken

        return tiktoken.Encoding(
            name="gpt2",
            pat_str=_GPT2_PATTERN,
            mergeable_ranks=self._ranks,
            special_tokens={_END_OF_TEXT: self.eos_id},
        )

    @property
    def eos_id(self) -> int:
        return len(self._ranks)

    @property
    def vocab_size(self) -> int:
        return len(self._ranks) + 1

    def encode(self, text: str) -> Int[np.ndarray, " L"]:
        """Ids (int32) of a text; a text that spells <|endoftext|> is read as those characters."""
        return np.array(self._encoding.encode_ordinary(text), np.int32)

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """The text that ids stand for; bytes that are no UTF-8 become U+FFFD."""
        _check_ids(ids, self.vocab_size)
        return self._encoding.decode(ids.tolist())

    def to_json(self) -> dict[str, Any]:
        return {"kind": "gpt2", "path": self.path, "sha256": self.sha256}

    def fingerprint(self) -> str:
        """Equal for tokenizers that give every text the same ids, wherever their files lie."""
        return _sha256_of_json({"kind": "gpt2", "sha256": self.sha256})


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPiece:
    """BERT's uncased word pieces; its [MASK] is the absorbing state and so not one of the vocab_size real tokens.

    `path` is a vocabulary, one piece a line (bert-base-uncased: [MASK] is 103 of 30,522 ids); [SEP] ends a document.
    Decoding gives lower-case text without accents, since that is all the ids know.
    """

    path: str
    sha256: str
    unit: ClassVar[str] = "token"

    def __post_init__(self):
        found = hashlib.sha256(_content(self.path)).hexdigest()
        if found != self.sha256:
            raise ValueError(f"{self.path} has sha256 {found}, not {self.sha256}: put the same file back")
        if missing := {"[MASK]", "[SEP]", "[UNK]"} - self._pieces.keys():
            raise ValueError(f"{self.path} lacks {', '.join(sorted(missing))}: give BERT's own vocabulary file")

    @functools.cached_property
    def _pieces(self) -> dict[str, int]:
        return {piece: id_ for id_, piece in enumerate(_content(self.path).decode("utf-8").splitlines())}

    @functools.cached_property
    def _model(self):
        try:
            import tokenizers as hf
        except ImportError as error:
            raise ImportError("word pieces need a package that is not installed: pip install tokenizers") from error

        model = hf.Tokenizer(hf.models.WordPiece(self._pieces, unk_token="[UNK]", max_input_chars_per_word=100))
        model.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
        model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
        model.decoder = hf.decoders.WordPiece()
        return model

    @property
    def mask_id(self) -> int:
        return self._pieces["[MASK]"]

    @property
    def eos_id(self) -> int:
        return self._pieces["[SEP]"]

    @property
    def vocab_size(self) -> int:
        return len(self._pieces) - 1

    def encode(self, text: str) -> Int[np.ndarray, " L"]:
        """Ids (int32) of a text, without BERT's frame of [CLS] and [SEP]."""
        return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """The text that ids stand for, in lower case and with the spaces BERT's pieces imply."""
        _check_ids(ids, len(self._pieces))
        return self._model.decode(ids.tolist(), skip_special_tokens=False)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "wordpiece", "path": self.path, "sha256": self.sha256}

    def fingerprint(self) -> str:
        """Equal for tokenizers that give every text the same ids, wherever their files lie."""
        return _sha256_of_json({"kind": "wordpiece", "sha256": self.sha256})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ids:
    """Ids as decimal numbers with spaces between: for a checkpoint whose tokenizer is not known."""

    vocab_size: int
    unit: ClassVar[str] = "token"
    mask_id: ClassVar[None] = None
    eos_id: ClassVar[None] = None

    def encode(self, text: str) -> Int[np.ndarray, " L"]:
        """Ids (int32) that a text spells out."""
        words = text.split()
        wrong = [word for word in words if not (word.isascii() and word.isdecimal() and int(word) < self.vocab_size)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no id: give numbers from 0 to {self.vocab_size - 1} with spaces between")
        return np.array([int(word) for word in words], np.int32)

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """The numbers of ids in [0, vocab_size)."""
        _check_ids(ids, self.vocab_size)
        return " ".join(map(str, ids.tolist()))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "ids", "vocab_size": self.vocab_size}

    def fingerprint(self) -> str:
        """Equal for tokenizers that give every text the same ids."""
        return _sha256_of_json(self.to_json())


Tokenizer = Characters | GPT2 | WordPiece | Ids


def build(spec: str, documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that a spec names: `characters`, `text8`, `gpt2`, `gpt2:FILE`, `wordpiece:FILE` or `ids:N`.

    `characters` takes its alphabet, sorted, from `documents()`. Give those of every split: the set of characters is all
    that held-out text lends, and no evaluation then meets a character without an id. text8 is a space (0) and a to z.
    """
    kind, argument = _parse(spec)
    return _BUILDERS[kind](argument, documents)


def vocab_size_of(spec: str) -> int:
    """Tokens that a tokenizer will have, the mask left out, from its spec alone."""
    kind, argument = _parse(spec)
    return _ids(argument).vocab_size if kind == "ids" else VOCAB_SIZES[kind]


def _parse(spec: str) -> tuple[str, str]:
    """Kind and argument of a tokenizer's spec."""
    kind, colon, argument = spec.partition(":")
    if kind not in _BUILDERS:
        nearest = difflib.get_close_matches(kind, _BUILDERS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"tokenizer={spec!r} is of no known kind: {hint}give one of {', '.join(_FORMS)}")
    if bool(argument) not in _TAKES_ARGUMENT[kind] or bool(colon) != bool(argument):
        raise ValueError(f"tokenizer={spec!r} is not complete, or more than that: give one of {', '.join(_FORMS)}")
    return kind, argument


def from_json(description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` described; one that reads a file checks that it is the same file."""
    fields = dict(description)
    kind = fields.pop("kind")
    if kind not in _KINDS:
        raise ValueError(f"tokenizer kind={kind!r} is unknown: this version reads {', '.join(_KINDS)}")
    return _KINDS[kind](**fields)


def num_ids(tokenizer: Tokenizer) -> int:
    """How many ids a tokenizer itself can name: its real tokens, and its own mask where it has one."""
    return tokenizer.vocab_size + (tokenizer.mask_id is not None)


def _characters_of(documents: Iterable[str]) -> Characters:
    return Characters(alphabet="".join(sorted(set().union(*map(set, documents)))))


def _gpt2(path: str | None) -> GPT2:
    return GPT2(path=path, sha256=_sha256_of_ranks(_read_ranks(path)))


def _word_piece(path: str) -> WordPiece:
    return WordPiece(path=path, sha256=hashlib.sha256(_content(path)).hexdigest())


def _ids(count: str) -> Ids:
    if not (count.isascii() and count.isdecimal() and int(count) > 0):
        raise ValueError(f"tokenizer='ids:{count}' names no number of tokens: give one from 1, as in ids:50257")
    return Ids(vocab_size=int(count))


_KINDS = {"characters": Characters, "gpt2": GPT2, "wordpiece": WordPiece, "ids": Ids}
_TEXT8 = Characters(alphabet=" " + string.ascii_lowercase)
_BUILDERS = {
    "characters": lambda argument, documents: _characters_of(documents()),
    "text8": lambda argument, documents: _TEXT8,
    "gpt2": lambda argument, documents: _gpt2(str(pathlib.Path(argument).absolute()) if argument else None),
    "wordpiece": lambda argument, documents: _word_piece(str(pathlib.Path(argument).absolute())),
    "ids": lambda argument, documents: _ids(argument),
}
_TAKES_ARGUMENT = {"characters": {False}, "text8": {False}, "gpt2": {False, True}, "wordpiece": {True}, "ids": {True}}
_FORMS = ("characters", "text8", "gpt2", "gpt2:FILE", "wordpiece:FILE", "ids:N")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _check_ids(ids: np.ndarray, stop: int) -> None:
    outside = (ids < 0) | (ids >= stop)
    if outside.any():
        position = int(outside.argmax())
        raise ValueError(
            f"id {ids[position]} at position {position} is outside [0, {stop}): decode unmasked tokens only"
        )


def _content(path: str) -> bytes:
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"the tokenizer's file {path} does not exist: put it back, or name where it is now")
    return pathlib.Path(path).read_bytes()


def _read_ranks(path: str | None) -> dict[bytes, int]:
    """Byte pair ranks of a file in tiktoken's format, or of GPT-2 as tiktoken keeps (or fetches) it."""
    if path is None:
        import tiktoken

        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    lines = [line.split() for line in _content(path).splitlines() if line]
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ValueError(f"{path} is no file of ranks ({error}): each line is base64 bytes and a rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(f"{path} has {len(ranks)} ranks that lack a number or one of the 256 bytes: give a whole file")
    return ranks


def _sha256_of_ranks(ranks: dict[bytes, int]) -> str:
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda x: x[1]))
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _sha256_of_json(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
