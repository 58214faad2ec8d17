"""The Lambda function in Lambda's own runtime client, before a real endpoint on the emulator."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from emulated_aws import EmulatedAws
from lambda_runtime import LambdaRuntime, running_function

FUNCTION = Path(__file__).parents[2] / "deploy" / "lambda"
ENDPOINT = "before-lambda"
pytestmark = [pytest.mark.aws, pytest.mark.slow]


@pytest.fixture(scope="module")
def photo(bin_photo: Callable[..., bytes]) -> bytes:
    return bin_photo(1)


@pytest.fixture(scope="module")
def endpoint(emulator: EmulatedAws, photo: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint with a model that always answers 2."""
    from mlflow.deployments import get_deploy_client

    from stocktake.models.export import export_model
    from stocktake.models.majority import fit_majority
    from stocktake.serving.pyfunc import save_pyfunc

    folder = tmp_path_factory.mktemp("lambda")
    export_model(fit_majority((1, 2, 3), 32, np.array([1, 2, 3, 2, 2])), folder / "exported")
    model = save_pyfunc(folder / "exported", folder / "model", photo)
    config = {"execution_role_arn": emulator.role, "bucket": emulator.bucket, "image_url": "1.dkr.ecr/stocktake:1"}
    config |= {"instance_type": "ml.c7i.large"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boto3, "DEFAULT_SESSION", None)  # it may hold another test's keys
        for name, value in emulator.environment.items():
            patch.setenv(name, value)
        client = get_deploy_client("sagemaker:/us-east-1")
        client.create_deployment(ENDPOINT, str(model), "python_function", config)
        yield ENDPOINT
        client.delete_deployment(ENDPOINT)


@pytest.fixture(scope="module")
def function(emulator: EmulatedAws, endpoint: str) -> Iterator[LambdaRuntime]:
    """The function, allowed to fetch from this machine."""
    environment = {
        **emulator.environment,
        "STOCKTAKE_ENDPOINT": endpoint,
        "STOCKTAKE_BUCKETS": f"another-bucket {emulator.bucket}",
        "STOCKTAKE_CORS_ORIGINS": "https://warehouse.example",
        "STOCKTAKE_ALLOW_HTTP": "true",
        "STOCKTAKE_ALLOW_PRIVATE": "true",
        "STOCKTAKE_MAX_BATCH": "5",
    }
    with running_function(FUNCTION, environment) as runtime:
        yield runtime


