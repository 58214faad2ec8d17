"""The server: moto's, with this package's operations in the place of moto's, on this machine's loopback only."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
from moto.moto_server import werkzeug_app
from werkzeug.serving import make_server

from sagemaker_local.authentication import AuthenticatedApplication
from sagemaker_local.containers import supports_namespaces
from sagemaker_local.context import EmulatorContext
from sagemaker_local.operations import install

HOST = "127.0.0.1"
BUCKET = "sagemaker-local"
ROLE = "sagemaker-local"
"""A bucket and a role that are there from the start."""
_PREFIX = "sagemaker-local-"
_WATCHDOG = """
import os, shutil, sys, time
sys.stdin.read()
for _ in range(100):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.05)  # containers that are just being killed still write
"""
"""Program of the cleanup watchdog: a process that outlives the server and removes its folder, also after SIGKILL."""


class EmulatorError(Exception):
    """A setting that cannot be used; the message names it."""


class Emulator:
    """One SageMaker. As a context manager it is ended with everything that it started."""

    def __init__(
        self,
        port: int = 0,
        region: str = "us-east-1",
        state: Path | None = None,
        grace: float = 10.0,
        startup: float = 60.0,
        images: Mapping[str, list[str]] | None = None,
    ) -> None:
        """Start it; port 0 is any free one.

        Raises:
            EmulatorError: the port is in use, or the state folder cannot be written.
        """
        try:
            listener = socket.create_server((HOST, port))
        except OSError as error:
            raise EmulatorError(f"--port {port}: {error.strerror}; --port 0 takes a free one") from None
        endpoint = "http://{}:{}".format(*listener.getsockname())
        with listener:  # the server has a copy of its own
            state = (state or Path(tempfile.gettempdir())).absolute()
            try:
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=state))
            except OSError as error:
                raise EmulatorError(f"--state {state}: {error.strerror}; name a folder that can be written") from None
            command = [sys.executable, "-I", "-S", "-c", _WATCHDOG, str(folder)]
            self._watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            self.context = EmulatorContext(
                folder, region, endpoint, supports_namespaces(folder), grace, startup, images or {}
            )
            install(self.context)
            logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
            application = werkzeug_app.DomainDispatcherApplication(werkzeug_app.create_backend_app)
            self._server = make_server(
                HOST,
                port,
                AuthenticatedApplication(application, self.context.access_key),
                threaded=True,
                request_handler=werkzeug_app.MotoRequestHandler,
                fd=listener.fileno(),
            )
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            self.role = self._bootstrap()
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead AWS clients here, and the names of what is here."""
        return {
            **self.context.aws_environment(),
            "SAGEMAKER_VALIDATE_ROLE": "false",
            "SAGEMAKER_LOCAL_BUCKET": BUCKET,
            "SAGEMAKER_LOCAL_ROLE": self.role,
        }

    def close(self) -> None:
        """End every container and the server, and remove the folder."""
        self.context.close()
        self._server.shutdown()
        self._watchdog.communicate()

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bootstrap(self) -> str:
        """Create the bucket, and the role that SageMaker may assume and that may do everything; return its ARN."""
        keys: dict[str, Any] = {
            "endpoint_url": self.context.endpoint,
            "region_name": self.context.region,
            "aws_access_key_id": self.context.access_key,
            "aws_secret_access_key": self.context.secret_key,
        }
        place = {"CreateBucketConfiguration": {"LocationConstraint": self.context.region}}
        boto3.client("s3", **keys).create_bucket(Bucket=BUCKET, **(place if self.context.region != "us-east-1" else {}))
        services = ["sagemaker.amazonaws.com", "lambda.amazonaws.com"]
        iam = boto3.client("iam", **keys)
        role = iam.create_role(
            RoleName=ROLE, AssumeRolePolicyDocument=_policy("sts:AssumeRole", Principal={"Service": services})
        )
        iam.put_role_policy(RoleName=ROLE, PolicyName="everything", PolicyDocument=_policy("*", Resource="*"))
        return str(role["Role"]["Arn"])


def _policy(action: str, **statement: Any) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": action, **statement}]})
