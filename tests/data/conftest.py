"""Buckets: one that is private, on moto; and a clean AWS environment."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from s3_server import Server, serve


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of AWS in the environment, and no machine's role is looked for."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")


@pytest.fixture(scope="module")
def make_bucket() -> Iterator[Callable[[pytest.MonkeyPatch], str]]:
    """make_bucket(monkeypatch): s3:// address of an empty bucket on moto, with credentials in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()

    def make(monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        name = f"bins-{os.urandom(4).hex()}"
        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
        return f"s3://{name}"

    yield make
    server.stop()


@pytest.fixture
def private_bucket(
    make_bucket: Callable[[pytest.MonkeyPatch], str], no_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    """s3:// address of an empty bucket, with credentials for it in the environment."""
    return make_bucket(monkeypatch)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """served(folder, bucket, faults, page, delay): a server of the folder, whose address is in the environment."""
    with ExitStack() as stack:

        def start(folder: Path, **settings: Any) -> Server:
            server = stack.enter_context(serve(folder, **settings))
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the service's own address comes first
            return server

        yield start
