"""pass@k of generated code on problems with tests, in the format of HumanEval (Chen et al. 2021, arXiv 2107.03374)."""

import collections
import concurrent.futures
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.data import text_files
from sedd_jax.evaluation import generation_quality, results, sandbox, tables
from sedd_jax.runtime import errors, hosts, storage
from sedd_jax.sampling import templates

ATTEMPTS = generation_quality.Samples(num_samples=10)
_KS = (1, 10, 100)
# A function that follows a prompt ends before the first match.
_STOP = re.compile(r"\n(class|def|#|@|if|print)")
_FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


class Problem(NamedTuple):
    """A problem: the code to write follows the prompt or, if there is a suffix, is between the two."""

    task_id: str
    prompt: str
    canonical_solution: str
    test: str
    entry_point: str
    suffix: str | None = None


def read(path: str | os.PathLike[str]) -> list[Problem]:
    """Reads problems from a JSON lines file.

    Raises:
        errors.UserError: where there is no such file, or a line is not a problem.
    """
    path = hosts.local_path(os.fspath(path))
    if not path.is_file():
        raise errors.UserError(
            "is not a file", field="problems", value=path, remedy="give one in the format of HumanEval.jsonl"
        )
    found = []
    for line in text_files.lines([str(path)]):
        try:
            content = json.loads(line.text)
            wanted = {name: content[name] for name in _FIELDS} | {"suffix": content.get("suffix")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise errors.UserError(
                f"this line is not a problem with {', '.join(_FIELDS)} ({type(error).__name__}: {error})",
                place=line.place,
                remedy="mend or remove it",
            ) from error
        if not all(isinstance(value, str) for value in wanted.values() if value is not None):
            raise errors.UserError(f"{', '.join(_FIELDS)} and suffix must be text", place=line.place)
        found.append(Problem(**wanted))
    if not found:
        raise errors.UserError("has no problem in it", field="problems", value=path, remedy="give another file")
    return found


def measure(
    workdir: storage.Directory,
    problems: str,
    *,
    step: int | None = None,
    attempts: generation_quality.Samples = ATTEMPTS,
    timeout_s: float = 3.0,
    **settings: Any,
) -> dict[str, Any]:
    """Generates code for every problem and runs its tests in `sandbox`.

    After a prompt the model fills all of its length; the text up to the next statement counts. Between a prompt and a
    suffix it fills as many tokens as the reference solution has.

    Args:
        workdir: the run directory.
        problems: the file, see `read`.
        step: the checkpoint; the newest if None.
        attempts: how many attempts at each problem.
        timeout_s: seconds for an attempt to pass its tests.
        **settings: fields of `config.SamplingConfig` that differ from the run's: sampler, num_steps, draw.

    Returns:
        `pass_at_1` and so on with standard errors over problems, how attempts ended, and `left_out`: problems that do
        not fit the model's length, or have text outside its vocabulary. These count as not passed.

    Raises:
        errors.UserError: where programs cannot be run safely, or a problem's own solution does not pass its tests.
    """
    sandbox.check()
    found = read(problems)
    run = runs.load(workdir)
    sampling = run.sampling(num_samples=attempts.batch_size, **settings)
    references = [assemble(problem, problem.canonical_solution) for problem in found]
    for problem, outcome in zip(found, _run_all(references, timeout_s), strict=True):
        if outcome != sandbox.Outcome.PASSED:
            raise errors.UserError(
                f"the solution that {problem.task_id} comes with {outcome}", place=problems, remedy="mend or remove it"
            )
    opened = run.restore(step)
    result = {
        **results.circumstances(run, opened.step),
        "problems": str(problems),
        "data_sha256": hashlib.sha256(hosts.local_path(problems).read_bytes()).hexdigest(),
        "num_problems": len(found),
        "num_samples": attempts.num_samples,
        **generation_quality.described(run, sampling),
        "timeout_s": timeout_s,
        "batch_size": attempts.batch_size,
        "seed": attempts.seed,
    }
    name = results.name("problems", result)
    asked, left_out = {}, {}
    for problem in found:
        try:
            asked[problem] = _template(run, problem)
        except errors.UserError as error:
            left_out[problem.task_id] = str(error)
    written = _attempt(opened, sampling, asked, attempts)
    outcomes = _run_all([assemble(problem, code) for problem, code in written], timeout_s)
    passed = collections.Counter(
        problem for (problem, _), outcome in zip(written, outcomes, strict=True) if outcome == sandbox.Outcome.PASSED
    )
    for k in _KS:
        if k <= attempts.num_samples:
            each = np.array([pass_at_k(attempts.num_samples, passed[problem], k) for problem in found])
            result |= {f"pass_at_{k}": float(each.mean()), f"pass_at_{k}_stderr": generation_quality.stderr(each)}
    result["outcomes"] = dict(collections.Counter(outcomes))
    result["left_out"] = left_out
    result["passed"] = {problem.task_id: count for problem, count in passed.items()}
    firsts = written[:: attempts.num_samples]
    result["texts"] = [assemble(problem, code) for problem, code in firsts[: results.KEPT_TEXTS]]
    results.keep(run, name, result)
    return result


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k attempts passes (Chen et al. 2021, equation 1)."""
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def assemble(problem: Problem, code: str) -> str:
    """The program that passes if `code` solves the problem."""
    return f"{problem.prompt}{code}{problem.suffix or ''}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"


def table(result: dict[str, Any]) -> tables.Table:
    """The result of `measure` as a table."""
    rows = [
        (f"pass@{k}", tables.estimate(result[f"pass_at_{k}"], result[f"pass_at_{k}_stderr"]))
        for k in _KS
        if f"pass_at_{k}" in result
    ]
    ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(result["outcomes"].items()))
    notes = [f"attempts: {ended or 'none'}"]
    if result["left_out"]:
        name, reason = next(iter(result["left_out"].items()))
        notes.append(f"{len(result['left_out'])} problems left out and counted as not passed, such as {name}: {reason}")
    return tables.Table(
        head=[
            f"{result['workdir']}  step {result['step']}  {result['num_problems']} problems of {result['problems']}, "
            f"{result['num_samples']} attempts each, {generation_quality.how(result)}"
        ],
        columns=("", "share of problems"),
        rows=rows,
        notes=notes,
    )


def _template(run: runs.Run, problem: Problem) -> templates.Template:
    """The template of a program: prompt, gap and suffix.

    Raises:
        errors.UserError: where it is longer than the model, or has text outside the vocabulary.
    """
    prompt = run.tokenizer.encode(problem.prompt)
    if problem.suffix is None:
        return templates.assemble(run, [prompt, (max(1, run.config.data.length - len(prompt)), None)])
    gap = len(run.tokenizer.encode(problem.canonical_solution))
    return templates.assemble(run, [prompt, (gap, None), run.tokenizer.encode(problem.suffix)])


def _attempt(
    opened: runs.OpenRun,
    sampling: configs.SamplingConfig,
    asked: dict[Problem, templates.Template],
    attempts: generation_quality.Samples,
) -> list[tuple[Problem, str]]:
    """Draws the code of all attempts, those at one problem after another."""
    if not asked:
        return []
    each = attempts.num_samples
    rows = lambda field: np.repeat(np.stack([getattr(template, field) for template in asked.values()]), each, 0)
    drawn = generation_quality.fill(opened, sampling, rows("tokens"), rows("is_given"), attempts.seed)
    problems = [problem for problem in asked for _ in range(each)]
    return [
        (problem, _code(opened.run, problem, row, asked[problem])) for problem, row in zip(problems, drawn, strict=True)
    ]


def _code(run: runs.Run, problem: Problem, row: Int[np.ndarray, "L"], template: templates.Template) -> str:
    """The code that was written into the gap, up to an end of text or, after a prompt, the next statement."""
    start, end = np.flatnonzero(~template.is_given[: template.length])[[0, -1]] + (0, 1)
    written = row[start:end]
    if run.tokenizer.eos_id is not None:
        written = written[: np.argmax(np.append(written, run.tokenizer.eos_id) == run.tokenizer.eos_id)]
    text = run.tokenizer.decode(written)
    return text if problem.suffix is not None else _STOP.split(text, maxsplit=1)[0]


def _run_all(programs: Sequence[str], timeout_s: float) -> list[sandbox.Outcome]:
    """Runs programs in parallel, one on each core."""
    with concurrent.futures.ThreadPoolExecutor(hosts.num_cores()) as pool:
        return list(pool.map(lambda program: sandbox.run(program, timeout_s=timeout_s), programs))
