"""What is known of a text beforehand: a template with gaps, a prefix, a suffix."""

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

# A pattern may hold braces of its own, escaped or as in [0-9]{2}.
_GAP = re.compile(r"\{\{|\}\}|\{(\d+)(?::((?:[^{}\\]|\\.|\{[^{}]*\})*))?\}|\{[^{}]*\}?|\}", re.DOTALL)
# Known tokens, or how many are to be filled, with what their text is to match.
Part = Int[np.ndarray, "..."] | tuple[int, str | None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """Known tokens and gaps, padded with one last gap to the length the model was trained on.

    Attributes:
        tokens: known tokens, 0 in gaps.
        is_given: where they are known.
        length: tokens that are shown; what follows is generated too, since the model knows only its full length, and
            cut.
        gaps: those whose text is to match a pattern.
    """

    tokens: Int[np.ndarray, "L"]
    is_given: Bool[np.ndarray, "L"]
    length: int
    gaps: tuple[patterns.Gap, ...] = ()


class Written(NamedTuple):
    """What is known of a text as a user writes it: a template, or a prefix and a suffix, or nothing."""

    template: str = ""
    prefix: str = ""
    suffix: str = ""


def read(run: runs.Run, written: Written) -> Template:
    """What is known, by `around` or by `parse`.

    Raises:
        errors.UserError: as they do, and where both are asked for.
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
    """Reads "Hi, my name is {32} and": {n} is a gap of n tokens, {{ and }} are braces; "" is one gap of full length.

    {n:REGEX} is a gap whose text matches a regular expression, see `patterns`.

    Raises:
        errors.UserError: where a brace is neither, the template is longer than the model, or text is not in its
            vocabulary.
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
        else:
            parts += [_encode(run, text), (int(match.group(1)), match.group(2))]
            text = ""
    parts.append(_encode(run, text + template[position:]))
    return assemble(run, parts, None if template else run.config.data.length)


def _encode(run: runs.Run, text: str) -> Int[np.ndarray, "n"]:
    try:
        return run.tokenizer.encode(text)
    except ValueError as error:
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise errors.UserError(f"in the text {shown!r}, {error}") from error


def around(run: runs.Run, prefix: str, suffix: str) -> Template:
    """Text at the start and at the end of the model's full length, one gap between.

    Raises:
        errors.UserError: where both together leave no gap, or are outside the vocabulary.
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
    """Known tokens and gaps one after another; `shown` tokens of them, or all.

    Raises:
        errors.UserError: where they are longer than the model.
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
    """The patterns of a batch of templates; None where there are none.

    Raises:
        errors.UserError: where one is none or cannot be matched, or the run does not fill gaps mask by mask.
    """
    gaps = [gap for template in templates for gap in template.gaps]
    if not gaps:
        return None
    if run.is_autoregressive or not run.graph.has_mask:
        raise errors.UserError(
            f"the gap {{{gaps[0].length}:{gaps[0].pattern}}} has a pattern, which takes the masks of an absorbing run, "
            f"not {errors.name('config.graph.name')}={run.config.graph.name}",
            remedy="leave the pattern out",
        )
    automaton, initial = patterns.compile([gap.pattern for gap in gaps], run.tokenizer, run.graph)
    for gap in patterns.kinds(gaps).values():
        patterns.check(gap, automaton, initial)
    places = [patterns.place(one.gaps, len(one.tokens), automaton, initial) for one in templates]
    return constraints.Patterns(automaton, jax.tree.map(lambda *rows: np.stack(rows), *places))
