"""Attacks on the emulator: a call can start programs on this machine, so that pages and strangers must get nothing."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import UNSIGNED
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.client import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from emulated_aws import PATIENCE, EmulatedAws

pytestmark = pytest.mark.aws
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def loot(tmp_path: Path) -> Path:
    """The file that an attack writes when it gets through."""
    return tmp_path / "loot"


def training_job(emulator: EmulatedAws, loot: Path, name: str) -> bytes:
    """The body of a CreateTrainingJob that runs a shell."""
    request: dict[str, Any] = {
        "TrainingJobName": name,
        "AlgorithmSpecification": {
            "TrainingImage": "image:1",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["sh", "-c", f"touch {loot}"],
        },
        "RoleArn": emulator.role,
        "OutputDataConfig": {"S3OutputPath": f"s3://{emulator.bucket}/output"},
        "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 10},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    }
    return json.dumps(request).encode()


def send(
    emulator: EmulatedAws, body: bytes, headers: dict[str, str], method: str = "POST", path: str = "/"
) -> http.client.HTTPResponse:
    """A request as an attacker writes it."""
    connection = http.client.HTTPConnection(emulator.endpoint.removeprefix("http://"), timeout=PATIENCE)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        response.read()
        return response
    finally:
        connection.close()


def signed(emulator: EmulatedAws, body: bytes, access_key: str, secret_key: str) -> dict[str, str]:
    """Headers of a CreateTrainingJob that is signed with a key."""
    headers = {"X-Amz-Target": "SageMaker.CreateTrainingJob", "Content-Type": "application/x-amz-json-1.1"}
    request = AWSRequest("POST", emulator.endpoint, headers, body)
    SigV4Auth(Credentials(access_key, secret_key), "sagemaker", "us-east-1").add_auth(request)
    return dict(request.headers)


def test_a_request_of_a_web_page_is_refused_even_if_it_is_signed(emulator: EmulatedAws, loot: Path) -> None:
    body = training_job(emulator, loot, "by-page")
    keys = emulator.environment["AWS_ACCESS_KEY_ID"], emulator.environment["AWS_SECRET_ACCESS_KEY"]
    headers = signed(emulator, body, *keys)
    for origin in ("https://evil.example", "null", emulator.endpoint):
        response = send(emulator, body, headers | {"Origin": origin})
        assert response.status == 403
        assert response.getheader("Access-Control-Allow-Origin") is None
    preflight = {
        "Origin": "https://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-amz-target",
    }
    response = send(emulator, b"", preflight, method="OPTIONS")
    assert (response.status, response.getheader("Access-Control-Allow-Origin")) == (403, None)
    assert not loot.exists()
    # The same request without an Origin is the owner's, whose answers no page may read.
    response = send(emulator, body, headers)
    assert (response.status, response.getheader("Access-Control-Allow-Origin")) == (200, None)
    assert emulator.ended("by-page")["TrainingJobStatus"] == "Completed"
    assert loot.exists()


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/sagemaker/aws4_request, Signature=0",
        "AWS4-HMAC-SHA256 Credential=/20260101/us-east-1/sagemaker/aws4_request, Signature=0",
        "AWS testing:c2lnbmF0dXJl",
        "Bearer testing",
    ],
)
def test_unsigned_calls_and_unknown_keys_are_refused(
    emulator: EmulatedAws, loot: Path, authorization: str | None
) -> None:
    body = training_job(emulator, loot, "by-stranger")
    headers = {"X-Amz-Target": "SageMaker.CreateTrainingJob", "Content-Type": "text/plain"}
    headers |= {"Authorization": authorization} if authorization else {}
    assert send(emulator, body, headers).status == 403
    assert send(emulator, b"x", headers, "PUT", f"/{emulator.bucket}/planted").status == 403
    for path in ("/moto-api/reset", "/moto-api/data.json", "/latest/meta-data/iam/security-credentials/", "/"):
        assert send(emulator, b"", headers, "GET", path).status == 403
    query = "?X-Amz-Credential=testing%2F20260101%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Signature=0"
    assert send(emulator, b"", {}, "GET", f"/{emulator.bucket}/{query}").status == 403
    with pytest.raises(ClientError):
        emulator.job("by-stranger")
    assert not loot.exists()
    assert emulator.keys("planted") == []


def test_clients_see_the_reason(emulator: EmulatedAws) -> None:
    """In the words of the service that they call."""
    for service, call in (("sagemaker", "list_training_jobs"), ("s3", "list_buckets"), ("iam", "list_users")):
        place: dict[str, Any] = {"endpoint_url": emulator.endpoint, "region_name": "us-east-1"}
        stranger = boto3.client(service, aws_access_key_id="testing", aws_secret_access_key="testing", **place)
        with pytest.raises(ClientError) as refused:
            getattr(stranger, call)()
        assert refused.value.response["Error"]["Code"] == "UnrecognizedClientException"
        with pytest.raises(ClientError) as refused:
            getattr(boto3.client(service, config=Config(signature_version=UNSIGNED), **place), call)()
        assert refused.value.response["Error"]["Code"] == "MissingAuthenticationToken"


def test_presigned_urls_of_the_owner_work(emulator: EmulatedAws) -> None:
    emulator.put("signed/a", "A")
    url = emulator.client("s3").generate_presigned_url("get_object", {"Bucket": emulator.bucket, "Key": "signed/a"})
    assert send(emulator, b"", {}, "GET", url.removeprefix(emulator.endpoint)).status == 200


def test_every_start_has_another_key(emulator: EmulatedAws, tmp_path: Path) -> None:
    other = EmulatedAws.start("--state", str(tmp_path))
    try:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert other.environment[name] != emulator.environment[name]
            assert len(other.environment[name]) > 20
        body = training_job(other, tmp_path / "loot", "by-neighbour")
        keys = emulator.environment["AWS_ACCESS_KEY_ID"], emulator.environment["AWS_SECRET_ACCESS_KEY"]
        assert send(other, body, signed(other, body, *keys)).status == 403
    finally:
        other.close()
    assert not (tmp_path / "loot").exists()


@contextmanager
def evil_site(page: str) -> Iterator[str]:
    """A web site of another origin."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.mark.browser
def test_a_page_in_a_browser_runs_nothing(emulator: EmulatedAws, loot: Path) -> None:
    """The page has guessed everything but that it is a page: it even knows the access key."""
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    body = training_job(emulator, loot, "by-browser")
    keys = emulator.environment["AWS_ACCESS_KEY_ID"], emulator.environment["AWS_SECRET_ACCESS_KEY"]
    headers = {name: value for name, value in signed(emulator, body, *keys).items() if name != "Content-Length"}
    call = """async ([url, headers, body, mode]) => {
        try {
            const response = await fetch(url, {method: "POST", headers, body, mode});
            return response.type + " " + response.status;
        } catch (error) { return "blocked"; }
    }"""
    with evil_site("<title>Win a prize</title>") as site, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(site)
        assert page.evaluate(call, [emulator.endpoint, headers, body.decode(), "cors"]) == "blocked"
        page.evaluate(call, [emulator.endpoint, {"Content-Type": "text/plain"}, body.decode(), "no-cors"])
        browser.close()
    with pytest.raises(ClientError):
        emulator.job("by-browser")
    assert not loot.exists()
