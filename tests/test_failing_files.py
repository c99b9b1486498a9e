"""Each operation on a file fails in turn: one line names the path and what to do, and nothing is lost."""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import tempfile

import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.training import train
from tests.support import failing_files, slow

# A directory whose file system has no locks is used without.
NOT_NEEDED = (".lock",)
CODES = (errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EIO)


def call(*argv):
    """Exit status and standard error of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(argv))
    return status, err.getvalue()


def contents(directory):
    """Digest of each file below a directory, by name."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def succeeded(status, err):
    return status == 0


def fail_in_turn(make_place, argv, *, codes, changed=(), not_needed=NOT_NEEDED, is_done=succeeded):
    """Lets each operation of a command fail with each of the codes that `codes` gives for its number.

    Args:
        make_place: makes a fresh directory for an attempt.
        argv: the arguments of the command in such a directory.
        codes: (number of the operation) -> codes.
        changed: the files that the command changes. All others stay as they are.
        not_needed: ends of the names of files without which the command succeeds.
        is_done: (status, standard error) -> whether the command did what it does where nothing fails.
    """
    place = make_place()
    found = failing_files.Faults(place)
    with failing_files.watched(found):
        status, err = call(*argv(place))
    assert is_done(status, err), err
    assert len(found.calls) > 2
    for number in sorted(_first_and_last(found.calls)):
        for code in codes(number):
            place = make_place()
            before = contents(place)
            faults = failing_files.Faults(place, number, code)
            with failing_files.watched(faults):
                status, err = call(*argv(place))
            assert len(faults.calls) > number
            if is_done(status, err):
                failed, earlier = faults.calls[number], faults.calls[:number]
                assert is_not_needed(failed, earlier, not_needed), (failed, os.strerror(code), err)
            else:
                check(faults.calls[number], code, status, err)
            after = contents(place)
            assert set(before) <= set(after), (faults.calls[number], code)
            lost = [name for name in before if after[name] != before[name] and name not in changed]
            assert not lost, (faults.calls[number], code)


def _first_and_last(calls):
    """Numbers of the first and the last of equal operations, such as the many writes of one file."""
    return {calls.index(call) for call in calls} | {len(calls) - 1 - calls[::-1].index(call) for call in calls}


def is_not_needed(failed, earlier, not_needed):
    """Whether a command does without an operation, such as making a directory that is there.

    One that it made earlier, for a time, it also empties at a second try.
    """
    is_made = failed[0] == "mkdir" and os.path.isdir(failed[1])
    return failed[1].endswith(not_needed) or is_made or ("mkdir", failed[1]) in earlier


def check(failed, code, status, err):
    """The last line of a command that an operation ended which failed."""
    what = (failed, os.strerror(code), err)
    assert status == 1, what
    last = err.splitlines()[-1]
    assert last.startswith("sedd"), what
    assert os.strerror(code) in last, what
    name = os.path.basename(failed[1]).strip(".").removesuffix(".partial")
    assert name in last or os.path.basename(os.path.dirname(failed[1])) in last, what
    assert last.rpartition(os.strerror(code))[2].strip("): "), what  # What to do follows.


@pytest.fixture
def make_place(tmp_path):
    """Makes a directory with a text and, if it is given one, a copy of a run."""
    count = iter(range(10**6))

    def make(run=None):
        place = tmp_path / f"place{next(count)}"
        place.mkdir()
        (place / "good.txt").write_text("a = 1\nb = 22\n" * 200)
        if run is not None:
            shutil.copytree(run, place / "run")
        return place

    return make


def all_codes(number):
    return CODES


def one_code(number):
    return CODES[number % len(CODES) :][:1]


@pytest.mark.parametrize("codes", slow.all_but([one_code], [one_code, all_codes]))
def test_no_failure_of_sedd_prepare_is_a_traceback(make_place, codes):
    argv = lambda place: [
        "prepare", f"--data=text:{place}/good.txt", "--tokenizer=characters", f"--out={place}/out", "--num_workers=1",
    ]  # fmt: skip
    fail_in_turn(make_place, argv, codes=codes)


@pytest.mark.slow
def test_no_failure_of_sedd_sample_is_a_traceback(make_place, code_run):
    argv = lambda place: [
        "sample", f"--workdir={place}/run", "--num_steps=2", "--num_samples=1", f"--out={place}/out.jsonl",
        "--num_processes=1",
    ]  # fmt: skip
    fail_in_turn(lambda: make_place(code_run), argv, codes=one_code)


