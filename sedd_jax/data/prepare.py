"""Prepare text once: tokenize a source and write token shards that any number of runs can read."""

import os
from typing import Any

from sedd_jax.data import batches, corpora, shards, tokenizers
from sedd_jax.runtime import errors, hosts, leases, storage, terminals

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
    tokenizers.check(tokenizer_spec)
    local = storage.local_copy(directory)
    with leases.owned(directory, "out"):
        _check_new(directory)  # Only its owner can tell: another process may have prepared it just now.
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


def _check_new(directory: storage.Directory) -> None:
    if shards.is_packed(directory):
        raise errors.UserError(
            "already holds prepared text", field="out", value=directory, remedy="use it, or choose another directory"
        )
    if not storage.is_remote(directory) and not storage.is_free(directory):
        raise errors.UserError(
            "exists and is not empty", field="out", value=directory, remedy="choose another directory"
        )


def read_tokenizer(
    directory: storage.Directory, spec: str | None = None, *, field: str = "tokenizer"
) -> tokenizers.Tokenizer:
    """The tokenizer of prepared text. The file that it needs, if any, lies beside the text.

    Earlier versions wrote only the path of that file. Where it is gone, `spec` says where the file is now.

    Args:
        directory: prepared text.
        spec: the tokenizer that the reader wants, one of `tokenizers.FORMS`; any if None.
        field: the input that names the spec, for errors.

    Raises:
        errors.UserError: if the spec names another tokenizer, or the file is missing.
    """
    header, place = shards.follow(directory)
    fingerprint, description = header["tokenizer_fingerprint"], _beside(header["tokenizer"], place)
    refused = errors.UserError(
        f"is another tokenizer than {directory} was prepared with",
        field=field,
        value=spec,
        remedy=f"set it to {header['tokenizer_spec']}, or prepare {header['source']} again",
    )
    is_another = lambda spec: tokenizers.is_learned(spec) or tokenizers.fingerprint(spec) != fingerprint
    if spec is not None and spec != header["tokenizer_spec"] and is_another(spec):
        raise refused
    path = description.get("path")
    is_lost = str(description.get("kind")) in tokenizers.FILES and not (path and os.path.isfile(str(path)))
    if is_lost and spec is not None:
        tokenizer = tokenizers.build(spec, lambda: ())
        if tokenizer.fingerprint() != fingerprint:
            raise refused
        return tokenizer
    if is_lost and path:
        raise errors.UserError(
            f"the tokenizer's file {path} is missing",
            remedy=f"put it back, or say where it is now by {errors.name(field)}={description['kind']}:FILE",
        )
    header_file = place / shards.HEADER
    try:
        tokenizer = tokenizers.from_json(description)
        tokenizers.num_ids(tokenizer)  # Opens a model that the description holds.
    except errors.UserError as error:
        raise error.at(str(header_file)) from error
    except (KeyError, TypeError) as error:
        raise errors.UserError(
            f"{header_file} is damaged ({error!r})", remedy="remove the directory and prepare it again"
        ) from error
    return tokenizer


def _beside(description: dict[str, Any], place: storage.Directory) -> dict[str, Any]:
    """The description of the tokenizer of prepared text, with the path of the file beside the text if there is one."""
    name = tokenizers.FILES.get(str(description.get("kind")))
    if name is None:
        return description
    storage.download(place, name)
    file = storage.local_copy(place).absolute() / name
    return {**description, "path": str(file)} if file.exists() else description


def describe(directory: storage.Directory, tokenizer_spec: str | None = None) -> dict[str, Any]:
    """Counts of prepared text, its entropies in bits per token, and the beginning of its first split as text.

    Args:
        directory: prepared text.
        tokenizer_spec: its tokenizer, where an earlier version prepared it and the tokenizer's file has moved since.

    Raises:
        errors.UserError: if the text is damaged, or its tokenizer is another one or misses its file.
    """
    header = shards.read_header(directory)
    tokenizer = read_tokenizer(directory, tokenizer_spec)
    num_ids = tokenizers.num_ids(tokenizer)
    splits: dict[str, Any] = {}
    for name in header["splits"]:
        counts, tokens = shards.open_split(directory, name)
        measured = tokens.read(0, min(len(tokens), batches.MEASURED_TOKENS))
        try:
            tokenizers.check_encoded(measured, tokenizer)
        except errors.UserError as error:
            raise error.at(f"{directory}, split {name}") from error
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
