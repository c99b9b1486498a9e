"""Keeps results in RUN/evaluations as KIND-HASH.json, with all that is needed to repeat the measurement."""

import contextlib
import contextvars
import datetime
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.runtime import errors, processes, storage

DIRECTORY = "evaluations"
KEPT_TEXTS = 8  # samples whose text a result holds
_failures: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("_failures", default=None)


@contextlib.contextmanager
def printed_first() -> Iterator[None]:
    """Inside it, what cannot be kept is an error only at the end, so that a result is shown before.

    Raises:
        errors.UserError: at the end, if something could not be kept.
    """
    failures: list[str] = []
    token = _failures.set(failures)
    try:
        yield
    finally:
        _failures.reset(token)
    if failures:
        raise errors.UserError(
            f"the result is shown, but cannot be kept ({failures[0]})", remedy="make the run writable, or copy it"
        )


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Around what writes files of a result."""
    try:
        yield
    except OSError as error:
        failures = _failures.get()
        if failures is None:
            raise
        failures.append(errors.reason(error))


def circumstances(opened: runs.OpenRun) -> dict[str, Any]:
    """The fields that every result has: run, checkpoint and its checksum, precision, device and versions."""
    return {
        "workdir": str(opened.run.workdir),
        "step": opened.step,
        "checksum": opened.checksum,
        "dtype": opened.run.config.network.dtype,
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("sedd_jax", "jax", "numpy")},
    }


def name(kind: str, settings: dict[str, Any]) -> str:
    """The name under which a result is kept, from a hash of `settings`: all that the result is a function of."""
    return f"{kind}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}"


def keep(run: runs.Run, name: str, result: dict[str, Any]) -> None:
    """Writes a result with the time and the run's config, in place of one with the same name."""
    measured = datetime.datetime.now(datetime.UTC).isoformat()
    if processes.is_first():
        content = {"measured": measured, **result, "config": configs.to_dict(run.config)}
        with keeping():
            storage.replace_text(path(run, f"{name}.json"), json.dumps(content, indent=1) + "\n")
            storage.upload(run.workdir, f"{DIRECTORY}/{name}.*")


def load(run: runs.Run) -> dict[str, list[dict[str, Any]]]:
    """All results by kind, the oldest first, each with its name."""
    storage.download(run.workdir, DIRECTORY)
    found: dict[str, list[dict[str, Any]]] = {}
    for file in (run.local / DIRECTORY).glob("*.json"):
        result = {"name": file.stem, **runs.read_json(file)}
        found.setdefault(file.stem.rpartition("-")[0], []).append(result)
    return {kind: sorted(kept, key=lambda result: str(result.get("measured"))) for kind, kept in found.items()}


def read_parts(run: runs.Run, name: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The finished parts of a long measurement, from which it resumes after an interruption.

    Raises:
        errors.UserError: where a part is damaged, or lacks one of the fields.
    """
    storage.download(run.workdir, DIRECTORY)
    file = run.local / DIRECTORY / f"{name}.jsonl"
    if not file.exists():
        return []
    try:
        parts = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"{file} is damaged ({error})", remedy="remove it and measure again") from error
    if not all(isinstance(part, dict) and part.keys() >= set(fields) for part in parts):
        problem = f"{file} is damaged (a line lacks one of {', '.join(fields)})"
        raise errors.UserError(problem, remedy="remove it and measure again")
    return parts


def write_parts(run: runs.Run, name: str, parts: Sequence[dict[str, Any]]) -> None:
    """Writes all finished parts of a measurement."""
    if processes.is_first():
        with keeping():
            storage.replace_text(path(run, f"{name}.jsonl"), "".join(json.dumps(part) + "\n" for part in parts))
            storage.upload(run.workdir, f"{DIRECTORY}/{name}.jsonl")


def path(run: runs.Run, name: str) -> pathlib.Path:
    """The path of a file of a result; its directory is made if it does not exist."""
    (run.local / DIRECTORY).mkdir(exist_ok=True)
    return run.local / DIRECTORY / name
