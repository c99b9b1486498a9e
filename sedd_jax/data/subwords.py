"""Subword tokenizers: GPT-2's byte pair encoding, BERT's WordPiece, and SentencePiece."""

import base64
import dataclasses
import functools
import hashlib
import io
import re
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Integer

from sedd_jax.data import alphabets
from sedd_jax.runtime import errors, hosts

# GPT-2 cuts text with this pattern before it merges bytes. It matches contractions; words, numbers and signs, each with
# an optional space before it; and white space.
_GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_END_OF_TEXT = "<|endoftext|>"
# tiktoken cannot match the pattern with a longer run of white space.
_LONGEST_BLANKS = 100_000
_BLANKS = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # what \s means to tiktoken
_BLOCK = "\u2581"
_SPECIAL_PIECE = re.compile(r"\[\w+\]")  # matches [SEP] and [unused7], but not the pieces [ and ]
_LINE = 4096  # characters of a line that SentencePiece learns from
_NUM_LINES = 1_000_000  # lines that SentencePiece learns from
_RETURN = "put the same file back"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2:
    """Byte pair encoding (BPE) of text that is cut by GPT-2's pattern.

    The end of text is the id after the last rank, which is 50256 for GPT-2's own ranks.

    Attributes:
        path: file of BPE ranks in tiktoken's format (each line is base64 bytes and a rank). None stands for tiktoken's
            own copy of GPT-2's ranks.
        sha256: hash of the ranks in that format, which a file and tiktoken's copy of the same ranks share.
        num_unused: number of ids after the end of text that no text has, as other programs append them for padding.
    """

    path: str | None
    sha256: str
    num_unused: int = 0
    unit: ClassVar[str] = "token"
    mask_id: ClassVar[None] = None
    unk_id: ClassVar[None] = None

    def __post_init__(self):
        if type(self.num_unused) is not int or self.num_unused not in range(128):
            raise errors.UserError(f"num_unused={self.num_unused!r} is no count", remedy="give one from 0 to 127")
        found = _sha256_of_ranks(self._ranks)
        if found != self.sha256:
            raise errors.UserError(f"the ranks in {self.path} have sha256 {found}, not {self.sha256}", remedy=_RETURN)

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
            special_tokens={_END_OF_TEXT: self.eos_id} | {f"<|unused{i}|>": i for i in sorted(self.special_ids)[1:]},
        )

    @property
    def eos_id(self) -> int:
        return len(self._ranks)

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(range(self.eos_id, self.vocab_size))

    @property
    def vocab_size(self) -> int:
        return len(self._ranks) + 1 + self.num_unused

    def encode(self, text: str) -> Int[np.ndarray, " L"]:
        """Token ids (int32) of `text`. If it contains <|endoftext|>, these are ordinary characters."""
        ids: list[int] = []
        done = 0
        for found in re.finditer(rf"{_BLANKS}{{{_LONGEST_BLANKS},}}", alphabets.writable(text)):
            # GPT-2's pattern takes all white space but the last character, which may belong to a word, as one piece.
            stop = found.end() - (found.end() < len(text))
            ids += self._encoding.encode_ordinary(text[done : found.start()])
            ids += self._encoding._encode_single_piece(text[found.start() : stop])
            done = stop
        return np.array(ids + self._encoding.encode_ordinary(text[done:]), np.int32)

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """Text of `ids`. Bytes that are not valid UTF-8 become U+FFFD."""
        alphabets.check_ids(ids, self.vocab_size)
        return self._encoding.decode(ids.tolist())

    def to_json(self) -> dict[str, Any]:
        unused = {"num_unused": self.num_unused} if self.num_unused else {}  # Earlier versions have no such field.
        return {"kind": "gpt2", "path": self.path, "sha256": self.sha256, **unused}

    def file(self) -> bytes:
        """Content of a file for `path`."""
        return _file_of_ranks(self._ranks)

    def fingerprint(self) -> str:
        """Hash that is equal for tokenizers that give every text the same ids, wherever their files are."""
        return alphabets.fingerprint_of({name: x for name, x in self.to_json().items() if name != "path"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPiece:
    """WordPiece, the tokenizer of uncased BERT.

    [MASK] is the absorbing state, so it is not one of the `vocab_size` real tokens. In bert-base-uncased it is id 103
    of 30,522. [SEP] ends a document. Decoded text is lower case without accents, because the ids hold no more.

    Attributes:
        path: vocabulary file, one piece per line.
        sha256: hash of that file.
    """

    path: str
    sha256: str
    unit: ClassVar[str] = "token"

    def __post_init__(self):
        found = hashlib.sha256(alphabets.content(self.path)).hexdigest()
        if found != self.sha256:
            raise errors.UserError(f"{self.path} has sha256 {found}, not {self.sha256}", remedy=_RETURN)
        if missing := {"[MASK]", "[SEP]", "[UNK]"} - self._pieces.keys():
            raise errors.UserError(
                f"{self.path} lacks {', '.join(sorted(missing))}", remedy="give BERT's own vocabulary file"
            )

    @functools.cached_property
    def _pieces(self) -> dict[str, int]:
        try:
            text = alphabets.content(self.path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise errors.UserError(
                f"{self.path} is not UTF-8 text ({error})", remedy="give BERT's own vocabulary file"
            ) from error
        lines = text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n").split("\n")
        pieces: dict[str, int] = {}
        for id_, piece in enumerate(lines):
            if not piece or piece in pieces:
                problem = f"repeats the piece {piece!r} of line {pieces[piece] + 1}" if piece else "is empty"
                raise errors.UserError(
                    f"{self.path}:{id_ + 1} {problem}, so ids after it are uncertain",
                    remedy="give BERT's own vocabulary file",
                )
            pieces[piece] = id_
        return pieces

    @functools.cached_property
    def _model(self):
        try:
            import tokenizers as hf
        except ImportError as error:
            raise errors.UserError(
                "wordpiece needs the package tokenizers, which is not installed",
                remedy="pip install 'sedd_jax[wordpiece]'",
            ) from error

        model = hf.Tokenizer(hf.models.WordPiece(self._pieces, unk_token="[UNK]", max_input_chars_per_word=100))
        model.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
        model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
        model.decoder = hf.decoders.WordPiece()
        return model

    @property
    def mask_id(self) -> int:
        return self._pieces["[MASK]"]

    @property
    def unk_id(self) -> int:
        return self._pieces["[UNK]"]

    @property
    def eos_id(self) -> int:
        return self._pieces["[SEP]"]

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(id_ for piece, id_ in self._pieces.items() if _SPECIAL_PIECE.fullmatch(piece))

    @property
    def vocab_size(self) -> int:
        return len(self._pieces) - 1

    def encode(self, text: str) -> Int[np.ndarray, " L"]:
        """Token ids (int32) of `text`, without the [CLS] and [SEP] that BERT puts around it."""
        return np.array(self._model.encode(alphabets.writable(text), add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """Text of `ids`, in lower case and with the spaces that WordPiece implies."""
        alphabets.check_ids(ids, len(self._pieces))
        return self._model.decode(ids.tolist(), skip_special_tokens=False)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "wordpiece", "path": self.path, "sha256": self.sha256}

    def file(self) -> bytes:
        """Content of a file for `path`."""
        return alphabets.content(self.path)

    def fingerprint(self) -> str:
        """Hash that is equal for tokenizers that give every text the same ids, wherever their files are."""
        return alphabets.fingerprint_of({"kind": "wordpiece", "sha256": self.sha256})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """A SentencePiece model.

    A model of `learn_sentence_piece` gives every text back exactly. Other models may normalise text. They may also
    lack characters, which become `unk_id`. A control or user-defined piece [MASK] or <mask> is the absorbing state.

    Attributes:
        model: the content of the .model file in base64, so that the tokenizer needs no file.
    """

    model: str = dataclasses.field(repr=False)
    unit: ClassVar[str] = "token"

    @functools.cached_property
    def _processor(self):
        import sentencepiece

        try:
            if not self.model:
                raise ValueError("it is empty")
            return sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(self.model, validate=True))
        except (TypeError, ValueError, RuntimeError) as error:
            raise errors.UserError("this is no SentencePiece model", remedy="give the .model file") from error

    @functools.cached_property
    def _block_ids(self) -> list[int]:
        """Ids for the character U+2581, which SentencePiece would take for a space: its bytes, or `unk_id`."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _BLOCK.encode()]
        return [self.unk_id] if self.unk_id in ids else ids

    @functools.cached_property
    def mask_id(self) -> int | None:
        ids = [self._processor.piece_to_id(piece) for piece in ("[MASK]", "<mask>")]
        return next((id_ for id_ in ids if id_ != self.unk_id), None)

    @property
    def eos_id(self) -> int | None:
        id_ = self._processor.eos_id()
        return None if id_ < 0 else id_

    @property
    def unk_id(self) -> int:
        return self._processor.unk_id()

    @property
    def special_ids(self) -> frozenset[int]:
        ids = range(self._processor.get_piece_size())
        return frozenset(id_ for id_ in ids if id_ in (self.mask_id, self.unk_id) or self._processor.is_control(id_))

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size() - (self.mask_id is not None)

    def encode(self, text: str) -> Int[np.ndarray, " L"]:
        """Token ids (int32) of `text`."""
        first, *rest = (self._processor.encode(part) for part in alphabets.writable(text).split(_BLOCK))
        return np.array(first + [id_ for part in rest for id_ in (*self._block_ids, *part)], np.int32)

    def decode(self, ids: Integer[np.ndarray, " L"]) -> str:
        """Text of `ids`. An end of text and other control pieces appear by name, such as </s>."""
        alphabets.check_ids(ids, self._processor.get_piece_size())
        texts, run = [], []
        for id_ in ids.tolist():
            if self._processor.is_control(id_):
                texts += [self._processor.decode(run), self._processor.id_to_piece(id_)]
                run = []
            else:
                run.append(id_)
        return "".join([*texts, self._processor.decode(run)])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "sentencepiece", "model": self.model}

    def file(self) -> bytes:
        """Content of the .model file that SentencePiece reads."""
        return base64.b64decode(self.model)

    def fingerprint(self) -> str:
        """Hash that is equal for equal models."""
        return alphabets.fingerprint_of(self.to_json())


def learn_sentence_piece(vocab_size: int, documents: Iterable[str]) -> SentencePiece:
    """Learn a SentencePiece model with `vocab_size` byte pair encoding pieces from documents.

    The pieces include all 256 bytes, the newline and </s>. Text is not normalised. The model learns from at most a
    million lines, a random sample of all lines. Longer lines are first cut after every 4096 characters.

    Raises:
        errors.UserError: if the text does not yield that many pieces.
    """
    import sentencepiece

    lines = (line for document in documents for line in document.split("\n"))
    pieces = (line[start : start + _LINE] for line in lines for start in range(0, len(line), _LINE))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            input_sentence_size=_NUM_LINES,
            max_sentence_length=4 * _LINE,
            num_threads=hosts.num_cores(),
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise errors.UserError(
            f"SentencePiece cannot make {vocab_size} pieces of this text ({reason})",
            remedy="ask for another number, or give more text",
        ) from error
    return SentencePiece(model=base64.b64encode(model.getvalue()).decode())


def load_sentence_piece(path: str) -> SentencePiece:
    """Read a SentencePiece model from a .model file."""
    tokenizer = SentencePiece(model=base64.b64encode(alphabets.content(path)).decode())
    try:
        is_empty = tokenizer.vocab_size == 0
    except errors.UserError as error:
        raise error.at(path) from error
    if is_empty:
        raise errors.UserError(f"{path} holds no pieces", remedy="give a SentencePiece .model file")
    return tokenizer


def gpt2(path: str | None) -> GPT2:
    """GPT-2's tokenizer with the ranks of a file, or with tiktoken's own copy if `path` is None."""
    return GPT2(path=path, sha256=_sha256_of_ranks(_read_ranks(path)))


def word_piece(path: str) -> WordPiece:
    """WordPiece tokenizer with the vocabulary of a file."""
    return WordPiece(path=path, sha256=hashlib.sha256(alphabets.content(path)).hexdigest())


def _read_ranks(path: str | None) -> dict[bytes, int]:
    """BPE ranks of a file in tiktoken's format. If `path` is None, those of GPT-2, which tiktoken may download."""
    if path is None:
        import tiktoken

        try:
            return tiktoken.get_encoding("gpt2")._mergeable_ranks
        except (OSError, ValueError) as error:
            raise errors.UserError(
                f"GPT-2's ranks are not here, and tiktoken cannot fetch them ({str(error).partition(': Max')[0]})",
                remedy="name them as gpt2:FILE, such as gpt2.tiktoken of prepared text, or set TIKTOKEN_CACHE_DIR",
            ) from error
    lines = [line.split() for line in alphabets.content(path).splitlines() if line]
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise errors.UserError(
            f"{path} is not a file of ranks ({error})", remedy="give one whose lines are base64 bytes and a rank"
        ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise errors.UserError(
            f"{path} has {len(ranks)} ranks that lack a number or one of the 256 bytes", remedy="give a whole file"
        )
    return ranks


def _file_of_ranks(ranks: dict[bytes, int]) -> bytes:
    """Content of a file of ranks in tiktoken's format."""
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda x: x[1]))
    return b"".join(lines)


def _sha256_of_ranks(ranks: dict[bytes, int]) -> str:
    return hashlib.sha256(_file_of_ranks(ranks)).hexdigest()
