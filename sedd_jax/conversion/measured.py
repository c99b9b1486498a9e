"""What a model card says of a run beside its config: kept evaluations, samples with their seed, pictures of curves."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sedd_jax import runs
from sedd_jax.evaluation import generation_quality, report, results, tables
from sedd_jax.runtime import storage, terminals

PICTURE = "loss.png"
_SAMPLES = 2  # texts that a card shows
# What a value such as text:/home/me/books/*.txt has before the last part of its path.
_DIRECTORY = re.compile(r"((?:[\w-]+:)*)/(?!/)(?:.*/)?", re.DOTALL)
_INSIDE = re.compile(r"""(?<=[\s:='"(,])/(?!/)(?:[^\s'",:]*/)?(?=[^\s])""")
_DRAWN = re.compile(r"^--- sample \d+ at step \d+\n", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Markdown for a model card, and the pictures that it shows.

    Attributes:
        text: sections with figures, samples and pictures; each says so if there are none.
        pictures: files to write beside the card, by name.
    """

    text: str
    pictures: Mapping[str, pathlib.Path]


def find(run: runs.Run, step: int | None, weights: str, dtype: str) -> Measured:
    """What a run directory holds about one of its checkpoints.

    Args:
        run: the run; without results, samples and pictures if it is another program's checkpoint.
        step: step of the checkpoint.
        weights: "ema" or "raw". Only the moving average ("ema") is ever measured and sampled.
        dtype: of the weights that the card goes with.
    """
    kept = results.load(run) if weights == "ema" else {}
    of_step = {
        kind: [result for result in reversed(kept.get(kind, [])) if step is not None and result.get("step") == step]
        for kind in report.SECTIONS
    }
    pictures, parts = {}, ["## Figures", ""]
    if weights != "ema":
        parts.append("Nothing was measured of these raw weights: evaluations are of the moving average.")
    elif not any(of_step.values()):
        parts.append("Nothing was measured of this checkpoint.")
    elif dtype != "float32":
        parts += [f"They are of the float32 weights, before these were rounded to {dtype}.", ""]
    for kind, found in of_step.items():
        title, table = report.SECTIONS[kind]
        for result in found:
            with report.reading(run, result):
                parts += [f"### {title}", "", table(_without_directories(result)).as_markdown(), ""]
                name = f"{result['name']}.png"
                if (run.local / results.DIRECTORY / name).is_file():
                    pictures[name] = run.local / results.DIRECTORY / name
                    shown = "Judge against entropy" if kind == "frontier" else "Quality against network evaluations"
                    parts += [f"![{shown}]({name})", ""]
    parts += ["", "## Samples", "", *_samples(run, of_step["generation"], step, weights)]
    if (run.local / PICTURE).is_file():
        pictures[PICTURE] = run.local / PICTURE
        parts += ["", "## Training", "", f"![Bits over training, lower is better]({PICTURE})"]
    return Measured(text="\n".join(parts) + "\n", pictures=pictures)


def without_directories(value: Any) -> Any:
    """A value of JSON in which every absolute path is its last part: a card is for readers of other machines."""
    if isinstance(value, Mapping):
        return {name: without_directories(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_directories(part) for part in value]
    if not isinstance(value, str):
        return value
    return _INSIDE.sub("", _DIRECTORY.sub(r"\1", value, count=1) if _DIRECTORY.match(value) else value)


def _without_directories(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name == "texts" else without_directories(value) for name, value in result.items()}


def _samples(run: runs.Run, generated: Sequence[dict[str, Any]], step: int | None, weights: str) -> list[str]:
    """Lines about the first samples of the newest measurement of text, else of those that training has drawn."""
    for result in generated:
        with report.reading(run, result):
            how = f"{generation_quality.how(result)}, {result['length']} tokens, seed {result['seed']}"
            if result["texts"]:
                return _shown(how, result["texts"])
    path = run.local / "samples" / f"{step or 0:08d}.txt"
    if weights != "ema" or step is None or not path.is_file():
        return ["None were kept of this checkpoint."]
    # Training draws them with the run's own settings, and their seed is the step.
    sampling, length = run.config.sampling, run.config.data.length
    how = generation_quality.how(generation_quality.described(run, sampling))
    texts = [text.removesuffix("\n") for text in _DRAWN.split(storage.read_description(path))[1:]]
    return _shown(f"drawn in training, {how}, {length} tokens, seed {step}", texts)


def _shown(how: str, texts: Sequence[str]) -> list[str]:
    lines = [f"The first of their seed, not selected: {tables.literal(how)}."]
    for text in texts[:_SAMPLES]:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
        lines += ["", f"{fence}text", text.translate(terminals.VISIBLE_CONTROLS), fence]
    return lines
