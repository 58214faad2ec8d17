"""Training jobs that train: containers of the request's entry point, their states, and what they leave in S3."""

from __future__ import annotations

import math
import re
import shutil
import time
from enum import Enum
from functools import partial
from typing import Any, ClassVar, cast

from moto.core.utils import utcnow
from moto.sagemaker.exceptions import ValidationError
from moto.sagemaker.models import FakeTrainingJob, SageMakerModelBackend

from sagemaker_local.cloudwatch import JobMetrics, LogStream
from sagemaker_local.container_init import MODEL_FOLDER
from sagemaker_local.containers import Container, start_all, stop
from sagemaker_local.context import EmulatorContext
from sagemaker_local.jobs import (
    Job,
    JobError,
    Operations,
    check_bucket,
    check_new,
    check_role,
    check_source,
    job_operations,
)
from sagemaker_local.permissions import role_variables
from sagemaker_local.service_model import require
from sagemaker_local.spot import Spot
from sagemaker_local.storage import Storage, UnsafePathError
from sagemaker_local.training_hosts import Host, prepare_hosts

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
_SYNC_SECONDS = 1.0
"""Between two uploads of checkpoints."""
_DEFAULT_RUNTIME = 86400


class Ending(Enum):
    """Why a job's containers have ended; the value is the job's secondary status."""

    BY_THEMSELVES = "Completed"
    STOPPED = "Stopped"
    OVER_RUNTIME = "MaxRuntimeExceeded"
    OVER_WAIT = "MaxWaitTimeExceeded"
    INTERRUPTED = "Interrupted"


