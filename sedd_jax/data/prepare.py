"""Prepare text once: tokenize a source and write token shards that any number of runs can read."""

from typing import Any

from sedd_jax.data import batches, corpora, shards, tokenizers
from sedd_jax.runtime import errors, hosts, locks, storage, terminals

_MEASURED_TOKENS = 2**24  # enough for the entropies, whose pairs then take half a gigabyte with GPT-2's tokens
_SHOWN_TOKENS = 200


def prepare(source: str, tokenizer_spec: str, directory: storage.Directory, *, num_workers: int | None = None) -> None:
    """Tokenize a corpus and write it to a new directory, which appears only when it is complete.

    Args:
        source: one of `corpora.FORMS`.
        tokenizer_spec: one of `tokenizers.FORMS`.
        directory: a new directory, local or in a bucket. In a bucket, header.json is written last.
        num_workers: processes that tokenize; one per CPU core if None.

    Raises:
        errors.UserError: if an argument or a document cannot be used.
        OSError: if a file cannot be read or written.
    """
    if num_workers is not None and num_workers < 1:
        raise errors.UserError("must be at least 1", field="num_workers", value=num_workers)
    if shards.is_packed(directory):
        raise errors.UserError(
            "already holds prepared text", field="out", value=directory, remedy="use it, or choose another directory"
        )
    if not storage.is_remote(directory) and not storage.is_free(directory):
        raise errors.UserError(
            "exists and is not empty", field="out", value=directory, remedy="choose another directory"
        )
    local = storage.local_copy(directory)
    with locks.owned(local, "out"):
        corpus = corpora.find(source)
        tokenizer = tokenizers.build(tokenizer_spec, corpus.texts)
        storage.clear(directory)
        with terminals.progress() as report, storage.new_directory(local) as partial:
            shards.pack(
                corpus,
                tokenizer,
                partial,
                source=source,
                tokenizer_spec=tokenizer_spec,
                num_workers=num_workers or hosts.num_cores(),
                report=report,
            )
        storage.upload(directory)
        storage.clear(directory)


def describe(directory: storage.Directory) -> dict[str, Any]:
    """Counts of prepared text, its entropies in bits per token, and the beginning of its first split as text."""
    header = shards.read_header(directory)
    tokenizer = tokenizers.from_json(header["tokenizer"])
    num_ids = tokenizers.num_ids(tokenizer)
    splits: dict[str, Any] = {}
    for name in header["splits"]:
        counts, tokens = shards.open_split(directory, name)
        measured = tokens.read(0, min(len(tokens), _MEASURED_TOKENS))
        entropies = batches.entropies(measured, num_ids)
        splits[name] = {
            **{key: value for key, value in counts.items() if key != "shards"},
            "num_shards": len(counts["shards"]),
            "measured_tokens": len(measured),
            "unigram_entropy_bits": entropies.unigram,
            "bigram_entropy_bits": entropies.bigram,
        }
    _, tokens = shards.open_split(directory, next(iter(splits)))
    return {
        "directory": str(directory),
        "source": header["source"],
        "tokenizer": header["tokenizer_spec"],
        "num_ids": num_ids,
        "dtype": header["dtype"],
        "splits": splits,
        "sample": tokenizer.decode(tokens.read(0, min(len(tokens), _SHOWN_TOKENS))),
    }


def table(description: dict[str, Any]) -> str:
    """The result of `describe` as a table to print."""
    lines = [
        f"{description['directory']}: {description['source']} in tokens of {description['tokenizer']}, "
        f"{description['num_ids']} ids of {8 * int(description['dtype'][-1])} bits",
        f"{'split':<6}{'documents':>11}{'tokens':>15}{'words':>14}{'characters':>16}{'per token':>11}"
        f"{'unigram bits':>14}{'bigram':>8}",
    ]
    for name, split in description["splits"].items():
        lines.append(
            f"{name:<6}{split['num_documents']:>11,}{split['num_tokens']:>15,}{split['num_words']:>14,}"
            f"{split['num_characters']:>16,}{split['num_characters'] / split['num_tokens']:>11.3f}"
            f"{split['unigram_entropy_bits']:>14.3f}{split['bigram_entropy_bits']:>8.3f}"
        )
    for name, split in description["splits"].items():
        if split["num_unknown"]:
            share = split["num_unknown"] / split["num_tokens"]
            lines.append(
                f"{name}: {split['num_unknown']:,} tokens ({share:.2%}) are unknown: their text has no token of its own"
            )
        if split["num_empty"]:
            lines.append(
                f"{name}: {split['num_empty']:,} empty documents left out, the first at {split['first_empty']}"
            )
        if split["measured_tokens"] < split["num_tokens"]:
            lines.append(f"{name}: entropies are those of its first {split['measured_tokens']:,} tokens")
    return "\n".join([*lines, f"{next(iter(description['splits']))} begins:", description["sample"]])
