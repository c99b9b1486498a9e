"""Several runs side by side: how far each is, its newest held-out bound, its speed, and where their configs differ."""

import contextlib
import io
import statistics
from collections.abc import Sequence
from typing import Any

from sedd_jax import checkpoints, runs
from sedd_jax import config as configs
from sedd_jax.runtime import errors, metric_lines, storage

# The bounds that training measures, the tightest first.
_BOUNDS = {
    "negative_log_likelihood": "exact",
    "cross_entropy": "cross-entropy",
    "score_entropy": "score entropy",
}
_LAST = 20  # logged steps whose median is the speed

Cells = tuple[list[str], list[list[str]]]  # Titles of the columns, and rows.


def find(directories: Sequence[storage.Directory]) -> list[runs.Run]:
    """The runs in these directories: each is a run directory, or holds some.

    Raises:
        errors.UserError: where one is neither.
    """
    found = []
    for directory in directories:
        places = [directory]
        if not storage.holds(directory, "config.json"):
            inside = sorted(directory.iterdir()) if directory.is_dir() else []
            inside = [each for each in inside if not each.name.startswith(".")]  # What a kill has left of one.
            places = [
                each for each in inside if storage.holds(each, "config.json") and (each / storage.CHECKPOINTS).exists()
            ]
            if not places:
                raise errors.UserError(f"{directory} holds no run", remedy="give run directories, or what holds some")
        found += map(runs.load, places)
    return found


def compare(found: Sequence[runs.Run]) -> dict[str, Any]:
    """What is known of each run, and the fields of their configs that differ, with the value in each run."""
    flat = [configs.flatten(configs.to_dict(run.config)) for run in found]
    different = [name for name in flat[0] if any(each[name] != flat[0][name] for each in flat)]
    return {
        "runs": [_facts(run) for run in found],
        "differences": {name: [each[name] for each in flat] for name in different},
    }


def overview(result: dict[str, Any]) -> Cells:
    """A row for each run, which has a number."""
    rows = []
    for number, run in enumerate(result["runs"], start=1):
        bound, speed = "none yet", "not logged"
        if run["bound"]:
            error = f" ± {run['bound']['stderr']:.3f}" if run["bound"]["stderr"] is not None else ""
            bound = f"{run['bound']['bits']:.3f}{error} bits/{run['bound']['unit']}, {_BOUNDS[run['bound']['name']]}"
        if run["tokens_per_second"]:
            speed = f"{run['tokens_per_second']:,.0f}"
        step = "no checkpoint" if run["step"] is None else f"{run['step']}/{run['num_steps']}"
        rows.append([f"{number}  {run['workdir']}", step, bound, speed])
    return ["run", "step", "held-out bound", "tokens/s"], rows


def differences(result: dict[str, Any]) -> Cells:
    """A row for each field of the config that differs, a column for each run."""
    columns = ["config", *(str(number) for number in range(1, len(result["runs"]) + 1))]
    return columns, [[name, *map(str, values)] for name, values in result["differences"].items()]


def _facts(run: runs.Run) -> dict[str, Any]:
    """Step of the newest checkpoint, newest bound, and the median speed of the last logged steps."""
    path = run.workdir / "metrics.jsonl"
    # A local copy is that of a training on this machine, which may have logged more.
    records = metric_lines.parse(io.BytesIO(storage.get_bytes(path) or b""), path)
    try:
        speeds = [float(each["train/tokens_per_second"]) for each in records if "train/tokens_per_second" in each]
        bound = next(filter(None, (_bound(record) for record in reversed(records))), None)
    except (TypeError, ValueError) as error:
        raise errors.UserError(f"{path} holds no numbers ({error})", remedy="copy it again") from error
    return {
        "workdir": str(run.workdir),
        "step": _newest(run),
        "num_steps": run.config.training.num_steps,
        "bound": bound and bound | {"unit": run.tokenizer.unit},
        "tokens_per_second": statistics.median(speeds[-_LAST:]) if speeds else None,
    }


def _bound(record: dict[str, Any]) -> dict[str, Any] | None:
    """The tightest held-out bound of a line of metrics, in bits; None if it has none."""
    name = next((name for name in _BOUNDS if f"valid/{name}_bits" in record), None)
    if name is None:
        return None
    stderr = record.get(f"valid/{name}_bits_stderr")
    bits = float(record[f"valid/{name}_bits"])
    return {"step": record["step"], "name": name, "bits": bits, "stderr": None if stderr is None else float(stderr)}


def _newest(run: runs.Run) -> int | None:
    with contextlib.closing(checkpoints.Checkpoints(run.checkpoint_dir)) as saved:
        return saved.find(None)
