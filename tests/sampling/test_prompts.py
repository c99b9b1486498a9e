"""`sedd sample --prompts`: a text for every line, in order; finished texts are kept; errors name the line."""

import contextlib
import io
import json
import pathlib

import pytest

from sedd_jax import checkpoints, runs
from sedd_jax.cli import main as cli
from sedd_jax.runtime import errors
from sedd_jax.sampling import generate, prompts, refill

LINES = [{"template": "a = {3}"}, {"prefix": "b"}, {"template": "{2}1\nb = 2{1}"}, {"prefix": "a", "suffix": "\n"}] * 3


def call(*argv):
    """Exit status, standard output and standard error of one command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([*argv, "--num_processes=1"])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def arguments(code_run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    settings = ("--sampler=first_hitting", "--num_steps=40", "--num_samples=4", "--seed=3")
    return [
        "sample",
        f"--workdir={code_run}",
        f"--prompts={file}",
        f"--out={tmp_path / 'out.jsonl'}",
        "--json",
        *settings,
    ]


def test_every_line_is_answered_in_its_order_and_a_stop_loses_nothing(arguments, tmp_path, monkeypatch):
    status, printed, err = call(*arguments)
    assert status == 0, err
    found = json.loads(printed.splitlines()[-1])
    assert [one["prompt"] for one in found] == LINES
    assert [one["index"] for one in found] == list(range(12))
    assert printed.count("--- sample") == 12
    for one in found:
        prompt = one["prompt"]
        assert one["text"].startswith(prompt.get("prefix", prompt.get("template", "").partition("{")[0]))
        assert one["text"].endswith(prompt.get("suffix", prompt.get("template", "").rpartition("}")[2]))
        assert len(one["text"]) == {"a = {3}": 7, "{2}1\nb = 2{1}": 10}.get(prompt.get("template"), 32)
        assert (one["seed"], one["sampler"], one["fit"], one["stop_at_eos"]) == (3, "first_hitting", False, False)
    # The file has the same texts, in the order in which they were finished: short ones come earlier.
    out = tmp_path / "out.jsonl"
    lines = out.read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in lines]
    assert sorted(written, key=lambda one: one["index"]) == found
    assert [one["index"] for one in written] != list(range(12))

    # Stopped after five texts, in the middle of a character of the sixth line.
    out.write_bytes("\n".join([*lines[:5], '{"text": "é']).encode()[:-1])
    asked, draw = [], refill.draw

    def recorded(opened, left, *rest, seed, **how):
        asked.append((len(left), seed))
        return draw(opened, left, *rest, seed=seed, **how)

    monkeypatch.setattr(refill, "draw", recorded)
    again = json.loads(call(*arguments)[1].splitlines()[-1])
    ((num_left, seed),) = asked
    assert num_left == 7
    # They take the slots of finished texts, so they must not get the same random numbers.
    assert seed != 3
    kept = [json.loads(line)["index"] for line in lines[:5]]
    assert [again[i] for i in kept] == [found[i] for i in kept]
    assert [one["prompt"] for one in again] == LINES
    assert {json.loads(line)["index"] for line in out.read_text(encoding="utf-8").splitlines()} == set(range(12))

    status, _, err = call(*arguments, "--seed=4")
    assert status == 1
    assert "out.jsonl holds other results, in line 1: remove it, or give another --out" in err
    assert len(out.read_text(encoding="utf-8").splitlines()) == 12


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"'' is not JSON: give \{"),
        ("[1]", r"'\[1\]' is no prompt"),
        ("{}", r"'{}' is no prompt"),
        ('{"text": "a"}', "is no prompt"),
        ('{"template": 3}', "template=3 is not text"),
        ('{"template": "a", "prefix": "b"}', "template cannot be combined with prefix"),
        ('{"template": "a{4"}', "a gap is"),
        ('{"template": "{33}"}', "the template is 33 tokens long"),
        ('{"prefix": "%s"}' % ("a" * 40), "leave no gap"),
        ('{"template": "Z"}', "'Z'"),
        ('{"template": "a{2:b(}"}', r"b\("),
    ],
)
def test_a_bad_line_is_named(code_run, tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"template": "a"}}\n{line}\n{{"template": "a"}}\n')
    with pytest.raises(ValueError, match=rf"prompts\.jsonl:2: .*{message}"):
        prompts.read(runs.load(code_run), file)


@pytest.mark.slow
def test_an_autoregressive_run_refuses_text_after_a_gap_before_anything_is_drawn(judge_run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"template": "a{3}"}\n{"template": "a{3}b"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: an autoregressive run sees no text after a gap"):
        prompts.read(runs.load(judge_run), file)


def test_lines_may_hold_what_other_programs_take_for_their_end(code_run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"template": "a"}\r\n{"template": "b{2}\\n"}', encoding="utf-8", newline="")
    found = prompts.read(runs.load(code_run), file)
    assert [prompt.template.length for prompt in found] == [1, 4]
    file.write_text('{"template": "\u2028"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: .*U\+2028"):
        prompts.read(runs.load(code_run), file)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty: give a JSON object a line"), (b"\xff\n", "is not UTF-8 text")]
)
def test_a_file_without_prompts_is_refused(code_run, tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompts.read(runs.load(code_run), file)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts=missing.jsonl"], "--prompts=missing.jsonl is not a file"),
        (["--prompts=x", "--prefix=a"], "--prompts cannot be combined with --template, --prefix or --suffix"),
        (["--stop_at_eos"], "--stop_at_eos needs an end of text, and config.data.tokenizer=characters has none"),
    ],
)
def test_the_command_answers_bad_input_with_one_line(code_run, argv, message):
    status, out, err = call("sample", f"--workdir={code_run}", *argv)
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_seed_is_no_negative_number(code_run):
    """NumPy's seeds, from which a stopped list continues, cannot be negative."""
    status, out, err = call("sample", f"--workdir={code_run}", "--seed=-1")
    assert (status, out) == (2, "")
    assert "--seed=-1" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("keep", [True, False])
