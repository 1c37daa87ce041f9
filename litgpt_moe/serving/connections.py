"""The server's HTTP connections: limits of time and number, and clients that close their half early.

Built on uvicorn 0.54's protocol over h11, which waits for ever for a header and drops a half-closed client.
tests/serving/test_connections.py fails where a later uvicorn differs.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10  # for the header of a request to arrive, from the connection or the last response on
READING_S = 30  # for a client to read on when the buffers are full, or what is left of a response
ENDING_S = 2  # for the responses under way when the server stops
PROBE_S = 0.5  # between two probes of a client that closed its half
MAX_CONNECTIONS = 100
MAX_PER_ADDRESS = 48  # a browser opens 6; the engine takes up to 32 requests at a time
MAX_UNREAD = 32  # connections with full buffers: the memory for what their clients do not read has a bound


class Connection(H11Protocol):
    """A connection that cannot keep others out.

    One that waits for a header is closed after `HEADER_S`. When its address or the server has too many
    connections, the one that has waited longest for a whole request makes room for a new one.
    """

    def connection_made(self, transport: Any) -> None:
        """Make room for the connection, or close it if all others are at work."""
        super().connection_made(transport)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._is_half_closed = False
        self._waits_since = self._unread_since = self.loop.time()
        others = [c for c in self.connections if isinstance(c, Connection) and not c.transport.is_closing()]
        same = [c for c in others if (c.client or ("",))[0] == (self.client or ("",))[0]]
        for crowd, limit in ((same, MAX_PER_ADDRESS), (others, MAX_CONNECTIONS)):
            if len(crowd) > limit:
                idle = [c for c in crowd if c is not self and (c.is_idle or c.cycle.more_body)]
                min(idle, key=lambda c: c._waits_since, default=self).transport.abort()
        self._start("header", HEADER_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        super().connection_lost(exc)
        for name in list(self._timers):
            self._stop(name)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def handle_events(self) -> None:
        """Handle what arrived; the limit of time ends with a whole header."""
        super().handle_events()
        if not self.is_idle:
            self._stop("header")

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP with the status 400, or close the connection if an answer has begun.

        uvicorn would send a second answer, which h11 refuses, and let the application send one after this.
        """
        can_answer = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application reads and sends no more
            self.cycle.message_event.set()
        if can_answer:
            super().send_400_response(msg)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        """Go on to a request that has arrived already, or wait for the next one."""
        self._waits_since = self.loop.time()
        super().on_response_complete()
        if self.is_idle and self._is_half_closed:
            self.transport.close()
        if self.is_idle:
            # the client may be reading still; a closed transport writes its buffer, too
            is_unread = self.transport.is_closing() or self.transport.get_write_buffer_size()
            self._start("header", READING_S if is_unread else HEADER_S, self.transport.abort)

    def eof_received(self) -> bool:
        """Return whether to stay open: a client may end its half and still wait for the response."""
        self._is_half_closed = not self.is_idle and not self.cycle.more_body
        if self._is_half_closed:
            self._probe()
        return self._is_half_closed

    def _probe(self) -> None:
        # TCP does not say whether a client closed its half or has gone. In the latter case its system refuses
        # what is sent; a waiting client ignores a `100 Continue` (RFC 9110, section 15.2)
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.SEND_RESPONSE and self.scope["http_version"] == "1.1":
            event = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(event))
        self._start("probe", PROBE_S, self._probe)

    def pause_writing(self) -> None:
        """Start the limit of time for reading; the longest unread of too many connections is closed."""
        super().pause_writing()
        self._unread_since = self.loop.time()
        unread = [c for c in self.connections if isinstance(c, Connection) and c.flow.write_paused]
        # one that was closed a moment ago has an empty buffer
        unread = [c for c in unread if c.transport.get_write_buffer_size()]
        if len(unread) > MAX_UNREAD:
            min(unread, key=lambda c: c._unread_since).transport.abort()
        self._start("reading", READING_S, self.transport.abort)

    def resume_writing(self) -> None:
        """End the limit of time for reading."""
        super().resume_writing()
        self._stop("reading")

    def shutdown(self) -> None:
        """Answer the request under way, if that takes little time, and close the connection."""
        super().shutdown()
        # uvicorn would cancel the answer and print a traceback
        self._start("ending", ENDING_S, self.transport.abort)

    def _start(self, name: str, seconds: float, act: Any) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, act)

    def _stop(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()
