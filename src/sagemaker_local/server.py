"""The server: moto's, with the operations that this package adds to it, on this machine's loopback only."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import boto3
from moto.core.common_types import TYPE_RESPONSE
from moto.core.responses import ActionResult, BaseResponse
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from moto.sagemaker.responses import SageMakerResponse

from sagemaker_local import checks, endpoints, invocations, permissions, training_jobs, transform_jobs, tuning_jobs
from sagemaker_local.containers import ACCESS_KEY, Machine, can_confine
from stocktake.errors import StocktakeError
from stocktake.locks import FileLock

HOST = "127.0.0.1"
BUCKET = "stocktake-rehearsal"
ROLE = "stocktake-rehearsal"
"""A bucket and a role that are there from the start."""
_PREFIX = "stocktake-rehearsal-"
_LOCK = "server.lock"
_HEIR = """
import os, shutil, sys, time
sys.stdin.read()
for _ in range(100):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.05)  # containers that are just being killed still write
"""
"""A process that outlives the server: the folder goes with it also when it is killed."""


class Rehearsal:
    """One local AWS. As a context manager it is ended with all that it started."""

    def __init__(
        self,
        port: int = 0,
        region: str = "us-east-1",
        state: str | None = None,
        grace: float = 10.0,
        startup: float = 60.0,
        images: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; port 0 is any free one.

        Raises:
            StocktakeError: the port is in use, or the state folder cannot be written.
        """
        sweep(Path(state or tempfile.gettempdir()))
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=state))
        except OSError as error:
            raise StocktakeError(f"--state {state}: {error.strerror}; name a folder that can be written") from None
        self._lock = FileLock(self.folder / _LOCK)
        self._lock.try_acquire()
        self._heir = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _HEIR, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            confined = can_confine(self.folder)
            port = _bindable(port)
            self.machine = Machine(
                self.folder, region, confined, grace, startup, images or {}, endpoint=f"http://{HOST}:{port}"
            )
            _install(self.machine)
            logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
            self._server = ThreadedMotoServer(HOST, port, verbose=False)
            self._server.start()
            self.role = self._furnish()
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make AWS's clients talk to this one."""
        return {
            **{name: value for name, value in self.machine.aws_environment().items() if name != "AWS_REGION"},
            "SAGEMAKER_VALIDATE_ROLE": "false",
            "STOCKTAKE_BUCKET": BUCKET,
            "STOCKTAKE_ROLE": self.role,
        }

    def close(self) -> None:
        """End every container and the server, and remove the state."""
        machine: Machine | None = getattr(self, "machine", None)
        if machine is not None:
            machine.close()
        if hasattr(self, "_server"):
            self._server.stop()
        self._heir.communicate()
        self._lock.release()

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _furnish(self) -> str:
        """A bucket, and a role that SageMaker may assume and that may do everything: its ARN."""
        client: dict[str, Any] = {
            "endpoint_url": self.machine.endpoint,
            "region_name": self.machine.region,
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": ACCESS_KEY,
        }
        where = {} if self.machine.region == "us-east-1" else {"LocationConstraint": self.machine.region}
        boto3.client("s3", **client).create_bucket(
            Bucket=BUCKET, **({"CreateBucketConfiguration": where} if where else {})
        )
        services = ["sagemaker.amazonaws.com", "lambda.amazonaws.com"]
        statement = {"Effect": "Allow", "Principal": {"Service": services}, "Action": "sts:AssumeRole"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam = boto3.client("iam", **client)
        role = iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument=policy)
        everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
        iam.put_role_policy(RoleName=ROLE, PolicyName="everything", PolicyDocument=json.dumps(everything))
        return str(role["Role"]["Arn"])


def sweep(folder: Path) -> None:
    """Remove what servers have left in `folder` that ended with the whole machine: a living one holds its lock."""
    for left in folder.glob(f"{_PREFIX}*"):
        if not (left / _LOCK).exists() or not os.access(left, os.W_OK):
            continue
        lock = FileLock(left / _LOCK)
        if lock.try_acquire():
            shutil.rmtree(left, ignore_errors=True)
            lock.release()


def _install(machine: Machine) -> None:
    """Put this package's operations in the place of moto's, and the service model's limits before all of them."""
    endpoints.install(machine)
    invocations.install()
    permissions.install()
    ours = training_jobs.operations(machine) | endpoints.operations()
    ours |= transform_jobs.operations(machine) | tuning_jobs.operations(machine)
    inherited = set(dir(BaseResponse))
    names = [name for name in vars(SageMakerResponse) if name not in inherited and not name.startswith("_")]
    for name in {*names, *ours}:
        method = ours.get(name) or getattr(SageMakerResponse, name)
        if callable(method):
            setattr(SageMakerResponse, name, _checked(name, method))
    _answer_what_is_missing()


def _answer_what_is_missing() -> None:
    """An operation that neither moto nor this package has is answered with 501, which no client repeats."""
    call = BaseResponse.call_action

    def call_action(response: BaseResponse) -> TYPE_RESPONSE:
        try:
            return call(response)
        except NotImplementedError as error:
            logging.getLogger(__name__).warning("%s: %s", response.service_name, error)
            return 501, {"status": "501"}, ""

    setattr(BaseResponse, call.__name__, call_action)


def _checked(name: str, method: Callable[[SageMakerResponse], ActionResult]) -> Callable[..., ActionResult]:
    def operation(response: SageMakerResponse) -> ActionResult:
        action = response._get_action()
        checks.check_request(action, response.params)
        result = method(response)
        return ActionResult(checks.without_hollow(action, result.result)) if isinstance(result.result, dict) else result

    operation.__name__ = name
    return operation


def _bindable(port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        StocktakeError: it is in use, or not for everybody.
    """
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise StocktakeError(f"--port {port} cannot be had: {error.strerror}; --port 0 takes a free one") from None
        return int(probe.getsockname()[1])
