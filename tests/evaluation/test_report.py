"""The report holds every result of a run, needs no other file, and runs nothing that a sample says."""

import contextlib
import html.parser
import json
import shutil

import pytest

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.evaluation import generation_quality, perplexity, quality_curves, report, results
from sedd_jax.runtime import errors
from tests.support import wrong_values


@pytest.fixture
def run(code_run, tmp_path):
    """A copy of the run without evaluations."""
    shutil.copytree(code_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    return tmp_path / "run"


class Page(html.parser.HTMLParser):
    """Elements, what they refer to, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.slow
def test_the_page_holds_every_result(run, judge_run, capsys):
    samples = generation_quality.Samples(num_samples=4, batch_size=4)
    bounds = [perplexity.evaluate(run, settings=perplexity.Settings(num_times=1, seed=seed)) for seed in (0, 1)]
    generated = generation_quality.measure(run, str(judge_run), samples=samples)
    curve = quality_curves.Curve(samplers=["tweedie"], num_steps=[4])
    quality_curves.measure(run, str(judge_run), curve, samples=samples)
    assert cli.main(["eval", f"--workdir={run}", "--report", "--num_processes=1"]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    page = Page((run / "report.html").read_text())
    assert not page.open
    text = "\n".join(page.text)
    for result in bounds:
        assert f"{result['cross_entropy']['ppl_bound']:.3f}" in text
    assert f"{generated['samples']['gen_ppl_pooled']:.3f}" in text
    assert generated["texts"][0] in page.text
    assert page.tags.count("img") == 1 + (run / "loss.png").exists()
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in page.sources)
    assert json.loads(page.text[page.text.index("Config") + 1])["data"]["length"] == 32
    assert generated["data_sha256"] in text


def generated(opened):
    figures = {"gen_ppl_per_sequence": 1.0, "gen_ppl_pooled": 1.0, "unigram_entropy": 1.0}
    figures |= {f"distinct_{n}": 1.0 for n in (1, 2, 3)}
    result = {
        **results.circumstances(opened.restore()),
        "judge": "<b>judge</b>",
        "judge_first": 0,
        "length": 32,
        "num_samples": 1,
    }
    result |= {"sampler": "tweedie", "nfe": 5, "draw": "precise", "samples": figures, "held_out": figures}
    return {**result, "texts": ["<script>alert(1)</script></pre>"]}


def test_samples_are_no_markup(run):
    opened = runs.load(run)
    results.keep(opened, results.name("generation", {}), generated(opened))
    page = Page(report.write(run).read_text())
    assert "<script>alert(1)</script></pre>" in page.text
    assert not {"script", "b"} & set(page.tags)


def test_a_result_of_another_version_is_named(run):
    opened = runs.load(run)
    results.keep(opened, results.name("generation", {}), {"judge": "one"})
    message = r"generation-\w+.json has no '\w+', so another version wrote it: remove it and measure again"
    with pytest.raises(errors.UserError, match=message):
        report.write(run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is damaged"),
        ("null", "is damaged"),
        ("{", "is damaged"),
        ('{"measured": 5, "bound": 5, "texts": 5}', "so another version wrote it"),
    ],
)
def test_a_result_that_holds_something_else_is_named(run, capsys, content, message):
    (run / "evaluations").mkdir()
    (run / "evaluations" / "likelihood-1.json").write_text(content)
    assert cli.main(["eval", f"--workdir={run}", "--report", "--num_processes=1"]) == 1
    error = capsys.readouterr().err
    assert f"{run}/evaluations/likelihood-1.json " in error
    assert message in error
    assert error.count("\n") == 1


def test_values_of_other_types_in_a_result_are_no_traceback(run):
    opened = runs.load(run)
    result = generated(opened)
    for changed in wrong_values.changed(result, [None, 5, "text", [], {}, [5]]):
        results.keep(opened, "generation-1", changed)
        with contextlib.suppress(errors.UserError):
            report.write(run)


def test_nothing_measured_is_no_report(run, capsys):
    assert cli.main(["eval", f"--workdir={run}", "--report", "--num_processes=1"]) == 1
    assert "has no results yet: measure it with sedd eval first" in capsys.readouterr().err


def test_several_runs_stand_side_by_side(run, judge_run, capsys):
    opened = runs.load(run)
    figures = {"gen_ppl_per_sequence": 1.0, "gen_ppl_pooled": 1.0, "unigram_entropy": 1.0}
    figures |= {f"distinct_{n}": 1.0 for n in (1, 2, 3)}
    result = {
        **results.circumstances(opened.restore()),
        "judge": "one",
        "judge_first": 0,
        "length": 32,
        "num_samples": 1,
    }
    result |= {"sampler": "tweedie", "nfe": 5, "draw": "precise", "samples": figures, "held_out": figures}
    results.keep(opened, results.name("generation", {}), {**result, "texts": ["a text"]})
    flags = ["--report", f"--beside={judge_run}", "--num_processes=1"]
    assert cli.main(["eval", f"--workdir={run}", *flags]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    page = Page((run / "report.html").read_text())
    assert not page.open
    text = page.text
    first, second = (text.index(f"{number}\u2002{each}") for number, each in enumerate((run, judge_run), start=1))
    assert first < text.index("a text") < second < text.index("not measured")
    assert text.index("graph.name") < first
    assert text[text.index("graph.name") + 1 :][:2] == ["absorb", "autoregressive"]
    assert "network.num_layers" not in text  # The same in both.


def test_a_run_beside_that_is_none_is_named(run, capsys):
    assert cli.main(["eval", f"--workdir={run}", "--report", "--beside=nowhere", "--num_processes=1"]) == 1
    assert "nowhere holds no run: give run directories" in capsys.readouterr().err
