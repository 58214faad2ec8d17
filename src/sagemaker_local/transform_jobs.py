"""Batch transform: a model's container over the objects of a prefix, an answer per object or per line."""

from __future__ import annotations

import http
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, cast

import urllib3
from moto.core.utils import utcnow
from moto.sagemaker.models import FakeTransformJob, SageMakerModelBackend

from sagemaker_local.cloudwatch import LogStream
from sagemaker_local.context import EmulatorContext
from sagemaker_local.jobs import Job, JobError, Operations, check_bucket, check_new, check_source, job_operations
from sagemaker_local.model_servers import ModelServer, ModelServerError
from sagemaker_local.storage import Storage, relative_path, split_uri

LOG_GROUP = "/aws/sagemaker/TransformJobs"
_MEGABYTE = 2**20
_RETRY_SECONDS = 0.5


class TransformJob(Job):
    """One batch transform; when it is stopped, objects that were begun are finished."""

    KIND: ClassVar[str] = "TransformJob"
    ARN_KIND: ClassVar[str] = "transform-job"

    def run(self) -> str:
        """Transform every object."""
        try:
            self._transform()
        except ModelServerError as error:
            raise JobError(f"AlgorithmError: The container {error}. See job logs for more information") from None
        return "Stopped" if self._stopping.is_set() else "Completed"

    def _transform(self) -> None:
        request = self._request
        source = request["TransformInput"]["DataSource"]["S3DataSource"]
        objects = self._storage.objects(source["S3Uri"])
        environment = (request.get("Environment") or {}) | {
            "SAGEMAKER_BATCH": "true",
            "SAGEMAKER_MAX_PAYLOAD_IN_MB": str(request.get("MaxPayloadInMB", 6)),
            "SAGEMAKER_BATCH_STRATEGY": request.get("BatchStrategy", "MultiRecord"),
            "SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": str(request.get("MaxConcurrentTransforms", 1)),
        }
        stream = LogStream(self._backend, LOG_GROUP, f"{self.name}/i-{time.time_ns():017x}")
        server = ModelServer(self._context, self._backend, request["ModelName"], stream, environment)
        try:
            server.wait_ready(self._stopping.is_set)
            self.description["TransformStartTime"] = utcnow()
            prefix = split_uri(source["S3Uri"])[1]
            with ThreadPoolExecutor(request.get("MaxConcurrentTransforms") or 1) as pool:
                for future in [pool.submit(self._transform_one, server, stream, uri, prefix) for uri, _ in objects]:
                    future.result()
        finally:
            server.close()

    def _transform_one(self, server: ModelServer, stream: LogStream, uri: str, prefix: str) -> None:
        """Transform one object into <key>.out.

        Raises:
            JobError: it is too large, or the model refuses it.
        """
        if self._stopping.is_set():
            return
        source, output = self._request["TransformInput"], self._request["TransformOutput"]
        content = self._storage.read(uri)
        headers = {"Content-Type": source["ContentType"]} if source.get("ContentType") else {}
        headers |= {"Accept": output["Accept"]} if output.get("Accept") else {}
        answers = []
        for payload in self._payloads(content):
            if len(payload) > self._most_bytes:
                raise JobError(f"ClientError: a payload of {uri} exceeds MaxPayloadInMB. See job logs")
            try:
                answers.append(self._ask(server, payload, headers))
            except JobError as error:
                stream.write(f"{uri}: {error}")
                raise JobError(f"{error}: {uri}. See job logs for more information") from None
        joint = b"\n" if output.get("AssembleWith") == "Line" else b""
        whole = b"".join(answer.removesuffix(joint) + joint for answer in answers)
        key = relative_path(split_uri(uri)[1], prefix)
        self._storage.write(f"{output['S3OutputPath'].rstrip('/')}/{key}.out", whole)

    @property
    def _most_bytes(self) -> int:
        return int(self._request.get("MaxPayloadInMB", 6)) * _MEGABYTE

    def _payloads(self, content: bytes) -> Iterator[bytes]:
        """Yield what is sent of an object: all of it, its lines, or as many lines as fit into a payload."""
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
        failure = "no answer"
        for _ in range(1 + client.get("InvocationsMaxRetries", 3)):
            try:
                reply = server.invoke(payload, headers, timeout)
            except urllib3.exceptions.HTTPError as error:
                failure = f"AlgorithmError: {type(error).__name__}"
            else:
                if reply.status == http.HTTPStatus.OK:
                    return reply.data
                failure = f"ClientError: {reply.status} {reply.data.decode('utf-8', 'replace')[:200]}"
                if reply.status < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                    break
            time.sleep(_RETRY_SECONDS)
        raise JobError(failure)


def operations(context: EmulatorContext) -> Operations:
    """Return this module's operations of SageMaker's API."""

    def create(backend: SageMakerModelBackend, request: dict[str, Any]) -> TransformJob:
        check_new("Transform job", request["TransformJobName"], backend.transform_jobs)
        backend.describe_model(request["ModelName"])
        storage = Storage(backend)
        check_source(storage, request["TransformInput"]["DataSource"]["S3DataSource"]["S3Uri"], backend.region_name)
        check_bucket(storage, request["TransformOutput"]["S3OutputPath"])
        job = TransformJob(context, backend, request)
        backend.transform_jobs[job.name] = cast("FakeTransformJob", job)
        return job

    return job_operations(TransformJob, create)[0]