@contextmanager
def answering(*answers: tuple[int, dict[str, str], bytes]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers in turn, the last one for ever; its address and the requests' paths."""
    left, paths = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            paths.append(self.path)
            status, headers, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        server.server_close()


def http_api(body: str, headers: dict[str, str], *, encoded: bool = False) -> dict[str, Any]:
    """An event of API Gateway's HTTP API."""
    return {
        "version": "2.0",
        "rawPath": "/predict",
        "headers": headers,
        "requestContext": {"http": {"method": "POST", "path": "/predict"}, "stage": "$default"},
        "body": body,
        "isBase64Encoded": encoded,
    }


def rest_api(body: str, headers: dict[str, str], *, encoded: bool = False) -> dict[str, Any]:
    """An event of API Gateway's REST API."""
    return {
        "path": "/predict",
        "httpMethod": "POST",
        "headers": headers,
        "requestContext": {"stage": "prod", "path": "/prod/predict"},
        "body": body,
        "isBase64Encoded": encoded,
    }


def answer_of(function: LambdaRuntime, event: Any) -> dict[str, Any]:
    invocation = function.invoke(event)
    assert not invocation.failed, invocation.answer
    answer: dict[str, Any] = invocation.answer
    return answer


def test_a_url_is_answered_with_a_prediction(function: LambdaRuntime, photo: bytes) -> None:
    with answering((200, {"Content-Type": "text/plain"}, photo)) as (address, paths):
        answer = answer_of(function, {"url": f"{address}/bins/1.jpg"})
    assert (answer["quantity"], paths) == (2, ["/bins/1.jpg"])
    assert answer["request_id"]
    assert 0 < answer["confidence"] <= 1


def test_an_s3_uri_is_answered_and_a_bucket_that_is_not_allowed_is_refused(
    function: LambdaRuntime, emulator: EmulatedAws, photo: bytes
) -> None:
    uri = emulator.put("lambda/a bin+1.jpg", photo)
    assert answer_of(function, {"s3_uri": uri})["quantity"] == 2
    assert answer_of(function, {"s3_uri": "s3://secrets/key"})["status"] == 403
    assert answer_of(function, {"s3_uri": f"s3://{emulator.bucket}/lambda/nothing.jpg"})["status"] == 404
    assert answer_of(function, {"s3_uri": f"s3://{emulator.bucket}"})["status"] == 400


def test_a_notification_of_a_new_object_is_answered(
    function: LambdaRuntime, emulator: EmulatedAws, photo: bytes
) -> None:
    emulator.put("lambda/a bin+1.jpg", photo)
    record = {"s3": {"bucket": {"name": emulator.bucket}, "object": {"key": "lambda/a+bin%2B1.jpg"}}}
    first, second = answer_of(function, {"Records": [record, {"eventSource": "aws:sqs"}]})["predictions"]
    assert (first["quantity"], second["status"]) == (2, 400)


@pytest.mark.parametrize("event", [http_api, rest_api])
def test_an_api_takes_a_photo_and_json(function: LambdaRuntime, photo: bytes, event: Callable[..., Any]) -> None:
    text = base64.b64encode(photo).decode()
    raw = answer_of(function, event(text, {"content-type": "image/jpeg"}, encoded=True))
    assert (raw["statusCode"], json.loads(raw["body"])["quantity"]) == (200, 2)
    headers = {"content-type": "application/json", "origin": "https://warehouse.example"}
    parsed = answer_of(function, event(json.dumps({"photo": text}), headers))
    assert (parsed["statusCode"], json.loads(parsed["body"])["quantity"]) == (200, 2)
    sent = {name.lower(): value for name, value in {**parsed.get("headers", {})}.items()}
    sent |= {name.lower(): values[0] for name, values in parsed.get("multiValueHeaders", {}).items()}
    assert sent["access-control-allow-origin"] == "https://warehouse.example"


@pytest.mark.parametrize(
    ("body", "content_type", "encoded", "status"),
    [
        ("{", "application/json", False, 400),
        ("[" * 100_000, "application/json", False, 400),
        ("{}", "application/json", False, 400),
        ('{"url": "https://a.example", "s3_uri": "s3://b/c"}', "application/json", False, 400),
        ('{"photo": "not base64!"}', "application/json", False, 400),
        ('{"password": "x"}', "application/json", False, 400),
        ("photo", "image/jpeg", False, 415),
        (base64.b64encode(b"GIF89a").decode(), "image/jpeg", True, 415),
        (base64.b64encode(b"\xff\xd8\xff" + bytes(6 * 2**20)).decode(), "image/jpeg", True, 413),
    ],
    ids=["no JSON", "deep JSON", "nothing", "two things", "no base64", "unknown key", "text", "GIF", "too large"],
)
def test_a_request_that_cannot_be_answered_is_a_problem(
    body: str, content_type: str, encoded: bool, status: int, function: LambdaRuntime
) -> None:
    answer = answer_of(function, http_api(body, {"content-type": content_type}, encoded=encoded))
    problem = json.loads(answer["body"])
    assert (answer["statusCode"], problem["status"]) == (status, status)
    assert answer["headers"]["Content-Type"] == "application/problem+json"
    assert problem["detail"]


def test_a_photo_that_the_model_cannot_read_is_the_callers_fault(function: LambdaRuntime, photo: bytes) -> None:
    broken = base64.b64encode(photo[: len(photo) // 3]).decode()
    answer = answer_of(function, {"photo": broken})
    assert 400 <= answer["status"] < 500


def test_in_a_batch_a_failed_photo_is_a_record_among_the_others(function: LambdaRuntime, photo: bytes) -> None:
    good = {"photo": base64.b64encode(photo).decode()}
    records = answer_of(function, {"photos": [good, {"url": "ftp://nowhere"}, "text", good]})["predictions"]
    assert [record.get("quantity", record.get("status")) for record in records] == [2, 400, 400, 2]
    assert len({record["request_id"] for record in records}) == 4
    assert answer_of(function, {"photos": [good] * 6})["status"] == 413


def test_a_busy_endpoint_is_asked_again_within_the_budget_and_no_longer(photo: bytes) -> None:
    busy = (429, {"x-amzn-errortype": "ThrottlingException"}, b'{"message": "slow down"}')
    fine = (200, {"Content-Type": "application/json"}, b'{"quantity": 4}')
    event = {"photo": base64.b64encode(photo).decode()}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "STOCKTAKE_ENDPOINT": "bins"}
    for answers, expected in (((busy, busy, fine), 4), ((busy,), 429)):
        with answering(*answers) as (address, paths):
            environment = {**keys, "AWS_ENDPOINT_URL": address, "STOCKTAKE_SECONDS": "2"}
            with running_function(FUNCTION, environment) as runtime:
                invocation = runtime.invoke(event)
        assert expected in (invocation.answer.get("quantity"), invocation.answer.get("status"))
        assert 1 < len(paths) <= 6
        assert invocation.milliseconds < 6000


def test_an_endpoint_that_is_not_there_or_does_not_answer_is_told_apart(emulator: EmulatedAws, photo: bytes) -> None:
    event = {"photo": base64.b64encode(photo).decode()}
    with running_function(FUNCTION, {**emulator.environment, "STOCKTAKE_ENDPOINT": "gone"}) as runtime:
        assert answer_of(runtime, event)["status"] == 502
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silence = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "STOCKTAKE_SECONDS": "1"}
        with running_function(FUNCTION, {**emulator.environment, **silence, "STOCKTAKE_ENDPOINT": "silent"}) as runtime:
            assert answer_of(runtime, event)["status"] == 504
