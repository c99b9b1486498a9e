"""Judges score generated text: an autoregressive run, or a causal language model of transformers."""

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sedd_jax import runs
from sedd_jax.model import autoregression
from sedd_jax.runtime import errors, sharding, storage

Rows = Sequence[Int[np.ndarray, "_"]]
# Of each sequence the texts that it holds: all of it, or what is between its ends of text.
Samples = Sequence[Rows]
_BATCH_SIZE = 16
_WIDTH_MULTIPLE = 64  # widths are rounded up to this, so that few shapes are compiled


class Judge(abc.ABC):
    """A language model that gives text a likelihood, in tokens of its own.

    Attributes:
        name: what it is, for tables.
        length: tokens that it reads at once.
        first: index of the first token of a window that gets a likelihood: 0, or 1 if the model needs a token before.
    """

    name: str
    length: int
    first: int

    @abc.abstractmethod
    def _shares(self, run: runs.Run, token: int | None) -> bool:
        """Whether the judge reads a run's tokens as they are, or at least this one, its end of text."""

    @abc.abstractmethod
    def _encode(self, texts: Sequence[str]) -> Rows:
        """Texts in the tokens of the judge."""

    def tokens(self, run: runs.Run, rows: Int[np.ndarray, "S L"]) -> Samples:
        """A run's sequences in the tokens of the judge.

        An end of text that the judge does not know as one is no text. The sequence is split there, and the judge reads
        each part by itself.
        """
        if self._shares(run, None):
            return [[row] for row in rows]
        end = run.tokenizer.eos_id
        if end is None or self._shares(run, end):
            return [[row] for row in self._encode([run.tokenizer.decode(row) for row in rows])]
        found = []
        for row in rows:
            parts = [part[part != end] for part in np.split(row, np.flatnonzero(row == end))]
            texts = [run.tokenizer.decode(part) for part in parts if len(part)]
            found.append(self._encode(texts or [""]))
        return found

    @abc.abstractmethod
    def _log_likelihood(self, batch: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B _"]:
        """log p of every token from `first` on given those before it, in nats."""

    @abc.abstractmethod
    def _features(self, batch: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B L D"]:
        """Hidden states that the head reads, at every position."""

    def log_likelihoods(self, samples: Samples) -> list[Float[np.ndarray, "_"]]:
        """log p of each sequence's tokens in nats, each text read in windows of the judge's length from its start."""
        windows = [
            (number, row[at : at + self.length])
            for number, rows in enumerate(samples)
            for row in rows
            for at in range(0, len(row), self.length)
        ]
        found: list[list[Float[np.ndarray, "_"]]] = [[np.zeros(0)] for _ in samples]
        at = 0
        for batch, lengths in self._batches([window for _, window in windows]):
            values = self._log_likelihood(batch)
            for row, length in zip(values, lengths, strict=False):
                found[windows[at][0]].append(row[: length - self.first].astype(np.float64))
                at += 1
        return [np.concatenate(parts) for parts in found]

    def features(self, samples: Samples) -> Float[np.ndarray, "S D"]:
        """Hidden state at the last token of the first window of each sequence's last text: the features of MAUVE."""
        rows, found = [texts[-1] for texts in samples], []
        for batch, lengths in self._batches([row[: self.length] for row in rows]):
            found.append(self._features(batch)[np.arange(len(lengths)), np.maximum(lengths, 1) - 1])
        return np.concatenate(found)

    def _batches(self, windows: Rows) -> Iterator[tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "_"]]]:
        """Batches of windows with their lengths. Padding follows each window; a causal model is not affected by it."""
        longest = max((len(window) for window in windows), default=0)
        width = min(self.length, -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE)
        for at in range(0, len(windows), _BATCH_SIZE):
            part = windows[at : at + _BATCH_SIZE]
            batch = np.zeros((_BATCH_SIZE, width), np.int32)
            for place, window in zip(batch, part, strict=False):
                place[: len(window)] = window
            yield batch, np.array([len(window) for window in part])