class TrainingJob(Job):
    """One training job, alone or of a tuning job."""

    KIND: ClassVar[str] = "TrainingJob"
    ARN_KIND: ClassVar[str] = "training-job"

    def __init__(self, context: EmulatorContext, backend: SageMakerModelBackend, request: dict[str, Any]) -> None:
        super().__init__(context, backend, request)
        self.metrics = JobMetrics(backend, self.name, request["AlgorithmSpecification"].get("MetricDefinitions", []))
        self._number = context.next_number()
        self._folder = context.folder / str(self._number)
        self._spot = Spot(request)
        self._trained = 0.0
        """Seconds in containers, over all attempts."""
        self._output = f"{request['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{self.name}/output"
        self._last_secondary = ""
        self.description |= {
            "ModelArtifacts": {"S3ModelArtifacts": f"{self._output}/model.tar.gz"},
            "SecondaryStatusTransitions": [],
        }
        self._enter("Starting")

    def stop(self) -> None:
        """Ask it to end: SIGTERM, then SIGKILL. Its artifacts are uploaded all the same."""
        with self._guard:
            if self.status == "InProgress":
                self._enter("Stopping")
            super().stop()

    def describe(self) -> dict[str, Any]:
        """Return DescribeTrainingJob's answer."""
        with self._guard:
            transitions = [dict(transition) for transition in self.description["SecondaryStatusTransitions"]]
            return self.description | {
                "SecondaryStatusTransitions": transitions,
                "FinalMetricDataList": list(self.metrics.final.values()),
            }

    def run(self) -> str:
        """Run attempts until one ends otherwise than by an interruption."""
        try:
            ending = self._attempts()
        except (FileNotFoundError, UnsafePathError) as error:
            raise JobError(f"ClientError: Data download failed: {error}") from None
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._last_secondary = ending.value
        return "Completed" if ending is Ending.BY_THEMSELVES else "Stopped"

    def finish(self, status: str, reason: str) -> None:
        """Write the end, the last transition and the seconds into the description."""
        self._enter(self._last_secondary or status, reason)
        now = utcnow()
        self.description["SecondaryStatusTransitions"][-1]["EndTime"] = now
        began = self.description.setdefault("TrainingStartTime", now)
        seconds = max(1, math.ceil((now - began).total_seconds()))
        billed = max(1, math.ceil(self._spot.billed(min(seconds, self._trained + 1))))
        self.description |= {"TrainingTimeInSeconds": seconds, "BillableTimeInSeconds": billed}
        super().finish(status, reason)

    def _enter(self, secondary: str, message: str = "") -> None:
        """Go over to a secondary status, unless the job is stopping and the status is one of a running job."""
        now = utcnow()
        with self._guard:
            if self._stopping.is_set() and secondary in ("Starting", "Downloading", "Training"):
                return
            transitions = self.description["SecondaryStatusTransitions"]
            if transitions:
                transitions[-1]["EndTime"] = now
            transitions.append({"Status": secondary, "StartTime": now, "StatusMessage": message or secondary})
            self.description |= {"SecondaryStatus": secondary, "LastModifiedTime": now}

    def _attempts(self) -> Ending:
        began = time.monotonic()
        while True:
            if (ending := self._wait_for_capacity(began)) is not None:
                return ending
            self._enter("Downloading")
            self.description.setdefault("TrainingStartTime", utcnow())
            hosts = prepare_hosts(self._folder, self._request, self._storage)
            ending, codes = self._train(hosts, began)
            _upload_checkpoints(hosts)
            if ending is not Ending.INTERRUPTED:
                break
            self._enter("Interrupted")
            shutil.rmtree(self._folder)  # a new instance has nothing of the old one but what is in S3
            self._enter("Starting")
        self._enter("Uploading")
        self._storage.upload_archive(f"{self._output}/model.tar.gz", [host.folder / "model" for host in hosts])
        results = [host.folder / "output" / "data" for host in hosts]
        if any(any(folder.iterdir()) for folder in results):
            self._storage.upload_archive(f"{self._output}/output.tar.gz", results)
        if ending is Ending.BY_THEMSELVES and any(codes):
            code = next(code for code in codes if code)
            failure = next((host.failure for host in hosts if host.failure), "")
            raise JobError(f"AlgorithmError: {failure}, exit code: {code}")
        return ending

    def _wait_for_capacity(self, began: float) -> Ending | None:
        """Wait until there are machines; return why that is given up, if it is."""
        until = time.monotonic() + self._spot.capacity_seconds
        while (now := time.monotonic()) < until:
            if self._stopping.is_set():
                return Ending.STOPPED
            if now - began > self._longest_wait:
                return Ending.OVER_WAIT
            self._woken.wait(min(_SYNC_SECONDS, until - now))
            self._woken.clear()
        return None

    @property
    def _longest_wait(self) -> float:
        """Seconds from its beginning to its end, at most."""
        return float(self._request["StoppingCondition"].get("MaxWaitTimeInSeconds", math.inf))

    def _train(self, hosts: list[Host], began: float) -> tuple[Ending, list[int]]:
        """Run the containers until all have ended; return why, and the exit codes of those that ended first."""
        longest = self._request["StoppingCondition"].get("MaxRuntimeInSeconds", _DEFAULT_RUNTIME) - self._trained
        if not self._context.has_namespaces and len(hosts) > 1:
            raise JobError("several hosts need private mount namespaces, which this machine forbids")
        if self._stopping.is_set():
            return Ending.STOPPED, []
        self._enter("Training")
        started = time.monotonic()
        containers = start_all([partial(self._start, host, hosts) for host in hosts], self._context.grace)
        try:
            while True:
                self._woken.wait(_SYNC_SECONDS)
                self._woken.clear()
                _upload_checkpoints(hosts)
                codes = [container.exit_code for container in containers]
                ran = time.monotonic() - started
                if any(codes) or None not in codes:
                    return Ending.BY_THEMSELVES, [code for code in codes if code is not None]
                if self._stopping.is_set():
                    return Ending.STOPPED, []
                if time.monotonic() - began > self._longest_wait:
                    return Ending.OVER_WAIT, []
                if ran > longest:
                    return Ending.OVER_RUNTIME, []
                if self._spot.takes_back(ran):
                    return Ending.INTERRUPTED, []
        finally:
            stop(containers, self._context.grace)
            self._trained += time.monotonic() - started

    def _start(self, host: Host, hosts: list[Host]) -> Container:
        specification = self._request["AlgorithmSpecification"]
        # As docker: an entry point replaces the image's, and `train` is what SageMaker adds to the image's own.
        command = [*specification.get("ContainerEntrypoint", []), *specification.get("ContainerArguments", [])]
        if not specification.get("ContainerEntrypoint"):
            command = [*self._context.entry_point(specification["TrainingImage"]), *(command or ["train"])]
        stream = LogStream(self._backend, LOG_GROUP, f"{self.name}/{host.name}-{time.time_ns() // 1_000_000}")
        is_isolated = self._request.get("EnableNetworkIsolation", False)
        role = {} if is_isolated else role_variables(self._backend, self._request["RoleArn"])
        environment = self._context.container_environment(host.folder.parent, role)
        environment |= (self._request.get("Environment") or {}) | {
            "TRAINING_JOB_NAME": self.name,
            "TRAINING_JOB_ARN": self.arn,
        }

        def on_line(line: str) -> None:
            stream.write(line)
            self.metrics.read(line)
            if self._spot.read(line):
                self._woken.set()

        high, low = divmod(self._number, 250)
        addresses = {each.name: f"127.{high + 1}.{low}.{index}" for index, each in enumerate(hosts, 1)}
        return Container(
            self._context, command, host.folder, environment, on_line, self._woken.set, addresses=addresses
        )


