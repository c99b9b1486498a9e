"""metric_writers: metrics read back, survive kills and resumes, and look right on terminals and in pictures."""

import errno
import io
import json
import math
import os
import pathlib
import re
import select
import struct
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.data import alphabets, batches, shards
from sedd_jax.runtime import errors, metric_lines
from sedd_jax.training import loss_curves, metric_writers, train

TRAIN = {"train/loss": 3.21, "train/bits_per_character": 2.9}


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that a test advances."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(metric_writers, "time", types.SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture(autouse=True)
def say_again():
    metric_writers.say_missing.cache_clear()


WORK = metric_writers.Work(tokens=1000, flops_per_token=6e6, peak_flops=None)


def make_writer(directory, **changes):
    settings: dict[str, Any] = {
        "num_steps": 2000,
        "start_step": 0,
        "unit": "character",
        "work": WORK,
        "stream": io.StringIO(),
    }
    return metric_writers.MetricWriter(directory, **{**settings, **changes})


def write_lines(path, steps, *, start_step=0):
    lines = metric_writers.JsonLines(path, start_step=start_step)
    for step in steps:
        lines.write(step, {"train/loss": float(step)})
    lines.close()


def steps_of(path):
    return [record["step"] for record in metric_lines.read(path)]


def test_a_line_is_on_disk_before_close(tmp_path):
    lines = metric_writers.JsonLines(tmp_path / "metrics.jsonl", start_step=0)
    lines.write(7, TRAIN)
    text = (tmp_path / "metrics.jsonl").read_text()
    lines.close()
    assert json.loads(text) == {"step": 7, **TRAIN}


def test_resume_drops_later_steps_and_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(10, 140, 10))
    write_lines(path, range(110, 150, 10), start_step=100)
    assert steps_of(path) == list(range(10, 150, 10))


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [10, 20])
    whole = path.read_bytes()
    # The last cut removes only the line end: the JSON is complete, but the next line would be appended to it.
    for cut in (5, 12, 1):
        path.write_bytes(whole[:-cut])
        assert steps_of(path) == [10]
        write_lines(path, [20], start_step=20)
        assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for broken in ('{"st', '{"step": 1e999}', '{"step": Infinity}', "3"):
        path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
        with pytest.raises(errors.UserError, match=r"line 2 holds no metrics of a step .*delete that line"):
            metric_lines.read(path)


def test_non_finite_values_stay_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = metric_writers.JsonLines(path, start_step=0)
    lines.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    lines.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert math.isnan(float(record["a"]))
    assert [float(record["b"]), float(record["c"])] == [math.inf, -math.inf]


def read_events(directory):
    """The events of all files in a directory. A record is length, its CRC, payload, its CRC."""
    from tensorboardX.proto import event_pb2

    event: Any = event_pb2

    events = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(event.Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return events


def test_tensorboard_events_read_back(tmp_path):
    board = metric_writers.TensorBoard(tmp_path, start_step=0)
    board.write(10, TRAIN)
    board.write(20, {"valid/score_entropy_bits": 2.5})
    board.close()
    events = read_events(tmp_path)
    scalars = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    expected = {(10, name): value for name, value in TRAIN.items()} | {(20, "valid/score_entropy_bits"): 2.5}
    assert scalars == pytest.approx(expected)
    assert not any(event.session_log.status for event in events)


def test_tensorboard_shows_texts_line_by_line(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write_text(10, "samples", "# a <b>\n  c")
    (value,) = [value for event in read_events(tmp_path / "tensorboard") for value in event.summary.value]
    assert value.tag.startswith("samples")
    assert value.tensor.string_val == [b"    # a <b>\n      c"]  # Code in Markdown.


def test_a_run_without_tensorboard_files_has_the_others(tmp_path):
    with make_writer(tmp_path, tensorboard=False) as writer:
        writer.write(10, TRAIN)
        writer.write_text(10, "samples", "a")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_training_step_has_the_peak_memory(tmp_path, monkeypatch):
    devices = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n * 2**30}) for n in (3, 5)]
    monkeypatch.setattr(metric_writers.jax, "local_devices", lambda: devices)
    with make_writer(tmp_path) as writer:
        writer.write(10, TRAIN)
        writer.write(10, {"valid/score_entropy_bits": 2.5})
    train, valid = metric_lines.read(tmp_path / "metrics.jsonl")
    assert train["system/peak_device_memory_gib"] == 5.0
    assert 0.05 < train["system/peak_host_memory_gib"] < 1000
    assert not [name for name in valid if name.startswith("system/")]


