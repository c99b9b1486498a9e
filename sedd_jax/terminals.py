"""Watching text being denoised in a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator

Watch = Callable[[int, list[str]], None]


@contextlib.contextmanager
def watcher(wanted: bool) -> Iterator[Watch | None]:
    """What `generate.draw_samples` calls as it goes: a picture redrawn in place, or lines without a terminal."""
    if not wanted:
        yield None
    elif sys.stderr.isatty():
        from rich import console, live, text

        screen = console.Console(stderr=True, highlight=False)
        with live.Live(console=screen, auto_refresh=False, transient=True) as picture:

            def redraw(taken: int, texts: list[str]) -> None:
                frame = text.Text(f"step {taken}\n", style="dim")
                for number, body in enumerate(texts, start=1):
                    frame.append(f"--- sample {number}\n", style="dim").append(body + "\n")
                picture.update(frame, refresh=True)

            yield redraw
    else:
        yield lambda taken, texts: print(f"step {taken}\n" + "\n---\n".join(texts), file=sys.stderr, flush=True)
