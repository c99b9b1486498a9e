"""metrics.jsonl of a run: a line of JSON for every step that was logged."""

import json
import os
from collections.abc import Iterable
from typing import Any

from sedd_jax.runtime import errors


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file.

    A last line without a line end is left out: a kill cut it off, or it is being written.

    Raises:
        errors.UserError: names a line that is no JSON object with a step.
    """
    with open(path, "rb") as file:
        return parse(file, path)


def parse(lines: Iterable[bytes], path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """`read` of lines that were read already; `path` is for messages."""
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            records.append(record | {"step": int(record["step"])})
        except (ValueError, OverflowError, RecursionError, TypeError, KeyError) as error:
            raise errors.UserError(
                f"{path} line {number} holds no metrics of a step ({line[:60]!r})", remedy="delete that line"
            ) from error
    return records
