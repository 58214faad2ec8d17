"""The application: /ping and /invocations as SageMaker asks for them, and a page for people."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stocktake.data.images import PhotoError
from stocktake.serving.engine_pool import EnginePool
from stocktake.serving.explanation import occlusion, page
from stocktake.serving.payloads import JSON, PHOTO_TYPES, Payload, RequestError, answer_type, media_type, read, write
from stocktake.serving.predictor import Prediction, Predictor, record
from stocktake.serving.settings import MEBIBYTE, ServerSettings
from stocktake.serving.telemetry import CLIENT_LEFT, RequestLoggingMiddleware, send_error

MAX_HELD_BYTES = 64 * MEBIBYTE
"""Of all bodies that a worker holds at once, unless one request may be half as large; beyond it is busy."""
LARGE_BODY = MEBIBYTE // 4
"""A larger JSON body is parsed in a thread, one at a time: a hostile one grows tenfold while it is parsed."""
MAX_EXPLANATIONS = 4
"""Asked for at once; each takes dozens of forward passes."""
_CANCELLED_SECONDS = 0.2
"""In which requests that drain_seconds cut off are answered with 503; then uvicorn ends the process."""
_BUSY = {"retry-after": "1"}


def create_app(
    predictor: Predictor,
    settings: ServerSettings,
    *,
    batch_mode: bool = False,
    on_end: Callable[[], None] = lambda: None,
) -> Starlette:
    """The application of one worker; `app.state.service` answers its requests.

    Args:
        predictor: the model.
        settings: all but host, port, workers and threads, which are used by now.
        batch_mode: for a batch transform job: a photo that cannot be used is answered with an error record and status
            200 in every request format, since any other status would end the job.
        on_end: called when the worker has answered its last request.
    """
    service = Service(predictor, settings, batch_mode)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        blank = np.zeros((1, predictor.size, predictor.size, 3), dtype=np.uint8)
        await asyncio.to_thread(service.pool.probabilities, blank)  # the first pass allocates
        yield {"client_seconds": settings.client_seconds}  # for the connections
        service.pool.close()
        await asyncio.sleep(_CANCELLED_SECONDS)
        on_end()

    routes = [Route("/ping", service.ping), Route("/invocations", service.invocations, methods=["POST"])]
    if settings.page:
        routes += [Route("/", service.page), Route("/explain", service.explain, methods=["POST"])]
    paths = frozenset(route.path for route in routes)
    middleware = [Middleware(RequestLoggingMiddleware, paths=paths, model_version=predictor.version)]
    if is_loopback(settings.host):
        middleware.append(Middleware(LocalHostMiddleware))
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=middleware,
        exception_handlers={RequestError: _error_response, HTTPException: _starlette_error_response},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class LocalHostMiddleware:
    """Refuses requests for other hosts than this machine.

    Without it, a web page whose name its owner points at 127.0.0.1 could read a local server's answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if not is_loopback(name):
                await send_error(RequestError(421, f"this server answers for localhost only, not for {name!r}"), send)
                return
        await self._app(scope, receive, send)


