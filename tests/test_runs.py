"""A small run on a source of known entropy: training, resuming, evaluation, sampling, conversion, and wrong input."""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from sedd_jax import checkpoints, runs
from sedd_jax import config as configs
from sedd_jax.cli import main as cli
from sedd_jax.data import corpora, prepare
from sedd_jax.evaluation import perplexity
from sedd_jax.model import networks
from sedd_jax.runtime import errors, last_words, processes, terminals
from sedd_jax.sampling import generate, templates
from sedd_jax.training import compilation, metric_writers, train
from tests.support import compiling, places, slow, small_runs

ALPHABET = "abcdefgh"
LENGTH = 32
STEPS = 250


def markov_chain():
    """A transition matrix with strong structure, its stationary distribution, and nats per character of a sequence."""
    matrix = np.random.default_rng(0).dirichlet(np.full(len(ALPHABET), 0.25), size=len(ALPHABET)) * 0.96 + 0.005
    stationary = np.linalg.matrix_power(matrix, 200)[0]
    first = -(stationary * np.log(stationary)).sum()
    following = -(stationary[:, None] * matrix * np.log(matrix)).sum()
    return matrix, stationary, (first + (LENGTH - 1) * following) / LENGTH


def write_text(directory):
    matrix, stationary, _ = markov_chain()
    generator = np.random.default_rng(1)
    for split, size in (("train", 300_000), ("valid", 30_000), ("test", 30_000)):
        state = generator.choice(len(ALPHABET), p=stationary)
        cumulative, uniform, states = matrix.cumsum(1), generator.random(size), []
        for u in uniform:
            state = min(int(np.searchsorted(cumulative[state], u)), len(ALPHABET) - 1)
            states.append(state)
        (directory / f"{split}.txt").write_text("".join(ALPHABET[s] for s in states), encoding="utf-8")
    return f"text:{directory}/{{split}}.txt"


def settings(source, **training):
    return {
        "data": {"source": source, "length": LENGTH},
        "network": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "cond_dim": 32,
            "dropout": 0.0,
            "dtype": "float32",
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 20, "ema_decay": 0.97},
        "training": {
            "num_steps": STEPS,
            "batch_size": 64,
            "log_every": 50,
            "eval_every": 125,
            "eval_sequences": 128,
            "sample_every": 125,
            "checkpoint_every": 125,
            "num_micro_batches": 1,
        }
        | training,
        "sampling": {"num_steps": 8, "num_samples": 2},
        "mesh": {"data": 1},
    }


def one_device_config(partial):
    return configs.parse(configs.merge(partial))


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Lets the program see one of the harness' eight devices, because each further one costs time on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: first)
        # JAX has started already, so this process cannot join others.
        patch.setattr(processes, "join", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """The directory of a finished run, and what the run printed."""
    workdir = tmp_path_factory.mktemp("runs") / "absorb"
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "options", lambda training: compiling.OPTIMISED)  # It takes many steps.
        train.train(one_device_config(settings(source)), workdir, stream=stream)
    return workdir, stream.getvalue()


