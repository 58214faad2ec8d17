"""The HTTP server: /ping and /invocations as SageMaker asks for them, /metrics, and a page for people."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn import Config

from stocktake.data.images import PhotoError
from stocktake.serving.batching import Batcher, Outcome, QueueFullError
from stocktake.serving.explanation import occlusion, page
from stocktake.serving.openapi import document
from stocktake.serving.payloads import (
    JSON,
    LINES_TYPES,
    PHOTO_TYPES,
    Form,
    Payload,
    RequestError,
    accepted,
    encoded,
    media_type,
    read,
    write,
)
from stocktake.serving.predictor import Prediction, Predictor
from stocktake.serving.protocol import KEEP_ALIVE_SECONDS, Connection, DrainingServer
from stocktake.serving.settings import MEBIBYTE, ServerSettings
from stocktake.serving.telemetry import Metrics, Observed, RequestLog

HELD_BYTES = 64 * MEBIBYTE
"""Of all the bodies that a worker holds at once, unless one request may be half as large; beyond it is busy."""
LARGE_BODY = MEBIBYTE // 4
"""A JSON body above is read in a thread, one at a time: a hostile one grows tenfold while it is read."""
MOST_EXPLANATIONS = 4
"""Asked for at once; each takes dozens of forward passes."""
LEFT = 499
"""Status in log and metrics of a request whose client did not wait for the answer; as nginx counts them."""
_BUSY = {"retry-after": "1"}


def run_worker(
    counter: Predictor, settings: ServerSettings, listener: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT; then answer what has begun and return. For a process's main thread.

    Args:
        counter: the model.
        settings: all but host, port, workers and threads, which are used by now.
        listener: a listening socket, maybe shared with other processes. This process's copy is closed.
        ready: called once a request would be answered.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of each bad request; the log has a line of it
    app = create_app(counter, settings)
    config = Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    server = DrainingServer(
        config,
        body_seconds=settings.body_seconds,
        drain_seconds=settings.drain_seconds,
        ready=ready,
        ending=app.state.service.end,
    )
    server.run([listener])


def create_app(counter: Predictor, settings: ServerSettings) -> Starlette:
    """The application; `app.state.service` is what answers."""
    service = Service(counter, settings)
    routes = [
        Route("/ping", service.ping),
        Route("/invocations", service.invocations, methods=["POST"]),
        Route("/metrics", service.metrics),
        Route("/openapi.json", service.interface),
    ]
    if settings.page:
        routes += [Route("/", service.page), Route("/explain", service.explain, methods=["POST"])]
    paths = frozenset(route.path for route in routes)
    app = Starlette(
        routes=routes,
        lifespan=service.life,
        middleware=[Middleware(Observed, log=service.log, metrics=service.measured, paths=paths)],
        exception_handlers={RequestError: _refused, HTTPException: _refused_by_starlette},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class Service:
    """One worker's model, queue and figures."""

    def __init__(self, counter: Predictor, settings: ServerSettings) -> None:
        self._counter, self._settings = counter, settings
        self._most_held = max(HELD_BYTES, 2 * settings.max_request_bytes)
        self._held = 0
        self._batcher: Batcher
        self._large_body = asyncio.Lock()
        self._explaining = 0
        self._one_explanation = asyncio.Lock()
        self._ending = False
        self.measured = Metrics()
        self.log = RequestLog()

    @contextlib.asynccontextmanager
    async def life(self, _: Starlette) -> AsyncIterator[None]:
        """From the model's first pass, on a blank photo, to the last line of the log."""
        size = self._counter.size
        await asyncio.to_thread(self._counter.probabilities, np.zeros((1, size, size, 3), dtype=np.uint8))
        self._batcher = Batcher(self._counter, self._settings, self.measured.batch)
        yield
        self._batcher.close()
        self.log.close()

    def end(self) -> None:
        """From now on /ping says that the server ends."""
        self._ending = True

    async def ping(self, _: Request) -> Response:
        """GET /ping: whether it is well, and which model answers."""
        if self._ending:
            raise RequestError(503, "the server is ending", _BUSY)
        model = {"model_version": self._counter.version, "engine": self._counter.engine}
        return _json({"status": "ok", **model, "quantities": list(self._counter.labels)})

    async def metrics(self, _: Request) -> Response:
        """GET /metrics: for Prometheus."""
        self.measured.pending(self._batcher.pending)
        return Response(self.measured.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def interface(self, _: Request) -> Response:
        """GET /openapi.json."""
        return _json(document(self._counter.version))

    async def invocations(self, request: Request) -> Response:
        """POST /invocations: photos in, counts out."""
        media = media_type(request.headers.get("content-type"), request.headers.get("content-encoding"))
        form: Form = "one" if media in PHOTO_TYPES else "lines" if media in LINES_TYPES else "list"
        answer_media = accepted(request.headers.get("accept"), form)
        async with self._body(request) as body:
            payload = await self._read(media, body)
            photos = [photo for photo in payload.photos if isinstance(photo, bytes)]
            request.scope["stocktake.photos"] = len(photos)
            outcomes = await self._count(request, photos)
        answers = _merged(payload, outcomes)
        return Response(write(answers, form, answer_media), media_type=answer_media)

    async def page(self, _: Request) -> Response:
        """GET /: the page."""
        content, headers = page()
        return Response(content, headers=headers, media_type="text/html; charset=utf-8")

    async def explain(self, request: Request) -> Response:
        """POST /explain: a photo in; the quantity, and by how much its probability falls without each part, out."""
        media = media_type(request.headers.get("content-type"), request.headers.get("content-encoding"))
        if media not in PHOTO_TYPES:
            raise RequestError(415, f"content-type {media} is not with_root_cause: send one photo")
        if self._explaining >= MOST_EXPLANATIONS:
            raise RequestError(503, "too many explanations are asked for: try again later", _BUSY)
        self._explaining += 1
        try:
            async with self._body(request) as body:
                await self._read(media, body)
                request.scope["stocktake.photos"] = 1
                async with self._one_explanation:
                    quantity, drops = await asyncio.to_thread(self._explain, body)
        except PhotoError as error:
            raise RequestError(422, str(error)) from None
        finally:
            self._explaining -= 1
        return _json({"quantity": quantity, "drops": drops, "model_version": self._counter.version})

    def _explain(self, photo: bytes) -> tuple[int, list[list[float]]]:
        quantity, drops = occlusion(self._counter, self._batcher.prepare(photo), self._settings.max_batch)
        return quantity, drops.tolist()

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The request's body, bounded in size and time; counted as held until it is done with."""
        request.scope["stocktake.received"] = 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                body = b"".join([chunk async for chunk in self._chunks(request)])
        except ClientDisconnect:
            raise RequestError(LEFT, "the client left") from None
        except TimeoutError:
            reason = f"the body took more than {self._settings.body_seconds:g} s"
            raise RequestError(408, reason, {"connection": "close"}) from None
        else:
            yield body
        finally:
            self._held -= request.scope["stocktake.received"]

    async def _chunks(self, request: Request) -> AsyncIterator[bytes]:
        most = self._settings.max_request_bytes
        too_large = RequestError(413, f"the body has more than {most} bytes")
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        async for chunk in request.stream():
            request.scope["stocktake.received"] += len(chunk)
            self._held += len(chunk)
            if request.scope["stocktake.received"] > most:
                raise too_large
            if self._held > self._most_held:
                raise RequestError(503, "the server holds too many requests: try again later", _BUSY)
            yield chunk

    async def _read(self, media: str, body: bytes) -> Payload:
        most = self._settings.max_queue
        if media in PHOTO_TYPES or len(body) < LARGE_BODY:
            return read(media, body, most)
        async with self._large_body:
            return await asyncio.to_thread(read, media, body, most)

    async def _count(self, request: Request, photos: Sequence[bytes]) -> list[Outcome]:
        try:
            answer = self._batcher.submit(photos)
        except QueueFullError:
            raise RequestError(503, "too many photos wait: try again later", _BUSY) from None
        self.measured.pending(self._batcher.pending)
        leaving = asyncio.create_task(_cancel_if_left(request, answer))
        try:
            outcomes = await answer
        except asyncio.CancelledError:
            if leaving.done():
                raise RequestError(LEFT, "the client left") from None
            raise
        finally:
            leaving.cancel()
            self.measured.pending(self._batcher.pending)
        self.measured.counted(outcome for outcome in outcomes if isinstance(outcome, Prediction))
        return outcomes


async def _cancel_if_left(request: Request, answer: asyncio.Future[list[Outcome]]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


def _merged(payload: Payload, outcomes: Sequence[Outcome]) -> list[Prediction | RequestError]:
    """The answers in the order of the request; a bad photo that has no line of its own refuses the request."""
    left: Iterator[Outcome] = iter(outcomes)
    answers: list[Prediction | RequestError] = []
    for number, photo in enumerate(payload.photos, 1):
        outcome = photo if isinstance(photo, RequestError) else next(left)
        if isinstance(outcome, PhotoError):
            where = f"photo {number}: " if payload.form == "list" else ""
            outcome = RequestError(422, f"{where}{outcome}")
            if payload.form != "lines":
                raise outcome
        answers.append(outcome)
    return answers


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)  # noqa: S101
    return Response(encoded(error.document()), error.status, error.headers, JSON)


async def _refused_by_starlette(request: Request, error: Exception) -> Response:
    """404 and 405."""
    assert isinstance(error, HTTPException)  # noqa: S101
    return await _refused(request, RequestError(error.status_code, error.detail, dict(error.headers or {})))


def _json(content: dict[str, object]) -> Response:
    return Response(json.dumps(content).encode(), media_type=JSON)
