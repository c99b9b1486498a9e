"""The edge of the command line: what becomes one line, what shows a traceback, and the exit statuses."""

import contextlib
import errno
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from sedd_jax.cli import main as cli
from sedd_jax.runtime import errors
from sedd_jax.training import train
from tests.support import slow


@pytest.fixture
def fails(monkeypatch, capsys):
    """(command, error, arguments) -> exit status and stderr of the command, which raises this error."""

    def call(command, error, *arguments):
        def raise_error(argv):
            raise error

        monkeypatch.setitem(cli.COMMANDS, command, raise_error)
        status = cli.main([command, *arguments])
        out, err = capsys.readouterr()
        assert out == ""
        return status, err

    return call


def test_a_user_error_is_one_line_with_inputs_spelled_as_flags(fails):
    error = errors.UserError("is wrong", field="judge", value="a b", remedy=f"set {errors.name('samplers')}")
    assert fails("eval", error) == (1, "sedd eval: --judge='a b' is wrong: set --samplers\n")
    error = train.NonFiniteLossError("train/loss is nan at step 4", remedy="lower the learning rate")
    assert fails("train", error) == (1, "sedd train: train/loss is nan at step 4: lower the learning rate\n")


@pytest.mark.parametrize(
    ("command", "field", "spelled"),
    [
        ("train", "config.sampling.top_p", "--config.sampling.top_p"),
        ("bench", "config.training.batch_size", "--config.training.batch_size"),
        ("sample", "config.sampling.top_p", "--top_p"),
        ("tune-grid", "config.sampling.num_steps", "--num_steps"),
        ("sample", "config.graph.name", "config.graph.name"),
        ("serve", "config.sampling.top_p", "config.sampling.top_p"),
        ("serve", "port", "--port"),
    ],
)
def test_a_field_of_the_config_is_a_flag_where_the_command_has_one(fails, command, field, spelled):
    assert fails(command, errors.UserError("is wrong", field=field)) == (1, f"sedd {command}: {spelled} is wrong\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/a"),
            "/runs/a: No space left on device: make room there, or name another place",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/etc/key"),
            "/etc/key: Permission denied: change its permissions, or name another place",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_system_refuses_is_one_line(fails, error, message):
    assert fails("eval", error) == (1, f"sedd eval: {message}\n")