def create_job(context: EmulatorContext, backend: SageMakerModelBackend, request: dict[str, Any]) -> TrainingJob:
    """Check a request as CreateTrainingJob does, and make the job, which is still to be started.

    Raises:
        ValidationError, ResourceInUseException: AWS would refuse it.
    """
    check_new("Training job", request["TrainingJobName"], backend.training_jobs)
    check_request(backend, request)
    try:
        job = TrainingJob(context, backend, request)
    except re.error as error:
        raise ValidationError(message=f"Invalid metric definition regular expression: {error}") from None
    backend.training_jobs[job.name] = cast("FakeTrainingJob", job)
    return job


def check_request(backend: SageMakerModelBackend, request: dict[str, Any]) -> None:
    """Check what a training job needs, whether it is asked for alone or by a tuning job.

    Raises:
        ValidationError: AWS would refuse it.
    """
    require(request, "AlgorithmSpecification.TrainingImage", "ResourceConfig.InstanceType")
    require(request, "ResourceConfig.InstanceCount", "ResourceConfig.VolumeSizeInGB")
    require(request, "StoppingCondition", "OutputDataConfig.S3OutputPath")
    check_role(backend, request["RoleArn"])
    condition, is_spot = request["StoppingCondition"], request.get("EnableManagedSpotTraining", False)
    longest, wait = condition.get("MaxRuntimeInSeconds", _DEFAULT_RUNTIME), condition.get("MaxWaitTimeInSeconds")
    if is_spot and (wait is None or wait < longest):
        raise ValidationError(
            message="Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to "
            "MaxRuntimeInSeconds"
        )
    if not is_spot and wait is not None:
        raise ValidationError(
            message="MaxWaitTimeInSeconds above 0 is not supported when EnableManagedSpotTraining is not enabled"
        )
    storage = Storage(backend)
    check_bucket(storage, request["OutputDataConfig"]["S3OutputPath"])
    names: set[str] = set()
    for channel in request.get("InputDataConfig", []):
        name = channel["ChannelName"]
        if name in names or name in (".", ".."):
            raise ValidationError(message=f"Channel names must be unique names of folders; {name} is not.")
        names.add(name)
        require(channel, "DataSource.S3DataSource")
        check_source(storage, channel["DataSource"]["S3DataSource"]["S3Uri"], backend.region_name)
    local = (request.get("CheckpointConfig") or {}).get("LocalPath", MODEL_FOLDER)
    if not f"{local}/".startswith(f"{MODEL_FOLDER}/") or ".." in local.split("/"):
        raise ValidationError(message=f"CheckpointConfig.LocalPath {local} must lie in {MODEL_FOLDER}")


def operations(context: EmulatorContext) -> Operations:
    """Return this module's operations of SageMaker's API."""
    return job_operations(TrainingJob, partial(create_job, context))[0]


def _upload_checkpoints(hosts: list[Host]) -> None:
    for host in hosts:
        if host.checkpoints is not None:
            host.checkpoints.upload()
