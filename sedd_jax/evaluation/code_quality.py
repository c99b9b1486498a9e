"""Quality of generated Python: the share of samples, and of windows with refilled gaps, that parse."""

import ast
import math
import re
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sedd_jax import runs
from sedd_jax.evaluation import generation_quality, results, tables
from sedd_jax.reverse import steps
from sedd_jax.runtime import errors, storage
from sedd_jax.sampling import generate

# Lines that continue a statement although they are not indented.
_CONTINUES = re.compile(r"[)\]}]|(else|elif|except|finally|case)\b")


def whole_statements(window: str) -> str:
    """The complete statements of a window of code at the least indentation of its lines, with that indentation removed.

    The first and the last line may be cut, and the last statement may continue after the window. So these are left out.
    """
    lines = window.split("\n")[1:-1]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    depth = min((indent for line, indent in zip(lines, indents, strict=True) if line.strip()), default=0)
    starts = [
        number
        for number, (line, indent) in enumerate(zip(lines, indents, strict=True))
        if line.strip() and indent == depth and not _CONTINUES.match(line.strip())
    ]
    while starts and lines[starts[-2:][0]].lstrip().startswith("@"):
        starts.pop()  # A decorator and what it decorates are one statement.
    return "\n".join(line[depth:] for line in lines[starts[0] : starts[-1]]) if starts else ""


def parses(window: str) -> bool:
    """Whether a window of code has complete statements that are Python. It may begin in a string, which is left out."""
    return _is_python(whole_statements(window)) or _is_python(whole_statements(window.partition('"""')[2]))


def _is_python(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def measure(
    workdir: storage.Directory,
    *,
    step: int | None = None,
    num_samples: int = 64,
    num_steps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Shares of windows that parse, among held-out windows, samples, and held-out windows with a refilled gap.

    The gap is the middle eighth of a window. Only windows that parse get one, so all refilled windows could parse. For
    comparison `gap_closed` is the share that parse with the gap removed. An autoregressive run sees no text after a
    gap, so it has samples alone.

    Args:
        workdir: the run directory.
        step: the checkpoint; the newest if None.
        num_samples: windows of each kind.
        num_steps: reverse steps; the run's config if None.
        seed: seed of the samples and of the choice of windows.

    Raises:
        errors.UserError: where too few windows of the held-out code parse.
    """
    run = runs.load(workdir)
    changed = {} if num_steps is None else {"num_steps": num_steps}
    sampling = run.sampling(num_samples=num_samples, **changed)
    held_out = run.split("valid")
    sequences = np.random.default_rng(seed).permutation(held_out.sequences()).astype(np.int32)
    real = [parses(_text(run, row)) for row in sequences]
    chosen = sequences[np.flatnonzero(real)[:num_samples]]
    if not any(real):
        raise errors.UserError(
            f"none of the {len(real)} held-out windows of {workdir} parses",
            remedy="measure a run whose text is Python, with longer sequences than these if it is",
        )
    if len(chosen) < num_samples and not run.is_autoregressive:
        raise errors.UserError(
            f"only {len(chosen)} held-out windows parse",
            remedy=f"ask for {errors.name('num_samples')}={len(chosen)} at most",
        )
    length = run.config.data.length
    gap = slice(length // 2 - length // 16, length // 2 + length // 16)
    is_given = np.ones(length, bool)
    is_given[gap] = False
    opened = run.restore(step)
    result = {
        **results.circumstances(opened),
        "data_sha256": held_out.sha256,
        "length": length,
        "gap": gap.stop - gap.start,
        **generation_quality.described(run, sampling),
        "num_samples": num_samples,
        "seed": seed,
    }
    name = results.name("code", result)
    empty = (num_samples, length)
    nothing = steps.Given(jnp.zeros(empty, jnp.int32), jnp.zeros(empty, bool))
    with opened.on_devices():
        samples = generate.draw_tokens(opened, nothing, sampling, seed=seed)
        drawn = {"samples": samples}
        if not run.is_autoregressive:
            around = steps.Given(jnp.asarray(chosen), jnp.broadcast_to(is_given, chosen.shape))
            drawn["refilled"] = generate.draw_tokens(opened, around, sampling, seed=seed)
            drawn["gap_closed"] = np.delete(chosen, np.r_[gap], axis=1)
    result["held_out"] = _share(real)
    for kind, rows in drawn.items():
        result[kind] = _share([parses(_text(run, row)) for row in rows])
    result["texts"] = [_text(run, row) for row in samples[: results.KEPT_TEXTS]]
    results.keep(run, name, result)
    return result


def table(result: dict[str, Any]) -> tables.Table:
    """The result of `measure` as a table."""
    names = {
        "held_out": "held-out code",
        "samples": "samples",
        "refilled": f"held-out code that parses, {result['gap']} tokens refilled",
        "gap_closed": "the same, those tokens left out",
    }
    return tables.Table(
        head=[
            f"{result['workdir']}  step {result['step']}  windows of {result['length']} tokens, "
            f"{generation_quality.how(result)}"
        ],
        columns=("windows whose whole statements parse", "share", "windows"),
        rows=[
            (title, tables.estimate(result[name]["share"], result[name]["stderr"]), str(result[name]["windows"]))
            for name, title in names.items()
            if name in result
        ],
    )


def _text(run: runs.Run, tokens: Int[np.ndarray, " L"]) -> str:
    """The text of a window, with a newline for each end of a document."""
    eos_id = run.tokenizer.eos_id
    ends = [] if eos_id is None else np.flatnonzero(tokens == eos_id)
    return "\n".join(run.tokenizer.decode(part[part != eos_id]) for part in np.split(tokens, ends))


def _share(outcomes: list[bool]) -> dict[str, float | None]:
    count = len(outcomes)
    share = sum(outcomes) / count
    stderr = math.sqrt(share * (1 - share) / count) if count > 1 else None
    return {"share": share, "stderr": stderr, "windows": count}
