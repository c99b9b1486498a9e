"""What a model card says of a run: figures that were kept, samples with their seed, pictures, and no directory."""

import dataclasses
import json
import re
import shutil

import pytest
import yaml

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.conversion import convert, measured
from sedd_jax.evaluation import generation_quality, perplexity
from sedd_jax.runtime import errors

BOUND = {
    "nats_per_token": 1.25,
    "nats_per_token_stderr": 0.01,
    "bits_per_character": 1.8034,
    "bits_per_character_stderr": 0.0144,
    "ppl_bound": 3.4903,
    "ppl_bound_stderr": 0.0349,
    "ppl_bound_per_word": None,
    "ppl_bound_per_word_stderr": None,
}


def keep(run, name, step, **changed):
    result = {
        "measured": "2026-11-28T09:00:00",
        "workdir": str(run.workdir),
        "step": step,
        "dtype": "bfloat16",
        "protocol": "published",
        "source": f"text:{run.workdir}/{{split}}.txt",
        "split": "valid",
        "num_sequences": 48,
        "length": 32,
        "num_times": 2,
        "stderr_freedom": 6,
        "score_entropy": BOUND,
        "cross_entropy": BOUND,
    }
    (run.local / "evaluations").mkdir(exist_ok=True)
    (run.local / "evaluations" / f"{name}.json").write_text(json.dumps(result | changed))


@pytest.fixture
def run(code_run, tmp_path):
    """A copy of the run without evaluations."""
    shutil.copytree(code_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations", "samples"))
    return runs.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text:/home/me/books/{split}.txt", "text:{split}.txt"),
        ("wikitext2:text:/home/me/My Books/{split}.txt", "wikitext2:text:{split}.txt"),
        ("/home/me/runs/a", "a"),
        ("/models/gpt2  gpt2, 124 parameters", "gpt2  gpt2, 124 parameters"),
        (
            "books: text:/home/me/a.txt is missing, and (/home/me/b.txt) too",
            "books: text:a.txt is missing, and (b.txt) too",
        ),
        ("hf:owner/name/config#text", "hf:owner/name/config#text"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("see https://example.org/a/b or 3 / 4", "see https://example.org/a/b or 3 / 4"),
        ({"a": ["/x/y", 3, None]}, {"a": ["y", 3, None]}),
    ],
)
def test_directories_of_this_machine_are_left_out(value, expected):
    assert measured.without_directories(value) == expected


def test_a_checkpoint_that_nobody_measured_says_so(run):
    keep(run, "likelihood-1", step=1)
    found = measured.find(run, 2, "ema", "float32")
    assert "Nothing was measured of this checkpoint." in found.text
    assert "None were kept of this checkpoint." in found.text
    assert "1.2500" not in found.text


def test_figures_come_with_protocol_precision_and_error(run):
    keep(run, "likelihood-1", step=2)
    keep(run, "likelihood-2", step=1, num_sequences=777)
    text = measured.find(run, 2, "ema", "float32").text
    assert "| cross-entropy | 1.2500 ± 0.0100 | 1.8034 ± 0.0144 | 3.490 ± 0.035 | no figure |" in text
    assert r"48 sequences of 32 tokens, 2 times each, t in \[1e-3, 1\], published protocol, bfloat16" in text
    assert "± is the standard error over times and noise (6 degrees of freedom)" in text
    assert "run step 2 text:{split}.txt valid" in text
    assert "777" not in text
    assert "rounded" not in text
    assert "before these were rounded to bfloat16" in measured.find(run, 2, "ema", "bfloat16").text


def test_raw_weights_do_not_get_the_figures_of_the_average(run):
    keep(run, "likelihood-1", step=2)
    (run.local / "samples").mkdir()
    (run.local / "samples" / "00000002.txt").write_text("--- sample 1 at step 2\na = 1\n")
    text = measured.find(run, 2, "raw", "float32").text
    assert "Nothing was measured of these raw weights: evaluations are of the moving average." in text
    assert "None were kept of this checkpoint." in text
    assert "1.2500" not in text


def test_a_damaged_result_is_named(run):
    keep(run, "likelihood-1", step=2, score_entropy={})
    with pytest.raises(errors.UserError, match=r"evaluations/likelihood-1\.json has no 'nats_per_token', so another"):
        measured.find(run, 2, "ema", "float32")


def test_samples_of_training_come_with_seed_and_settings(run):
    (run.local / "samples").mkdir()
    texts = "--- sample 1 at step 2\na = ```` \x1b[0m\n\n--- sample 2 at step 2\n  b\n--- sample 3 at step 2\nc\n"
    (run.local / "samples" / "00000002.txt").write_text(texts)
    text = measured.find(run, 2, "ema", "float32").text
    assert "not selected: drawn in training, tweedie, nfe 5, precise draws, 32 tokens, seed 2." in text
    assert "\n`````text\na = ```` \\x1b[0m\n\n`````\n" in text
    assert "\n```text\n  b\n```\n" in text
    assert "\nc\n" not in text


def test_the_pictures_of_the_curves_are_shown_and_copied(run, tmp_path):
    (run.local / "loss.png").write_bytes(b"picture")
    keep(run, "likelihood-1", step=2, picture="../../elsewhere.png")  # A run of somebody else may name any file.
    found = measured.find(run, 2, "ema", "float32")
    assert found.pictures == {"loss.png": run.local / "loss.png"}
    assert "![Bits over training, lower is better](loss.png)" in found.text
    convert.convert(run.workdir, convert.Target(directory=tmp_path / "out"), verify=False)
    assert (tmp_path / "out" / "loss.png").read_bytes() == b"picture"


def test_the_header_of_a_card_is_what_the_hub_reads(run, tmp_path):
    convert.convert(run.workdir, convert.Target(directory=tmp_path / "out"), verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)[1])
    assert header["library_name"] == "transformers"
    assert {"sedd", "sedd_jax"} <= set(header["tags"])
    hub = pytest.importorskip("huggingface_hub")
    assert hub.ModelCard(card).data.to_dict() == header


@pytest.mark.slow
def test_what_the_program_measures_is_on_the_card(run, judge_run, tmp_path):
    settings = dataclasses.replace(perplexity.Settings(), num_times=2)
    bound = perplexity.evaluate(run.workdir, settings=settings)
    samples = generation_quality.Samples(num_samples=4, batch_size=4, seed=3)
    generated = generation_quality.measure(run.workdir, str(judge_run), samples=samples)
    arguments = ["--curve=steps:2,4", "--samplers=tweedie", f"--judge={judge_run}", "--num_samples=4"]
    assert cli.main(["eval", f"--workdir={run.workdir}", "--num_processes=1", *arguments]) == 0
    assert cli.main(["convert", f"--from={run.workdir}", f"--to={tmp_path / 'out'}", "--noverify"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    figures = bound["cross_entropy"]
    assert f"{figures['nats_per_token']:.4f} ± {figures['nats_per_token_stderr']:.4f}" in card
    assert f"{generated['samples']['gen_ppl_pooled']:.3f}" in card
    assert "32 tokens, seed 3." in card
    assert f"\n{generated['texts'][0]}\n" in card
    pictures = re.findall(r"\]\((.*?\.png)\)", card)
    assert pictures
    assert all((tmp_path / "out" / name).stat().st_size for name in pictures)
    assert str(tmp_path) not in card
