"""Connections to the page. Those whose request does not come are bounded in time and number, so that others get in."""

import asyncio
from typing import Any

from uvicorn.protocols.http import h11_impl

MAX_UNFINISHED = 256  # connections without a whole request; a system often allows a process 1024 files
_SECONDS = 10.0  # in which a request must have come, counted from the connection or from the answer before it


class Connection(h11_impl.H11Protocol):
    """uvicorn's, which waits for a request for ever, with an end to the wait.

    Where too many wait, the one that has waited longest is closed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._note()
        ends = {other._end.when(): other for other in self.connections if isinstance(other, Connection) and other._end}
        if len(ends) > MAX_UNFINISHED:
            ends[min(ends)].transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _note(self) -> None:
        """Starts the clock if no request is being answered, and stops it if one is."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._end is None and not self.transport.is_closing():
            self._end = self.loop.call_later(_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None
