"""A converted model for transformers. It needs torch_model.py beside it, torch and transformers.

    model = AutoModel.from_pretrained("sedd-mine", trust_remote_code=True)
    tokens = model.sample(4, num_steps=128, seed=0)  # [4, L] token ids
    texts = model.decode(tokens)
    log_score = model(tokens, sigma)  # [B, L, V]

`sedd convert` writes it into every checkpoint, and config.json names it under `auto_map`.
"""

import base64
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_files

from .torch_model import Network

TOKENIZER = "sedd_tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, "gpt2.tiktoken", "vocab.txt", "tokenizer.model")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class SEDDConfig(PretrainedConfig):
    """The published program's nested config: tokens, graph, noise, model. Whatever else it holds is kept as it is."""

    model_type = "sedd"


class SEDDModel(Network, PreTrainedModel):
    """The score network with its sampler. `dtype` of `from_pretrained` is that of matrix products: weights are float32.

    Calling it with tokens [B, L] and their total noise sigma [B] gives the log score of every state, [B, L, V].
    """

    config_class = SEDDConfig
    _keep_in_fp32_modules_strict = ["vocab_embed", "sigma_map", "rotary_emb", "blocks", "output_layer"]  # noqa: RUF012

    def __init__(self, config: SEDDConfig):
        super().__init__(config)
        # transformers makes the dtype that is asked for torch's default, while it makes a model.
        self.build(config.to_dict(), torch.get_default_dtype())
        self.tokenizer_files: dict[str, str] = {}
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *args: Any, **settings: Any) -> Any:
        """Loads a model as `PreTrainedModel.from_pretrained` does, with its tokenizer. All weights must be there."""
        wants_info = settings.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **settings)
        model, found = loaded
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{name} lacks {', '.join(missing[:4])}: download or convert the model again")
        where = {option: settings[option] for option in _HUB if option in settings}
        paths = cached_files(
            name,
            list(TOKENIZER_FILES),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **where,
        )
        model.tokenizer_files = {pathlib.Path(path).name: path for path in paths or ()}
        return (model, found) if wants_info else model

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leaves new weights as their layers have made them."""

    def decode(self, tokens: torch.Tensor) -> list[str]:
        """Texts of sampled tokens [B, L], by the tokenizer that was beside the weights.

        Raises:
            FileNotFoundError: if there was none.
            ImportError: if it needs a package that is not installed.
        """
        if TOKENIZER not in self.tokenizer_files:
            raise FileNotFoundError(f"no {TOKENIZER} was beside the weights: copy it there, or decode the ids yourself")
        description = json.loads(pathlib.Path(self.tokenizer_files[TOKENIZER]).read_text(encoding="utf-8"))
        file = pathlib.Path(self.tokenizer_files[description["path"]]) if "path" in description else pathlib.Path()
        text_of = _DECODERS[description["kind"]](description, file)
        return [text_of(row) for row in tokens.tolist()]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **settings: Any) -> None:
        """Saves the model as `PreTrainedModel.save_pretrained` does, with its tokenizer."""
        pathlib.Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, path in self.tokenizer_files.items():
            if not (pathlib.Path(save_directory) / name).exists():
                shutil.copyfile(path, pathlib.Path(save_directory) / name)
        super().save_pretrained(save_directory, *args, **settings)


Decode = Callable[[list[int]], str]


def _characters(description: dict[str, Any], file: pathlib.Path) -> Decode:
    return lambda row: "".join(description["alphabet"][token] for token in row)


def _bytes(description: dict[str, Any], file: pathlib.Path) -> Decode:
    return lambda row: bytes(row).decode("utf-8", "replace")


def _numbers(description: dict[str, Any], file: pathlib.Path) -> Decode:
    return lambda row: " ".join(map(str, row))


def _gpt2(description: dict[str, Any], file: pathlib.Path) -> Decode:
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines() if line)
    pieces = {int(rank): base64.b64decode(piece) for piece, rank in lines}
    pieces[len(pieces)] = b"<|endoftext|>"
    for _ in range(description.get("num_unused", 0)):
        pieces[len(pieces)] = f"<|unused{len(pieces)}|>".encode()
    return lambda row: b"".join(pieces[token] for token in row).decode("utf-8", "replace")


def _wordpiece(description: dict[str, Any], file: pathlib.Path) -> Decode:
    from tokenizers import decoders  # transformers needs it too.

    pieces = file.read_text(encoding="utf-8").removeprefix("\ufeff").split("\n")
    return lambda row: decoders.WordPiece().decode([pieces[token] for token in row])


def _sentencepiece(description: dict[str, Any], file: pathlib.Path) -> Decode:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("the tokenizer of this model needs a package: pip install sentencepiece") from error
    model = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(description["model"]))

    def text_of(row: list[int]) -> str:
        parts = itertools.groupby(row, key=model.is_control)  # The end of a text appears by its name.
        named = lambda ids: "".join(map(model.id_to_piece, ids))
        return "".join(named(ids) if is_control else model.decode(list(ids)) for is_control, ids in parts)

    return text_of


_DECODERS: dict[str, Callable[[dict[str, Any], pathlib.Path], Decode]] = {
    "characters": _characters,
    "bytes": _bytes,
    "ids": _numbers,
    "gpt2": _gpt2,
    "wordpiece": _wordpiece,
    "sentencepiece": _sentencepiece,
}
