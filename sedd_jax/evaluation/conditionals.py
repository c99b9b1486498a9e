"""Likelihood of continuations given their context, and which of several choices is the likeliest."""

import dataclasses
import hashlib
import json
import math
import os
from typing import Any, NamedTuple

from sedd_jax import runs
from sedd_jax.bounds import continuations
from sedd_jax.data import text_files
from sedd_jax.evaluation import results, tables
from sedd_jax.runtime import errors, hosts, sharding, storage, terminals

_FORM = '{"context": "...", "continuation": "..."} or {"context": "...", "choices": ["...", "..."], "answer": 0}'
_KEPT = ("context_tokens", "cut_tokens", "tokens", "log_likelihoods", "stderrs", "num_times", "is_decided")
_SHOWN = 10  # lines of a file, in the table
_KEPT_EVERY = 16  # lines between two writes of the results so far, each of which replaces the file


class Item(NamedTuple):
    """A line of the file.

    Attributes:
        context: what is given, which may be empty.
        continuations: what may follow: one, or two choices or more.
        answer: index of the right choice; None if it is not known.
        place: file and line.
    """

    context: str
    continuations: tuple[str, ...]
    answer: int | None
    place: str


def read(path: str | os.PathLike[str]) -> list[Item]:
    """Reads items from a JSON lines file.

    Raises:
        errors.UserError: where there is no such file, or a line is not an item.
    """
    path = hosts.local_path(os.fspath(path))
    if not path.is_file():
        raise errors.UserError(
            "is not a file", field="conditional", value=path, remedy=f"give one with lines of {_FORM}"
        )
    found = [_item(line) for line in text_files.lines([str(path)])]
    if not found:
        raise errors.UserError("has no line in it", field="conditional", value=path, remedy="give another file")
    return found


def _item(line: text_files.Line) -> Item:
    try:
        content = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"this line is not JSON ({error})", place=line.place, remedy="mend it") from error
    problem, given = "", content if isinstance(content, dict) else {}
    choices = given.get("choices", [given.get("continuation")])
    answer = given.get("answer")
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in (given.get("context"), *choices)):
        problem = "does not have a context and a continuation, or choices, as text"
    elif "choices" in given and ("continuation" in given or len(choices) < 2):
        problem = "has a continuation beside its choices" if "continuation" in given else "has fewer than two choices"
    elif answer is not None and (type(answer) is not int or "choices" not in given or not 0 <= answer < len(choices)):
        problem = f"has the answer {answer!r}, which is not the number of a choice, from 0 on"
    if problem:
        raise errors.UserError(f"this line {problem}", place=line.place, remedy=f"write it as {_FORM}")
    return Item(given["context"], tuple(choices), answer, line.place)


def measure(
    workdir: storage.Directory,
    path: str,
    *,
    step: int | None = None,
    budget: continuations.Budget = continuations.BUDGET,
) -> dict[str, Any]:
    """Bounds the log-likelihood of each continuation given its context, and ranks choices.

    Finished lines are kept. So an interrupted command goes on where it stopped when it is repeated.

    Args:
        workdir: the run directory.
        path: the file, see `read`.
        step: the checkpoint; the newest if None.
        budget: when draws for a line stop.

    Returns:
        `items`: for each line its log-likelihoods in nats (lower bounds; exact for an autoregressive run), their
        standard errors, the number of draws and, of choices, the best, its lead over the second with a standard error,
        and whether that is decided. `accuracy` over lines with an answer.

    Raises:
        errors.UserError: where a line is not an item, or its text cannot be read by the run.
    """
    run, asked = runs.load(workdir), read(path)
    length, encoded = run.config.data.length, []
    for item in asked:
        try:
            encoded.append(continuations.encode(run.tokenizer, length, item.context, item.continuations))
        except errors.UserError as error:
            raise error.at(item.place) from error
    opened = run.restore(step)
    drawn = {
        "step": opened.step,
        "checksum": opened.checksum,
        "data_sha256": hashlib.sha256(hosts.local_path(path).read_bytes()).hexdigest(),
        **dataclasses.asdict(budget),
    }
    with opened.on_devices():
        name = results.name("conditional", drawn | {"devices": sharding.num_batch_devices()})
    done = results.read_parts(run, name, _KEPT)
    values_fn = continuations.make_values_fn(opened)
    num_tokens = 0
    with opened.on_devices(), terminals.progress() as report:
        for number in range(len(done), len(asked)):
            parts, num_cut = encoded[number]
            found = continuations.estimate(values_fn, parts, budget, number, is_exact=run.is_autoregressive)
            done.append(_described(asked[number], parts, num_cut, found))
            num_tokens += sum(part.num_tokens for part in parts)
            report("lines", len(done) / len(asked), num_tokens)
            if len(done) % _KEPT_EVERY == 0 or len(done) == len(asked):
                results.write_parts(run, name, done)
    result = {
        **results.circumstances(opened),
        **drawn,
        "path": str(path),
        "graph": run.config.graph.name,
        "begins_with_end_of_text": run.tokenizer.eos_id is not None,
        "items": done,
        **_accuracy(done),
    }
    results.keep(run, name, result)
    return result


