"""Files of a run directory that are cut, emptied, replaced or changed: each is read, or named in one line."""

import json
import shutil

import pytest

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.data import shards
from sedd_jax.runtime import errors
from sedd_jax.training import metric_writers
from tests.support import slow, wrong_values

OTHER = [
    "",
    "[]",
    "null",
    "5",
    '"text"',
    "{}",
    "{",
    "\0\0\0",
    "\xff",
    "[" * 100_000,
    '{"step": "x"}\n',
    '{"step": "5"}\n',
    "3\n",
]
VALUES = [None, 5, -1, 2.5, "text", [], {}, [5], {"a": 5}, True]


def _open(workdir):
    run = runs.load(workdir)
    for split in ("train", "valid"):
        run.split(split).batch(0, batch_size=2, seed=0)
    shards.verify(workdir / "data")
    if (workdir / runs.TIME_GRID).exists():
        run.tuned_grid()
    metric_writers.truncate_after(workdir / "metrics.jsonl", 2)


@pytest.fixture
def workdir(code_run, tmp_path):
    shutil.copytree(code_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "samples", "tensorboard"))
    (tmp_path / "run" / runs.TIME_GRID).write_text(json.dumps({"times": [1.0, 0.5, 1e-5], "num_steps": 2, "step": 2}))
    lines = [{"step": step, "train/loss": 1.5 + step, "train/bits_per_character": "nan"} for step in (1, 2)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _open(tmp_path / "run")
    return tmp_path / "run"


FILES = ["config.json", "tokenizer.json", "data/header.json", "metrics.jsonl", runs.TIME_GRID]


@pytest.mark.parametrize("name", slow.all_but(["config.json"], FILES))
def test_whatever_stands_in_a_file_is_read_or_named(workdir, name):
    """Nothing but errors for users, and of the system, which name the file."""
    path = workdir / name
    whole = path.read_bytes()
    contents = [content.encode("latin-1") for content in OTHER]
    contents += [whole[:size] for size in range(0, len(whole), max(1, len(whole) // 20))]
    contents += [whole[:place] + bytes([whole[place] ^ 128]) + whole[place + 1 :] for place in range(0, len(whole), 37)]
    if name != "metrics.jsonl":
        contents += [json.dumps(changed).encode() for changed in wrong_values.changed(json.loads(whole), VALUES)]
    messages = []
    for content in contents:
        path.write_bytes(content)
        try:
            _open(workdir)
        except (errors.UserError, OSError) as error:
            messages.append(str(error))
    assert not [message for message in messages if "\n" in message]
    assert len(messages) >= 5
    path.write_bytes(whole)
    _open(workdir)


@pytest.mark.parametrize("name", [*FILES[:3], "data", "data/train-00000.bin"])
def test_what_is_missing_is_named(workdir, name):
    path = workdir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises((errors.UserError, OSError), match=path.name):
        _open(workdir)


def test_a_config_of_another_version_is_called_that(workdir, capsys):
    config = json.loads((workdir / "config.json").read_text())
    config["network"]["new_field"] = 1
    (workdir / "config.json").write_text(json.dumps(config))
    assert cli.main(["sample", f"--workdir={workdir}", "--num_processes=1"]) == 1
    error = capsys.readouterr().err
    assert f"{workdir}/config.json, which another version may have written: config.network.new_field is not" in error