def test_results_may_go_where_nothing_is_kept(keep):
    """As to /dev/stdout, whose reading end may be a pipe that never ends."""
    assert prompts._finished(pathlib.Path("/dev/null"), [], keep=keep) == {}


@pytest.mark.slow
def test_a_single_template_may_be_fitted(code_run, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text('{"text": "from before", "tokens": [0], "sampler": "euler"}\n')  # Samples are replaced.
    argv = ("sample", f"--workdir={code_run}", "--template=a = {3}", "--fit", "--num_samples=3", f"--out={out}")
    status, printed, err = call(*argv, "--sampler=first_hitting", "--num_steps=40", "--json")
    assert status == 0, err
    found = json.loads(printed.splitlines()[-1])
    assert [one["index"] for one in found] == [0, 1, 2]
    assert {
        (len(one["text"]), one["text"][:4], one["nfe"], one["num_steps"], one["fit"], one["prompt"]) for one in found
    } == {(7, "a = ", 3, 2, True, None)}
    assert sorted(map(json.loads, out.read_text().splitlines()), key=lambda one: one["index"]) == found
    assert all(generate.Sample.from_dict(one).to_dict() == one for one in found)


def test_texts_of_other_weights_are_not_taken_for_this_run_s(arguments, tmp_path, monkeypatch):
    assert call(*arguments)[0] == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(checkpoints, "checksum", lambda params: 1)
    status, _, err = call(*arguments)
    assert (status, "holds other results, in line 1" in err) == (1, True), err
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_prompt_of_endless_brackets_is_no_json(code_run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prefix": ' + "[" * 100_000 + "\n")
    with pytest.raises(errors.UserError, match=r"prompts\.jsonl:1: .* is not JSON"):
        prompts.read(runs.load(code_run), tmp_path / "prompts.jsonl")
