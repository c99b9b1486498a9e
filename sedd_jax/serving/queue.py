"""Requests in a bounded line: one thread does them in order, and one whose reader has gone is not done."""

import asyncio
import dataclasses
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

SECONDS_BETWEEN_PLACES = 1.0
Event = tuple[str, dict[str, Any]]
# Takes an event's name and content, and raises `GoneError` where nobody reads any more.
Emit = Callable[[str, dict[str, Any]], None]
Job = Callable[[Emit], None]


class FullError(Exception):
    """As many requests are open as may be."""


class GoneError(Exception):
    """The reader has gone: what is being done can stop."""


@dataclasses.dataclass(kw_only=True, eq=False)
class Place:
    """A request in the line: what it wants done, and the events that wait to be read (None after the last)."""

    job: Job
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | None] = dataclasses.field(default_factory=asyncio.Queue)
    is_started: bool = False
    is_done: bool = False
    has_left: bool = False

    def emit(self, name: str, content: dict[str, Any]) -> None:
        if self.has_left:
            raise GoneError
        self.loop.call_soon_threadsafe(self.events.put_nowait, (name, content))


class Line:
    """Places in order of arrival. `enter`, `read` and `leave` belong to the event loop, `_work` to the one thread.

    A place counts until its reader leaves, so that `limit` also bounds the events that are held for slow readers.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._places: list[Place] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="draw", daemon=True)
        self._thread.start()

    def enter(self, job: Job) -> Place:
        """A new last place; raises `FullError`."""
        place = Place(job=job, loop=asyncio.get_running_loop())
        with self._changed:
            if len(self._places) >= self.limit:
                raise FullError
            self._places.append(place)
            self._changed.notify()
        return place

    async def read(self, place: Place) -> AsyncIterator[Event]:
        """How many are ahead, as long as any is; then what the job emits."""
        yield "queued", {"ahead": self._ahead(place)}
        while True:
            try:
                async with asyncio.timeout(SECONDS_BETWEEN_PLACES):
                    event = await place.events.get()
            except TimeoutError:
                if not place.is_started:
                    yield "queued", {"ahead": self._ahead(place)}
                continue
            if event is None:
                return
            yield event

    def leave(self, place: Place) -> None:
        """Takes a place out of the line, whether it was waiting, is being done or is finished."""
        with self._changed:
            place.has_left = True
            self._places.remove(place)

    def close(self) -> None:
        """Ends the thread, at the next event of what it does."""
        with self._changed:
            self._is_closed = True
            for place in self._places:
                place.has_left = True
            self._changed.notify()
        self._thread.join()

    def _ahead(self, place: Place) -> int:
        with self._changed:
            return sum(not other.is_done for other in self._places[: self._places.index(place)])

    def _work(self) -> None:
        waiting = lambda: [place for place in self._places if not place.is_started]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or waiting())
                if self._is_closed:
                    return
                place = waiting()[0]
                place.is_started = True
            _do(place)
            # It would hold the last request's events until there is another.
            del place


def _do(place: Place) -> None:
    """Does a job; whatever goes wrong is told to its reader, and the next one is served."""
    try:
        place.job(place.emit)
    except GoneError:
        pass
    except Exception as error:
        if not isinstance(error, ValueError):
            traceback.print_exc()
        message = (str(error).splitlines() or [type(error).__name__])[0]
        place.loop.call_soon_threadsafe(place.events.put_nowait, ("error", {"error": message}))
    finally:
        place.is_done = True
        place.loop.call_soon_threadsafe(place.events.put_nowait, None)
