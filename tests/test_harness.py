"""A run is a model of lm-evaluation-harness: its tasks, made of local files, end in figures of ours."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is missing")

from lm_eval import evaluator, tasks
from lm_eval.api import instance

from sedd_jax import harness, runs
from sedd_jax.bounds import continuations

CHOICES = """task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITTEN = """task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "nothing of the kind"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""
TEXTS = """task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
LINES = [
    {"context": "a = ", "choices": ["1\n", "b = 22\nb = 22\n"], "answer": 0, "text": "a = 1\nb = 22\n" * 5},
    {"context": "b = ", "choices": ["22\n", "a = 1\na = 1\na = 1\n"], "answer": 1, "text": "a = 1\n"},
]


@pytest.fixture(scope="module")
def model(code_run):
    return harness.Model(str(code_run), num_times=64, num_steps=4)


def _request(*args, doc_id=0):
    return instance.Instance("any", {}, args, 0, metadata=("task", doc_id, 1))


def test_tasks_of_local_files_are_evaluated(model, tmp_path):
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for name, text in (("choices", CHOICES), ("written", WRITTEN), ("texts", TEXTS)):
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path))
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = ["choices", "written", "texts"]
    found = evaluator.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
    # The run knows nothing yet, so the shorter choice is the likelier.
    assert found["choices"]["acc,none"] == 0.5
    assert found["written"]["exact_match,none"] == 0
    # Seven characters at some log2(7) bits each.
    assert found["texts"]["bits_per_byte,none"] == pytest.approx(np.log2(7), abs=0.5)


def test_choices_share_their_draws_and_have_the_bounds_of_the_command(model, code_run):
    asked = [_request("a = ", text) for text in ("1\n", "b = 22\n")]
    first, second = model.loglikelihood(asked)
    opened = runs.load(code_run).restore()
    parts, _ = continuations.encode(opened.run.tokenizer, 32, "a = ", ["1\n", "b = 22\n"])
    with opened.on_devices():
        budget = continuations.Budget(num_times=64)
        expected = continuations.estimate(continuations.make_values_fn(opened), parts, budget)
    assert [-first[0], -second[0]] == pytest.approx(expected.nats)


def test_a_text_of_any_length_counts_every_token_once(judge_run):
    model = harness.Model(str(judge_run))
    long = "a = 1\nb = 22\n" * 6
    windows = model._windows(long)
    assert sum(window.num_tokens for window in windows) == len(long)
    assert all(len(window.tokens) <= 32 for window in windows)
    assert all(len(window.tokens) == 32 for window in windows[1:])
    (short,) = model.loglikelihood_rolling([_request("a = 1\n")])
    ((whole, _),) = model.loglikelihood([_request("", "a = 1\n")])
    assert short == pytest.approx(whole)


def test_greedy_is_what_is_written_and_text_ends_at_the_stop(judge_run):
    model = harness.Model(str(judge_run))
    (text,) = model.generate_until([_request("a = 1\n", {"until": [], "max_gen_toks": 6})])
    assert len(text) == 6
    answers = model.loglikelihood(
        [_request("a = 1\n", text), _request("a = 1\n", text[:-1] + ("a" if text[-1] != "a" else "b"), doc_id=1)]
    )
    assert [is_greedy for _, is_greedy in answers] == [True, False]
    (cut,) = model.generate_until([_request("a = 1\n", {"until": [text[2]], "max_gen_toks": 6})])
    assert cut == text.partition(text[2])[0]


@pytest.mark.parametrize(
    ("asked", "given", "gap"), [(6, 10, 6), (32, 10, 22), (2048, 10, 22), (32, 30, 16), (4, 30, 4)]
)
def test_a_task_that_asks_for_the_whole_length_keeps_its_context(model, asked, given, gap):
    context = ("a = 1\nb = 22\n" * 3)[:given]
    template = model._gap(context, {"max_gen_toks": asked})
    known = model._opened.run.tokenizer.decode(template.tokens[template.is_given])
    assert (known, template.length - len(known)) == (context[-(32 - gap) :], gap)


def test_the_command_names_a_run_that_is_none_in_one_line(tmp_path):
    (tmp_path / "choices.yaml").write_text(CHOICES.format(folder=tmp_path))
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    arguments = ["--model_args", f"workdir={tmp_path}/none", "--tasks", "choices", "--include_path", str(tmp_path)]
    command = [sys.executable, "-m", "sedd_jax.harness", "--model", "sedd", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"sedd_jax.harness: workdir={tmp_path}/none is not")
