"""Draws docs/figures/denoising.svg: a template whose gaps are filled step by step, as a trained run fills them.

sedd train --config=configs/quickstart_ar.py --workdir=runs/characters --config.graph.name=absorb \\
    --config.network.scale_by_sigma=True
python docs/figures/denoising.py runs/characters

The picture moves by CSS animations, without any script. Where animations are off, it shows the last state. The default
seed was chosen among 500, for words that nearly exist.
"""

import argparse
import dataclasses
import pathlib
import re
from xml.sax import saxutils

from sedd_jax.sampling import generate, templates

TEMPLATE = (
    "Return the {6} of the {5} if it is {5}, else {4}. The {5} must be a {6} of {7}."  # 96 characters, as the model
)
MASK = "░"  # how `generate` shows a masked character
COLUMNS, ADVANCE, LINE, FONT = 34, 15.6, 44, 26  # characters a line; pixels of a character, of a line, of the font
LEFT, TOP, WIDTH = 36, 66, 602
SECONDS_PER_STEP, SECONDS_AT_START, SECONDS_AT_END = 0.22, 1.0, 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A text on its way from masks to the last token.

    Attributes:
        text: its last state.
        is_gap: which characters were to be filled.
        shown_at: the network evaluation after which each character is known; 0 where it was given.
        nfe: network evaluations.
        label: how it was drawn.
    """

    text: str
    is_gap: list[bool]
    shown_at: list[int]
    nfe: int
    label: str


def denoise(workdir: pathlib.Path, template: str, *, sampler: str, num_steps: int, seed: int) -> Trajectory:
    """Fill a template with gaps {n} once, and note when each character appears."""
    states = []
    (sample,) = generate.generate(
        workdir,
        templates.Written(template=template),
        sampler=sampler,
        num_steps=num_steps,
        num_samples=1,
        seed=seed,
        watch=lambda taken, total, texts: states.append(texts()[0]),
    )
    text = states[-1]
    if {len(state) for state in states} != {len(sample.tokens)} or len(states) != sample.nfe:
        raise SystemExit(f"{workdir}: give a run of characters, and at most 128 steps")
    parts = re.split(r"\{(\d+)\}", template)
    is_gap = [known for i, part in enumerate(parts) for known in [i % 2 == 1] * (int(part) if i % 2 else len(part))]
    shown_at = [
        1 + next(n for n, state in enumerate(states) if state[i] != MASK) if gap else 0 for i, gap in enumerate(is_gap)
    ]
    label = f"step {sample.step}, {sampler}, seed {seed}"
    return Trajectory(text=text, is_gap=is_gap, shown_at=shown_at, nfe=sample.nfe, label=label)


def lines_of(text: str) -> list[range]:
    """Positions of each line, broken at spaces where there is one."""
    lines, start = [], 0
    while start < len(text):
        stop = min(start + COLUMNS, len(text))
        if stop < len(text) and " " in text[start:stop]:
            stop = start + text[start:stop].rindex(" ") + 1
        lines.append(range(start, stop))
        start = stop
    return lines


def svg(drawn: Trajectory) -> str:
    """The picture."""
    seconds = SECONDS_AT_START + drawn.nfe * SECONDS_PER_STEP + SECONDS_AT_END
    share = lambda step: 100 * (SECONDS_AT_START + step * SECONDS_PER_STEP) / seconds
    lines = lines_of(drawn.text)
    bar_y = TOP + len(lines) * LINE + 4
    height = bar_y + 46
    rules = [
        ".card{fill:#ffffff;stroke:#d0d7de}.given{fill:#1f2328}.new{fill:#0550ae}.mask{fill:#c4ccd5}",
        "text.note{fill:#59636e;font-size:15px}.track{fill:#e4e8ec}.bar{fill:#0969da}",
        "@media (prefers-color-scheme:dark){.card{fill:#0d1117;stroke:#30363d}.given{fill:#f0f6fc}.new{fill:#79c0ff}"
        ".mask{fill:#3d444d}text.note{fill:#9198a1}.track{fill:#2a313c}.bar{fill:#4493f8}}",
        f"text{{font:{FONT}px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}}",
        # The state without animation is the last one: characters shown, masks and earlier counts hidden.
        ".mask,.count{opacity:0}.last{opacity:1}",
    ]
    moving = [
        f".a{{animation-duration:{seconds:.2f}s;animation-iteration-count:infinite;animation-timing-function:linear}}"
    ]
    for step in sorted({*drawn.shown_at, *range(drawn.nfe + 1)} - {0}):
        at = share(step)
        moving.append(f"@keyframes c{step}{{0%,{at - 0.01:.2f}%{{opacity:0}}{at:.2f}%,100%{{opacity:1}}}}")
        moving.append(f"@keyframes m{step}{{0%,{at - 0.01:.2f}%{{opacity:1}}{at:.2f}%,100%{{opacity:0}}}}")
        moving.append(f".c{step}{{animation-name:c{step}}}.m{step}{{animation-name:m{step}}}")
    for step in range(drawn.nfe + 1):
        start = 0 if step == 0 else share(step)
        stop = 100 if step == drawn.nfe else share(step + 1) - 0.01
        before = f"0%,{start - 0.01:.2f}%{{opacity:0}}" if step else ""
        after = f"{stop + 0.01:.2f}%,100%{{opacity:0}}" if step < drawn.nfe else ""
        moving.append(f"@keyframes n{step}{{{before}{start:.2f}%,{stop:.2f}%{{opacity:1}}{after}}}")
        moving.append(f".n{step}{{animation-name:n{step}}}")
    moving.append(
        f"@keyframes grow{{0%,{share(0):.2f}%{{transform:scaleX(0)}}{share(drawn.nfe):.2f}%,100%{{transform:none}}}}"
        f".bar{{transform-origin:{LEFT}px 0;animation-name:grow}}"
    )
    rules.append(f"@media (prefers-reduced-motion:no-preference){{{''.join(moving)}}}")
    body = []
    for row, line in enumerate(lines):
        y = TOP + row * LINE
        for column, i in enumerate(line):
            x = LEFT + column * ADVANCE
            kind = f"new a c{drawn.shown_at[i]}" if drawn.is_gap[i] else "given"
            if drawn.is_gap[i]:
                box = f'x="{x + 1.3:.1f}" y="{y - 22}" width="{ADVANCE - 2.6:.1f}" height="29" rx="3"'
                body.append(f'<rect class="mask a m{drawn.shown_at[i]}" {box}/>')
            if drawn.text[i] != " ":
                character = saxutils.escape(drawn.text[i].replace("\n", "↵"))
                body.append(f'<text class="{kind}" x="{x:.1f}" y="{y}">{character}</text>')
    counts = "".join(
        f'<text class="note count{" last" if step == drawn.nfe else ""} a n{step}" x="{WIDTH - LEFT}" y="{bar_y + 26}" '
        f'text-anchor="end">{step} of {drawn.nfe} network evaluations</text>'
        for step in range(drawn.nfe + 1)
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            'role="img">',
            f"<title>Text with gaps, denoised: {saxutils.escape(' '.join(drawn.text.split()))}</title>",
            f"<desc>{saxutils.escape(drawn.label)}; docs/figures/denoising.py</desc>",
            f"<style>{''.join(rules)}</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
            *body,
            f'<rect class="track" x="{LEFT}" y="{bar_y}" width="{WIDTH - 2 * LEFT}" height="5" rx="2.5"/>',
            f'<rect class="bar a" x="{LEFT}" y="{bar_y}" width="{WIDTH - 2 * LEFT}" height="5" rx="2.5"/>',
            f'<text class="note" x="{LEFT}" y="{bar_y + 26}">masks to text</text>',
            counts,
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--template", default=TEMPLATE)
    parser.add_argument("--sampler", default="first_hitting")
    parser.add_argument("--num_steps", type=int, default=64)
    parser.add_argument("--seed", type=int, default=316)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".svg"))
    given = parser.parse_args()
    drawn = denoise(given.workdir, given.template, sampler=given.sampler, num_steps=given.num_steps, seed=given.seed)
    given.out.write_text(svg(drawn), encoding="utf-8")
    print(drawn.text)


if __name__ == "__main__":
    main()
