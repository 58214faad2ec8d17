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
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._is_draining = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time for a first request's head."""
        super().connection_made(transport)
        self._start_receiving()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        self._stop_receiving()
        self._stop_sending()

    def data_received(self, data: bytes) -> None:
        """Start the time for the rest of a head, or of a refused body; stop it once a request is being answered."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_receiving()
            if self._is_draining:
                self._make_last()
        elif self.timeout_keep_alive_task is None:
            self._start_receiving()

    def on_response_complete(self) -> None:
        """Start the time for reading a last answer, or for the rest of a head that came with the last request."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_sending()
        elif self.cycle.response_complete and self.conn.trailing_data[0]:
            self._start_receiving()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and start the time for reading the answer."""
        super().send_400_response(msg)
        self._start_sending()

    def shutdown(self) -> None:
        """The worker ends: answer a last request, also one that is on its way; uvicorn would close at once."""
        self._is_draining = True
        if self.cycle is not None and not self.cycle.response_complete:
            self._make_last()
        else:
            self.loop.call_later(IDLE_DRAIN_SECONDS, self._close_if_idle)

    def _make_last(self) -> None:
        """Close after this request's answer, and tell the client so, which would send its next request else."""
        if self.cycle.keep_alive and not self.cycle.response_started:
            self.cycle.keep_alive = False
            self.cycle.default_headers = [*self.cycle.default_headers, CLOSE_HEADER]

    def _close_if_idle(self) -> None:
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            super().shutdown()

    def pause_writing(self) -> None:
        """The buffers are full: start the time for reading them."""
        super().pause_writing()
        self._start_sending()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_sending()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; what its client left unread is dropped."""
        super().timeout_keep_alive_handler()
        self.transport.abort()

    def _cut_off_later(self) -> asyncio.TimerHandle:
        return self.loop.call_later(self._limit, self.transport.abort)

    def _start_receiving(self) -> None:
        if self._receiving is None:
            self._receiving = self._cut_off_later()

    def _start_sending(self) -> None:
        if self._sending is None:
            self._sending = self._cut_off_later()

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _stop_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None