@pytest.mark.slow
def test_no_failure_of_sedd_eval_is_a_traceback(make_place, code_run):
    argv = lambda place: ["eval", f"--workdir={place}/run", "--num_times=1", "--num_processes=1"]
    fail_in_turn(lambda: make_place(code_run), argv, codes=one_code)


@pytest.mark.slow
def test_no_failure_of_sedd_train_is_a_traceback(make_place, code_run):
    config = configs.flatten(configs.to_dict(runs.load(code_run).config)) | {"training.num_steps": 3}
    flags = [f"--config.{name}={value}" for name, value in config.items()]
    argv = lambda place: ["train", f"--workdir={place}/run", "--num_processes=1", *flags]
    changed = ("run/config.json", "run/metrics.jsonl", "run/loss.png")
    fail_in_turn(lambda: make_place(code_run), argv, codes=one_code, changed=changed)


def test_a_run_that_is_moved_while_it_trains_is_asked_back(make_place, code_run, monkeypatch):
    place = make_place(code_run)

    def loop(*args):
        (place / "run").rename(place / "elsewhere")
        (place / "run" / "loss.png").touch()

    monkeypatch.setattr(train, "_loop", loop)
    config = configs.flatten(configs.to_dict(runs.load(code_run).config)) | {"training.num_steps": 3}
    flags = [f"--config.{name}={value}" for name, value in config.items()]
    status, err = call("train", f"--workdir={place}/run", "--num_processes=1", *flags)
    assert status == 1
    wanted = f"put {place}/run back, which was moved or removed, then the same command goes on"
    assert err.splitlines()[-1].endswith(wanted), err


@pytest.mark.slow
def test_no_failure_of_sedd_convert_is_a_traceback(make_place, code_run):
    pytest.importorskip("torch", reason="pip install -e '.[test-all]'")
    argv = lambda place: ["convert", f"--from={place}/run", f"--to={place}/out"]
    fail_in_turn(lambda: make_place(code_run), argv, codes=one_code)


@pytest.mark.slow
def test_no_failure_of_sedd_push_is_a_traceback(make_place, code_run, monkeypatch):
    """Up to the question whether to upload: it converts in a temporary directory, and lists the files."""
    pytest.importorskip("huggingface_hub", reason="push needs the Hub's library")

    def argv(place):
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        return ["push", f"--from={place}/run", "--to=ada/model"]

    is_done = lambda status, err: status == 1 and err.startswith("sedd push: nothing was uploaded")
    fail_in_turn(lambda: make_place(code_run), argv, codes=one_code, is_done=is_done)


@pytest.mark.slow
def test_no_failure_of_sedd_tune_grid_is_a_traceback(make_place, code_run):
    argv = lambda place: [
        "tune-grid", f"--workdir={place}/run", "--num_steps=2", "--num_sequences=8", "--batch_size=8",
        "--num_processes=1",
    ]  # fmt: skip
    fail_in_turn(lambda: make_place(code_run), argv, codes=one_code, changed=("run/time_grid.json",))


@pytest.mark.slow
def test_no_failure_of_a_report_is_a_traceback(make_place, code_run, tmp_path):
    shutil.copytree(code_run, tmp_path / "measured")
    assert call("eval", f"--workdir={tmp_path}/measured", "--num_times=1", "--num_processes=1")[0] == 0
    argv = lambda place: ["eval", f"--workdir={place}/run", "--report", "--num_processes=1"]
    fail_in_turn(lambda: make_place(tmp_path / "measured"), argv, codes=all_codes)


@pytest.mark.slow
def test_no_failure_of_sedd_serve_is_a_traceback(make_place, code_run, monkeypatch):
    pytest.importorskip("starlette", reason="the page needs sedd_jax[serve]")
    uvicorn = pytest.importorskip("uvicorn", reason="the page needs sedd_jax[serve]")
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    argv = lambda place: ["serve", f"--workdir={place}/run", "--port=0"]
    # The page has no example without the run's text.
    without_text = ("data/header.json", ".bin")
    fail_in_turn(lambda: make_place(code_run), argv, codes=one_code, not_needed=without_text)