def test_tensorboard_hides_the_steps_after_the_resumed_one(tmp_path):
    metric_writers.TensorBoard(tmp_path, start_step=100).close()
    # A start event at step 101 makes TensorBoard drop steps from 101 on in earlier files.
    assert [e.step for e in read_events(tmp_path) if e.session_log.status == 1] == [101]


def test_pace_counts_training_only(clock):
    pace = metric_writers.Pace(num_steps=1000, start_step=100)
    clock.now += 10
    with pace.pause():
        clock.now += 50
    assert pace.lap(120) == pytest.approx((2.0, 880 / 2))
    clock.now += 20
    with pace.pause():
        clock.now += 20
    # Four steps per second without pauses, two with them. The time left counts pauses.
    assert pace.lap(200) == pytest.approx((4.0, 800 / 2))


def test_a_pause_ends_with_an_error_inside(clock):
    pace = metric_writers.Pace(num_steps=10, start_step=0)

    @pace.pause()
    def evaluate():
        clock.now += 5
        raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    clock.now += 1
    assert pace.lap(1)[0] == pytest.approx(1.0)


def test_plain_lines(tmp_path, clock):
    stream = io.StringIO()
    work = metric_writers.Work(tokens=123, flops_per_token=3e7, peak_flops=1e12)
    with make_writer(tmp_path, stream=stream, work=work) as writer:
        clock.now += 1
        writer.write(100, TRAIN)
        writer.say("a sample\x1b[2J")
        bound = {"valid/score_entropy_bits": 2.5, "valid/score_entropy_bits_stderr": 0.01}
        writer.write(100, {**bound, "valid/cross_entropy_bits": 2.4})
    assert stream.getvalue().splitlines() == [
        "step 100/2000  loss 3.210  bits/character 2.900  12.3k tokens/s  mfu 36.9%  left 0:00:19",
        "a sample\\x1b[2J",
        "step 100  held out: score entropy bits 2.500 ± 0.010  cross entropy bits 2.400",
    ]
    train, valid = metric_lines.read(tmp_path / "metrics.jsonl")
    assert train["train/tokens_per_second"] == pytest.approx(12300)
    assert train["train/model_flop_utilization"] == pytest.approx(0.369)
    assert valid == {"step": 100, **bound, "valid/cross_entropy_bits": 2.4}


def test_without_a_known_peak_there_is_no_utilization(tmp_path):
    stream = io.StringIO()
    with make_writer(tmp_path, stream=stream) as writer:
        writer.write(100, TRAIN)
    assert "mfu" not in stream.getvalue()
    (record,) = metric_lines.read(tmp_path / "metrics.jsonl")
    assert "train/model_flop_utilization" not in record


def test_standard_error_is_the_default(tmp_path, capsys):
    with make_writer(tmp_path, stream=None) as writer:
        writer.write(100, TRAIN)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("step 100/2000  loss 3.210")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0.0, "0"), (987.0, "987"), (999.7, "1k"), (12345.0, "12.3k"), (4.567e6, "4.57M"), (3e13, "30T")],
)
def test_short_counts(count, text):
    assert metric_writers._short(count) == text


@pytest.fixture
def terminal(monkeypatch):
    """A stream on a pseudo terminal of 60 columns, and a function that returns its text without styles."""
    pty = pytest.importorskip("pty", reason="pseudo terminals need a POSIX system")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "24")
    reader, follower = pty.openpty()
    stream = os.fdopen(follower, "w", encoding="utf-8")

    def shown(until):
        # Text written to a pseudo terminal arrives later and in pieces.
        text = ""
        while re.search(until, text, re.DOTALL) is None:
            assert select.select([reader], [], [], 10)[0], f"{until!r} is not in {text!r}"
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text + os.read(reader, 1 << 16).decode())
        return text.replace("\r", "\n")

    yield stream, shown
    stream.close()
    os.close(reader)