def call(*argv):
    """Exit status, standard output and standard error of one command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(argv))
    return status, out.getvalue(), err.getvalue()


def test_the_bound_comes_down_to_the_entropy_and_never_below(trained):
    entropy = markov_chain()[2]
    workdir, _ = trained
    settings = perplexity.Settings(num_times=4, batch_size=64)
    result = perplexity.evaluate(workdir, split="test", settings=settings)
    for name in ("score_entropy", "cross_entropy"):
        bound, stderr = result[name]["nats_per_token"], result[name]["nats_per_token_stderr"]
        # The average over t in [1e-3, 1] leaves out about a thousandth of the bound.
        assert bound > entropy * 0.999 - 3 * stderr
        assert bound < entropy * 1.05 + 3 * stderr
        assert stderr < 0.02 * entropy
        assert result[name]["ppl_bound"] == pytest.approx(math.exp(bound))
        assert result[name]["bits_per_character"] == pytest.approx(bound / math.log(2))
    assert result["cross_entropy"]["nats_per_token"] <= result["score_entropy"]["nats_per_token"]


def test_a_run_directory_describes_itself(trained):
    workdir, printed = trained
    names = {path.name for path in workdir.iterdir()} - {"evaluations"}  # Other tests evaluate this run.
    assert names == {
        "config.json",
        "tokenizer.json",
        "data",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "loss.png",
    }
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert list(losses) == list(range(50, STEPS + 1, 50))
    assert losses[STEPS] < losses[50]
    assert "held out: score entropy bits" in printed
    assert (workdir / "samples" / f"{STEPS:08d}.txt").read_text().count("--- sample") == 2
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_samples_follow_the_chain(trained):
    matrix, _, entropy = markov_chain()
    run = runs.load(trained[0])
    opened = run.restore()
    assert opened.step == STEPS
    settings = configs.SamplingConfig(num_steps=32, num_samples=128)
    with opened.on_devices():
        samples = generate.draw_samples(opened, templates.parse(run, ""), settings, seed=1)
    ids = np.array([[ALPHABET.index(c) for c in sample.text] for sample in samples])
    surprise = -np.log(matrix[ids[:, :-1], ids[:, 1:]]).mean()
    # Independent characters would have more than twice the entropy.
    assert surprise < 1.3 * entropy


def test_a_stopped_run_is_started_again_but_not_from_an_earlier_step(source, tmp_path, monkeypatch):
    """Repeating a command with --step would lose the steps since that checkpoint."""
    monkeypatch.setattr(train, "train", lambda *_, **__: {"step": 3})
    config = tmp_path / "config.py"
    config.write_text(f"def get_config():\n    return {settings(source, num_steps=4)!r}\n")
    command = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--num_processes=1"]
    assert cli.main(command) == cli.TRY_AGAIN
    assert cli.main([*command, "--step=2"]) == 1


class Terminates(io.StringIO):
    """Sends SIGTERM to the process when step 1 is reported, or another signal when another step is.

    Attributes:
        saved: files of checkpoints there were at the last message.
    """

    def __init__(self, sign=signal.SIGTERM, step=1, checkpoint_dir=None):
        super().__init__()
        self.sign, self.step, self.checkpoint_dir, self.saved = sign, step, checkpoint_dir, []

    def write(self, text):
        if f"step {self.step}/" in text:
            signal.raise_signal(self.sign)  # In this thread, before another line: JAX drops some that come later.
        if self.checkpoint_dir is not None and self.checkpoint_dir.exists():
            self.saved = os.listdir(self.checkpoint_dir)
        return super().write(text)


def test_resuming_is_bit_for_bit_the_run_that_was_never_stopped(source, tmp_path, monkeypatch):
    full, parts = tmp_path / "full", tmp_path / "parts"
    config = one_device_config(settings(source, num_steps=4, log_every=1, eval_every=0, sample_every=0))
    words = []
    with monkeypatch.context() as patch:
        patch.setattr(last_words, "_speakers", [None])
        patch.setattr(last_words, "_say", words.append)
        train.train(config, full, stream=io.StringIO())
    assert len(words) == 1  # Nothing was saved before the last step, so no log listed the checkpoints.

    before = signal.getsignal(signal.SIGTERM)
    closed, close = [], checkpoints.Checkpoints.close
    is_default = lambda saved: closed.append(signal.getsignal(signal.SIGTERM) == before)
    monkeypatch.setattr(checkpoints.Checkpoints, "close", lambda saved: (is_default(saved), close(saved)))
    stream = Terminates(checkpoint_dir=parts / "checkpoints")
    assert train.train(config, parts, stream=stream)["step"] == 2
    said = f"stopped by SIGTERM at step 2, which is saved in {parts}: the same command goes on\n"
    assert stream.getvalue().endswith(said)
    assert stream.saved == ["2"]  # It is whole when that is said.
    assert signal.getsignal(signal.SIGTERM) == before
    assert closed == [False]  # A second SIGTERM waits for the save in progress.
    stream = io.StringIO()
    assert train.train(config, parts, stream=stream)["step"] == 4
    assert f"resumed {parts} at step 2" in stream.getvalue()
    (step, params), (other_step, other) = (runs.load(each).params("ema_params") for each in (full, parts))
    assert step == other_step == 4
    jax.tree.map(np.testing.assert_array_equal, params, other)

    def logged(workdir):
        lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines]

    assert logged(full) == logged(parts)
    assert [step for step, _, _ in logged(parts)] == [1, 2, 3, 4]

    config = one_device_config(settings(source, num_steps=9, log_every=1, eval_every=0, sample_every=0))
    with pytest.raises(KeyboardInterrupt) as interrupt:
        train.train(config, parts, stream=Terminates(signal.SIGINT, step=6))
    assert str(interrupt.value) == f"the newest checkpoint is of step 4 in {parts}; the same command goes on"
    with pytest.raises(KeyboardInterrupt) as interrupt:
        train.train(config, parts, from_step=2, stream=Terminates(signal.SIGINT, step=4))
    assert str(interrupt.value).endswith(f"step 2 in {parts}; the same command without --step goes on")


@pytest.mark.slow
def test_an_evaluation_that_sigterm_meets_is_made_up_and_made_once(source, tmp_path):
    """At the step at which it stops, a run neither evaluates nor samples; the run that goes on does."""
    full, parts = tmp_path / "full", tmp_path / "parts"
    every = {"log_every": 1, "eval_every": 2, "sample_every": 2, "checkpoint_every": 2}
    config = one_device_config(settings(source, num_steps=4, **every))
    expected = train.train(config, full, stream=io.StringIO())
    assert train.train(config, parts, stream=Terminates())["step"] == 2
    assert not metric_writers.holds(parts / "metrics.jsonl", 2, "valid/")
    assert not list(parts.glob("samples/*"))
    found = train.train(config, parts, stream=io.StringIO())
    assert {name: found[name] for name in expected if "per_second" not in name} == {
        name: value for name, value in expected.items() if "per_second" not in name
    }
    # A second life from the same step, which now has its evaluation, makes none.
    train.train(config, parts, from_step=2, stream=io.StringIO())
    assert small_runs.logged(parts) == small_runs.logged(full)
    texts = [{path.name: path.read_text() for path in place.glob("samples/*")} for place in (full, parts)]
    assert texts[0] == texts[1]
    assert sorted(texts[0]) == ["00000002.txt", "00000004.txt"]


@pytest.mark.parametrize(("step", "status"), [(2, 75), (4, 0)])
def test_a_run_that_was_stopped_asks_to_be_started_again(step, status, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda config, workdir, from_step: {"step": step})
    assert call("train", f"--workdir={tmp_path}", "--config.training.num_steps=4")[0] == status


@pytest.mark.slow
def test_micro_batches_average_their_gradients_and_have_noise_of_their_own(source, tmp_path):
    short = {"num_steps": 1, "log_every": 1, "eval_every": 0, "sample_every": 0}
    norms = {}
    for num_micro_batches in (1, 4):
        partial = settings(source, **short, num_micro_batches=num_micro_batches)
        metrics = train.train(one_device_config(partial), tmp_path / str(num_micro_batches), stream=io.StringIO())
        norms[num_micro_batches] = metrics["train/grad_norm"]
        assert metrics["train/loss"] == pytest.approx(math.log(len(ALPHABET)), rel=0.1)
    # Summed gradients would be four times as long. With the same noise in each part only rounding would differ.
    assert norms[4] == pytest.approx(norms[1], rel=0.3)
    assert norms[4] != pytest.approx(norms[1], rel=1e-6)


@pytest.mark.slow
def test_two_devices_train_and_evaluate_like_one(trained, source, tmp_path, monkeypatch):
    short = {"num_steps": 2, "log_every": 1, "eval_every": 2, "sample_every": 2}
    config = one_device_config(settings(source, **short | {"sample_every": 0}))
    one = train.train(config, tmp_path / "one", stream=io.StringIO())
    alone = perplexity.evaluate(trained[0], settings=perplexity.Settings(num_times=1, batch_size=64))
    two_devices = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: two_devices)
    # Two devices cannot share three samples evenly. Sampling works nevertheless.
    partial = settings(source, **short) | {"mesh": {"data": 2}, "sampling": {"num_samples": 3, "num_steps": 2}}
    two = train.train(one_device_config(partial), tmp_path / "two", stream=io.StringIO())
    for name in ("train/loss", "train/grad_norm", "valid/score_entropy_bits"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)
    together = perplexity.evaluate(trained[0], settings=perplexity.Settings(num_times=1, batch_size=64))
    assert together["score_entropy"]["nats_per_token"] == pytest.approx(
        alone["score_entropy"]["nats_per_token"], rel=1e-4
    )


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(source, tmp_path):
    workdir = tmp_path / "run"
    short = {"log_every": 1, "eval_every": 0, "sample_every": 0, "checkpoint_every": 1}
    train.train(one_device_config(settings(source, **short, num_steps=2)), workdir, stream=io.StringIO())
    config = one_device_config(settings(source, **short, num_steps=4))
    broken = tmp_path / "broken"
    shutil.copytree(workdir, broken)
    with contextlib.closing(checkpoints.Checkpoints(broken / "checkpoints", keep=3)) as saved:
        run = runs.load(broken)
        mesh = train.sharding.make_mesh(config.mesh)
        optimizer = train.train_steps.make_optimizer(config)
        state, step, _ = train.initial_state(run, optimizer, mesh, saved)
        assert step == 2
        saved.save(3, state.replace(step=state.step + 1, params=jax.tree.map(lambda x: x * np.nan, state.params)))
    with pytest.raises(
        train.NonFiniteLossError, match=r"train/loss is nan at step 4: the newest checkpoint is of step 3"
    ):
        train.train(config, broken, stream=io.StringIO())


def test_eval_command_prints_both_bounds_and_json(trained):
    status, out, _ = call(
        "eval", f"--workdir={trained[0]}", "--split=valid", "--num_times=2", "--batch_size=64", "--json"
    )
    assert status == 0
    assert "score-entropy" in out
    assert "cross-entropy" in out
    result = json.loads(out.splitlines()[-1])
    assert result["split"] == "valid"
    assert result["score_entropy"]["ppl_bound_stderr"] > 0


def test_sample_command_fills_a_template_and_writes_jsonl(trained, tmp_path):
    file = tmp_path / "samples.jsonl"
    argv = ["sample", f"--workdir={trained[0]}", "--template=abc{4}abc{2}", "--num_samples=2", f"--out={file}"]
    status, out, err = call(*argv, "--json", "--num_steps=4", "--seed=5")
    assert status == 0, err
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows == json.loads(out.splitlines()[-1])
    assert len(rows) == 2
    for row in rows:
        assert row["text"].startswith("abc")
        assert row["text"][7:10] == "abc"
        assert len(row["text"]) == len(row["tokens"]) == 12
        assert (row["seed"], row["nfe"], row["sampler"], row["draw"]) == (5, 5, "tweedie", "precise")
    again = call(*argv, "--json", "--num_steps=4", "--seed=5")[1]
    assert again == out
    other = call(*argv, "--json", "--num_steps=4", "--seed=6")[1]
    assert other != out


@pytest.mark.slow
@pytest.mark.parametrize("sampler", slow.all_but(["euler"], ["euler", "tau_leaping"]))
def test_prefix_and_suffix_stand_at_the_ends_with_every_sampler(trained, sampler):
    status, out, _ = call(
        "sample",
        f"--workdir={trained[0]}",
        "--prefix=abba",
        "--suffix=hh",
        f"--sampler={sampler}",
        "--num_steps=4",
        "--json",
    )
    assert status == 0
    for row in json.loads(out.splitlines()[-1]):
        assert len(row["text"]) == LENGTH
        assert row["text"].startswith("abba")
        assert row["text"].endswith("hh")


def test_watch_shows_masks_turning_into_the_same_text(trained):
    argv = ("sample", f"--workdir={trained[0]}", "--num_steps=4", "--num_samples=1", "--seed=3", "--template=ab{9}")
    _, out, err = call(*argv, "--watch")
    frames = [line for line in err.splitlines() if line and not line.startswith(("step", "---"))]
    assert frames[0].count("░") > frames[-1].count("░") == 0
    assert all(frame.startswith("ab") for frame in frames)
    assert out.splitlines()[1] == frames[-1]
    assert out == call(*argv)[1]


def test_steps_and_seeds_do_not_recompile(trained, monkeypatch):
    argv = ("sample", f"--workdir={trained[0]}", "--num_samples=1")
    first = call(*argv, "--num_steps=4", "--seed=0")[1]

    def traced_again(*_):
        raise AssertionError("the network was traced again")

    monkeypatch.setattr(networks, "apply", traced_again)
    assert call(*argv, "--num_steps=4", "--seed=0")[1] == first
    assert call(*argv, "--num_steps=7", "--seed=1")[1] != first


def test_long_sampling_reports_its_progress(trained, monkeypatch):
    argv = ("sample", f"--workdir={trained[0]}", "--num_steps=4", "--num_samples=1")
    assert call(*argv)[2] == ""
    monkeypatch.setattr(terminals, "SECONDS_BETWEEN_LINES", 0.0)
    assert call(*argv)[2].splitlines() == [f"step {taken} of 5" for taken in range(1, 6)]


def test_braces_are_written_twice(trained):
    run = runs.load(trained[0])
    with pytest.raises(ValueError, match=r"'{' \(U\+007B\)"):
        templates.parse(run, "a{{b")
    template = templates.parse(run, "ab{3}c{0}d")
    assert template.is_given.tolist()[:7] == [True, True, False, False, False, True, True]
    assert template.length == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--template=abc{40}"], "the template is 43 tokens long, the model's length is 32"),
        (["--template=abc{x}"], "--template has '{x}' at position 3"),
        (["--template=abc}"], "--template has '}' at position 3"),
        (["--template=abcz{3}"], "'z'"),
        (["--prefix=" + "a" * 20, "--suffix=" + "b" * 12], "leave no gap"),
        (["--prefix=a", "--template=b{1}"], "--template cannot be combined"),
        (["--num_steps=0"], "num_steps=0 must be at least 1"),
        (["--sampler=analytic"], "--sampler=analytic is unknown: choose one of tweedie, euler, tau_leaping"),
        (["--draw=sloppy"], "choose one of precise, published"),
        (["--out=/nowhere/at/all.jsonl"], "/nowhere/at"),
        (["--sead=1"], "sead"),
    ],
)
def test_sample_answers_bad_input_with_one_line(trained, argv, message):
    status, out, err = call("sample", f"--workdir={trained[0]}", *argv)
    assert status != 0
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--config.netwrk.num_layers=2"], "did you mean --config.network.num_layers?"),
        (["--config.network.num_layers=two"], "network.num_layers"),
        (["--config.training.batch_size=7", "--config.training.num_micro_batches=2"], "config.training.batch_size=7"),
        (["--config.data.source=text:/nowhere/*.txt"], "/nowhere/*.txt"),
        (["--config.data.source=web:everything"], "web"),
        (["--config.data.length=1000000"], "1000000"),
        (["--config=/nowhere.py"], "/nowhere.py"),
        (["--config.mesh.data=3"], "mesh"),
        (["extra"], "extra"),
    ],
)
def test_train_answers_bad_input_with_one_line_and_writes_nothing(source, tmp_path, change, message):
    workdir = tmp_path / "run"
    flat = configs.flatten(settings(source))
    argv = [f"--config.{name}={value}" for name, value in flat.items()]
    status, out, err = call("train", f"--workdir={workdir}", *argv, *change)
    assert status != 0
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_foreign_unwritable_and_changed_directories(trained, source, tmp_path):
    argv = [f"--config.{name}={value}" for name, value in configs.flatten(settings(source)).items()]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    status, _, err = call("train", f"--workdir={foreign}", *argv)
    assert status == 1
    assert "is not a run directory" in err
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]

    status, _, err = call("train", f"--workdir={foreign / 'thesis.tex' / 'run'}", *argv)
    assert status == 1
    assert "cannot write to" in err
    assert err.count("\n") == 1

    before = sorted((path, path.stat().st_mtime_ns) for path in trained[0].rglob("*"))
    status, _, err = call("train", f"--workdir={trained[0]}", *argv, "--config.network.num_layers=3")
    assert status == 1
    assert "config.network.num_layers was 2 and is now 3" in err
    assert sorted((path, path.stat().st_mtime_ns) for path in trained[0].rglob("*")) == before


def test_a_run_does_not_go_on_with_text_that_changed(trained, source, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(trained[0], damaged)
    file = damaged / "data" / "train-00000.bin"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    argv = [f"--config.{name}={value}" for name, value in configs.flatten(settings(source)).items()]
    status, _, err = call("train", f"--workdir={damaged}", *argv)
    assert status == 1
    assert "train-00000.bin is damaged" in err


def test_what_is_wrong_is_said_before_the_text_is_read(tmp_path, monkeypatch):
    """Reading and tokenizing may take minutes. Nothing is left behind."""
    monkeypatch.setattr(corpora, "find", lambda source: pytest.fail("the text was read"))
    config = one_device_config(settings("python:docs"))
    with pytest.raises(errors.UserError, match=r"step=7 goes with a run that has checkpoints; .* is not one yet"):
        train.train(config, tmp_path / "run", from_step=7)
    for tokenizer in ("", "gpt3", "sentencepiece"):
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
        with pytest.raises(errors.UserError, match=f"the tokenizer '{tokenizer}' "):
            train.train(changed, tmp_path / "run")
        with pytest.raises(errors.UserError, match=f"the tokenizer '{tokenizer}' "):
            prepare.prepare("python:docs", tokenizer, tmp_path / "text")
    assert not list(tmp_path.iterdir())


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    status, _, err = call("train", f"--workdir={tmp_path / 'run'}", f"--config.data.source=text:{tmp_path}/empty.txt")
    assert status == 1
    assert "no text" in err
    assert not (tmp_path / "run").exists()


def test_commands_name_directories_that_are_no_runs(tmp_path):
    for command in ("eval", "sample"):
        status, _, err = call(command, f"--workdir={tmp_path}")
        assert status == 1
        assert "is not a run directory" in err
    status, _, err = call("eval")
    assert status == 2
    assert "--workdir" in err
    status, _, err = call("evaluate")
    assert status == 2
    assert "choose one of prepare, train, eval, runs, sample, tune-grid" in err


# Fields of config.json that were added after the first format, in the order of their addition, with the value that
# means "as before". `remat` was a boolean until it was added with the second of these.
ADDED = (
    {"network.attention": "auto"},
    {"network.dropout_generator": "threefry"},
    {"training.keep_checkpoints_every": 0},
    {"network.normalize": False},
    {"init_from": ""},
    {"sampling.grid": "uniform", "sampling.corrector_steps": 0},
    {"sampling.temperature": 1.0, "sampling.top_p": 1.0, "sampling.guidance": 1.0},
    {"training.deterministic": False, "training.profile": ""},
    {"sampling.corrector": "forward_backward"},
)
NAMED_REMAT = 2


def copy_with(run, target, config):
    """A copy of a run directory whose config.json holds this flat config."""
    shutil.copytree(run, target)
    nested = {}
    for name, value in config.items():
        section, _, field = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[field] = value
    (target / "config.json").write_text(json.dumps(nested))
    return target


def past_and_newest(code_run, directory, number, remat, saved_remat):
    """The same run in format `number`, which has the first so many of `ADDED`, and in the newest."""
    full = configs.flatten(json.loads((code_run / "config.json").read_text())) | {"network.remat": remat}
    lacking = {name: value for fields in ADDED[number:] for name, value in fields.items()}
    assert {name: full[name] for name in lacking} == lacking
    old = {name: value for name, value in full.items() if name not in lacking}
    old["network.remat"] = remat if number >= NAMED_REMAT else saved_remat
    return copy_with(code_run, directory / "past", old), copy_with(code_run, directory / "newest", full)


REMATS = [("none", False), ("blocks", True)]


@pytest.mark.parametrize("number", range(len(ADDED)))
@pytest.mark.parametrize(("remat", "saved_remat"), REMATS)
def test_a_run_of_every_past_format_has_the_config_of_today(code_run, tmp_path, number, remat, saved_remat):
    past, newest = past_and_newest(code_run, tmp_path, number, remat, saved_remat)
    assert runs.load(past).config == runs.load(newest).config
    assert runs.load(past).config.network.remat == remat


@pytest.mark.parametrize(("remat", "saved_remat"), slow.all_but([("blocks", True)], REMATS))
def test_a_run_of_the_first_format_draws_the_same_text(code_run, tmp_path, remat, saved_remat):
    past_and_new = past_and_newest(code_run, tmp_path, 0, remat, saved_remat)
    drawn, expected = (generate.generate(each, templates.Written(prefix="a = "), seed=3) for each in past_and_new)
    assert drawn == expected


@pytest.mark.parametrize("name", ["network.num_layer", "sampling.topp", "samples.num_steps", "sed"])
def test_an_unknown_field_of_a_run_is_refused_by_name(code_run, tmp_path, name):
    full = configs.flatten(json.loads((code_run / "config.json").read_text()))
    run = copy_with(code_run, tmp_path / "run", full | {name: 1})
    with pytest.raises(errors.UserError, match=f"config.{name.removesuffix('.num_steps')} is not a field"):
        runs.load(run)
    status, out, err = call("sample", f"--workdir={run}")
    assert (status, out) == (1, "")
    assert "is not a field" in err
    assert err.count("\n") == 1


def test_an_impossible_value_of_a_run_is_refused_by_name(code_run, tmp_path):
    full = configs.flatten(json.loads((code_run / "config.json").read_text()))
    run = copy_with(code_run, tmp_path / "run", full | {"network.remat": "some"})
    with pytest.raises(errors.UserError, match=r"config\.network\.remat=some is unknown: choose one of none"):
        runs.load(run)


def test_help_lists_every_field_with_its_default():
    status, out, _ = call("train", "--help")
    assert status == 0
    for name, value in configs.flatten(configs.to_dict(configs.Config())).items():
        assert f"--config.{name}={value!r}" in out
    quickstart = places.REPOSITORY / "configs" / "quickstart.py"
    assert "--config.data.length=96" in call("train", f"--config={quickstart}", "--help")[1]
    for command in ("eval", "sample", "convert"):
        assert "--json" in call(command, "--help")[1]


@pytest.mark.slow
def test_convert_carries_a_run_to_pytorch_and_back(trained, tmp_path):
    published, back = tmp_path / "published", tmp_path / "back"
    assert call("convert", f"--from={trained[0]}", f"--to={published}")[0] == 0
    assert {path.name for path in published.iterdir()} == {
        "README.md",
        "config.json",
        "loss.png",
        "model.safetensors",
        "modeling_sedd.py",
        "sedd_tokenizer.json",
        "torch_model.py",
    }
    status, out, err = call("convert", f"--from={published}", f"--to={back}", "--json")
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["to"] == str(back)
    run, other = runs.load(trained[0]), runs.load(back)
    ours, theirs = (each.params("ema_params")[1] for each in (run, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert other.tokenizer == run.tokenizer
    known = run.tokenizer.decode(np.array([0, 1, 2]))
    status, out, _ = call("sample", f"--workdir={back}", "--num_steps=2", "--num_samples=1", f"--template={known}{{3}}")
    assert status == 0
    assert out.splitlines()[1].startswith(known)
    status, _, err = call("convert", f"--from={published}", f"--to={back}")
    assert status == 1
    assert "exists and is not empty: use another --to" in err
