"""Problems to solve by code, in the layouts in which HumanEval, HumanEval+, MBPP and MBPP+ are distributed."""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sedd_jax.data import text_files
from sedd_jax.programs import mbpp_inputs
from sedd_jax.runtime import errors, hosts

# Code that follows a prompt ends before the first match: where the prompt began a function, and where it is a task.
_AFTER_FUNCTION = re.compile(r"\n(class|def|#|@|if|print)")
_AFTER_TASK = re.compile(r'\n("""|assert|if __name__|def main\(|print\()')
_SEVERAL_ZEROS = "HumanEval/32"  # Any zero of a polynomial is right.
_MAYBE = (str, type(None))


class Answers(NamedTuple):
    """Inputs of a function, whose results must be those of the reference solution.

    Attributes:
        entry_point: the function's name.
        rule: the name by which `compare_answers` knows its other right results; "" if it has none.
        atol: absolute tolerance.
        inputs: the pickled list of lists of arguments, those of the original tests first.
        num_original: how many are of the original tests.
        num_inputs: how many there are.
    """

    entry_point: str
    rule: str
    atol: float
    inputs: bytes
    num_original: int
    num_inputs: int


class Problem(NamedTuple):
    """A problem: the code to write follows the prompt or, if there is a suffix, is between the two.

    Attributes:
        task_id: its name.
        prompt: what precedes the code.
        solution: the reference solution.
        tests: Python that raises where the program before it is wrong.
        answers: what is tested instead, in EvalPlus's own layout.
        suffix: what follows the code.
        stop: code after a prompt ends before the first match.
    """

    task_id: str
    prompt: str
    solution: str
    tests: str = ""
    answers: Answers | None = None
    suffix: str | None = None
    stop: re.Pattern[str] = _AFTER_FUNCTION

    def program(self, code: str) -> str:
        """The program that `code` is a part of, without its tests."""
        return f"{self.prompt}{code}{self.suffix or ''}\n"


def read(path: str | os.PathLike[str]) -> list[Problem]:
    """Reads problems from a file of JSON lines, or of one JSON list; it may be compressed.

    Raises:
        errors.UserError: where there is no such file, or an entry is not a problem.
    """
    path = hosts.local_path(os.fspath(path))
    if not path.is_file():
        raise errors.UserError(
            "is not a file", field="problems", value=path, remedy="give one in the format of HumanEval.jsonl"
        )
    found = [_problem(content, place) for content, place in _entries(str(path))]
    if not found:
        raise errors.UserError("has no problem in it", field="problems", value=path, remedy="give another file")
    return found


def _entries(path: str) -> Iterator[tuple[Any, str]]:
    """The JSON values in a file and their places.

    Raises:
        errors.UserError: where it is not JSON.
    """
    lines = text_files.lines([path])
    for line in lines:
        is_list = line.number == 1 and line.text.lstrip().startswith("[")
        text = "".join([line.text, *(other.text for other in lines)]) if is_list else line.text
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise errors.UserError(
                f"this line is not a problem, nor JSON ({type(error).__name__}: {error})",
                place=line.place,
                remedy="mend or remove it",
            ) from error
        if is_list:
            yield from ((entry, f"{path}, entry {number}") for number, entry in enumerate(content, start=1))
        else:
            yield content, line.place


def _problem(content: Any, place: str) -> Problem:
    """The problem that an entry holds, in the layout that its fields have.

    Raises:
        errors.UserError: where it is no problem.
    """
    fields = content if isinstance(content, dict) else {}
    layout = next((layout for layout in (_EVALPLUS, _MBPP) if layout.mark in fields), _HUMANEVAL)
    for name, kind in layout.fields.items():
        if not isinstance(fields.get(name, layout.defaults.get(name)), kind):
            raise errors.UserError(
                f"this line is not a problem with {', '.join(layout.fields)}: {name} "
                + (f"is {fields[name]!r:.40}" if name in fields else "is missing"),
                place=place,
                remedy="mend or remove it",
            )
    try:
        return layout.make(layout.defaults | fields)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise errors.UserError(
            f"the inputs of {fields['task_id']} are not those of its function ({type(error).__name__}: {error})",
            place=place,
            remedy="mend or remove it",
        ) from error


def _from_humaneval(fields: dict[str, Any]) -> Problem:
    return Problem(
        task_id=fields["task_id"],
        prompt=fields["prompt"],
        solution=fields["canonical_solution"],
        tests=f"{fields['test']}\n\ncheck({fields['entry_point']})\n",
        suffix=fields["suffix"],
    )


def _from_evalplus(fields: dict[str, Any]) -> Problem:
    """HumanEval+ and MBPP+ in EvalPlus's own layout: inputs, and a solution that says what is right."""
    task_id, entry_point = fields["task_id"], fields["entry_point"]
    is_mbpp = task_id.startswith("Mbpp/")
    inputs = [*fields["base_input"], *fields["plus_input"]]
    if not inputs or not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError("each input must be a list of arguments")
    return Problem(
        task_id=task_id,
        prompt=fields["prompt"],
        solution=fields["canonical_solution"],
        answers=Answers(
            entry_point=entry_point,
            rule=entry_point if is_mbpp or task_id == _SEVERAL_ZEROS else "",
            atol=float(fields["atol"]),
            inputs=pickle.dumps(mbpp_inputs.restored(task_id, inputs) if is_mbpp else inputs),
            num_original=len(fields["base_input"]),
            num_inputs=len(inputs),
        ),
        stop=_AFTER_TASK if is_mbpp else _AFTER_FUNCTION,
    )


def _from_mbpp(fields: dict[str, Any]) -> Problem:
    """MBPP, whole (text) and sanitized (prompt), and MBPP+ with a test program. The prompt is the task and one test."""
    task = "\n".join([fields["text"] or fields["prompt"], *fields["test_list"][:1]]).replace('"""', "'''")
    tests = [fields["test"]] if fields["test"] else [fields["test_setup_code"], *fields["test_list"]]
    return Problem(
        task_id=fields["task_id"] if isinstance(fields["task_id"], str) else f"Mbpp/{fields['task_id']}",
        prompt=f'"""\n{task}\n"""\n',
        solution=fields["code"],
        tests="\n".join([part for part in (*fields["test_imports"], *tests) if part] + [""]),
        stop=_AFTER_TASK,
    )


class _Layout(NamedTuple):
    """A layout: the field that only it has, the types of its fields, values for those that may be missing."""

    mark: str
    fields: dict[str, type | tuple[type, ...]]
    defaults: dict[str, Any]
    make: Callable[[dict[str, Any]], Problem]


_HUMANEVAL = _Layout(
    mark="test",
    fields={**dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), str), "suffix": _MAYBE},
    defaults={"suffix": None},
    make=_from_humaneval,
)
_EVALPLUS = _Layout(
    mark="base_input",
    fields={
        **dict.fromkeys(("task_id", "prompt", "canonical_solution", "entry_point"), str),
        **dict.fromkeys(("base_input", "plus_input"), list),
        "atol": (int, float),
    },
    defaults={},
    make=_from_evalplus,
)
_MBPP = _Layout(
    mark="test_list",
    fields={
        "task_id": (int, str),
        "code": str,
        **dict.fromkeys(("text", "prompt", "test_setup_code", "test"), str),
        **dict.fromkeys(("test_list", "test_imports"), list),
    },
    defaults={"text": "", "prompt": "", "test_setup_code": "", "test": "", "test_imports": []},
    make=_from_mbpp,
)
