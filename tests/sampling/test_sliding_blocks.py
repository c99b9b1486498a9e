"""Texts longer than the model's length: what each window sees, and that each continues the one before."""

import json

import numpy as np
import pytest

from sedd_jax import config, runs
from sedd_jax.cli import main as cli
from sedd_jax.runtime import errors
from sedd_jax.sampling import generate, sliding_blocks, templates

LENGTH = 32


@pytest.fixture(scope="module")
def opened(code_run):
    return runs.load(code_run).restore()


def test_every_window_sees_the_end_of_the_one_before(opened, monkeypatch):
    run, seen = opened.run, []
    draw_tokens = generate.draw_tokens

    def recorded(opened, given, settings, **rest):
        rows = draw_tokens(opened, given, settings, **rest)
        seen.append((np.asarray(given.tokens), np.asarray(given.is_given), rows))
        return rows

    sampling = run.sampling(num_steps=2, num_samples=8)
    template = templates.around(run, "a = 1\n", "")
    with opened.on_devices():
        first = generate.draw_samples(opened, template, sampling, seed=5)
        monkeypatch.setattr(generate, "draw_tokens", recorded)
        drawn = sliding_blocks.draw(opened, template, sampling, num_tokens=50, block=8, seed=5)
    text = np.array([one.tokens for one in drawn])
    assert text.shape == (8, 50)
    assert [one.tokens for one in first] == text[:, :LENGTH].tolist()
    assert all(one.text.startswith("a = 1\n") for one in drawn)
    assert {(one.nfe, one.num_steps, one.seed) for one in drawn} == {(4 * 3, 2, 5)}
    assert len(seen) == 4
    for number, (tokens, is_given, rows) in enumerate(seen[1:]):
        assert is_given[:, : LENGTH - 8].all()
        assert not is_given[:, LENGTH - 8 :].any()
        start = 8 * (number + 1)
        known = min(LENGTH, 50 - start)
        np.testing.assert_array_equal(tokens[:, : LENGTH - 8], text[:, start : start + LENGTH - 8])
        np.testing.assert_array_equal(rows[:, :known], text[:, start : start + known])
    assert len({tuple(rows[0, LENGTH - 8 :]) for _, _, rows in seen[1:]}) > 1


def test_the_command_line_draws_long_texts(code_run, judge_run, capsys):
    for workdir in (code_run, judge_run):
        flags = [f"--workdir={workdir}", "--num_processes=1", "--num_steps=2", "--num_samples=8", "--num_tokens=40"]
        assert cli.main(["sample", *flags, "--json"]) == 0
        samples = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [len(one["tokens"]) for one in samples] == [40] * 8


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--num_tokens=32"], 1, "--num_tokens=32 must be more than the model's length 32: leave it out"),
        (["--num_tokens=40", "--block=32"], 1, "--block=32 must be at least 1 and below the model's length 32"),
        (["--num_tokens=40", "--template=a{3}"], 1, "the template ends after 4 of 32 tokens"),
        (["--num_tokens=40", "--fit"], 2, "--num_tokens goes without --prompts, --fit and --stop_at_eos"),
        (["--block=4"], 2, "--block goes with --num_tokens"),
    ],
)
def test_what_is_no_long_text_is_said(code_run, capsys, flags, status, message):
    assert cli.main(["sample", f"--workdir={code_run}", "--num_processes=1", *flags]) == status
    assert message in capsys.readouterr().err


def test_sequences_of_one_token_leave_no_room_for_what_came_before():
    run = runs.unsaved(config.parse(config.merge({"data": {"length": 1}})), 5)
    template = templates.Template(tokens=np.zeros(1, np.int32), is_given=np.zeros(1, bool), length=1)
    with pytest.raises(errors.UserError, match="block"):
        sliding_blocks.check(run, template, 4, None)
