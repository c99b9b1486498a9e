"""Thirty problems to solve by code, as data in the layouts of HumanEval+ and MBPP+, with right and wrong solutions.

Each has what makes such problems hard to judge: floats and tolerances, NaN and infinity, large inputs, sets, nested
tuples, results that raise for what is wrong, arguments that are changed in place.
"""

import copy
import math
import random
from typing import Any, NamedTuple

import numpy as np

# What a test program of the Hub's layout compares with, as its own text.
_COMPARE = """
import numpy as np
from math import inf, nan

def same(out, exp, atol):
    floats = isinstance(exp, float) or isinstance(exp, (list, tuple)) and exp and all(isinstance(x, float) for x in exp)
    if atol == 0 and floats:
        atol = 1e-6
    if out == exp or atol == 0:
        assert out == exp, (out, exp)
    else:
        assert type(out) is type(exp)
        assert np.allclose(out, exp, rtol=1e-07, atol=atol, equal_nan=True), (out, exp)

def check(candidate):
    inputs = {inputs!r}
    results = {results!r}
    for inp, exp in zip(inputs, results):
        same(candidate(*inp), exp, {atol})
"""


class Task(NamedTuple):
    """A problem: the head of its function, bodies that are right and wrong, inputs as JSON has them."""

    name: str
    head: str
    right: str
    wrong: tuple[str, ...]
    base: list[list[Any]]
    plus: list[list[Any]]
    atol: float = 0
    before: str = ""

    @property
    def prompt(self) -> str:
        return f'{self.before}def {self.head}:\n    """{self.name.replace("_", " ")}"""\n'

    @property
    def solution(self) -> str:
        return _body(self.right)

    @property
    def wrong_solutions(self) -> list[str]:
        return [_body(body) for body in self.wrong]

    @property
    def is_plain(self) -> bool:
        """Whether inputs are small and have no NaN, for which no assertion of MBPP can hold."""
        written = repr((self.base, self.plus, self.right))
        return len(written) < 10**5 and "nan" not in written

    @property
    def results(self) -> list[Any]:
        """The reference's results, computed here: these programs are ours."""
        names: dict[str, Any] = {}
        exec(self.prompt + self.solution, names)
        return [names[self.name](*copy.deepcopy(arguments)) for arguments in (*self.base, *self.plus)]


def _body(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.split("\n"))


def evalplus(task: Task) -> dict[str, Any]:
    """The problem in EvalPlus's own layout."""
    return {
        "task_id": f"Own/{task.name}",
        "prompt": task.prompt,
        "contract": "\n    assert True\n",
        "canonical_solution": task.solution,
        "entry_point": task.name,
        "base_input": task.base,
        "plus_input": task.plus,
        "atol": task.atol,
    }


def hub(task: Task) -> dict[str, Any]:
    """The problem in the layout of the Hub, with a test program that imports NumPy."""
    tests = _COMPARE.format(inputs=[*task.base, *task.plus], results=task.results, atol=task.atol)
    return {
        "task_id": f"Own/{task.name}",
        "prompt": task.prompt,
        "canonical_solution": task.solution,
        "entry_point": task.name,
        "test": tests,
    }


def mbpp(task: Task) -> dict[str, Any]:
    """The problem in the layout of MBPP: the task in words, whole functions as solutions, assertions."""
    return {
        "task_id": 1,
        "text": f"Write a function {task.name}.",
        "code": task.prompt.replace("\n", "\r\n") + task.solution,
        "test_list": [
            f"assert {task.name}(*{arguments!r}) == {result!r}"
            for arguments, result in zip(task.base, task.results, strict=False)
        ],
        "test_setup_code": "from math import inf",
        "challenge_test_list": [],
    }


_rng = random.Random(0)
_NUMBERS = [_rng.randint(-(10**9), 10**9) for _ in range(200_000)]
_FLOATS = [_rng.gauss(0, 1) for _ in range(50_000)]
_WORDS = ["".join(_rng.choices("abcd", k=6)) for _ in range(20_000)]

