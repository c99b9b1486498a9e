"""Documents to tokens, in this process or several."""

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
from sedd_jax.runtime import errors

_CHARACTERS_AT_ONCE = 500_000


class Encoded(NamedTuple):
    """Some documents' tokens, in a row, and counts of what was in them.

    Attributes:
        tokens: of the documents, in the type that holds every id, with an end of text after each or a joiner between.
        num_documents: documents.
        num_characters: characters, joiners among them.
        num_words: words between white space.
        num_unknown: tokens that stand for text without one.
        done: share of the split read so far.
    """

    tokens: Integer[np.ndarray, " T"]
    num_documents: int
    num_characters: int
    num_words: int
    num_unknown: int
    done: float


def dtype_of(tokenizer: tokenizers.Tokenizer) -> str:
    """The smaller of uint16 and uint32 that holds every id, little-endian."""
    return "<u2" if tokenizers.num_ids(tokenizer) <= 2**16 else "<u4"


def encode(
    texts: Iterator[documents.Document], tokenizer: tokenizers.Tokenizer, *, num_workers: int
) -> Iterator[Encoded]:
    """Tokens of the documents of a split in their order, whatever the number of processes.

    Raises:
        errors.UserError: where a document, named by its place, cannot be tokenized, or a process was ended from
            outside.
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
            waiting.append(pool.submit(_encode_here, *task))
            if len(waiting) > 2 * num_workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(texts: Iterator[documents.Document]) -> Iterator[tuple[list[documents.Document], bool]]:
    """Lists of documents that are work for a moment, and whether one begins the split."""
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
        except errors.UserError as error:
            raise error.at(document.place) from error
        parts += [ids, end]
        num_characters += len(text)
        num_words += len(document.text.split())
    tokens = np.concatenate(parts).astype(dtype_of(tokenizer))
    num_unknown = 0 if tokenizer.unk_id is None else int(np.count_nonzero(tokens == tokenizer.unk_id))
    return Encoded(tokens, len(task), num_characters, num_words, num_unknown, task[-1].done)


def _result(future: "concurrent.futures.Future[Encoded]") -> Encoded:
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise errors.UserError(
            "a process that tokenized was ended from outside, perhaps for want of memory",
            remedy=f"use fewer {errors.name('num_workers')}",
        ) from error


_tokenizer: Any = None  # Of a process that tokenizes for another.


def _start(description: dict[str, Any]) -> None:
    global _tokenizer
    _tokenizer = tokenizers.from_json(description)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The first process ends the others.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_here(task: list[documents.Document], is_first: bool) -> Encoded:
    return _encode(_tokenizer, task, is_first)
