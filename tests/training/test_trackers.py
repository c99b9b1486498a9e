"""trackers: a run is sent to its tracker as a whole, goes on there when it resumes, and never stops because of it.

Most tests put a module of the library's name on Python's path, which writes down how it is called. The last ones run
the libraries themselves, offline.
"""

import dataclasses
import io
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time

import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.data import alphabets
from sedd_jax.runtime import errors, processes
from sedd_jax.training import trackers, train

LIBRARIES = ("wandb", "trackio")
FAKE = """
import json, os, signal, sys, time
if os.environ.get("FAKE_TROUBLE") == "import": raise ImportError("no part of it is found")

def call(name, /, **arguments):
    print("chatter"), print("chatter", file=sys.stderr)
    with open(os.environ["FAKE_CALLS"], "a") as file:
        file.write(json.dumps([name, arguments]) + "\\n")
    trouble, _, how = os.environ.get("FAKE_TROUBLE", "").partition(" ")
    if trouble == name and how == "fails": raise RuntimeError("no entry\\nfor " + os.environ["WANDB_API_KEY"])
    if trouble == name and how == "crashes": os.kill(os.getpid(), signal.SIGSEGV)
    if trouble == name and how == "hangs": time.sleep(100)
    if trouble == name and how == "is stopped": os.kill(os.getpid(), signal.SIGSTOP)

class Run:
    url, step = None, int(os.environ.get("FAKE_STEP", 0))
    def log(self, values, step=None): call("log", values=values, step=step)
    def define_metric(self, name, step_metric=None): call("define_metric", name=name, step_metric=step_metric)
    def finish(self, exit_code=None): call("finish", status=exit_code)

def init(project=None, name=None, **others):
    call("init", name=name, project=project, **others)
    return Run()

def Html(text, inject): return text
def Markdown(text): return text
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Puts the recording modules where Python finds them first. Returns a function: what was called so far."""
    place = tmp_path / "libraries"
    place.mkdir()
    for name in LIBRARIES:
        (place / f"{name}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(place)
    record = tmp_path / "calls"
    record.touch()
    for name in ("WANDB_PROJECT", "WANDB_MODE", "WANDB_DIR", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("FAKE_CALLS", str(record))
    return lambda: [json.loads(line) for line in record.read_text().splitlines()]


class Lived:
    """A run directory whose metrics and samples a test writes, followed by a tracker."""

    def __init__(self, workdir, tracker):
        (workdir / "samples").mkdir(parents=True)
        config = configs.parse(configs.merge({"training.tracker": tracker}))
        self.run = runs.Run(workdir=workdir, config=config, tokenizer=alphabets.Ids(vocab_size=5))
        self.metrics, self.samples = workdir / "metrics.jsonl", workdir / "samples"
        self.metrics.touch()
        self.said = []

    def log(self, *lines):
        with self.metrics.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def live(self, *lines, is_killed=False):
        """One life of the training process, whose lines come while it is followed."""
        try:
            with trackers.follow(self.run, self.said.append):
                self.log(*lines)
                if is_killed:
                    raise InterruptedError
        except InterruptedError:
            pass


def loss(*steps):
    return [{"step": step, "train/loss": 1 / step} for step in steps]


def logged(calls):
    return [arguments for name, arguments in calls if name == "log"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_tracker_gets_config_curves_and_samples(calls, tmp_path, name):
    lived = Lived(tmp_path / "my run", name)
    (lived.samples / "00000004.txt").write_text("a <b>\n    c\n")
    lived.log(*loss(2))
    lived.live({"step": 4, "train/loss": "nan"}, {"step": 4, "valid/score_entropy_bits": 2.5})
    (_, init), *others = calls()
    record = json.loads((tmp_path / "my run" / "tracker.json").read_text())[name]
    assert init["project"] in (None, "sedd_jax")  # W&B has it from its variable.
    assert init["name"] == ("my run" if name == "wandb" else f"my run-{record['id']}")
    assert init["config"] == configs.flatten(configs.to_dict(lived.run.config))
    assert (init["resume"], others[-1][0]) == ("allow", "finish")
    rows = [arguments["values"] for arguments in logged(calls())]
    if name == "wandb":
        assert (init["id"], others[-1][1]["status"]) == (record["id"], 0)
        assert {"name": "*", "step_metric": "step"} in [a for called, a in others if called == "define_metric"]
        steps = [row.pop("step") for row in rows]
        assert rows[-1] == {"samples": "<pre>a &lt;b&gt;\n    c\n</pre>"}
    else:
        steps = [arguments["step"] for arguments in logged(calls())]
        assert rows[-1] == {"samples": "    a <b>\n        c\n"}
        assert init["private"]  # A Space that it makes.
    assert steps == [2, 4, 4, 4]
    assert rows[0] == {"train/loss": 0.5}
    assert rows[1]["train/loss"] != rows[1]["train/loss"]
    assert rows[2] == {"valid/score_entropy_bits": 2.5}
    assert len(lived.said) == 1
    assert lived.said[0].startswith(f"tracker {name}: ")
    assert "chatter" not in lived.said[0]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_run_that_goes_on_is_the_same_run_there_and_no_curve_goes_back(calls, tmp_path, monkeypatch, name):
    lived = Lived(tmp_path / "run", name)
    lived.live(*loss(*range(1, 15)), {"step": 8, "valid/score_entropy_bits": 2.5}, is_killed=True)
    first = calls()
    assert [a["status"] for called, a in first if called == "finish"] == [1 if name == "wandb" else None]
    # It resumes from the checkpoint of step 10, whose evaluation SIGTERM had left out.
    lived.metrics.write_text("")
    lived.log(*loss(*range(1, 11)))
    monkeypatch.setenv("FAKE_STEP", "15")
    lived.live({"step": 10, "valid/score_entropy_bits": 2.0}, *loss(*range(11, 18)))
    inits = [arguments for called, arguments in calls() if called == "init"]
    assert len(inits) == 2
    assert inits[0] == inits[1]
    rows = logged(calls())
    of_row = (lambda row: row["values"]["step"]) if name == "wandb" else (lambda row: row["step"])
    assert [of_row(row) for row in rows if "train/loss" in row["values"]] == list(range(1, 18))
    assert [of_row(row) for row in rows if "valid/score_entropy_bits" in row["values"]] == [8, 10]
    if name == "wandb":  # It drops a row whose number is not above the one before.
        assert [row["step"] for row in rows] == list(range(len(rows)))


def test_rows_go_on_where_the_server_is_if_a_kill_lost_their_number(calls, tmp_path, monkeypatch):
    lived = Lived(tmp_path / "run", "wandb")
    monkeypatch.setenv("FAKE_STEP", "15")
    lived.live(*loss(1, 2))
    assert [row["step"] for row in logged(calls())] == [15, 16]


def test_a_run_that_changes_its_tracker_brings_its_whole_curve(calls, tmp_path):
    lived = Lived(tmp_path / "run", "wandb")
    lived.live(*loss(1, 2))
    other = Lived(tmp_path / "other", "trackio")
    shutil.copytree(tmp_path / "run", tmp_path / "other", dirs_exist_ok=True)
    other.live(*loss(3))
    assert [row["step"] for row in logged(calls())[2:]] == [1, 2, 3]
    assert set(json.loads((tmp_path / "other" / "tracker.json").read_text())) == set(LIBRARIES)


@pytest.mark.parametrize("name", ["tensorboard", "none"])
def test_other_choices_start_nothing(calls, tmp_path, name):
    lived = Lived(tmp_path / "run", name)
    lived.live(*loss(1))
    assert (calls(), lived.said) == ([], [])
    assert not (tmp_path / "run" / "tracker.json").exists()


@pytest.mark.parametrize("part", ["import", "init fails", "log fails", "finish fails"])
def test_a_tracker_that_fails_is_one_line_without_keys(calls, tmp_path, monkeypatch, part):
    monkeypatch.setenv("FAKE_TROUBLE", part)
    lived = Lived(tmp_path / "run", "wandb")
    lived.live(*loss(1))
    warnings = [line for line in lived.said if line.startswith("warning")]
    why = "ImportError: no part of it is found" if part == "import" else "RuntimeError: no entry for ***"
    assert warnings == [f"warning: the tracker wandb failed ({why}); the run goes on without it"]


def test_a_tracker_that_cannot_begin_is_one_line(calls, tmp_path):
    lived = Lived(tmp_path / "run", "wandb")
    (tmp_path / "run" / "tracker.json").write_text("{")
    lived.live(*loss(1))
    (said,) = lived.said
    assert said.startswith(f"warning: the tracker wandb failed ({tmp_path}/run/tracker.json is damaged")
    assert said.endswith("; the run goes on without it")
    assert calls() == []


@pytest.mark.parametrize("how", ["crashes", "hangs", "is stopped"])
@pytest.mark.parametrize("part", ["init", "finish"])
def test_a_tracker_that_hangs_or_crashes_is_left_in_bounded_time(calls, tmp_path, monkeypatch, part, how):
    monkeypatch.setenv("FAKE_TROUBLE", f"{part} {how}")
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 1)
    monkeypatch.setattr(trackers, "_KILL_AFTER_SECONDS", 1)
    lived = Lived(tmp_path / "run", "trackio")
    with trackers.follow(lived.run, lived.said.append):
        while not calls() and part == "init" and not lived.said:
            time.sleep(0.05)
        lived.log(*loss(1))
        started = time.monotonic()
    assert time.monotonic() - started < 30  # 100 where it is waited for
    (warning,) = [line for line in lived.said if line.startswith("warning")]
    ended = r"did not finish in 1 seconds|ended with status -11" if how == "crashes" else "did not finish in 1 seconds"
    assert re.fullmatch(rf"warning: the tracker trackio ({ended}); metrics\.jsonl has everything, .*", warning)


def test_a_tracker_that_hangs_ends_by_itself_where_training_was_killed(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TROUBLE", "init hangs")
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 1)
    follower = trackers.Follower(Lived(tmp_path / "run", "trackio").run, print)
    follower._process.stdin.close()  # The system does, whatever ends training.
    assert follower._process.wait(timeout=30) == -signal.SIGALRM
    follower._listener.join()


def test_what_a_hanging_tracker_missed_comes_with_the_next_start(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 1)
    monkeypatch.setenv("FAKE_TROUBLE", "init hangs")
    lived = Lived(tmp_path / "run", "trackio")
    lived.live(*loss(1, 2))
    monkeypatch.setenv("FAKE_TROUBLE", "")
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 15)
    lived.live(*loss(3))
    assert [row["step"] for row in logged(calls())] == [1, 2, 3]


def test_a_library_that_is_missing_is_named_with_its_extra_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "_is_installed", lambda name: False)
    workdir = tmp_path / "runs" / "new"
    argv = ["train", "--num_processes=1", f"--workdir={workdir}", "--config.training.tracker=wandb"]
    assert cli.main(argv) == 1
    assert capsys.readouterr().err == (
        "sedd train: --config.training.tracker=wandb needs a library that is not installed: "
        "pip install 'sedd_jax[wandb]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_library_s_name_is_not_the_library(tmp_path, monkeypatch):
    """W&B leaves a folder wandb where a program was started."""
    (tmp_path / "a_folder_of_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._is_installed("a_folder_of_runs")
    assert trackers._is_installed("numpy")


def test_another_tracker_is_refused_with_the_four_that_there_are():
    with pytest.raises(errors.UserError) as refused:
        configs.parse(configs.merge({"training.tracker": "mlflow"}))
    assert str(refused.value) == (
        "config.training.tracker=mlflow is unknown: choose one of tensorboard, wandb, trackio, none"
    )


def go_on(workdir, num_steps, *arguments):
    """Status and standard error of more steps of a run."""
    config = configs.flatten(json.loads((workdir / "config.json").read_text()))
    config.pop("training.tracker", None)
    fields = [f"--config.{name}={value}" for name, value in (config | {"training.num_steps": num_steps}).items()]
    return cli.main(["train", "--num_processes=1", f"--workdir={workdir}", *fields, *arguments])


@pytest.fixture
def earlier_run(code_run, tmp_path):
    """A run of an earlier version, whose config says nothing of trackers."""
    workdir = shutil.copytree(code_run, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    assert config["training"].pop("tracker") == "tensorboard"
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def test_an_earlier_run_goes_on_with_a_tracker(calls, earlier_run, capsys):
    events = sorted((earlier_run / "tensorboard").iterdir())
    assert go_on(earlier_run, 4, "--config.training.log_every=1", "--config.training.tracker=wandb") == 0
    err = capsys.readouterr().err
    assert err.count("tracker wandb: ") == 1
    assert "chatter" not in err
    assert [row["values"]["step"] for row in logged(calls())] == [2, 3, 4]
    row = logged(calls())[-1]["values"]
    assert row["train/loss"] > 0
    assert row["train/tokens_per_second"] > 0
    assert row["system/peak_host_memory_gib"] > 0
    assert calls()[-1] == ["finish", {"status": 0}]
    assert sorted((earlier_run / "tensorboard").iterdir()) == events


@pytest.mark.slow
def test_a_tracker_that_fails_leaves_training_its_status(calls, earlier_run, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_TROUBLE", "init fails")
    assert go_on(earlier_run, 4, "--config.training.tracker=wandb") == 0
    err = capsys.readouterr().err
    assert err.count("warning: the tracker wandb failed (RuntimeError: no entry for ***)") == 1
    assert "Traceback" not in err
    assert "step 4/4  loss" in err


@pytest.mark.slow
def test_a_run_told_to_stop_saves_before_its_tracker_is_waited_for(calls, earlier_run, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_TROUBLE", "finish hangs")
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 1)
    stops = lambda: trackers.contextlib.nullcontext(lambda step: step == 3)
    monkeypatch.setattr(processes, "told_to_stop", stops)
    saved = []
    leave = trackers.Follower.__exit__
    look = lambda *given: (saved.extend(sorted(p.name for p in (earlier_run / "checkpoints").iterdir())), leave(*given))
    monkeypatch.setattr(trackers.Follower, "__exit__", look)
    assert go_on(earlier_run, 6, "--config.training.tracker=wandb") == 75
    assert saved == ["2", "3"]
    assert "the tracker wandb did not finish in 1 seconds" in capsys.readouterr().err


@pytest.mark.slow
def test_only_the_first_process_has_a_tracker(calls, earlier_run, monkeypatch):
    run = runs.load(earlier_run)
    training = dataclasses.replace(run.config.training, num_steps=3, tracker="wandb")
    monkeypatch.setattr(processes, "is_first", lambda: False)
    train.train(dataclasses.replace(run.config, training=training), earlier_run, stream=io.StringIO())
    assert calls() == []


def rows_of_wandb(path):
    """Rows in a file that W&B wrote offline: records in blocks of 32 KiB, each with checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2 as messages

    data, place, whole, rows = path.read_bytes(), 7, b"", []
    while place < len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = messages.Record.FromString(whole)
            if record.history.item:
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({name: json.loads(value) for name, value in items.items()})
            whole = b""
    return rows


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    lived = Lived(tmp_path / "run", "wandb")
    (lived.samples / "00000002.txt").write_text("a <b>\n")
    lived.live(*loss(1, 2, 3), is_killed=True)
    lived.metrics.write_text("")
    lived.log(*loss(1, 2))
    lived.live(*loss(3, 4))
    offline = f"offline, `wandb sync {lived.run.local}/wandb/offline-run-*` sends it"
    assert lived.said == [f"tracker wandb: {offline}"] * 2
    name = json.loads((tmp_path / "run" / "tracker.json").read_text())["wandb"]["id"]
    places = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert [place.name.rpartition("-")[2] for place in places] == [name, name]
    rows = [row for place in places for row in rows_of_wandb(place / f"run-{name}.wandb")]
    assert [row["_step"] for row in rows] == list(range(5))
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (step, 1 / step) for step in (1, 2, 3, 4)
    ]
    (text,) = places[0].rglob("*.html")
    assert text.read_text() == "<pre>a &lt;b&gt;\n</pre>"


@pytest.mark.slow
def test_trackio_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="pip install -e '.[trackio]'")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "ours")
    lived = Lived(tmp_path / "run", "trackio")
    (lived.samples / "00000002.txt").write_text("a <b>\n")
    lived.live(*loss(1, 2, 3), is_killed=True)
    lived.metrics.write_text("")
    lived.log(*loss(1, 2))
    lived.live(*loss(3, 4))
    name = f"run-{json.loads((tmp_path / 'run' / 'tracker.json').read_text())['trackio']['id']}"
    assert lived.said == [f"tracker trackio: project ours, run {name}; `trackio show` opens it"] * 2
    code = textwrap.dedent("""
        import json
        from trackio import sqlite_storage
        (name,) = sqlite_storage.SQLiteStorage.get_runs("ours")
        print(json.dumps([name, sqlite_storage.SQLiteStorage.get_logs("ours", name)], default=str))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, rows = json.loads(done.stdout)
    assert found == name
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (step, 1 / step) for step in (1, 2, 3, 4)
    ]
    (text,) = [row["samples"]["_value"] for row in rows if "samples" in row]
    assert text == "    a <b>\n"