TASKS = [
    Task(
        "mean_of",
        "mean_of(values)",
        "return sum(values) / len(values)",
        ("return sum(values) // len(values)", "return sum(values) / len(values) + 1e-5"),
        [[[1.0, 2.0]], [[0.5]]],
        [[[1e-3, 2e-3, 4e-3]], [_FLOATS]],
    ),
    Task(
        "half_life",
        "half_life(start, steps)",
        "return [start * 0.5**n for n in range(steps)]",
        ("return [start / (n + 1) for n in range(steps)]", "return [round(start * 0.5**n, 3) for n in range(steps)]"),
        [[1.0, 3]],
        [[3.3, 20], [1e5, 40]],
    ),
    Task(
        "root_of_two",
        "root_of_two(guess)",
        "for _ in range(60):\n    guess = (guess + 2 / guess) / 2\nreturn guess",
        ("return guess", "return (guess + 2 / guess) / 2"),
        [[1.0]],
        [[0.1], [100.0]],
        1e-4,
    ),
    Task(
        "loose_pi",
        "loose_pi(digits)",
        "return round(math.pi, digits)",
        ("return 3.0", "return 3.2"),
        [[2]],
        [[5], [10]],
        1e-2,
        "import math\n",
    ),
    Task(
        "not_a_number",
        "not_a_number(x)",
        "return float('nan') if x < 0 else x**0.5",
        ("return 0.0 if x < 0 else x**0.5", "return float('inf') if x < 0 else x**0.5"),
        [[4.0], [-1.0]],
        [[2.0], [-0.5]],
    ),
    Task(
        "with_gaps",
        "with_gaps(values)",
        "return [float('nan') if x is None else float(x) for x in values]",
        (
            "return [0.0 if x is None else float(x) for x in values]",
            "return [float(x) for x in values if x is not None]",
        ),
        [[[1, None]]],
        [[[None, None, 3.5]], [[]]],
    ),
    Task(
        "up_to_infinity",
        "up_to_infinity(x)",
        "return x * 1e308 * 10",
        ("return 1.7e308", "return float('nan')"),
        [[1.0]],
        [[-1.0], [2.5]],
    ),
    Task(
        "largest_finite",
        "largest_finite(values)",
        "return max((x for x in values if math.isfinite(x)), default=None)",
        ("return max(values, default=None)", "return max(x for x in values if math.isfinite(x))"),
        [[[1.0, 2.0]]],
        [[[1.0, math.inf, -math.inf, math.nan]], [[math.inf]], [[]]],
        0,
        "import math\n",
    ),
    Task(
        "letters",
        "letters(text)",
        "return set(text)",
        ("return sorted(set(text))", "return set(text.lower())"),
        [["abca"]],
        [["aAbB"], [""], ["é€x"]],
    ),
    Task(
        "shared",
        "shared(first, second)",
        "return set(first) & set(second)",
        ("return set(first) | set(second)", "return list(set(first) & set(second))"),
        [[[1, 2], [2, 3]]],
        [[_NUMBERS[:5000], _NUMBERS[2500:7500]], [[], [1]]],
    ),
    Task(
        "nested_pairs",
        "nested_pairs(n)",
        "return tuple((i, (i * i, (i**3,))) for i in range(n))",
        ("return [(i, (i * i, (i**3,))) for i in range(n)]", "return tuple((i, (i * i, i**3)) for i in range(n))"),
        [[3]],
        [[0], [50]],
    ),
    Task(
        "float_grid",
        "float_grid(rows, columns)",
        "return [[r / (c + 1) for c in range(columns)] for r in range(rows)]",
        (
            "return [[r / (c + 2) for c in range(columns)] for r in range(rows)]",
            "return [[c / (r + 1) for c in range(columns)] for r in range(rows)]",
        ),
        [[2, 3]],
        [[30, 40], [1, 1]],
        1e-6,
    ),
    Task(
        "safe_int",
        "safe_int(text)",
        "try:\n    return int(text)\nexcept ValueError:\n    return None",
        ("return int(text)", "try:\n    return int(text)\nexcept ValueError:\n    return 0"),
        [["12"]],
        [["x"], ["-7"], ["1.5"]],
    ),
    Task(
        "error_name",
        "error_name(values, index)",
        "try:\n    return values[index]\nexcept Exception as error:\n    return type(error).__name__",
        ("return values[index]", "return values[index] if 0 <= index < len(values) else 'IndexError'"),
        [[[1, 2], 0]],
        [[[1, 2], 5], [[1, 2], -1], [{"a": 1}, "b"]],
    ),
    Task(
        "sum_large",
        "sum_large(values)",
        "return sum(values)",
        ("return sum(values[:100_000])", "return float(sum(values)) + 1"),
        [[[1, 2, 3]]],
        [[_NUMBERS], [[]]],
    ),
    Task(
        "sort_large",
        "sort_large(values)",
        "return sorted(values)",
        ("return values", "return sorted(set(values), reverse=True)"),
        [[[3, 1, 2]]],
        [[_NUMBERS[:50_000]], [_FLOATS]],
    ),
    Task(
        "commonest",
        "commonest(words)",
        "return collections.Counter(sorted(words)).most_common(1)[0]",
        ("return collections.Counter(words).most_common()[-1]", "return words[0], 1"),
        [[["a", "b", "a"]]],
        [[_WORDS]],
        0,
        "import collections\n",
    ),
    Task(
        "many_digits",
        "many_digits(n)",
        "return math.factorial(n)",
        ("return math.gamma(n + 1)", "return math.factorial(n) % 2**64"),
        [[5]],
        [[200], [800]],
        0,
        "import math\n",
    ),
    Task(
        "in_place",
        "in_place(values)",
        "values.sort()\nvalues.append(len(values))\nreturn values",
        ("return values", "return sorted(values)"),
        [[[3, 1]]],
        [[[5, 4, 3]], [[]]],
    ),
    Task(
        "matrix_product",
        "matrix_product(a, b)",
        "return (np.array(a) @ np.array(b)).tolist()",
        ("return (np.array(a) * np.array(b)).tolist()", "return (np.array(b) @ np.array(a)).tolist()"),
        [[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]]],
        [[np.arange(400.0).reshape(20, 20).tolist(), np.eye(20)[::-1].tolist()]],
        1e-6,
        "import numpy as np\n",
    ),
    Task(
        "spread",
        "spread(values)",
        "return float(np.std(values))",
        ("return float(np.std(values, ddof=1))", "return float(np.var(values))"),
        [[[1.0, 3.0]]],
        [[_FLOATS]],
        0,
        "import numpy as np\n",
    ),
    Task(
        "flattened",
        "flattened(value)",
        "return [y for x in value for y in flattened(x)] if isinstance(value, list) else [value]",
        ("return [y for x in value for y in x]", "return value"),
        [[[[1], [2, [3]]]]],
        [[[[[[[1.5]]]], "a", None]], [7]],
    ),
    Task(
        "true_or_one",
        "true_or_one(x)",
        "return x > 0",
        ("return None", "return x >= 0"),
        [[1]],
        [[0], [-1]],
    ),
    Task(
        "counts",
        "counts(text)",
        "return {c: text.count(c) for c in text}",
        ("return {c: 1 for c in text}", "return [(c, text.count(c)) for c in text]"),
        [["aab"]],
        [["abcabc" * 50], [""]],
    ),
    Task(
        "rounded",
        "rounded(x)",
        "return round(x)",
        ("return int(x + 0.5)", "return int(x)"),
        [[1.6]],
        [[2.5], [-1.5], [1e15 + 0.5]],
    ),
    Task(
        "complex_size",
        "complex_size(real, imaginary)",
        "return abs(complex(real, imaginary))",
        ("return real + imaginary", "return max(abs(real), abs(imaginary))"),
        [[3.0, 4.0]],
        [[1.0, 1.0], [-5.0, 12.0]],
    ),
    Task(
        "mixed",
        "mixed(n)",
        "return [n, n / 3, str(n)]",
        ("return [n, n // 3, str(n)]", "return (n, n / 3, str(n))"),
        [[3]],
        [[10], [-1]],
    ),
    Task(
        "longest_run",
        "longest_run(text)",
        "return max((len(list(g)) for _, g in itertools.groupby(text)), default=0)",
        ("return len(text)", "return max(len(list(g)) for _, g in itertools.groupby(text))"),
        [["aab"]],
        [["x" * 100_000 + "y"], [""]],
        0,
        "import itertools\n",
    ),
    Task(
        "slow_sum",
        "slow_sum(n)",
        "total = 0\nfor i in range(n):\n    total += i\nreturn total",
        ("while n > 1:\n    pass\nreturn 0", "return n * n // 2"),
        [[3]],
        [[300_000], [0]],
    ),
    Task(
        "lists_of_floats",
        "lists_of_floats(values)",
        "return tuple(x / 7 for x in values)",
        ("return [x / 7 for x in values]", "return tuple(x / 7 + 2e-6 for x in values)"),
        [[[7, 14]]],
        [[[1, 2, 3]], [[]]],
    ),
]
