"""Encode documents as tokens, in this process or in several."""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from sedd_jax.data import documents, tokenizers
from sedd_jax.runtime import errors, interrupts

_CHARACTERS_AT_ONCE = 500_000  # per task of a process


class Encoded(NamedTuple):
    """Tokens of consecutive documents, and counts of what they hold.

    Attributes:
        tokens: token ids of the documents, of type `dtype_of`. An end of text follows each document. If the tokenizer
            has none, a joiner (`tokenizers.joiner`) stands between documents.
        num_documents: number of documents.
        num_characters: number of characters, joiners included.
        num_words: number of words, separated by white space.
        num_unknown: number of tokens with the tokenizer's `unk_id`.
        done: share of the split that has been read.
    """

    tokens: Integer[np.ndarray, " T"]
    num_documents: int
    num_characters: int
    num_words: int
    num_unknown: int
    done: float


def dtype_of(tokenizer: tokenizers.Tokenizer) -> str:
    """The smaller of "<u2" and "<u4" (little-endian, unsigned) that holds every id of a tokenizer."""
    return "<u2" if tokenizers.num_ids(tokenizer) <= 2**16 else "<u4"


def encode(
    texts: Iterator[documents.Document], tokenizer: tokenizers.Tokenizer, *, num_workers: int
) -> Iterator[Encoded]:
    """Yield the tokens of the documents of one split, in order.

    The tokens do not depend on `num_workers`, the number of processes.

    Raises:
        errors.UserError: if a document cannot be tokenized (the error names its place), or if a process was killed.
    """
    tasks = _tasks(texts)
    if num_workers == 1:
        yield from (_encode(tokenizer, *task) for task in tasks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(tokenizer.to_json(),)
    )
    waiting: collections.deque[concurrent.futures.Future[Encoded]] = collections.deque()
    try:
        for task in tasks:
            with interrupts.kept_from_children():  # It may start a process, which would fail with many lines.
                waiting.append(pool.submit(_encode_here, *task))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:  # At the next task, or at the result of one.
        raise errors.UserError(
            "a process that tokenized was killed, perhaps because memory ran out",
            remedy=f"use fewer {errors.name('num_workers')}",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(texts: Iterator[documents.Document]) -> Iterator[tuple[list[documents.Document], bool]]:
    """Yield lists of documents that make one task, and whether the list begins the split."""
    task, size, is_first = [], 0, True
    for document in texts:
        task.append(document)
        size += len(document.text)
        if size >= _CHARACTERS_AT_ONCE:
            yield task, is_first
            task, size, is_first = [], 0, False
    if task:
        yield task, is_first


def _encode(tokenizer: tokenizers.Tokenizer, task: list[documents.Document], is_first: bool) -> Encoded:
    joiner = tokenizers.joiner(tokenizer)
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int32)
    parts, num_characters, num_words = [], 0, 0
    for index, document in enumerate(task):
        text = document.text if is_first and index == 0 else joiner + document.text
        try:
            ids = tokenizer.encode(text)
            tokenizers.check_encoded(ids, tokenizer)
        except errors.UserError as error:
            raise error.at(document.place) from error
        parts += [ids, end]
        num_characters += len(text)
        num_words += len(document.text.split())
    tokens = np.concatenate(parts).astype(dtype_of(tokenizer))
    num_unknown = 0 if tokenizer.unk_id is None else int(np.count_nonzero(tokens == tokenizer.unk_id))
    return Encoded(tokens, len(task), num_characters, num_words, num_unknown, task[-1].done)


_tokenizer: tokenizers.Tokenizer | None = None  # Set by `_start` in each worker process.


def _start(description: dict[str, Any]) -> None:
    global _tokenizer
    _tokenizer = tokenizers.from_json(description)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent process ends its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_here(task: list[documents.Document], is_first: bool) -> Encoded:
    assert _tokenizer is not None
    return _encode(_tokenizer, task, is_first)
