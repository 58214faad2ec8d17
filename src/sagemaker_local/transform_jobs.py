"""Batch transform: a model's container over the objects of a prefix, an answer per object or per line."""

from __future__ import annotations

import gzip
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from moto.core.responses import ActionResult, EmptyResult
from moto.core.utils import utcnow
from moto.sagemaker.exceptions import ResourceNotFound, ValidationError
from moto.sagemaker.models import FakeTransformJob, SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse

from sagemaker_local import checks
from sagemaker_local.containers import Machine
from sagemaker_local.listings import page
from sagemaker_local.model_servers import ModelServer, ModelServerError
from sagemaker_local.records import LogStream
from sagemaker_local.storage import Storage, relative_path, split_uri

LOG_GROUP = "/aws/sagemaker/TransformJobs"
_MEGABYTE = 2**20
_RETRY_SECONDS = 0.5


class PayloadError(Exception):
    """An object that the job could not transform: the reason, as AWS words it."""


class TransformJob:
    """One job: what is told about it, and the thread that runs it."""

    def __init__(self, machine: Machine, backend: SageMakerModelBackend, request: dict[str, Any]) -> None:
        self.name: str = request["TransformJobName"]
        self.arn = FakeTransformJob.arn_formatter(self.name, backend.account_id, backend.region_name)
        self.tags: list[dict[str, str]] = request.get("Tags") or []
        self._machine, self._backend, self._request = machine, backend, request
        self._storage = Storage(backend)
        self._stopping = threading.Event()
        now = utcnow()
        self.facts: dict[str, Any] = {name: value for name, value in request.items() if name != "Tags"} | {
            "TransformJobArn": self.arn,
            "TransformJobStatus": "InProgress",
            "CreationTime": now,
            "LastModifiedTime": now,
        }

    def start(self) -> None:
        threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def stop(self) -> None:
        """Ask it to end; objects that were begun are finished."""
        if self.facts["TransformJobStatus"] == "InProgress":
            self._stopping.set()
            self.facts["TransformJobStatus"] = "Stopping"

    def _run(self) -> None:
        try:
            self._transform()
            status, reason = ("Stopped" if self._stopping.is_set() else "Completed"), ""
        except (ModelServerError, PayloadError) as error:
            status, reason = "Failed", str(error)
            if isinstance(error, ModelServerError) and reason.startswith("did"):
                reason = f"AlgorithmError: The container {reason}. See job logs for more information"
        except Exception as error:  # whatever it is must end the job: it would be in progress for ever
            status, reason = "Failed", f"InternalServerError: {type(error).__name__}: {error}"
        if reason:
            self.facts["FailureReason"] = reason[:1024]
        now = utcnow()
        self.facts |= {"TransformEndTime": now, "LastModifiedTime": now, "TransformJobStatus": status}

    def _transform(self) -> None:
        request = self._request
        source = request["TransformInput"]["DataSource"]["S3DataSource"]
        objects = self._storage.objects(source)
        environment = (request.get("Environment") or {}) | {
            "SAGEMAKER_BATCH": "true",
            "SAGEMAKER_MAX_PAYLOAD_IN_MB": str(request.get("MaxPayloadInMB", 6)),
            "SAGEMAKER_BATCH_STRATEGY": request.get("BatchStrategy", "MultiRecord"),
            "SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": str(request.get("MaxConcurrentTransforms", 1)),
        }
        stream = LogStream(self._backend, LOG_GROUP, f"{self.name}/i-{time.time_ns():017x}")
        server = ModelServer(self._machine, self._backend, request["ModelName"], stream, environment)
        try:
            server.wait_ready(self._stopping.is_set)
            self.facts["TransformStartTime"] = utcnow()
            prefix = split_uri(source["S3Uri"])[1]
            with ThreadPoolExecutor(request.get("MaxConcurrentTransforms") or 1) as pool:
                for done in [pool.submit(self._transform_one, server, stream, uri, prefix) for uri, _ in objects]:
                    done.result()
        finally:
            server.close()

    def _transform_one(self, server: ModelServer, stream: LogStream, uri: str, prefix: str) -> None:
        """One object into <key>.out.

        Raises:
            PayloadError: it is too large, or the model refuses it.
        """
        if self._stopping.is_set():
            return
        asked, output = self._request["TransformInput"], self._request["TransformOutput"]
        content = self._storage.read(uri)
        if asked.get("CompressionType") == "Gzip":
            content = gzip.decompress(content)
        headers = {"Content-Type": asked["ContentType"]} if asked.get("ContentType") else {}
        headers |= {"Accept": output["Accept"]} if output.get("Accept") else {}
        answers = []
        for payload in self._payloads(content):
            if len(payload) > self._most_bytes:
                raise PayloadError(f"ClientError: a payload of {uri} exceeds MaxPayloadInMB. See job logs")
            try:
                answers.append(self._ask(server, payload, headers))
            except PayloadError as error:
                stream.write(f"{uri}: {error}")
                raise PayloadError(f"{error}: {uri}. See job logs for more information") from None
        joint = b"\n" if output.get("AssembleWith") == "Line" else b""
        whole = b"".join(answer.removesuffix(joint) + joint for answer in answers)
        key = relative_path(split_uri(uri)[1], prefix)
        self._storage.write(f"{output['S3OutputPath'].rstrip('/')}/{key}.out", whole)

    @property
    def _most_bytes(self) -> int:
        return int(self._request.get("MaxPayloadInMB", 6)) * _MEGABYTE

    def _payloads(self, content: bytes) -> Iterator[bytes]:
        """What is sent of an object: all of it, its lines, or as many lines as fit into a payload."""
        if self._request["TransformInput"].get("SplitType", "None") == "None":
            yield content
            return
        batch = b""
        for line in content.splitlines(keepends=True):
            if self._request.get("BatchStrategy") == "SingleRecord":
                yield line.rstrip(b"\r\n")
            elif batch and len(batch) + len(line) > self._most_bytes:
                yield batch
                batch = line
            else:
                batch += line
        if batch:
            yield batch

    def _ask(self, server: ModelServer, payload: bytes, headers: dict[str, str]) -> bytes:
        client = self._request.get("ModelClientConfig") or {}
        timeout = client.get("InvocationsTimeoutInSeconds", 600)
        said = "no answer"
        for _ in range(1 + client.get("InvocationsMaxRetries", 3)):
            try:
                reply = server.invoke(payload, headers, timeout)
            except (OSError, http.client.HTTPException) as error:
                said = f"AlgorithmError: {type(error).__name__}"
            else:
                if reply.status == http.client.OK:
                    return reply.body
                said = f"ClientError: {reply.status} {reply.body.decode('utf-8', 'replace')[:200]}"
                if reply.status < http.client.INTERNAL_SERVER_ERROR:
                    break
            time.sleep(_RETRY_SECONDS)
        raise PayloadError(said)


