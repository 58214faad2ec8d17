"""InvokeEndpoint: a request's bytes to a variant's server, its bytes back, and what CloudWatch has of it."""

from __future__ import annotations

import json
import time
from typing import Any, cast

import urllib3
from moto.cloudwatch.models import cloudwatch_backends
from moto.core.common_types import TYPE_RESPONSE
from moto.core.utils import utcnow
from moto.sagemaker.models import sagemaker_backends
from moto.sagemakerruntime.responses import SageMakerRuntimeResponse

from sagemaker_local.endpoints import Endpoint

MOST_BYTES = 6 * 2**20
"""Of a request or an answer in real time."""
MOST_SERVERLESS_BYTES = 4 * 2**20
_PASSED_ON = (
    "Content-Type",
    "Accept",
    "X-Amzn-SageMaker-Custom-Attributes",
    "X-Amzn-SageMaker-Inference-Id",
    "X-Amzn-SageMaker-Session-Id",
    "X-Amzn-SageMaker-Target-Model",
)


def install() -> None:
    """Put it in the place of moto's, which reads bodies as text and answers with a constant."""
    setup = SageMakerRuntimeResponse.setup_class

    def setup_class(response: SageMakerRuntimeResponse, request: Any, *rest: Any, **named: Any) -> None:
        # moto reads bodies as text or forms: these bytes are the model's.
        vars(response)["payload"] = request.get_data(cache=True)
        setup(response, request, *rest, **named)

    def invoke_endpoint(response: SageMakerRuntimeResponse) -> TYPE_RESPONSE:
        return invoke(response, vars(response)["payload"])

    for name, value in (("setup_class", setup_class), ("use_raw_body", True), ("invoke_endpoint", invoke_endpoint)):
        setattr(SageMakerRuntimeResponse, name, value)


def invoke(response: SageMakerRuntimeResponse, payload: bytes) -> TYPE_RESPONSE:
    """InvokeEndpoint: the bytes to a variant's server, its bytes back."""
    name = response.path.split("/")[2]
    account = response.current_account
    endpoint = cast("Endpoint | None", sagemaker_backends[account][response.region].endpoints.get(name))
    if endpoint is None or endpoint.endpoint_status not in ("InService", "Updating"):
        return _refused(400, "ValidationError", f"Endpoint {name} of account {account} not found.")
    try:
        variant, server, serverless = endpoint.pick_variant(response.headers.get("X-Amzn-SageMaker-Target-Variant"))
    except KeyError as error:
        return _refused(400, "ValidationError", f"Endpoint {name} of account {account} does not have {error.args[0]}.")
    most = MOST_SERVERLESS_BYTES if serverless else MOST_BYTES
    if len(payload) > most:
        return _refused(413, None, f"HTTP content length exceeded {most} bytes.")
    headers = {header: response.headers[header] for header in _PASSED_ON if header in response.headers}
    began = time.perf_counter()
    try:
        reply = server.invoke(payload, headers)
        status, text, kind = reply.status, reply.data.decode("utf-8", "replace"), reply.headers.get("content-type")
    except urllib3.exceptions.TimeoutError:
        status, text = 0, "Your invocation timed out while waiting for a response from container primary"
    except urllib3.exceptions.HTTPError as error:
        status, text = 503, f"{type(error).__name__}: the container gave no answer"
    _measure(response, name, variant, status, time.perf_counter() - began)
    if not 200 <= status < 300:
        side = "client" if 400 <= status < 500 else "server"
        message = (
            f'Received {side} error ({status}) from primary with message "{text}". See the log group '
            f"/aws/sagemaker/Endpoints/{name} in account {account} for more information."
        )
        return _refused(424, "ModelError", message, OriginalStatusCode=status, OriginalMessage=text)
    answer = {"Content-Type": kind or "application/octet-stream", "x-Amzn-Invoked-Production-Variant": variant}
    if attributes := reply.headers.get("x-amzn-sagemaker-custom-attributes"):
        answer["X-Amzn-SageMaker-Custom-Attributes"] = attributes
    return 200, answer, reply.data


def _refused(status: int, kind: str | None, message: str, **more: Any) -> TYPE_RESPONSE:
    headers = {"status": status, "Content-Type": "application/json"} | ({"x-amzn-errortype": kind} if kind else {})
    return status, headers, json.dumps({"Message": message, **more})


def _measure(response: SageMakerRuntimeResponse, endpoint: str, variant: str, status: int, seconds: float) -> None:
    """Put the metrics of a request into CloudWatch."""
    dimensions = [{"Name": "EndpointName", "Value": endpoint}, {"Name": "VariantName", "Value": variant}]
    values = {
        "Invocations": (1.0, "None"),
        "ModelLatency": (seconds * 1e6, "Microseconds"),
        "Invocation4XXErrors": (float(400 <= status < 500), "None"),
        "Invocation5XXErrors": (float(status >= 500 or status == 0), "None"),
    }
    data = [
        {"MetricName": name, "Value": value, "Unit": unit, "Timestamp": utcnow(), "Dimensions": dimensions}
        for name, (value, unit) in values.items()
    ]
    cloudwatch_backends[response.current_account][response.region].put_metric_data("AWS/SageMaker", data)
