"""uvicorn's HTTP connection with time limits: a client that never finishes a request or never reads is cut off."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_DRAIN_SECONDS = 1.0
"""How long a worker that ends leaves idle connections open: a request that is on its way is answered."""


class TimedConnection(H11Protocol):
    """One client's connection.

    uvicorn limits neither how long a client takes to send a request's head, nor how long it leaves an answer unread.
    The time that a body may take is limited by the application. The limit is `client_seconds` of the lifespan's state.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limit: float = self.app_state.get("client_seconds", 20.0)
        self._is_draining = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Watch the connection from now on."""
        super().connection_made(transport)
        self._waiting_since = self.loop.time()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        super().connection_lost(exc)
        self._timer.cancel()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._waiting_since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """While the worker ends, the request that has come is the last one."""
        super().data_received(data)
        if self._is_draining:
            self._make_last()

    def shutdown(self) -> None:
        """The worker ends: answer a last request, also one that is on its way; uvicorn would close at once."""
        self._is_draining = True
        self._make_last()
        self.loop.call_later(IDLE_DRAIN_SECONDS, self._close_when_idle)

    def _watch(self) -> None:
        if not self._is_waiting_for_client():
            self._waiting_since = self.loop.time()
        elif self.loop.time() - self._waiting_since > self._limit:
            self.transport.abort()
        self._timer = self.loop.call_later(self._limit / 10, self._watch)

    def _is_waiting_for_client(self) -> bool:
        if self.transport.is_closing() or self.flow.write_paused:
            return True  # to read
        is_answering = self.cycle is not None and not self.cycle.response_complete
        is_idle = self.timeout_keep_alive_task is not None and not self.conn.trailing_data[0]  # uvicorn limits that
        return not is_answering and not is_idle

    def _make_last(self) -> None:
        """Close after this request's answer, and tell the client so, which would send its next request else."""
        if self.cycle is not None and self.cycle.keep_alive and not self.cycle.response_started:
            self.cycle.keep_alive = False
            self.cycle.default_headers = [*self.cycle.default_headers, CLOSE_HEADER]

    def _close_when_idle(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()