def _described(item: Item, parts: list[continuations.Part], num_cut: int, found: continuations.Found) -> dict[str, Any]:
    described: dict[str, Any] = {
        "context_tokens": parts[0].start,
        "cut_tokens": num_cut,
        "tokens": [part.num_tokens for part in parts],
        "log_likelihoods": [-nats for nats in found.nats],
        "stderrs": found.stderrs,
        "num_times": found.num_times,
        "is_decided": found.is_decided,
    }
    if len(parts) > 1:
        described |= {"best": found.best, "lead": found.lead, "lead_stderr": found.lead_stderr, "answer": item.answer}
    return described


def _accuracy(items: list[dict[str, Any]]) -> dict[str, Any]:
    right = [item["best"] == item["answer"] for item in items if item.get("answer") is not None]
    if not right:
        return {}
    share = sum(right) / len(right)
    return {
        "accuracy": share,
        "accuracy_stderr": math.sqrt(share * (1 - share) / len(right)) if len(right) > 1 else None,
        "num_answers": len(right),
    }


def table(result: dict[str, Any]) -> tables.Table:
    """The result of `measure` as a table of its first lines, with the accuracy over all."""
    items, is_exact = result["items"], result["graph"] == "autoregressive"
    rows = []
    for number, item in enumerate(items[:_SHOWN], start=1):
        best = item.get("best", 0)
        rows.append(
            (
                f"line {number}",
                str(item["context_tokens"]),
                str(item["tokens"][best]),
                _estimate(item["log_likelihoods"][best], item["stderrs"][best], is_exact),
                str(best) if "best" in item else "",
                _estimate(item["lead"], item["lead_stderr"], is_exact) if "best" in item else "",
                str(item["num_times"] or "exact"),
            )
        )
    return tables.Table(
        head=[
            f"{result['workdir']}  step {result['step']}  {len(items)} lines of {result['path']}, {result['dtype']}",
            _surroundings(result),
        ],
        columns=("", "context tokens", "counted", "log-likelihood, nats", "choice", "ahead by", "draws"),
        rows=rows,
        notes=_notes(result, is_exact),
    )


def _estimate(value: float, stderr: float, is_exact: bool) -> str:
    return tables.estimate(value, None if is_exact else stderr, 3)


def _surroundings(result: dict[str, Any]) -> str:
    """What is around a text that is shorter than the model's sequences, in words."""
    before = (
        "an end of text, then the context, never noised"
        if result["begins_with_end_of_text"]
        else ("the context, never noised")
    )
    after = {
        "absorb": "what follows the continuation stays masked and does not count",
        "autoregressive": "what follows is not seen",
    }.get(result["graph"], "the sequence ends with the continuation")
    return f"{before}; {after}"


def _notes(result: dict[str, Any], is_exact: bool) -> list[str]:
    items = result["items"]
    notes = [f"and {len(items) - _SHOWN} lines more, in the result"] if len(items) > _SHOWN else []
    if not is_exact:
        notes.append("log-likelihoods are lower bounds, ± the standard error over masks, times and noise")
    choices = [item for item in items if "best" in item]
    if choices:
        open_ones = sum(not item["is_decided"] for item in choices)
        notes.append(
            f"{len(choices) - open_ones} of {len(choices)} rankings decided within {result['num_times']} draws "
            "(--num_times), by three standard errors"
        )
    if "accuracy" in result:
        shown = tables.estimate(result["accuracy"], result["accuracy_stderr"])
        notes.append(f"accuracy {shown} of {result['num_answers']} lines with an answer, ± over lines")
    if cut := sum(item["cut_tokens"] > 0 for item in items):
        notes.append(f"{cut} contexts were longer than the model's sequences allow: their start was cut off")
    return notes
