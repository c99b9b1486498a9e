"""Progress of long work, in a terminal or a log: text being denoised, text being prepared."""

import contextlib
import contextvars
import sys
import time
from collections.abc import Callable, Iterator

# Called with the steps taken, the number of steps, and a function that returns the texts so far.
Watch = Callable[[int, int, Callable[[], list[str]]], None]
# Called with the name of a part, the fraction of it that is done, and the number of tokens.
Report = Callable[[str, float, int], None]
SECONDS_BETWEEN_LINES = 30.0
# Samples, texts and file names may hold any characters. Escape sequences must be visible and not act on the terminal.
VISIBLE_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_is_shown = contextvars.ContextVar("_is_shown", default=True)


@contextlib.contextmanager
def shown(is_shown: bool) -> Iterator[None]:
    """Inside it, `progress` is shown or not."""
    before = _is_shown.set(is_shown)
    try:
        yield
    finally:
        _is_shown.reset(before)


@contextlib.contextmanager
def watcher(*, shows_text: bool) -> Iterator[Watch]:
    """A callback for `generate.draw_samples` that shows its progress on standard error.

    A terminal shows a progress bar, or with `shows_text` the texts, redrawn in place. Otherwise a line is written at
    most every 30 seconds, or with `shows_text` all texts at every call.
    """
    if sys.stderr.isatty():
        yield from _redrawn(shows_text)
    elif shows_text:
        yield lambda taken, _, texts: print(f"step {taken}\n" + "\n---\n".join(texts()), file=sys.stderr, flush=True)
    else:
        yield _line_now_and_then()


def _redrawn(shows_text: bool) -> Iterator[Watch]:
    from rich import console, live, progress_bar, table, text

    screen = console.Console(stderr=True, highlight=False)
    with live.Live(console=screen, auto_refresh=False, transient=True) as picture:

        def redraw(taken: int, total: int, texts: Callable[[], list[str]]) -> None:
            frame = text.Text(f"step {taken} of {total}\n", style="dim")
            if shows_text:
                for number, body in enumerate(texts(), start=1):
                    frame.append(f"--- sample {number}\n", style="dim").append(body.translate(VISIBLE_CONTROLS) + "\n")
                picture.update(frame, refresh=True)
            else:
                line = table.Table.grid(padding=(0, 1))
                line.add_row(progress_bar.ProgressBar(total=total, completed=taken, width=40), frame)
                picture.update(line, refresh=True)

        yield redraw


def _line_now_and_then() -> Watch:
    last = time.monotonic()

    def write(taken: int, total: int, texts: Callable[[], list[str]]) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"step {taken} of {total}", file=sys.stderr, flush=True)

    return write


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """A callback that shows the progress of each part: its name, the fraction done and the number of tokens.

    A terminal shows a bar for each part. Otherwise a line is written at most every 30 seconds.
    """
    if not _is_shown.get():
        yield lambda name, done, tokens: None
    elif sys.stderr.isatty():
        yield from _bars()
    else:
        yield _share_now_and_then()


def _bars() -> Iterator[Report]:
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.description:>5}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[tokens]:,} tokens"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bars:
        tasks = {}

        def update(name: str, done: float, tokens: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0, tokens=0)
            bars.update(tasks[name], completed=done, tokens=tokens)

        yield update


def _share_now_and_then() -> Report:
    last = time.monotonic()

    def write(name: str, done: float, tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{name} {done:.0%}  {tokens:,} tokens", file=sys.stderr, flush=True)

    return write
