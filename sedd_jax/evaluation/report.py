"""Writes RUN/report.html: one page with every result of a run, which needs no other file."""

import base64
import contextlib
import html
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sedd_jax import comparison, runs
from sedd_jax import config as configs
from sedd_jax.evaluation import (
    code_problems,
    code_quality,
    comparisons,
    conditionals,
    frontiers,
    generation_quality,
    perplexity,
    quality_curves,
    refilling,
    results,
    tables,
    zero_shot,
)
from sedd_jax.runtime import errors, storage

NAME = "report.html"
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], tables.Table]]] = {
    "likelihood": ("Likelihood", perplexity.table),
    "comparison": ("Likelihood against another run", comparisons.table),
    "zero_shot": ("Zero-shot suite", zero_shot.table),
    "conditional": ("Likelihood of continuations", conditionals.table),
    "generation": ("Generated text", generation_quality.table),
    "curve": ("Quality against compute", quality_curves.table),
    "frontier": ("Quality against entropy", frontiers.table),
    "infilling": ("Infilling", refilling.table),
    "code": ("Generated code that parses", code_quality.table),
    "problems": ("Code that passes tests", code_problems.table),
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f27; --faint: #5b6472; --line: #dfe3ea; --back: #ffffff; --soft: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --faint: #9aa4b2; --line: #333a46; --back: #14171c; --soft: #1c2027; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
  padding: 2rem 1rem; max-width: 62rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
nav a { margin-right: 1rem; } a { color: inherit; }
p { margin: .2rem 0; } p.head, p.note { color: var(--faint); font-size: .9rem; overflow-wrap: anywhere; }
article { margin: 1rem 0 2rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
pre { background: var(--soft); padding: .7rem; border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.45 ui-monospace, monospace; }
summary { cursor: pointer; color: var(--faint); font-size: .9rem; }
body.several { max-width: 110rem; } h3 { font-size: 1rem; margin: .8rem 0 0; overflow-wrap: anywhere; }
.beside { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); }
.beside > * { min-width: 0; }
"""


def write(workdir: storage.Directory, others: Sequence[storage.Directory] = ()) -> pathlib.Path:
    """Writes the page from the results in RUN/evaluations, the newest first, and returns its path.

    Args:
        workdir: the run, which gets the page.
        others: runs that stand beside it on the page.

    Raises:
        errors.UserError: where there are no results yet, or another version wrote them.
    """
    run, *rest = every = [runs.load(workdir), *comparison.find(others)]
    found = [results.load(each) for each in every]
    kinds = [kind for kind in SECTIONS if any(kind in each for each in found)]
    if not kinds:
        raise errors.UserError(
            "has no results yet", field="workdir", value=workdir, remedy="measure it with sedd eval first"
        )
    sections = [_compared(every)] if rest else []
    for kind in kinds:
        title, table = SECTIONS[kind]
        columns = [
            "".join(_article(each, result, table) for result in reversed(of_run.get(kind, [])))
            for each, of_run in zip(every, found, strict=True)
        ]
        sections.append(f'<h2 id="{kind}">{html.escape(title)}</h2>{_beside(every, columns, "not measured")}')
    pictures = [_curves(each) for each in every]
    if any(pictures):
        sections.append(f'<h2 id="training">Training</h2>{_beside(every, pictures, "no picture")}')
    linked = {"runs": "Runs"} if rest else {}
    linked |= {kind: SECTIONS[kind][0] for kind in kinds}
    links = "".join(f'<a href="#{kind}">{html.escape(name)}</a>' for kind, name in linked.items())
    config = configs.to_dict(run.config)
    names = ", ".join(pathlib.PurePath(str(each.workdir)).name for each in every)
    title = html.escape(names if rest else f"{names}: {config['graph']['name']}")
    network, data = config["network"], config["data"]
    about = (
        f"{data['source']}, {data['tokenizer']}, length {data['length']}; {network['num_layers']} layers of "
        f"{network['hidden_size']}, {network['num_heads']} heads; batch {config['training']['batch_size']}"
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f'<body class="{"several" if rest else "one"}">'
        f'<h1>{title}</h1><p class="head">{"" if rest else html.escape(about)}</p><nav>{links}</nav>{"".join(sections)}'
        f"<h2>Config{' of 1' if rest else ''}</h2><pre>{html.escape(json.dumps(config, indent=1))}</pre>"
        "</body></html>\n"
    )
    path = run.local / NAME
    storage.replace_text(path, page)
    storage.upload(run.workdir, NAME)
    return path


def _compared(every: Sequence[runs.Run]) -> str:
    """Steps, bounds and speeds of the runs, and where their configs differ."""
    result = comparison.compare(every)
    shown = [comparison.overview(result), comparison.differences(result)]
    found = (tables.Table(head=[], columns=columns, rows=rows).as_html() for columns, rows in shown if rows)
    return f'<h2 id="runs">Runs</h2>{"".join(found)}'


def _beside(every: Sequence[runs.Run], columns: Sequence[str], missing: str) -> str:
    """A column for each run with its name, or the only column as it is."""
    if len(every) == 1:
        return columns[0]
    nothing = f'<p class="note">{missing}</p>'
    named = (
        f"<section><h3>{number}&ensp;{html.escape(str(run.workdir))}</h3>{column or nothing}</section>"
        for number, (run, column) in enumerate(zip(every, columns, strict=True), start=1)
    )
    return f'<div class="beside">{"".join(named)}</div>'


def _curves(run: runs.Run) -> str:
    storage.download(run.workdir, "loss.png")
    path = run.local / "loss.png"
    return _image(path, "Bits over training") if path.exists() else ""


@contextlib.contextmanager
def reading(run: runs.Run, result: dict[str, Any]) -> Iterator[None]:
    """Around what shows a result. Whatever JSON holds may stand there: what is no result is a `UserError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        lacks = f"has no {error}" if isinstance(error, KeyError) else f"holds other than a result does ({error})"
        file = run.local / results.DIRECTORY / f"{result['name']}.json"
        raise errors.UserError(
            f"{file} {lacks}, so another version wrote it", remedy="remove it and measure again"
        ) from error


def _article(run: runs.Run, result: dict[str, Any], table: Callable[[dict[str, Any]], tables.Table]) -> str:
    with reading(run, result):
        parts = [table(result).as_html()]
        if "picture" in result:
            picture = run.local / results.DIRECTORY / pathlib.Path(result["picture"]).name
            parts.append(_image(picture, "Perplexity and entropy against nfe"))
        if result.get("texts"):
            first, *others = (f"<pre>{html.escape(text)}</pre>" for text in result["texts"])
            parts.append(f"{first}<details><summary>{len(others)} more samples</summary>{''.join(others)}</details>")
    hidden = ("texts", "config", "points", "sets", "samples", "held_out", "refilled", "items")
    facts = {name: value for name, value in result.items() if name not in hidden}
    parts.append(
        f"<details><summary>what this was measured with</summary><pre>{html.escape(json.dumps(facts, indent=1))}</pre>"
        "</details>"
    )
    return f"<article>{''.join(parts)}</article>"


def _image(path: pathlib.Path, description: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{content}"></p>'