def test_wrong_flags_have_their_own_status(fails):
    status, err = fails("eval", flags.IllegalFlagValueError("--generate goes without --code"))
    assert (status, err) == (2, "sedd eval: --generate goes without --code; see `sedd eval --help`\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--workdir=a", "--num_times=many"], "--num_times=many is not a whole number"),
        (["eval", "--workdir=a", "--num_times=1.5"], "--num_times=1.5 is not a whole number"),
        (["eval", "--workdir=a", "--target_stderr=small"], "--target_stderr=small is not a number"),
        (["sample", "--workdir=a", "--json=maybe"], "--json=maybe is not true or false"),
        (["train", "--workdir=a", "--config.seed=x"], "--config.seed=x is not a whole number"),
        (
            ["sample", "--workdir=a", "Hi"],
            "'Hi' belongs to no flag: write --NAME=VALUE, in quotes where it holds spaces",
        ),
        # A variable of the shell that is not set: nothing else is measured or drawn instead.
        (["eval", "--workdir=a", "--conditional="], "--conditional= is empty: give a value, or leave the flag out"),
        (["sample", "--workdir=a", "--prompts="], "--prompts= is empty: give a value, or leave the flag out"),
        (["sample", "--workdir=a", "--out="], "--out= is empty: give a value, or leave the flag out"),
        (["prepare", "--describe="], "--describe= is empty: give a value, or leave the flag out"),
    ],
)
def test_wrong_values_are_named_in_plain_words(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"sedd {arguments[0]}: {message}; see `sedd {arguments[0]} --help`\n"


@pytest.mark.parametrize(
    ("command", "arguments", "resumes"),
    [
        ("train", ["--workdir=a"], True),
        ("train", ["--workdir=a", "--step=3"], False),
        ("eval", [], True),
        ("sample", ["--prompts=a.jsonl"], True),
        ("sample", [], False),
    ],
)
def test_an_interrupt_says_whether_the_same_command_goes_on(fails, command, arguments, resumes):
    status, err = fails(command, KeyboardInterrupt(), *arguments)
    assert status == 130
    rest = ": the same command goes on from what is finished" if resumes else ""
    assert err == f"sedd {command}: interrupted{rest}\n"


def test_an_interrupt_that_knows_what_is_saved_says_it(fails):
    status, err = fails("train", KeyboardInterrupt("the newest checkpoint is of step 2"))
    assert (status, err) == (130, "sedd train: interrupted: the newest checkpoint is of step 2\n")


@pytest.mark.parametrize(
    "error", [ValueError("negative"), ImportError("no name"), OSError("no number"), KeyError("a"), RuntimeError("b")]
)
def test_any_other_exception_is_a_bug_that_asks_for_a_report(fails, error):
    with pytest.raises(type(error)) as caught:
        fails("eval", error, "--workdir=my run")
    assert caught.value is error
    (note,) = error.__notes__
    assert "This is a bug in sedd. Please report it" in note
    assert "sedd eval '--workdir=my run'" in note
    assert f"numpy {np.__version__}" in note


def _piped(command, monkeypatch, unbuffered):
    """Statuses of a shell's pipe, and standard error."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    sedd = f"{shlex.quote(sys.executable)} -m sedd_jax"
    script = f'{command.replace("sedd ", f"{sedd} ")}; echo "${{PIPESTATUS[@]}}" >&3'
    read, write = os.pipe()
    done = subprocess.run(
        ["bash", "-c", f"exec 3>&{write}; {script}"], capture_output=True, text=True, pass_fds=[write], timeout=120
    )
    os.close(write)
    with os.fdopen(read) as statuses:
        return statuses.read().split(), done.stderr


@pytest.mark.parametrize("unbuffered", slow.all_but(["1"], ["", "1"]))
@pytest.mark.parametrize("reader", slow.all_but(["head -n 1"], ["head -n 1", "true"]))
def test_a_reader_that_has_seen_enough_is_no_failure(monkeypatch, reader, unbuffered):
    statuses, err = _piped(f"sedd train --help | {reader}", monkeypatch, unbuffered)
    assert (statuses, err) == (["0", "0"], "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_standard_output_is_one_line(monkeypatch, unbuffered):
    statuses, err = _piped("sedd --help > /dev/full", monkeypatch, unbuffered)
    assert statuses == ["1"]
    assert err.startswith("sedd")
    assert err.endswith("No space left on device\n") or err.endswith("(No space left on device)\n")
    assert err.count("\n") == 1


def test_a_closed_standard_output_is_no_failure(monkeypatch):
    assert _piped("sedd --help >&-", monkeypatch, "") == (["0"], "")


def test_a_terminal_that_is_not_utf_8_shows_other_characters_as_it_can():
    code = (
        "import sys; from sedd_jax.cli import main as cli; "
        "cli.COMMANDS['eval'] = lambda argv: print('1.5 ± 0.1 ░'); sys.argv = ['sedd', 'eval']; cli.run()"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.5 \\xb1 0.1 \\u2591\n", "")


_PRINTS = """
import sys
from sedd_jax.cli import main as cli
from sedd_jax.runtime import errors, terminals
def sample(argv):
    print("a text \\x1b]0;title\\x07 \\x9b2J\\tand\\nmore")
    with terminals.watcher(shows_text=True) as watch:
        watch(1, 2, lambda: ["a draft \\x1b[2Jof it"])
    raise errors.UserError("a\\x1b[2J.txt holds no text")
cli.COMMANDS["sample"] = sample
sys.argv = ["sedd", "sample"]
cli.run()
"""


def test_a_terminal_shows_escape_sequences_and_does_not_obey_them(monkeypatch):
    """Texts of models and names of files are whatever others wrote. What is piped keeps its bytes."""
    pty = pytest.importorskip("pty", reason="pseudo terminals need a POSIX system")
    pytest.importorskip("rich", reason="texts are redrawn in place by rich")
    for name, value in {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    piped = subprocess.run([sys.executable, "-c", _PRINTS], capture_output=True, timeout=120)
    assert piped.stdout.decode() == "a text \x1b]0;title\x07 \x9b2J\tand\nmore\n"
    assert "a draft \x1b[2Jof it" in piped.stderr.decode()
    assert piped.stderr.decode().endswith("sedd sample: a\x1b[2J.txt holds no text\n")
    reader, follower = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", _PRINTS], stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    with os.fdopen(reader, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # Linux's way to say the end.
        while part := stream.read(1 << 16):
            shown += part
    assert child.wait(120) == 1
    text = shown.decode().replace("\r\n", "\n")
    assert "a text \\x1b]0;title\\x07 \\x9b2J\tand\nmore\n" in text
    assert "a draft \\x1b[2Jof it" in text
    assert text.endswith("sedd sample: a\\x1b[2J.txt holds no text\n")


def test_a_bug_in_a_command_shows_its_traceback_and_the_request():
    """A ValueError of NumPy, not of ours, in a process of its own."""
    code = (
        "import sys; import numpy; from sedd_jax.cli import main as cli; "
        "cli.COMMANDS['eval'] = lambda argv: numpy.zeros(-1); sys.argv = ['sedd', 'eval', '--workdir=a']; cli.run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    traceback, _, note = done.stderr.partition("ValueError: negative dimensions are not allowed\n")
    assert "in <lambda>" in traceback
    assert note.startswith("This is a bug in sedd. Please report it with the traceback above, the command")
    assert "  sedd eval --workdir=a\n" in note


@pytest.mark.parametrize("given", [["--config"], ["--config="]])
def test_a_config_without_a_name_is_not_the_default_one(given, tmp_path, capsys):
    assert cli.main(["train", f"--workdir={tmp_path / 'run'}", *given]) == 2
    assert capsys.readouterr().err == "sedd train: --config=FILE names no file; see `sedd train --help`\n"
    assert not (tmp_path / "run").exists()


def test_closed_standard_streams_take_nothing_and_hide_no_status(tmp_path):
    (tmp_path / "good.txt").write_text("a = 1\nb = 22\n" * 200)
    sedd = f"exec {sys.executable} -m sedd_jax"
    prepare = f"prepare --data=text:{tmp_path}/good.txt --tokenizer=characters --num_workers=1"
    for index, closed in enumerate(("2>&-", "0<&- 2>&-", "0<&- 1>&- 2>&-")):
        line = f"{sedd} {prepare} --out={tmp_path}/out{index} {closed}"
        assert subprocess.run(["bash", "-c", line], timeout=120).returncode == 0, closed
        assert (tmp_path / f"out{index}" / "header.json").is_file()
    assert subprocess.run(["bash", "-c", f"{sedd} prepare --nonsense 2>&-"], timeout=120).returncode == 2
    assert subprocess.run(["bash", "-c", f"{sedd} runs {tmp_path}/none 2>&-"], timeout=120).returncode == 1
