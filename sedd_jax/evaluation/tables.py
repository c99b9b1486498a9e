"""Tables of figures, as text for a terminal, as HTML or as Markdown."""

import dataclasses
import html
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of figures; str() gives its text for a terminal.

    Attributes:
        head: lines above the table: what was measured, and how.
        columns: titles of the columns; the first column names the rows.
        rows: cells of each row.
        notes: lines below the table.
    """

    head: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = []
        for cells in (self.columns, *self.rows):
            first, *others = (
                cell.rjust(width + 3) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            lines.append((first + "".join(others)).rstrip())
        return "\n".join([*self.head, *lines, *self.notes])

    def as_html(self) -> str:
        """The table as HTML, with head and notes."""
        paragraphs = lambda kind, lines: "".join(f'<p class="{kind}">{html.escape(line)}</p>' for line in lines)
        row = lambda cells, kind: f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"
        body = "".join(row(cells, "td") for cells in self.rows)
        table = f'<div class="wide"><table><thead>{row(self.columns, "th")}</thead><tbody>{body}</tbody></table></div>'
        return paragraphs("head", self.head) + table + paragraphs("note", self.notes)

    def as_markdown(self) -> str:
        """The table as Markdown, with head and notes as paragraphs."""
        row = lambda cells: f"| {' | '.join(map(literal, cells))} |"
        rule = f"|{'|'.join(['---', *['---:'] * (len(self.columns) - 1)])}|"
        table = "\n".join([row(self.columns), rule, *map(row, self.rows)])
        return "\n\n".join([*map(literal, self.head), table, *map(literal, self.notes)])


def literal(text: str) -> str:
    """Text as one line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def estimate(value: float | None, stderr: float | None = None, digits: int = 3) -> str:
    """A figure, with its standard error if it has one. There may be no figure."""
    if value is None:
        return "no figure"
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")
