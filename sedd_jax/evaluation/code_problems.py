"""pass@k of generated code on problems with tests, as of HumanEval (Chen et al. 2021, arXiv 2107.03374) and MBPP."""

import collections
import concurrent.futures
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.evaluation import generation_quality, results, tables
from sedd_jax.programs import layouts, sandbox, trials
from sedd_jax.runtime import errors, hosts, storage
from sedd_jax.sampling import templates

ATTEMPTS = generation_quality.Samples(num_samples=10)
_KS = (1, 10, 100)


def measure(
    workdir: storage.Directory,
    problems: str,
    *,
    step: int | None = None,
    attempts: generation_quality.Samples = ATTEMPTS,
    timeout_s: float | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Generates code for every problem and runs its tests in `programs.sandbox`.

    After a prompt the model fills all of its length; the text up to the next statement counts. Between a prompt and a
    suffix it fills as many tokens as the reference solution has.

    Args:
        workdir: the run directory.
        problems: the file, see `layouts.read`.
        step: the checkpoint; the newest if None.
        attempts: how many attempts at each problem.
        timeout_s: the least seconds an attempt has to pass its tests, see `trials.prepare`.
        **settings: fields of `config.SamplingConfig` that differ from the run's: sampler, num_steps, draw.

    Returns:
        `pass_at_1` and so on with standard errors over problems, how attempts ended, and `left_out`: problems that do
        not fit the model's length, or have text outside its vocabulary. These count as not passed. Where problems have
        the layout of EvalPlus, `original_pass_at_1` and so on are of the tests without those that it adds.

    Raises:
        errors.UserError: where programs cannot be run safely, or a problem's own solution does not pass its tests.
    """
    sandbox.check()
    found = layouts.read(problems)
    task_id, count = collections.Counter(problem.task_id for problem in found).most_common(1)[0]
    if count > 1:
        raise errors.UserError(
            f"has {count} problems of the name {task_id}, whose figures would be mixed",
            field="problems",
            value=problems,
            remedy="give each problem once, under a name of its own",
        )
    run = runs.load(workdir)
    sampling = run.sampling(num_samples=attempts.batch_size, **settings)
    try:
        prepared = _each(found, functools.partial(trials.prepare, timeout_s=timeout_s), found)
    except errors.UserError as error:
        raise error.at(problems) from error
    opened = run.restore(step)
    result = {
        **results.circumstances(opened),
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
    ready = dict(zip(found, prepared, strict=True))
    ended = _each(found, trials.attempt, [ready[problem] for problem, _ in written], [code for _, code in written])
    kinds = {"": [attempt.outcome == sandbox.Outcome.PASSED for attempt in ended]}
    if any(problem.answers for problem in found):
        kinds["original_"] = [attempt.passed_original for attempt in ended]
    for kind, outcomes in kinds.items():
        passed = collections.Counter(
            problem.task_id for (problem, _), is_passed in zip(written, outcomes, strict=True) if is_passed
        )
        result |= _estimates(kind, [passed[problem.task_id] for problem in found], attempts.num_samples)
        result[f"{kind}passed"] = dict(passed)
    result["outcomes"] = dict(collections.Counter(attempt.outcome for attempt in ended))
    result["left_out"] = left_out
    firsts = written[:: attempts.num_samples]
    result["texts"] = [problem.program(code) for problem, code in firsts[: results.KEPT_TEXTS]]
    results.keep(run, name, result)
    return result


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k attempts passes (Chen et al. 2021, equation 1)."""
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def _estimates(kind: str, passed: list[int], num_samples: int) -> dict[str, float]:
    """pass@k over problems, from how many attempts at each passed, with standard errors."""
    found = {}
    for k in _KS:
        if k <= num_samples:
            each = np.array([pass_at_k(num_samples, count, k) for count in passed])
            found |= {
                f"{kind}pass_at_{k}": float(each.mean()),
                f"{kind}pass_at_{k}_stderr": generation_quality.stderr(each),
            }
    return found


def table(result: dict[str, Any]) -> tables.Table:
    """The result of `measure` as a table."""
    rows = [
        (f"pass@{k}{title}", tables.estimate(result[f"{kind}pass_at_{k}"], result[f"{kind}pass_at_{k}_stderr"]))
        for kind, title in (("", ""), ("original_", ", original tests"))
        for k in _KS
        if f"{kind}pass_at_{k}" in result
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


def _template(run: runs.Run, problem: layouts.Problem) -> templates.Template:
    """The template of a program: prompt, gap and suffix.

    Raises:
        errors.UserError: where it is longer than the model, or has text outside the vocabulary.
    """
    prompt = run.tokenizer.encode(problem.prompt)
    if problem.suffix is None:
        return templates.assemble(run, [prompt, (max(1, run.config.data.length - len(prompt)), None)])
    gap = max(1, len(run.tokenizer.encode(problem.solution)))
    return templates.assemble(run, [prompt, (gap, None), run.tokenizer.encode(problem.suffix)])


def _attempt(
    opened: runs.OpenRun,
    sampling: configs.SamplingConfig,
    asked: dict[layouts.Problem, templates.Template],
    attempts: generation_quality.Samples,
) -> list[tuple[layouts.Problem, str]]:
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


def _code(run: runs.Run, problem: layouts.Problem, row: Int[np.ndarray, "L"], template: templates.Template) -> str:
    """The code that was written into the gap, up to an end of text or, after a prompt, the next statement."""
    start, end = np.flatnonzero(~template.is_given[: template.length])[[0, -1]] + (0, 1)
    written = row[start:end]
    if run.tokenizer.eos_id is not None:
        written = written[: np.argmax(np.append(written, run.tokenizer.eos_id) == run.tokenizer.eos_id)]
    text = run.tokenizer.decode(written)
    return text if problem.suffix is not None else problem.stop.split(text, maxsplit=1)[0]


def _each(problems: Sequence[layouts.Problem], do: Callable[..., Any], *work: Sequence[Any]) -> list[Any]:
    """Does all work in parallel, as much at once as the machine's cores and memory take."""
    with concurrent.futures.ThreadPoolExecutor(trials.num_at_once(problems)) as pool:
        return list(pool.map(do, *work))
