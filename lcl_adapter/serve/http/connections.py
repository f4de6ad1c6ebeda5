"""Connections of clients that do not go on: deadlines for headers and bodies, and room for newcomers.

uvicorn closes an idle connection, and waits without an end for one whose request has begun. With as many of these as it
allows, it turns everybody away. Here a request must arrive in time. Beyond a number of connections, the client with most
connections that wait for it loses the one that has waited longest, so that a newcomer is answered.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Protocol
else:
    Protocol = AutoHTTPProtocol  # httptools where it is installed, h11 elsewhere; both have what is used here

MAX_CONNECTIONS = 900  # at a time; a process may have 1,024 files by default
HEADER_SECONDS = 10.0  # for a request's headers, from their first byte or from the connection's start
BODY_SECONDS = 20.0  # for a body, and the time that its size needs at SLOWEST_RATE
SLOWEST_RATE = 16 * 2**10  # bytes a second
LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


@dataclass
class ConnectionCounters:
    """Counts since the start.

    connections_late: closed because a request did not arrive in time. connections_displaced: closed to make room.
    """

    connections_late: int = 0
    connections_displaced: int = 0


COUNTERS = ConnectionCounters()  # of this process, for all its servers


class BoundedConnection(Protocol):
    """uvicorn's connection, with deadlines.

    since: when the server began to wait for this client; None while a request is being answered.
    """

    since: float | None = None
    body_bytes = 0
    _timer: asyncio.TimerHandle | None = None
    _idle = False  # between two requests; uvicorn closes it

    @property
    def reading_body(self) -> bool:
        """Whether a request has its headers, and not yet its whole body or its answer."""
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    @property
    def answering(self) -> bool:
        """Whether a request has arrived, and its answer is not sent yet."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()
        _make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._idle:  # another request begins
            self._wait()
        cycle = self.cycle
        super().data_received(data)
        if self.answering:
            self._stop_waiting()
        elif self.cycle is not cycle:  # the headers are complete, the body follows
            self._wait()
        else:
            self.body_bytes += len(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() or self.answering:
            return
        self._wait()
        if not self.reading_body:  # no request follows yet
            self._stop_waiting()
            self.since, self._idle = self.loop.time(), True

    def _wait(self) -> None:
        self._stop_waiting()
        self.since, self.body_bytes = self.loop.time(), 0
        self._timer = self.loop.call_later(BODY_SECONDS if self.reading_body else HEADER_SECONDS, self._check)

    def _stop_waiting(self) -> None:
        self.since, self._idle = None, False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        """Close the connection if its client is late; otherwise check again at its deadline."""
        if self.since is None or self not in self.connections:
            return
        allowed = BODY_SECONDS + self.body_bytes / SLOWEST_RATE if self.reading_body else HEADER_SECONDS
        more = self.since + allowed - self.loop.time()
        if more > 0.01:
            self._timer = self.loop.call_later(more, self._check)
            return
        COUNTERS.connections_late += 1
        if not self.transport.is_closing():
            if not (self.reading_body and self.cycle.response_started):
                self.transport.write(LATE)
            self.transport.close()


def _make_room(newcomer: BoundedConnection) -> None:
    """Close a connection if there are too many: of the client with most connections that wait, those that wait longest."""
    open_ones = [connection for connection in newcomer.connections if not connection.transport.is_closing()]
    if len(open_ones) <= MAX_CONNECTIONS:
        return
    waiting = [one for one in open_ones if isinstance(one, BoundedConnection) and one.since is not None and one is not newcomer]
    if not waiting:  # all others are being answered
        COUNTERS.connections_displaced += 1
        newcomer.transport.abort()
        return
    counts = Counter(_address(one) for one in waiting)
    crowd = counts.most_common(1)[0][0]
    oldest = sorted((one for one in waiting if _address(one) == crowd), key=lambda one: one.since or 0.0)
    for one in oldest[: max(1, MAX_CONNECTIONS // 10)]:  # several, so that the next newcomers need no search
        COUNTERS.connections_displaced += 1
        one.transport.abort()


def _address(connection: BoundedConnection) -> str:
    return connection.client[0] if connection.client else ""
