"""Several runs side by side: what is listed of each, and only where they differ."""

import dataclasses
import json
import shutil

import pytest

from sedd_jax import comparison, runs
from sedd_jax.cli import main as cli
from sedd_jax.runtime import errors, storage
from tests.support import gcs_emulator

_LINES = [
    *({"step": step, "train/tokens_per_second": speed} for step, speed in enumerate([1.0, 10.0, 1000.0], start=1)),
    {"step": 3, "valid/score_entropy_bits": 9.0, "valid/cross_entropy_bits": 8.0, "valid/cross_entropy_bits_stderr": 1},
    {
        "step": 4,
        "valid/score_entropy_bits": 3.0,
        "valid/cross_entropy_bits": 2.5,
        "valid/cross_entropy_bits_stderr": 0.25,
    },
    {"step": 5, "train/loss": 1.0},
]


@pytest.fixture
def place(code_run, judge_run, tmp_path):
    """A directory with two runs, a directory that is none, and a checkpoint of another program."""
    for name, run in (("a", code_run), ("b", judge_run)):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _LINES))
    (tmp_path / "b" / "metrics.jsonl").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "sedd"}')
    return tmp_path


def test_runs_are_listed_with_step_bound_speed_and_where_they_differ(place, capsys):
    assert cli.main(["runs", str(place), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    head, first, second, blank, titles, *fields = lines
    assert head.split() == ["run", "step", "held-out", "bound", "tokens/s"]
    assert " ".join(first.split()) == f"1 {place}/a 2/2 2.500 ± 0.250 bits/character, cross-entropy 10"
    assert " ".join(second.split()) == f"2 {place}/b 2/2 none yet not logged"
    assert (blank, titles.split()) == ("", ["config", "1", "2"])
    shown = dict(line.split(maxsplit=1) for line in fields if line)
    assert {name: value.split() for name, value in shown.items()} == {
        "graph.name": ["absorb", "autoregressive"],
        "network.scale_by_sigma": ["True", "False"],
    }
    found = json.loads(last)
    assert found["runs"][0]["bound"] == {
        "step": 4,
        "name": "cross_entropy",
        "bits": 2.5,
        "stderr": 0.25,
        "unit": "character",
    }
    assert found["differences"]["graph.name"] == ["absorb", "autoregressive"]


def test_runs_with_one_config_are_said_to_have_one(code_run, capsys):
    assert cli.main(["runs", str(code_run), str(code_run)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("their configs are equal\n")
    assert "config  " not in out


def test_a_run_without_a_checkpoint_is_listed(place):
    shutil.rmtree(place / "b" / "checkpoints")
    _, rows = comparison.overview(comparison.compare([runs.load(place / "b")]))
    assert rows[0][1] == "no checkpoint"


@pytest.mark.parametrize("name", ["notes", "nowhere"])
def test_a_directory_without_runs_is_one_line(place, name, capsys):
    assert cli.main(["runs", str(place / name)]) == 1
    message = f"sedd runs: {place / name} holds no run: give run directories, or what holds some\n"
    assert capsys.readouterr().err == message


def test_no_directory_is_a_wrong_flag(capsys):
    assert cli.main(["runs"]) == 2
    assert "give run directories, or a directory that holds some" in capsys.readouterr().err


@pytest.mark.parametrize("value", [[1], "fast", None])
def test_metrics_that_are_no_numbers_are_named(place, value):
    line = json.dumps({"step": 1, "train/tokens_per_second": value})
    (place / "a" / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(errors.UserError, match=r"metrics\.jsonl holds no numbers .*: copy it again"):
        comparison.compare([runs.load(place / "a")])


def test_a_list_of_runs_leaves_the_local_copy_of_a_bucket_to_its_training(code_run, tmp_path, monkeypatch):
    """The training on this machine has logged more than it has uploaded."""
    with gcs_emulator.Server("bucket") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        place = storage.directory("gs://bucket/run")
        shutil.copytree(code_run, storage.local_copy(place), ignore=shutil.ignore_patterns("checkpoints"))
        storage.upload(place)
        live = storage.local_copy(place) / "metrics.jsonl"
        before = live.read_text() + '{"step": 3, "train/tokens_per_second": 5.0}\n'
        live.write_text(before)
        run = dataclasses.replace(runs.load(code_run), workdir=place)
        monkeypatch.setattr(comparison, "_newest", lambda run: None)
        (found,) = comparison.compare([run])["runs"]
        assert found["tokens_per_second"] != 5.0
        assert live.read_text() == before


def test_what_a_kill_has_left_of_a_run_is_not_listed(place):
    shutil.copytree(place / "a", place / ".b.partial")
    assert [run.workdir.name for run in comparison.find([place])] == ["a", "b"]


def test_metrics_that_are_no_text_are_named(place):
    (place / "a" / "metrics.jsonl").write_bytes(b'{"step": 1, "a\xff": 2}\n')
    with pytest.raises(errors.UserError, match=r"metrics\.jsonl line 1 holds no metrics of a step"):
        comparison.compare(comparison.find([place]))