class Service:
    """One worker's requests."""

    def __init__(self, predictor: Predictor, settings: ServerSettings, batch_mode: bool) -> None:
        self._predictor, self._settings, self._batch_mode = predictor, settings, batch_mode
        self.pool = EnginePool(predictor, settings.stuck_seconds)
        self._max_held = max(MAX_HELD_BYTES, 2 * settings.max_request_bytes)
        self.held_bytes = 0
        self._large_body = asyncio.Lock()
        self._explanations = 0
        self._explanation = asyncio.Lock()

    async def ping(self, _: Request) -> Response:
        """GET /ping: which model answers; 503 if prediction is dead or stuck."""
        if fault := self.pool.fault():
            raise RequestError(503, fault)
        model = {"model_version": self._predictor.version, "engine": self._predictor.engine}
        return _json({"status": "ok", **model, "quantities": list(self._predictor.labels)})

    async def invocations(self, request: Request) -> Response:
        """POST /invocations: photos in, predictions out."""
        media = media_type(request.headers.get("content-type"), request.headers.get("content-encoding"))
        async with self._body(request) as body:
            payload = await self._read(media, body)
            outcomes = await self._outcomes(request, payload)
        errors = [(number, error) for number, error in enumerate(outcomes, 1) if isinstance(error, PhotoError)]
        request.scope["stocktake.photo_errors"] = len(errors)
        if errors and payload.format != "lines" and not self._batch_mode:
            number, error = errors[0]
            raise RequestError(422, f"photo {number}: {error}" if payload.format == "list" else str(error))
        records = [record(outcome, self._predictor.version) for outcome in outcomes]
        media = answer_type(request.headers.get("accept"), payload.format)
        return Response(write(records, payload.format, media), media_type=media)

    async def page(self, _: Request) -> Response:
        """GET /: the page."""
        content, headers = page()
        return Response(content, headers=headers, media_type="text/html; charset=utf-8")

    async def explain(self, request: Request) -> Response:
        """POST /explain: a photo in; the quantity, and by how much its probability falls without each part, out."""
        media = media_type(request.headers.get("content-type"), request.headers.get("content-encoding"))
        if media not in PHOTO_TYPES:
            raise RequestError(415, f"content-type {media} is not explained: send one photo")
        if self._explanations >= MAX_EXPLANATIONS:
            raise RequestError(503, "too many explanations are asked for: try again later", _BUSY)
        self._explanations += 1
        try:
            async with self._body(request) as body:
                await self._read(media, body)
                request.scope["stocktake.photos"] = 1
                async with self._explanation:
                    quantity, drops = await asyncio.to_thread(self._explain, body)
        except PhotoError as error:
            raise RequestError(422, str(error)) from None
        finally:
            self._explanations -= 1
        return _json({"quantity": quantity, "drops": drops, "model_version": self._predictor.version})

    def _explain(self, photo: bytes) -> tuple[int, list[list[float]]]:
        quantity, drops = occlusion(self.pool, self.pool.prepare(photo))
        return quantity, drops.tolist()

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The request's body, bounded in size and time, and counted in held_bytes for the length of the block."""
        request.scope["stocktake.received"] = 0
        try:
            async with asyncio.timeout(self._settings.client_seconds):
                body = b"".join([chunk async for chunk in self._chunks(request)])
        except ClientDisconnect:
            raise RequestError(CLIENT_LEFT, "the client left") from None
        except TimeoutError:
            reason = f"the body took more than {self._settings.client_seconds:g} s"
            raise RequestError(408, reason, {"connection": "close"}) from None
        else:
            yield body
        finally:
            self.held_bytes -= request.scope["stocktake.received"]

    async def _chunks(self, request: Request) -> AsyncIterator[bytes]:
        limit = self._settings.max_request_bytes
        too_large = RequestError(413, f"the body has more than {limit} bytes")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        async for chunk in request.stream():
            request.scope["stocktake.received"] += len(chunk)
            self.held_bytes += len(chunk)
            if request.scope["stocktake.received"] > limit:
                raise too_large
            if self.held_bytes > self._max_held:
                raise RequestError(503, "the server holds too many requests: try again later", _BUSY)
            yield chunk

    async def _read(self, media: str, body: bytes) -> Payload:
        limit = self._settings.max_request_photos
        if media in PHOTO_TYPES or len(body) < LARGE_BODY:
            return read(media, body, limit)
        async with self._large_body:
            return await asyncio.to_thread(read, media, body, limit)

    async def _outcomes(self, request: Request, payload: Payload) -> list[Prediction | PhotoError]:
        """An outcome a photo of the payload, in order."""
        photos = [photo for photo in payload.photos if isinstance(photo, bytes)]
        request.scope["stocktake.photos"] = len(payload.photos)
        if photos and self.pool.waiting >= self._settings.max_queue:
            raise RequestError(503, "too many photos wait: try again later", _BUSY)
        predicting = asyncio.ensure_future(self.pool.predict(photos))
        watching = asyncio.create_task(_cancel_if_client_leaves(request, predicting))
        try:
            predicted = iter(await predicting)
        except asyncio.CancelledError:
            if watching.done():
                raise RequestError(CLIENT_LEFT, "the client left") from None
            raise
        finally:
            watching.cancel()
        return [next(predicted) if isinstance(photo, bytes) else photo for photo in payload.photos]


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine only."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _cancel_if_client_leaves(request: Request, task: asyncio.Future[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


async def _error_response(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)  # noqa: S101
    return Response(error.body(), error.status, error.headers, JSON)


async def _starlette_error_response(request: Request, error: Exception) -> Response:
    """404 and 405."""
    assert isinstance(error, HTTPException)  # noqa: S101
    return await _error_response(request, RequestError(error.status_code, error.detail, dict(error.headers or {})))


def _json(content: dict[str, object]) -> Response:
    return Response(json.dumps(content).encode(), media_type=JSON)
