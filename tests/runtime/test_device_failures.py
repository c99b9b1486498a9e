"""Devices that refuse are one line with what helps, in every command."""

import os
import re
import subprocess
import sys

import jax
import pytest

from sedd_jax import runs
from sedd_jax.bounds import likelihoods
from sedd_jax.cli import main as cli
from sedd_jax.runtime import device_failures, last_words
from sedd_jax.sampling import generate
from sedd_jax.training import train_steps
from tests.support import slow

NO_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17.31GiB.\nBufferAssignment: more lines"


def fails(*arguments, **named):
    raise jax.errors.JaxRuntimeError(NO_MEMORY)


@pytest.mark.parametrize(
    ("command", "place", "flags", "remedy"),
    [
        ("sample", (generate, "draw_samples"), [], "--num_samples"),
        ("eval", (likelihoods, "make_held_out"), ["--num_times=1"], "--batch_size"),
        ("train", (train_steps, "make_step_fn"), [], "--config.training.num_micro_batches"),
    ],
)
def test_no_memory_is_one_line_with_what_helps(code_run, monkeypatch, capsys, command, place, flags, remedy):
    if command == "eval":
        from sedd_jax.evaluation import perplexity

        monkeypatch.setattr(perplexity, "evaluate", fails)
    else:
        monkeypatch.setattr(*place, fails)
    if command == "train":
        config = runs.load(code_run).config
        flags = [f"--config.data.source={config.data.source}", "--config.data.tokenizer=characters"]
        flags += ["--config.training.num_steps=4", "--config.training.batch_size=8", "--config.data.length=32"]
        flags += [f"--config.network.{field}" for field in ("hidden_size=32", "num_layers=1", "num_heads=2")]
    workdir = code_run if command != "train" else code_run.parent / "no memory"
    assert cli.main([command, f"--workdir={workdir}", "--num_processes=1", *flags]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"sedd {command}: out of device memory (another 17.31GiB were asked for): ")
    assert remedy in err[-1]
    assert "`sedd plan" in err[-1]
    assert not any("Traceback" in line for line in err)


@pytest.mark.parametrize(
    ("name", "value"),
    slow.all_but(
        [("JAX_ENABLE_X64", "maybe")],
        [("JAX_ENABLE_X64", "maybe"), ("JAX_NUM_CPU_DEVICES", "x"), ("JAX_PLATFORMS", "nonsense")],
    ),
)
def test_a_setting_that_jax_cannot_read_is_one_line(code_run, name, value):
    command = [sys.executable, "-m", "sedd_jax", "sample", f"--workdir={code_run}", "--num_processes=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {name: value}, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert re.match(f"sedd sample: JAX .* {name}='?{value}'?.*: ", done.stderr)


def test_a_device_that_fails_otherwise_is_no_want_of_memory():
    assert device_failures.explained(jax.errors.JaxRuntimeError("INTERNAL: wrong"), "train") is None
    assert device_failures.explained(MemoryError("RESOURCE_EXHAUSTED"), "train") is None


@pytest.mark.parametrize(
    "said",
    [
        "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:3",
        "INTERNAL: NCCL operation ncclAllReduce() failed: remote process exited or there was a network error",
    ],
)
def test_a_collective_that_breaks_names_the_dead_process_only_where_there_are_several(monkeypatch, said):
    error = jax.errors.JaxRuntimeError(said)
    assert device_failures.explained(error, "eval") is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(last_words, "_remedies", [lambda: "step 7; the same command goes on"])
    assert str(device_failures.explained(error, "eval")) == "another process died: step 7; the same command goes on"