def test_a_bar_on_a_terminal(tmp_path, clock, terminal):
    pytest.importorskip("rich", reason="the bar needs rich")
    stream, shown = terminal
    work = metric_writers.Work(tokens=123, flops_per_token=3e7, peak_flops=1e12)
    with make_writer(tmp_path, stream=stream, work=work) as writer:
        shown("step 0/2000 .*the first step compiles")
        clock.now += 1
        writer.write(1000, TRAIN)
        lines = shown(r"mfu 369\.0%").splitlines()
        bar = next(line for line in lines if "step 1000" in line)
        assert re.fullmatch(r"step 1000/2000 \S+ 50%  left 0:00:01 *", bar)
        assert "loss 3.210  bits/character 2.900  123k tokens/s  mfu 369.0%" in lines
        assert max(map(len, lines)) <= 60
        writer.say("[red]text[/red] of a sample :smile:\x1b[2J")
        shown(r"\[red\]text\[/red\] of a sample :smile:\\x1b\[2J.*step 1000/2000 .*mfu 369\.0%")


def test_what_others_print_passes_above_the_bar(tmp_path, monkeypatch, terminal):
    pytest.importorskip("rich", reason="the bar needs rich")
    stream, shown = terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with make_writer(tmp_path, stream=None):
        shown("step 0/2000 .*the first step compiles")
        print("a warning", file=sys.stderr)
        shown("a warning.*step 0/2000 .*the first step compiles")
    assert sys.stderr is stream


def test_a_bar_elsewhere_leaves_standard_error_alone(tmp_path, capsys, terminal):
    stream, _ = terminal
    with make_writer(tmp_path, stream=stream):
        print("a warning", file=sys.stderr)
    assert capsys.readouterr().err == "a warning\n"


def test_without_rich_a_terminal_gets_plain_lines(tmp_path, monkeypatch, terminal):
    stream, shown = terminal
    monkeypatch.setitem(sys.modules, "rich", None)
    with make_writer(tmp_path, stream=stream) as writer:
        writer.write(100, TRAIN)
    assert shown("left").startswith("step 100/2000  loss 3.210")


def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch, terminal):
    stream, shown = terminal
    monkeypatch.setenv("TERM", "dumb")
    with make_writer(tmp_path, stream=stream) as writer:
        writer.write(100, TRAIN)
    assert shown("left").startswith("step 100/2000  loss 3.210")


def test_missing_packages_are_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for _ in range(2):
        with make_writer(tmp_path) as writer:
            writer.write(100, TRAIN)
        loss_curves.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png", {})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" is not installed")[0] for line in lines] == ["tensorboardX", "matplotlib"]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_smoothing_keeps_a_level_and_the_first_value():
    values = np.concatenate([[16.0], np.full(299, 2.0)])
    smooth = loss_curves._smooth(values)
    assert smooth[0] == 16.0
    np.testing.assert_allclose(smooth[1:], 2.0)  # A huge first loss does not raise the values after it.
    noise = np.random.default_rng(0).normal(size=3000)
    assert loss_curves._smooth(noise)[150:-150].std() < 0.15


def test_of_two_lines_for_a_step_the_later_counts():
    records = [{"step": 2, "a": 1.0}, {"step": 1, "a": "nan"}, {"step": 0, "b": 5.0}, {"step": 2, "a": 3.0}]
    steps, values = loss_curves._series(records, "a")
    assert (steps.tolist(), values.tolist()) == ([2.0], [3.0])


def pixels_of(path, color):
    """Rows and columns [n, 2] of the pixels close to a color, and the size of the picture."""
    from matplotlib import colors, image

    picture = image.imread(path)[..., :3]
    near = np.abs(picture - np.asarray(colors.to_rgb(color))).max(axis=-1) < 0.04
    return np.argwhere(near), picture.shape[:2]


