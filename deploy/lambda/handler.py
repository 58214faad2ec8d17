"""The Lambda function before the endpoint: a URL, an S3 URI or an API call in, a prediction out.

    {"url": "https://..."}  {"s3_uri": "s3://bucket/key"}  {"photo": "<base64>"}  {"photos": [any of these, ...]}

The same as JSON, or the photo itself as the body, through API Gateway (HTTP API or REST); and S3's notification of a
new object. Answers: quantity, confidence, probabilities, likely quantities, model version, request id. Errors are
problem JSON (RFC 9457) with the right status; in a batch a failed photo is a record among the others.
"""

import json
from functools import cache
from typing import Any
from urllib.parse import unquote_plus

from aws_lambda_powertools import Logger, Metrics, Tracer
from aws_lambda_powertools.event_handler import APIGatewayHttpResolver, APIGatewayRestResolver, CORSConfig, Response
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext
from photos import Endpoint, PhotoRequest, RequestError, decoded
from pydantic import ValidationError
from settings import Settings

logger = Logger(service="stocktake")
tracer = Tracer(service="stocktake")
metrics = Metrics(service="stocktake", namespace="stocktake")
Resolver = APIGatewayHttpResolver | APIGatewayRestResolver


@logger.inject_lambda_context(clear_state=True)
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Answer one event."""
    if "requestContext" in event:
        return dict(_resolver(event.get("version") == "2.0").resolve(event, context))
    if isinstance(event.get("Records"), list):
        return _batch([_new_object(record) for record in event["Records"]], context.aws_request_id)
    return _answer(event, context.aws_request_id)


def _answer(content: Any, request_id: str) -> dict[str, Any]:
    """A prediction, a batch of records, or a problem."""
    if isinstance(content, dict) and isinstance(content.get("photos"), list):
        return _batch(content["photos"], request_id)
    return _record(content, request_id)


def _batch(requests: list[Any], request_id: str) -> dict[str, Any]:
    most = _settings().max_batch
    if len(requests) > most:
        return _problem(RequestError(413, f"{len(requests)} photos in one event: at most {most}"), request_id)
    return {"predictions": [_record(request, f"{request_id}/{place}") for place, request in enumerate(requests)]}


def _record(content: Any, request_id: str) -> dict[str, Any]:
    try:
        if isinstance(content, RequestError):
            raise content
        try:
            request = PhotoRequest.model_validate(content)
        except ValidationError as error:
            raise RequestError(400, error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return _counted({**_endpoint().predict(request, request_id), "request_id": request_id})
    except RequestError as error:
        return _problem(error, request_id)


def _counted(prediction: dict[str, Any]) -> dict[str, Any]:
    metrics.add_metric("Predictions", MetricUnit.Count, 1)
    return prediction


def _problem(error: RequestError, request_id: str) -> dict[str, Any]:
    metrics.add_metric("Problems", MetricUnit.Count, 1)
    logger.warning(error.detail, extra={"status": error.status, "request": request_id})
    return {"status": error.status, "detail": error.detail, "request_id": request_id}


def _new_object(record: Any) -> dict[str, str] | RequestError:
    """The photo that an S3 notification tells of; its key comes encoded like a form's field."""
    try:
        return {"s3_uri": f"s3://{record['s3']['bucket']['name']}/{unquote_plus(record['s3']['object']['key'])}"}
    except (KeyError, TypeError):
        return RequestError(400, "a record is no S3 notification")


@cache
def _settings() -> Settings:
    return Settings()


@cache
def _endpoint() -> Endpoint:
    return Endpoint(_settings())


@cache
def _resolver(is_http_api: bool) -> Resolver:
    origins = list(_settings().cors_origins)
    cors = CORSConfig(allow_origin=origins[0], extra_origins=origins[1:]) if origins else None
    app: Resolver = APIGatewayHttpResolver(cors=cors) if is_http_api else APIGatewayRestResolver(cors=cors)

    @app.post("/predict")
    def predict() -> Response[str]:
        event = app.current_event
        request_id = app.lambda_context.aws_request_id
        try:
            body = event.decoded_body if _is_json(event.headers) else None
            if body is None:
                photo = _raw_body(event.raw_event)
                answer = _counted({**_endpoint().ask(photo, request_id), "request_id": request_id})
            else:
                answer = _answer(_parsed(body), request_id)
        except RequestError as error:
            answer = _problem(error, request_id)
        status = answer.get("status", 200)
        media_type = "application/json" if status == 200 else "application/problem+json"
        return Response(status, media_type, json.dumps(answer))

    return app


def _is_json(headers: Any) -> bool:
    named = {str(name).lower(): str(value) for name, value in (headers or {}).items()}
    return named.get("content-type", "application/json").partition(";")[0].strip().lower().endswith("json")


def _raw_body(event: dict[str, Any]) -> bytes:
    if not event.get("isBase64Encoded"):
        raise RequestError(415, "send JSON, or a photo with its media type (API Gateway must pass it on as binary)")
    return decoded(event.get("body") or "")


def _parsed(body: str | None) -> Any:
    try:
        return json.loads(body or "")
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is no JSON") from None
