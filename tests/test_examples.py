"""The examples run as they stand, with fewer steps."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys

import pytest

import sedd_jax
from sedd_jax.conversion import convert
from tests.support import places

EXAMPLES = places.REPOSITORY / "examples"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, capsys):
    content = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    # Fewer steps, and a short text, which takes less time.
    text = tmp_path / "text.txt"
    text.write_text(("".join(map(chr, range(32, 127))) + "\nThe name of the file.\n") * 100)
    replacements = {
        "num_steps = 2000": "num_steps = 2",
        "sentencepiece:2048": "characters",
        "runs/notebook": f"{tmp_path}/run",
        "python:docs": f"text:{text}",
    }
    for old, new in replacements.items():
        assert old in cells[0]
        cells[0] = cells[0].replace(old, new)
    variables = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), variables)
    printed = capsys.readouterr().out
    assert f"<sedd_jax run {tmp_path / 'run'}, step 2, absorb, 997," in printed
    assert printed.count("bits per character") == 2
    assert "'The " in printed


@pytest.mark.slow
def test_the_script_trains_fills_gaps_and_bounds(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "train_and_infill.py"))["main"]
    main(str(tmp_path / "run"), num_steps=2)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 5
    assert all(line.startswith("The ") for line in printed[:1])
    assert "bits per character" in printed[-1]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_is_short_and_says_how_it_is_run(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert f"python examples/{path.name}" in text


@pytest.mark.slow
def test_fine_tuning_on_own_text_lowers_its_bound(code_run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("b = 1\na = 22\n" * 400)
    main = runpy.run_path(str(EXAMPLES / "finetune_own_text.py"))["main"]
    main(str(code_run), f"text:{tmp_path}/mine.txt", str(tmp_path / "new"), num_steps=200, batch_size=8)
    printed = capsys.readouterr().out
    before, after = (float(re.search(rf"{name} +at most ([\d.]+)", printed)[1]) for name in ("before", "after"))
    assert after < before
    assert json.loads((tmp_path / "new" / "config.json").read_text())["init_from"] == str(code_run)


@pytest.mark.slow
def test_known_words_are_counted(code_run, tmp_path, capsys):
    (tmp_path / "train.txt").write_text("alpha beta gamma of\n" * 200)
    (tmp_path / "valid.txt").write_text("alpha beta delta of\n" * 200)
    config = json.loads((code_run / "config.json").read_text())
    config["data"]["source"] = f"text:{tmp_path}/{{split}}.txt"
    (tmp_path / "test.txt").write_text("alpha\n" * 200)
    sedd_jax.train(config, tmp_path / "run")
    shares = runpy.run_path(str(EXAMPLES / "known_words.py"))["main"](str(tmp_path / "run"), num_samples=2, num_steps=2)
    assert shares["samples"] < 0.2
    assert shares["held-out text"] == pytest.approx(2 / 3, abs=0.05)
    assert re.search(
        r"^held-out text: 0\.[67]\d+ of \d+ words occur in the training text$", capsys.readouterr().out, re.M
    )


@pytest.mark.slow
def test_gaps_are_filled_with_what_their_patterns_allow(code_run, capsys):
    main = runpy.run_path(str(EXAMPLES / "infill_patterns.py"))["main"]
    main(str(code_run), "a = {3:[12]{2}\n}{4}b", num_samples=4)
    printed = capsys.readouterr().out
    assert len(re.findall(r"^a = ([12]{2})\n.{4}b  \|  \1\n  .{4}\n", printed, re.MULTILINE | re.DOTALL)) == 4


@pytest.mark.slow
def test_a_converted_checkpoint_is_measured_and_kept(code_run, tmp_path, capsys):
    published, run = tmp_path / "published", tmp_path / "run"
    convert.convert(code_run, convert.Target(directory=published), verify=False)
    (tmp_path / "mine.txt").write_text("b = 1\na = 22\n" * 400)
    main = runpy.run_path(str(EXAMPLES / "evaluate_converted.py"))["main"]
    for again in (False, True):
        main(str(published), str(run), f"text:{tmp_path}/mine.txt", num_times=1)
        printed = capsys.readouterr().out
        assert ("parameters in float32" in printed) != again
        assert "<sedd_jax run " in printed
        assert len(re.findall(r"^--- \d+ network evaluations\n(?!---).{10}", printed, re.MULTILINE | re.DOTALL)) == 2
    bound = sedd_jax.open(run).bound(data=f"text:{tmp_path}/mine.txt", split="test", num_times=1)
    assert f"cross_entropy: at most {bound.nats_per_token:.3f} ± {bound.nats_per_token_stderr:.3f} nats" in printed


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: '.[tpu-plan]'")
def test_a_pod_is_planned_without_having_it():
    """In a process of its own, since JAX has other devices here."""
    small = {"network": {"hidden_size": 128, "num_layers": 1, "num_heads": 2, "scale_by_sigma": True}}
    small |= {"data": {"tokenizer": "bytes", "length": 128}, "training": {"batch_size": 64}}
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['main']('owt_small', 'v5e:2x2', **eval(sys.argv[2]))"
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-c", code, str(EXAMPLES / "plan_pod.py"), repr(small)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "training step of 128 x 1, 64 sequences of 128" in done.stdout
    assert "v5e:2x2: 4 devices" in done.stdout
