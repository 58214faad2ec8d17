"""uvicorn, as this server wants it: bounded heads, errors in JSON, and an end that drops no request."""

from __future__ import annotations

import asyncio
import contextlib
import http
import signal
import socket
import threading
from asyncio import TimerHandle
from collections.abc import Callable, Iterator
from typing import cast

from uvicorn import Config, Server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import HANDLED_SIGNALS, ServerState

from stocktake.serving.payloads import RequestError, encoded

MOST_HEAD_BYTES = 32_768
"""Of a request's line and headers."""
MOST_CONNECTIONS = 800
"""Of a worker, at once: fewer than the 1024 files that a process may usually have open."""
KEEP_ALIVE_SECONDS = 65
"""Longer than the minute after which load balancers close what is idle: the client is the one to close."""
IDLE_DRAIN_SECONDS = 1.0
"""How long a worker that ends leaves idle connections open: what a client is just sending is answered."""
CANCELLED_SECONDS = 0.5
"""How long requests that were cut off may take to say so."""


class State(ServerState):
    """What the connections of a server share."""

    def __init__(self, head_seconds: float) -> None:
        super().__init__()
        self.draining = False
        self.head_seconds = head_seconds


class Connection(HttpToolsProtocol):
    """One client's."""

    server_state: State

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse it if there are too many."""
        self._receiving = False  # a request has begun and is not all here
        self._in_head = True
        self._head_bytes = 0
        self._requests = 0
        self._deadline: TimerHandle | None = None
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(503, "the server has too many connections: try again later")
        else:
            self._restart_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """No more timers."""
        self._stop_deadline()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Bound the head, and have a timer run whenever the client is the one to act."""
        if self.transport.is_closing():
            return
        requests = self._requests
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes = self._head_bytes + len(data) if requests == self._requests else 0
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(431, f"the request's line and headers have more than {MOST_HEAD_BYTES} bytes")
                return
        if self.idle and self._deadline is None and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        """The client's time runs."""
        super().on_message_begin()
        self._receiving = True
        self._restart_deadline()

    def on_headers_complete(self) -> None:
        """A server that ends answers, and says that it is the last answer."""
        super().on_headers_complete()
        self._in_head = False
        if self.server_state.draining:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """The client's time is stopped."""
        super().on_message_complete()
        self._receiving, self._in_head, self._head_bytes = False, True, 0
        self._requests += 1
        self._stop_deadline()

    @property
    def idle(self) -> bool:
        """Whether nothing is being received or answered."""
        return not self._receiving and (self.cycle is None or self.cycle.response_complete)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """What came is no HTTP. Requests that came whole before it are answered, as they would be without it."""
        if self._in_head and self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self._receiving = False
            self._stop_deadline()
        else:
            self._refuse(400, "this is not well-formed HTTP")

    def _refuse(self, status: int, reason: str) -> None:
        self._stop_deadline()
        cycle = self.cycle
        if not self.pipeline and (cycle is None or not cycle.response_started or cycle.response_complete):
            body = encoded(RequestError(status, reason).document())
            head = (
                f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n"
                + ("retry-after: 1\r\n" if status == 503 else "")
                + "\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _restart_deadline(self) -> None:
        self._stop_deadline()
        self._deadline = self.loop.call_later(self.server_state.head_seconds, self._too_slow)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self.cycle is not None and not self.cycle.response_complete:
            if self._in_head:  # of a second request, while the client waits for the first one's answer
                self._restart_deadline()
            return  # in a body: the app's own deadline says so
        if not self._in_head or not self._receiving:  # the body of a request that was refused; or nothing at all
            self.transport.close()
        else:
            self._refuse(408, f"the request's headers took more than {self.server_state.head_seconds:g} s")


class DrainingServer(Server):
    """One that says when it is up, and ends without dropping a request."""

    def __init__(
        self,
        config: Config,
        *,
        body_seconds: float,
        drain_seconds: float,
        ready: Callable[[], None],
        ending: Callable[[], None],
    ) -> None:
        """A server.

        Args:
            config: of uvicorn.
            body_seconds: that a request's head may take.
            drain_seconds: that requests may take once the server is told to end.
            ready: called once it listens.
            ending: called once it is told to end.
        """
        super().__init__(config)
        self.server_state: State = State(body_seconds)
        self._drain_seconds = drain_seconds
        self._ready, self._ending = ready, ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, answer what comes on the connections there are, and close them."""
        loop = asyncio.get_running_loop()
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()  # this process's copy: others that share the socket go on accepting
        self._ending()
        self.server_state.draining = True
        connections = cast(set[Connection], self.server_state.connections)
        for connection in connections:
            if connection.cycle is not None:
                connection.cycle.keep_alive = False
        end = loop.time() + self._drain_seconds
        idle_end = loop.time() + min(IDLE_DRAIN_SECONDS, self._drain_seconds)
        while connections and loop.time() < end and not self.force_exit:
            if loop.time() >= idle_end:
                for connection in [one for one in connections if one.idle]:
                    connection.transport.close()
            await asyncio.sleep(0.02)
        if tasks := list(self.server_state.tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCELLED_SECONDS)
        for connection in list(connections):
            connection.transport.close()
        await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on a signal, and return: uvicorn would raise it once more, and the process would die of it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {one: signal.signal(one, self.handle_exit) for one in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for one, handler in former.items():
                signal.signal(one, handler)