def open_judge(name: str) -> Judge:
    """Opens the judge in a directory: an autoregressive run, or a model that transformers reads.

    Raises:
        errors.UserError: where the directory holds neither, or transformers or torch is needed and missing.
    """
    place = storage.directory(name)
    if not storage.is_remote(place) and (place / "config.json").is_file():
        try:
            content = runs.read_json(storage.local_copy(place) / "config.json")
        except errors.UserError as error:
            problem = f"cannot be read, its config.json is damaged: {error.problem}"
            raise errors.UserError(
                problem, field="judge", value=name, remedy="copy it again from where it was written"
            ) from error
        if "model_type" in content:
            return TransformersJudge(name)
    if not storage.holds(place, "config.json"):
        raise errors.UserError(
            "is not a run directory, nor one that transformers reads: it has no config.json",
            field="judge",
            value=name,
            remedy="give that of an autoregressive run, or of a model such as GPT-2",
        )
    return RunJudge(place)


class RunJudge(Judge):
    """A judge that is an autoregressive run, on the mesh of all devices."""

    first = 0

    def __init__(self, workdir: storage.Directory):
        self.run = run = runs.load(workdir)
        if not run.is_autoregressive:
            raise errors.UserError(
                "is not an autoregressive run",
                field="judge",
                value=workdir,
                remedy=f"train one with {errors.name('config.graph.name')}=autoregressive",
            )
        self.opened = run.restore()
        self.name, self.length = f"{workdir}  step {self.opened.step}", run.config.data.length
        graph = run.graph
        self._read = jax.jit(lambda model, x: sharding.replicate(autoregression.log_likelihood(model, x, graph)))
        self._look = jax.jit(lambda model, x: sharding.replicate(autoregression.features(model, x, graph)))

    def _shares(self, run: runs.Run, token: int | None) -> bool:
        return run.tokenizer.fingerprint() == self.run.tokenizer.fingerprint()

    def _encode(self, texts: Sequence[str]) -> Rows:
        return [self.run.tokenizer.encode(text) for text in texts]

    def _log_likelihood(self, batch: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B _"]:
        with self.opened.on_devices():
            return np.asarray(self._read(self.opened.model, batch))

    def _features(self, batch: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B L D"]:
        with self.opened.on_devices():
            return np.asarray(self._look(self.opened.model, batch).astype(jnp.float32))


class TransformersJudge(Judge):
    """A judge that is a causal language model of transformers, such as GPT-2, in a local directory.

    No token is put before a window. So its first token has no likelihood, as in the published figures.
    """

    first = 1

    def __init__(self, directory: str):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise errors.UserError(
                "needs transformers and torch",
                field="judge",
                value=directory,
                remedy="pip install 'sedd_jax[judge]'",
            ) from error
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, local_files_only=True, dtype=torch.float32
            )
        except Exception as error:  # Damaged files end in any error there, and a tokenizer may need a package.
            raise errors.UserError(
                f"cannot be read by transformers: {type(error).__name__}: {error}",
                field="judge",
                value=directory,
                remedy="give a directory that holds the config, weights and tokenizer of a causal language model",
            ) from error
        length = getattr(model.config, "max_position_embeddings", None)
        if not isinstance(length, int):
            raise errors.UserError(
                f"is a {model.config.model_type}, whose config does not say how long its texts may be",
                field="judge",
                value=directory,
                remedy="give a model that has max_position_embeddings, such as GPT-2",
            )
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.name = f"{directory}  {model.config.model_type}, {model.num_parameters():,} parameters"
        self.length = length

    def _shares(self, run: runs.Run, token: int | None) -> bool:
        # Its own end of text is written as one, such as <|endoftext|>: as published, it stays where it is.
        return token is not None and run.tokenizer.decode(np.array([token])) == self._tokenizer.eos_token

    def _encode(self, texts: Sequence[str]) -> Rows:
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(row, np.int32) for row in encoded]

    def _log_likelihood(self, batch: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B _"]:
        import torch

        tokens = self._tensor(batch)
        with torch.inference_mode():
            logits = self._model(tokens).logits[:, :-1].transpose(1, 2)
            return -torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").cpu().numpy()

    def _features(self, batch: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B L D"]:
        import torch

        with torch.inference_mode():
            return self._model(self._tensor(batch), output_hidden_states=True).hidden_states[-1].cpu().numpy()

    def _tensor(self, batch: Int[np.ndarray, "B L"]) -> Any:
        import torch

        return torch.as_tensor(batch, dtype=torch.int64, device=self._model.device)
