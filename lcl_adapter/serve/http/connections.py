"""Connections of clients that do not go on: deadlines for headers, bodies and answers, and room for newcomers.

uvicorn closes an idle connection, and waits without an end for one whose request has begun, or whose answer is not read.
With as many of these as it allows, it turns everybody away. Here a request must arrive, and its answer be read, in time.
Beyond a number of connections, the client with most connections that wait for it loses the one that has waited longest,
so that a newcomer is answered.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter, deque
from contextlib import suppress
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
READ_SECONDS = 20.0  # for an answer, from when its client stops reading, and the time that what it reads needs at SLOWEST_RATE
SLOWEST_RATE = 16 * 2**10  # bytes a second
UNSENT_BYTES = 64 * 2**10  # of an answer that the system holds beside those under way: a slow reader is then noticed as slow
LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


@dataclass
class ConnectionCounters:
    """Counts since the start.

    connections_late: closed because a request did not arrive in time. connections_unread: because an answer was not read in
    time. connections_displaced: closed to make room.
    """

    connections_late: int = 0
    connections_unread: int = 0
    connections_displaced: int = 0


COUNTERS = ConnectionCounters()  # of this process, for all its servers


class Outlet:
    """A connection's transport, which ignores what is written after its end.

    A write to an ended connection is an error of uvloop.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self.lost:
            self._transport.write(data)


class BoundedConnection(Protocol):
    """uvicorn's connection, with deadlines.

    since: when the server began to wait for a request; None while one is being answered.
    unread_since: when the client stopped reading its answer; None while nothing of it waits to be sent.
    """

    since: float | None = None
    unread_since: float | None = None
    body_bytes = 0
    displaced = False  # it ends in the next round of the loop
    _unread_bytes = 0  # that waited when the client stopped reading
    _read_bytes = 0  # of this answer, that waited before
    _unread_seconds = 0.0  # in which they waited
    _reading_timer: asyncio.TimerHandle | None = None
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

    @property
    def waits_since(self) -> float | None:
        """When the server began to wait for this client, to send a request or to read an answer; None if it does not."""
        times = [time for time in (self.since, self.unread_since) if time is not None]
        return min(times, default=None)

    def connection_made(self, transport: Any) -> None:
        self.outlet = Outlet(transport)
        self._cycles: deque[Any] = deque()  # requests that are not answered yet; the first one is being answered
        super().connection_made(self.outlet)  # type: ignore[arg-type]
        transport.set_write_buffer_limits(high=0)  # so that pause_writing says of every answer that it is not read
        with suppress(AttributeError, OSError):  # not every system has it
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._wait()
        _make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_reading_timer()
        self.outlet.lost = True
        with suppress(AttributeError):  # h11 has none
            self.pipeline.clear()  # requests that nobody waits for
        for cycle in self._cycles:  # of several that a client sent at once, uvicorn says only to the last one that the client is gone
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """A request begins. Only httptools calls this; with h11 a client has one request at a time."""
        super().on_headers_complete()
        if self.cycle is not None:
            self._cycles.append(self.cycle)

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
        self._read_bytes, self._unread_seconds = 0, 0.0
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        super().on_response_complete()
        if self.transport.is_closing() or self.answering:
            return
        self._wait()
        if not self.reading_body:  # no request follows yet
            self._stop_waiting()
            self.since, self._idle = self.loop.time(), True

    def pause_writing(self) -> None:
        """A part of an answer cannot be sent: the client does not read."""
        super().pause_writing()
        if self.unread_since is None and self in self.connections:
            self.unread_since, self._unread_bytes = self.loop.time(), self.transport.get_write_buffer_size()
            self._reading_timer = self.loop.call_later(READ_SECONDS - self._unread_seconds, self._check_reading)

    def resume_writing(self) -> None:
        """Everything is sent."""
        super().resume_writing()
        if self.unread_since is not None:
            self._unread_seconds += self.loop.time() - self.unread_since
            self._read_bytes += self._unread_bytes
        self._stop_reading_timer()

    def _stop_reading_timer(self) -> None:
        self.unread_since = None
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None

    def _check_reading(self) -> None:
        """End the connection if its client reads too slowly, or not at all; otherwise check again at its deadline."""
        if self.unread_since is None or self not in self.connections:
            return
        was_read = self._read_bytes + self._unread_bytes - self.transport.get_write_buffer_size()
        more = READ_SECONDS + was_read / SLOWEST_RATE - self._unread_seconds - (self.loop.time() - self.unread_since)
        if more > 0.01:
            self._reading_timer = self.loop.call_later(more, self._check_reading)
            return
        COUNTERS.connections_unread += 1
        self.end()

    def end(self) -> None:
        """End the connection at once. Closing it would wait for the client again, in this process or in the system."""
        with suppress(AttributeError, OSError):
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

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
    if len(newcomer.connections) <= MAX_CONNECTIONS:  # without looking at each of them
        return
    open_ones = [one for one in newcomer.connections if isinstance(one, BoundedConnection) and not one.displaced]
    if len(open_ones) <= MAX_CONNECTIONS:
        return
    waiting = [one for one in open_ones if one.waits_since is not None and one is not newcomer]
    if not waiting:  # all others are being answered
        _displace(newcomer)
        return
    counts = Counter(_address(one) for one in waiting)
    crowd = counts.most_common(1)[0][0]
    oldest = sorted((one for one in waiting if _address(one) == crowd), key=lambda one: one.waits_since or 0.0)
    for one in oldest[: max(1, MAX_CONNECTIONS // 10)]:  # several, so that the next newcomers need no search
        _displace(one)


def _displace(connection: BoundedConnection) -> None:
    COUNTERS.connections_displaced += 1
    connection.displaced = True
    connection.end()


def _address(connection: BoundedConnection) -> str:
    return connection.client[0] if connection.client else ""
