"""Templates: what is known of a text before it is drawn, as text with gaps, or as a prefix and a suffix."""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from sedd_jax import runs
from sedd_jax.runtime import errors
from sedd_jax.sampling import constraints, patterns

# A pattern may itself hold braces: escaped, or in pairs as in [0-9]{2}.
_GAP = re.compile(r"\{\{|\}\}|\{(\d+)(?::((?:[^{}\\]|\\.|\{[^{}]*\})*))?\}|\{[^{}]*\}?|\}", re.DOTALL)
# Known tokens; or a gap: its number of tokens, and the pattern that its text must match (None for any text).
Part = Int[np.ndarray, "..."] | tuple[int, str | None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """Known tokens and gaps, padded with one last gap to the length L that the model was trained on.

    Attributes:
        tokens: known tokens; 0 in gaps.
        is_given: where tokens are known.
        length: number of tokens that are shown. The rest is drawn too, since the model knows only its full length, and
            then cut.
        gaps: the gaps whose text must match a pattern.
    """

    tokens: Int[np.ndarray, "L"]
    is_given: Bool[np.ndarray, "L"]
    length: int
    gaps: tuple[patterns.Gap, ...] = ()


class Written(NamedTuple):
    """What a user writes of a text: a template, or a prefix and a suffix, or nothing."""

    template: str = ""
    prefix: str = ""
    suffix: str = ""


def read(run: runs.Run, written: Written) -> Template:
    """The template that a user has written: by `around` if there is a prefix or a suffix, else by `parse`.

    Raises:
        errors.UserError: as these do; and where a template is combined with a prefix or a suffix.
    """
    template, prefix, suffix = written
    if template and (prefix or suffix):
        raise errors.UserError(
            f"cannot be combined with {errors.name('prefix')} or {errors.name('suffix')}",
            field="template",
            remedy="write them into the template",
        )
    return around(run, prefix, suffix) if prefix or suffix else parse(run, template)


def parse(run: runs.Run, template: str) -> Template:
    """Reads a template such as "Hi, my name is {32} and".

    {n} is a gap of n tokens, and {n:REGEX} one whose text must match a regular expression (see `patterns`). {{ and }}
    are braces. "" is one gap of the model's length.

    Raises:
        errors.UserError: where a brace has another form, the template is longer than the model, or the vocabulary lacks
            a part of the text.
    """
    parts: list[Part] = []
    text, position = "", 0
    for match in _GAP.finditer(template):
        text += template[position : match.start()]
        position = match.end()
        if match.group() in ("{{", "}}"):
            text += match.group()[0]
        elif match.group(1) is None:
            raise errors.UserError(
                f"has {match.group()!r} at position {match.start()}",
                field="template",
                remedy="a gap is {n} with n tokens to fill, or {n:REGEX}, a brace itself is {{ or }}",
            )
        elif len(match.group(1)) > 9:
            raise errors.UserError(
                f"has a gap whose length has {len(match.group(1))} digits, at position {match.start()}",
                field="template",
                remedy=f"the model's length is {run.config.data.length}",
            )
        else:
            parts += [_encode(run, text), (int(match.group(1)), match.group(2))]
            text = ""
    parts.append(_encode(run, text + template[position:]))
    return assemble(run, parts, None if template else run.config.data.length)


def _encode(run: runs.Run, text: str) -> Int[np.ndarray, "n"]:
    try:
        return run.tokenizer.encode(text)
    except errors.UserError as error:
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise errors.UserError(f"in the text {shown!r}, {error.worded(errors.name)}") from error


def around(run: runs.Run, prefix: str, suffix: str) -> Template:
    """A template of the model's length: text at its start and its end, and one gap between them.

    Raises:
        errors.UserError: where prefix and suffix leave no gap, or the vocabulary lacks a part of them.
    """
    start, end = _encode(run, prefix), _encode(run, suffix)
    gap = run.config.data.length - len(start) - len(end)
    if gap <= 0:
        raise errors.UserError(
            f"{errors.name('prefix')} and {errors.name('suffix')} take {len(start)} + {len(end)} tokens of the model's "
            f"{run.config.data.length} and leave no gap",
            remedy="shorten them",
        )
    return assemble(run, [start, (gap, None), end])


def assemble(run: runs.Run, parts: list[Part], shown: int | None = None) -> Template:
    """The template of known tokens and gaps, one after the other; its `length` is `shown`, or that of all parts.

    Raises:
        errors.UserError: where the parts are longer than the model.
    """
    length = run.config.data.length
    sizes = [part[0] if isinstance(part, tuple) else len(part) for part in parts]
    total = sum(sizes)
    if total > length:
        raise errors.UserError(
            f"the template is {total} tokens long, the model's length is {length}", remedy="shorten it or its gaps"
        )
    tokens, is_given, gaps = np.zeros(length, np.int32), np.zeros(length, bool), []
    position = 0
    for part, size in zip(parts, sizes, strict=True):
        if not isinstance(part, tuple):
            tokens[position : position + size] = part
            is_given[position : position + size] = True
        elif part[1] is not None:
            gaps.append(patterns.Gap(position, size, part[1]))
        position += size
    return Template(tokens=tokens, is_given=is_given, length=total if shown is None else shown, gaps=tuple(gaps))


def compile_patterns(run: runs.Run, templates: Sequence[Template]) -> constraints.Patterns | None:
    """Compiles the patterns of a batch of templates; None if there are none.

    Raises:
        errors.UserError: where a pattern is not a regular expression or cannot be matched, or the run is an
            autoregressive baseline.
    """
    gaps = [gap for template in templates for gap in template.gaps]
    if not gaps:
        return None
    if run.is_autoregressive:
        raise errors.UserError(
            f"the gap {{{gaps[0].length}:{gaps[0].pattern}}} has a pattern, which takes a diffusion run, "
            f"not {errors.name('config.graph.name')}={run.config.graph.name}",
            remedy="leave the pattern out",
        )
    automaton, initial = patterns.compile([gap.pattern for gap in gaps], run.tokenizer, run.graph)
    for gap in patterns.kinds(gaps).values():
        patterns.check(gap, automaton, initial)
    places = [patterns.place(one.gaps, len(one.tokens), automaton, initial) for one in templates]
    return constraints.Patterns(constraints.pad(automaton), jax.tree.map(lambda *rows: np.stack(rows), *places))