def operations(machine: Machine) -> dict[str, Callable[[SageMakerResponse], ActionResult]]:
    """Of SageMaker's API, by moto's names for them."""

    def create_transform_job(response: SageMakerResponse) -> ActionResult:
        request, backend = response.params, response.sagemaker_backend
        name, jobs = request["TransformJobName"], backend.transform_jobs
        arn = FakeTransformJob.arn_formatter(name, backend.account_id, backend.region_name)
        checks.check_new("Transform job", name, cast("dict[str, Any]", jobs), arn)
        backend.describe_model(request["ModelName"])
        storage = Storage(backend)
        given = request["TransformInput"]
        checks.check_channels(backend, storage, [{"ChannelName": "TransformInput", "DataSource": given["DataSource"]}])
        checks.check_bucket(storage, request["TransformOutput"]["S3OutputPath"])
        if given.get("SplitType", "None") not in ("None", "Line"):
            raise ValidationError(message=f"SplitType {given['SplitType']}: only None and Line are here.")
        if request.get("DataProcessing"):
            raise ValidationError(message="DataProcessing is not here: join answers and records by their keys.")
        job = TransformJob(machine, backend, request)
        jobs[name] = cast("FakeTransformJob", job)
        job.start()
        return ActionResult({"TransformJobArn": job.arn})

    def describe_transform_job(response: SageMakerResponse) -> ActionResult:
        return ActionResult(dict(_find(response).facts))

    def stop_transform_job(response: SageMakerResponse) -> ActionResult:
        _find(response).stop()
        return EmptyResult()

    def list_transform_jobs(response: SageMakerResponse) -> ActionResult:
        jobs = cast("dict[str, TransformJob]", response.sagemaker_backend.transform_jobs)
        rows = [dict(job.facts) for job in list(jobs.values())]
        return ActionResult(page(rows, response.params, "TransformJobSummaries", "TransformJob"))

    own = (create_transform_job, describe_transform_job, stop_transform_job, list_transform_jobs)
    return {function.__name__: function for function in own}


def _find(response: SageMakerResponse) -> TransformJob:
    """Raises ResourceNotFound."""
    job = response.sagemaker_backend.transform_jobs.get(response.params["TransformJobName"])
    if job is None:
        raise ResourceNotFound(message="Requested resource not found.")
    return cast("TransformJob", job)
