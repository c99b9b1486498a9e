"""A bounded queue of requests. One thread does them in order, and drops those whose reader has gone."""

import asyncio
import contextlib
import dataclasses
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from sedd_jax.runtime import device_failures, errors

SECONDS_BETWEEN_PLACES = 1.0
Event = tuple[str, dict[str, Any]]
# Takes an event's name and content; raises `GoneError` if nobody reads them any more.
Emit = Callable[[str, dict[str, Any]], None]
Job = Callable[[Emit], None]


class FullError(Exception):
    """The maximum number of requests is open."""


class GoneError(Exception):
    """The reader has gone, so the job can stop."""


@dataclasses.dataclass(kw_only=True, eq=False)
class Place:
    """A request in the line.

    Attributes:
        job: what it wants done.
        loop: the event loop of its reader.
        events: events that wait to be read; None after the last.
        is_started: whether the thread has begun the job.
        is_done: whether the job has ended.
        has_left: whether the reader has gone.
    """

    job: Job
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | None] = dataclasses.field(default_factory=asyncio.Queue)
    is_started: bool = False
    is_done: bool = False
    has_left: bool = False

    def emit(self, name: str, content: dict[str, Any]) -> None:
        """Hands an event to the reader; raises `GoneError` if it has gone."""
        if self.has_left:
            raise GoneError
        self.loop.call_soon_threadsafe(self.events.put_nowait, (name, content))


class Line:
    """Places in order of arrival. The event loop calls `enter`, `read` and `leave`; one thread runs `_work`.

    A place counts until its reader leaves. So `limit` also bounds the events that are held for slow readers.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._places: list[Place] = []
        self._held = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="draw", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Counts a request that is still being read as one in the line; raises `FullError` if that is full."""
        with self._changed:
            self._refuse_if_full()
            self._held += 1
        try:
            yield
        finally:
            with self._changed:
                self._held -= 1

    def enter(self, job: Job) -> Place:
        """Adds a place at the end; raises `FullError` if the line is full."""
        place = Place(job=job, loop=asyncio.get_running_loop())
        with self._changed:
            self._refuse_if_full()
            self._places.append(place)
            self._changed.notify()
        return place

    async def read(self, place: Place) -> AsyncIterator[Event]:
        """Yields how many requests are ahead while the place waits, then the events of its job."""
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
        """Removes a place from the line, whether it waits, is being done, or is finished."""
        with self._changed:
            place.has_left = True
            self._places.remove(place)

    def close(self) -> None:
        """Ends the thread, at the next event of the running job."""
        with self._changed:
            self._is_closed = True
            for place in self._places:
                place.has_left = True
            self._changed.notify()
        self._thread.join()

    def _refuse_if_full(self) -> None:
        if len(self._places) + self._held >= self.limit:
            raise FullError

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
            # Otherwise it would hold the last request's events until the next request.
            del place


def _do(place: Place) -> None:
    """Does a job. A failure is reported to its reader, and the thread goes on with the next job."""
    try:
        place.job(place.emit)
    except GoneError:
        pass
    except Exception as error:
        known = error if isinstance(error, errors.UserError) else device_failures.explained(error, "serve")
        if known is None:
            traceback.print_exc()
        message = (str(known or error).splitlines() or [type(error).__name__])[0]
        place.loop.call_soon_threadsafe(place.events.put_nowait, ("error", {"error": message}))
    finally:
        place.is_done = True
        place.loop.call_soon_threadsafe(place.events.put_nowait, None)