def test_the_picture_shows_each_curve_where_it_belongs(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    lines = metric_writers.JsonLines(tmp_path / "metrics.jsonl", start_step=0)
    for step in range(10, 2010, 10):
        lines.write(step, {"train/bits_per_token": 3.0 + 3000 * math.exp(-step / 5)})
        if step % 500 == 0:
            error = {"valid/score_entropy_bits_stderr": 0.2}
            lines.write(step, {"valid/score_entropy_bits": 4.0, "valid/cross_entropy_bits": 3.5, **error})
    lines.close()
    loss_curves.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png", {"bigram entropy": 5.0})
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]
    heights, extents = [], []
    curve_colors = [loss_curves.REFERENCE_COLOR, *(color for _, color in loss_curves.BOUNDS.values())]
    for color in [*curve_colors, loss_curves.SMOOTH_COLOR]:
        found, (height, width) = pixels_of(tmp_path / "loss.png", color)
        assert (height, width) == (900, 1350)
        axes = found[(found[:, 0] < 0.79 * height) & (found[:, 1] > 0.3 * width)]
        assert len(axes) > 500
        heights.append(np.median(axes[:, 0]) / height)
        extents.append(np.ptp(axes[:, 0]))
    # From the top: the reference at 5, the bounds at 4 and 3.5, training at 3. The first loss, 409, is off the scale.
    assert heights == sorted(heights)
    assert heights[-1] - heights[0] > 0.4
    # Only the first bound has an error bar, of 0.2 bits on each side: it is taller than a dot of ten pixels.
    assert extents[1] > 60
    assert extents[2] < 20


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("", True),
        ('{"step": 10, "train/bits_per_token": "nan"}\n', True),
        ('{"step": 9, "train/bits_per_token": 9.5}\n', False),
    ],
)
def test_a_picture_of_no_point_or_one(tmp_path, text, note):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    (tmp_path / "metrics.jsonl").write_text(text)
    loss_curves.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png", {})
    written, (height, width) = pixels_of(tmp_path / "loss.png", loss_curves.REFERENCE_COLOR)
    middle = np.abs(written - np.asarray([height, width]) / 2).max(axis=-1) < 150
    assert bool(middle.any()) == note
    dot, _ = pixels_of(tmp_path / "loss.png", loss_curves.SMOOTH_COLOR)
    assert (np.count_nonzero(dot[:, 0] < 0.79 * height) > 50) == (not note)


def test_pictures_are_drawn_once_a_minute_and_at_the_end(tmp_path, monkeypatch):
    drawn, now = [], [100.0]
    monkeypatch.setattr(loss_curves, "plot_curves", lambda *paths: drawn.append(now[0]))
    monkeypatch.setattr(loss_curves.time, "monotonic", lambda: now[0])
    plot = loss_curves.occasional_plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png", {})
    for now[0] in (101.0, 159.0, 161.0, 170.0, 222.0):
        plot(False)
    now[0] = 223.0
    plot(True)
    assert drawn == [161.0, 222.0, 223.0]


@pytest.mark.slow
def test_tensorboard_files_do_not_load_pytorch(tmp_path):
    """Where PyTorch is installed, tensorboardX imports it, and training starts seconds later."""
    pytest.importorskip("torch", reason="what is not installed is never loaded")
    code = (
        "import sys; from sedd_jax.training import metric_writers as m; "
        f"m.TensorBoard({str(tmp_path)!r}, start_step=0).close(); print('torch' in sys.modules); import torch"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_reference_entropies_are_of_as_much_text_as_fits_in_memory(monkeypatch):
    monkeypatch.setattr(batches, "MEASURED_TOKENS", 100)
    tokens = np.random.default_rng(0).integers(4, size=1000).astype("<u2")
    packed = shards.Tokens(parts=[tokens], dtype="<u2", shard_tokens=1000, count=1000)
    split = batches.PackedSplit(tokens=packed, length=10, num_characters=1000, num_words=1, sha256="")
    monkeypatch.setattr(runs.Run, "split", lambda *_: split)
    run = runs.Run(workdir=pathlib.Path(), config=configs.Config(), tokenizer=alphabets.Characters(alphabet="abcd"))
    known = batches.entropies(tokens[:100], 5)
    assert train._reference_entropies(run) == {"unigram entropy": known.unigram, "bigram entropy": known.bigram}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_training_goes_on_where_nobody_reads_its_progress(tmp_path, is_terminal, clock):
    """As after `2>&1 | tee log`, when tee has ended, or at a terminal that is gone."""

    class Broken(io.StringIO):
        def isatty(self):
            return is_terminal

        def write(self, text):
            raise OSError(errno.EIO if is_terminal else errno.EPIPE, "gone")

    stream = io.StringIO()
    with make_writer(tmp_path, stream=stream) as writer:
        writer._progress = metric_writers.Progress(num_steps=2000, unit="character", start_step=0, stream=Broken())
        writer.say = writer._progress.say
        clock.now += 1
        writer.write(100, TRAIN)
        writer.write(100, {"valid/score_entropy_bits": 2.5})
        writer.say("a sample")
        writer._progress.close()
    assert [record["step"] for record in metric_lines.read(tmp_path / "metrics.jsonl")] == [100, 100]


def test_a_value_that_is_no_number_is_no_point_of_a_picture(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/bits_per_token": null}\n{"step": 2, "train/bits_per_token": 3.0}\n')
    loss_curves.plot_curves(path, tmp_path / "loss.png", {})
    steps, values = loss_curves._series(metric_lines.read(path), "train/bits_per_token")
    assert (steps.tolist(), values.tolist()) == ([2], [3.0])
