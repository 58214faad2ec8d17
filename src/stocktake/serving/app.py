"""The application: /ping and /invocations as SageMaker asks for them, and a page for people."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from stocktake.data.images import PhotoError
from stocktake.serving.engine_pool import EnginePool
from stocktake.serving.explanation import occlusion, page
from stocktake.serving.payloads import PHOTO_TYPES, Payload, error_response, json_response, media_type, read, write
from stocktake.serving.predictor import Prediction, Predictor, record
from stocktake.serving.settings import MEBIBYTE, ServerSettings
from stocktake.serving.telemetry import CLIENT_LEFT, RequestLoggingMiddleware

MAX_PIXELS = 16_000_000
"""Of a photo, fewer than a training set may have: threads decode several at once."""
MAX_BODIES_BYTES = 64 * MEBIBYTE
"""Of all bodies that a worker has at once, unless one request may be half as large; beyond it is busy."""
_CANCELLED_SECONDS = 0.2
"""In which requests that drain_seconds cut off are answered with 503; then uvicorn ends the process."""
_BUSY = {"retry-after": "1"}


def create_app(predictor: Predictor, settings: ServerSettings, *, batch_mode: bool = False) -> Starlette:
    """The application of one worker; `app.state.service` answers its requests.

    Args:
        predictor: the model.
        settings: all but host, port, workers and threads, which are used by now.
        batch_mode: for a batch transform job: a photo that cannot be used is answered with an error record and status
            200 in every request format, since any other status would end the job.
    """
    service = Service(predictor, settings, batch_mode)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        blank = np.zeros((1, predictor.size, predictor.size, 3), dtype=np.uint8)
        await asyncio.to_thread(predictor.probabilities, blank)  # the first pass allocates
        yield {"client_seconds": settings.client_seconds}  # for the connections
        service.pool.close()
        await asyncio.sleep(_CANCELLED_SECONDS)

    routes = [Route("/ping", service.ping), Route("/invocations", service.invocations, methods=["POST"])]
    if settings.page:
        routes += [Route("/", service.page), Route("/explain", service.explain, methods=["POST"])]
    paths = frozenset(route.path for route in routes)
    middleware = [Middleware(RequestLoggingMiddleware, paths=paths, model_version=predictor.version)]
    if _is_loopback(settings.host):
        # a web page whose name its owner points at 127.0.0.1 could read a local server's answers
        own = ["localhost", "127.0.0.1", "::1", "[::1]", settings.host]
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=own, www_redirect=False))
    app = Starlette(
        routes=routes, lifespan=lifespan, middleware=middleware, exception_handlers={HTTPException: _refuse}
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class Service:
    """One worker's requests."""

    def __init__(self, predictor: Predictor, settings: ServerSettings, batch_mode: bool) -> None:
        self._predictor, self._settings, self._batch_mode = predictor, settings, batch_mode
        self.pool = EnginePool(predictor, settings.stuck_seconds)
        self._max_bodies_bytes = max(MAX_BODIES_BYTES, 2 * settings.max_request_bytes)
        self.bodies_bytes = 0
        self._parsing, self._explaining = asyncio.Lock(), asyncio.Lock()

    async def ping(self, _: Request) -> Response:
        """GET /ping: which model answers; 503 if prediction is dead or stuck."""
        if fault := self.pool.fault():
            raise HTTPException(503, fault)
        model = {"model_version": self._predictor.version, "engine": self._predictor.engine}
        return json_response({"status": "ok", **model, "quantities": self._predictor.labels})

    async def invocations(self, request: Request) -> Response:
        """POST /invocations: photos in, predictions out."""
        media = media_type(request.headers)
        async with self._body(request) as body:
            payload = await self._read(media, body)
            outcomes = await self._outcomes(request, payload)
        errors = [(number, error) for number, error in enumerate(outcomes, 1) if isinstance(error, PhotoError)]
        request.scope["stocktake.photo_errors"] = len(errors)
        if errors and payload.format != "lines" and not self._batch_mode:
            number, error = errors[0]
            raise HTTPException(422, f"photo {number}: {error}" if payload.format == "list" else str(error))
        return write([record(outcome, self._predictor.version) for outcome in outcomes], payload.format)

    async def page(self, _: Request) -> Response:
        """GET /: the page."""
        content, headers = page()
        return Response(content, headers=headers, media_type="text/html; charset=utf-8")

    async def explain(self, request: Request) -> Response:
        """POST /explain: a photo in; the quantity, and by how much its probability falls without each part, out."""
        media = media_type(request.headers)
        if media not in PHOTO_TYPES:
            raise HTTPException(415, f"content-type {media} is not explained: send one photo")
        async with self._body(request) as body, self._explaining:
            await self._read(media, body)
            request.scope["stocktake.photos"] = 1
            try:
                quantity, drops = await asyncio.to_thread(occlusion, self._predictor, body)
            except PhotoError as error:
                raise HTTPException(422, str(error)) from None
        version = self._predictor.version
        return json_response({"quantity": quantity, "drops": drops.tolist(), "model_version": version})

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The request's body, bounded in size and time, and counted in bodies_bytes for the length of the block."""
        limit, body = self._settings.max_request_bytes, bytearray()
        too_large = HTTPException(413, f"the body has more than {limit} bytes")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self._settings.client_seconds):
                async for chunk in request.stream():
                    body += chunk
                    self.bodies_bytes += len(chunk)
                    if len(body) > limit:
                        raise too_large
                    if self.bodies_bytes > self._max_bodies_bytes:
                        raise HTTPException(503, "the server has too many requests: try again later", _BUSY)
        except ClientDisconnect:
            raise HTTPException(CLIENT_LEFT, "the client left") from None
        except TimeoutError:
            reason = f"the body took more than {self._settings.client_seconds:g} s"
            raise HTTPException(408, reason, {"connection": "close"}) from None
        else:
            yield bytes(body)
        finally:
            self.bodies_bytes -= len(body)
            request.scope["stocktake.received"] = len(body)

    async def _read(self, media: str, body: bytes) -> Payload:
        """The body's photos. JSON is parsed in a thread, one at a time: a hostile one grows tenfold meanwhile."""
        limit = self._settings.max_request_photos
        if media in PHOTO_TYPES:
            return read(media, body, limit)
        async with self._parsing:
            return await asyncio.to_thread(read, media, body, limit)

    async def _outcomes(self, request: Request, payload: Payload) -> list[Prediction | PhotoError]:
        """An outcome a photo of the payload, in order."""
        photos = [photo for photo in payload.photos if isinstance(photo, bytes)]
        request.scope["stocktake.photos"] = len(payload.photos)
        if photos and self.pool.waiting >= self._settings.max_queue:
            raise HTTPException(503, "too many photos wait: try again later", _BUSY)
        predicting = asyncio.ensure_future(self.pool.predict(photos))
        watching = asyncio.create_task(_cancel_if_client_leaves(request, predicting))
        try:
            predicted = iter(await predicting)
        except asyncio.CancelledError:
            if watching.done():
                raise HTTPException(CLIENT_LEFT, "the client left") from None
            raise
        finally:
            watching.cancel()
        return [next(predicted) if isinstance(photo, bytes) else photo for photo in payload.photos]


async def _cancel_if_client_leaves(request: Request, task: asyncio.Future[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    return error_response(error)


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
