"""Training jobs that train: containers of the request's entry point, their states, and what they leave in S3."""

from __future__ import annotations

import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Any, cast

from moto.core.responses import ActionResult, EmptyResult
from moto.core.utils import utcnow
from moto.sagemaker.exceptions import ResourceNotFound, ValidationError
from moto.sagemaker.models import FakeTrainingJob, SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse

from sagemaker_local import checks
from sagemaker_local.container_init import MODEL_FOLDER
from sagemaker_local.containers import Container, Machine, stop
from sagemaker_local.listings import page
from sagemaker_local.permissions import role_variables
from sagemaker_local.records import JobMetrics, LogStream
from sagemaker_local.spot import Spot
from sagemaker_local.storage import Storage
from sagemaker_local.training_hosts import Host, lay_out_hosts

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
_SYNC_SECONDS = 1.0
"""Between two looks at the checkpoints."""
_MESSAGES = {
    "Starting": "Preparing the instances for training",
    "Downloading": "Downloading input data",
    "Training": "Training image download completed. Training in progress.",
    "Interrupted": "Spot capacity was taken back; the job starts again",
    "Stopping": "Stopping the training job",
    "Uploading": "Uploading generated training model",
    "Completed": "Training job completed",
    "Failed": "Training job failed",
    "Stopped": "Training job stopped",
    "MaxRuntimeExceeded": "Training job runtime exceeded MaxRuntimeInSeconds provided",
    "MaxWaitTimeExceeded": "Training job wait time exceeded MaxWaitTimeInSeconds provided",
}
# fmt: off
_REQUEST_PARTS = (
    "TrainingJobName", "HyperParameters", "AlgorithmSpecification", "RoleArn", "InputDataConfig",
    "OutputDataConfig", "ResourceConfig", "VpcConfig", "StoppingCondition", "EnableNetworkIsolation",
    "EnableInterContainerTrafficEncryption", "RetryStrategy", "EnableManagedSpotTraining", "CheckpointConfig",
    "DebugHookConfig", "ExperimentConfig", "Environment", "TensorBoardOutputConfig", "ProfilerConfig",
    "RemoteDebugConfig", "MlflowConfig",
)
# fmt: on


class Ending(Enum):
    """Why a job's containers have ended."""

    BY_THEMSELVES = "they ended"
    STOPPED = "Stopped"
    OVER_RUNTIME = "MaxRuntimeExceeded"
    OVER_WAIT = "MaxWaitTimeExceeded"
    INTERRUPTED = "Interrupted"


class TrainingJob:
    """One job: what is told about it, and the thread that runs it."""

    def __init__(self, machine: Machine, backend: SageMakerModelBackend, request: dict[str, Any]) -> None:
        self.name: str = request["TrainingJobName"]
        self.arn = FakeTrainingJob.arn_formatter(self.name, backend.account_id, backend.region_name)
        self.tags: list[dict[str, str]] = request.get("Tags") or []
        self.metrics = JobMetrics(backend, self.name, request["AlgorithmSpecification"].get("MetricDefinitions", []))
        self.on_end: Callable[[], None] = lambda: None
        self._machine, self._backend, self._request = machine, backend, request
        self._storage = Storage(backend)
        self._number = machine.new_number()
        self._folder = machine.folder / str(self._number)
        self._guard = threading.RLock()
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._spot = Spot(request)
        self._trained = 0.0
        """Seconds in containers, over all attempts."""
        now = utcnow()
        output = request["OutputDataConfig"]["S3OutputPath"].rstrip("/")
        self._output = f"{output}/{self.name}/output"
        self.facts: dict[str, Any] = {part: request[part] for part in _REQUEST_PARTS if request.get(part) is not None}
        self.facts |= {
            "TrainingJobArn": self.arn,
            "TrainingJobStatus": "InProgress",
            "SecondaryStatus": "Starting",
            "ModelArtifacts": {"S3ModelArtifacts": f"{self._output}/model.tar.gz"},
            "CreationTime": now,
            "LastModifiedTime": now,
            "SecondaryStatusTransitions": [],
        }
        self._enter("Starting")

    @property
    def has_ended(self) -> bool:
        return "TrainingEndTime" in self.facts

    def start(self) -> None:
        threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def stop(self) -> None:
        """Ask it to end: SIGTERM, then SIGKILL. Its artifacts are uploaded all the same."""
        with self._guard:
            if self.facts["TrainingJobStatus"] == "InProgress":
                self._stopping.set()
                self.facts["TrainingJobStatus"] = "Stopping"
                self._enter("Stopping")
        self._woken.set()

    def describe(self) -> dict[str, Any]:
        """As DescribeTrainingJob answers."""
        with self._guard:
            transitions = [dict(one) for one in self.facts["SecondaryStatusTransitions"]]
            return self.facts | {
                "SecondaryStatusTransitions": transitions,
                "FinalMetricDataList": list(self.metrics.final.values()),
            }

    def _enter(self, status: str, message: str | None = None) -> None:
        now = utcnow()
        with self._guard:
            transitions = self.facts["SecondaryStatusTransitions"]
            if transitions:
                transitions[-1]["EndTime"] = now
            transitions.append(
                {"Status": status, "StartTime": now, "StatusMessage": message or _MESSAGES.get(status, "")}
            )
            self.facts |= {"SecondaryStatus": status, "LastModifiedTime": now}

    def _run(self) -> None:
        try:
            status, secondary, reason = self._attempts()
        except FileNotFoundError as error:
            status, secondary, reason = "Failed", "Failed", f"ClientError: Data download failed: {error}"
        except Exception as error:  # whatever it is must end the job: it would be in progress for ever
            status, secondary, reason = "Failed", "Failed", f"InternalServerError: {type(error).__name__}: {error}"
        shutil.rmtree(self._folder, ignore_errors=True)
        with self._guard:
            self._enter(secondary, reason or None)
            now = utcnow()
            self.facts["SecondaryStatusTransitions"][-1]["EndTime"] = now
            began = self.facts.setdefault("TrainingStartTime", now)
            seconds = max(1, math.ceil((now - began).total_seconds()))
            self.facts |= {
                "TrainingTimeInSeconds": seconds,
                "BillableTimeInSeconds": max(1, math.ceil(self._spot.billed(min(seconds, self._trained + 1)))),
                "TrainingEndTime": now,
            }
            if reason and status == "Failed":
                self.facts["FailureReason"] = reason[:1024]
            self.facts["TrainingJobStatus"] = status
        self.on_end()

    def _attempts(self) -> tuple[str, str, str]:
        """Run until it ends otherwise than by an interruption: its status, secondary status and failure reason."""
        began = time.monotonic()
        while True:
            if (given_up := self._wait_for_capacity(began)) is not None:
                return "Stopped", given_up.value, ""
            self._enter_unless_stopping("Downloading")
            self.facts.setdefault("TrainingStartTime", utcnow())
            hosts = lay_out_hosts(self._folder, self._request, self._storage)
            ending, codes = self._train(hosts, began)
            for host in hosts:
                if host.checkpoints is not None:
                    host.checkpoints.upload()
            if ending is not Ending.INTERRUPTED:
                break
            self._enter("Interrupted")
            shutil.rmtree(self._folder)  # a new instance has nothing of the old one but what is in S3
            self._enter_unless_stopping("Starting")
        self._enter("Uploading")
        self._storage.upload_archive(f"{self._output}/model.tar.gz", [host.folder / "model" for host in hosts])
        results = [host.folder / "output" / "data" for host in hosts]
        if any(any(folder.iterdir()) for folder in results):
            self._storage.upload_archive(f"{self._output}/output.tar.gz", results)
        if ending is not Ending.BY_THEMSELVES:
            return "Stopped", ending.value, ""
        if not any(codes):
            return "Completed", "Completed", ""
        code = next(code for code in codes if code)
        written = next((host.failure for host in hosts if host.failure), "")
        return "Failed", "Failed", f"AlgorithmError: {written}, exit code: {code}"

    def _wait_for_capacity(self, began: float) -> Ending | None:
        """Until there are machines: None, or why that is not waited for any more."""
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

    def _enter_unless_stopping(self, status: str) -> None:
        with self._guard:
            if not self._stopping.is_set():
                self._enter(status)

    def _train(self, hosts: list[Host], began: float) -> tuple[Ending, list[int]]:
        """Run the containers until all have ended: why, and the codes of those that failed first."""
        longest = self._request["StoppingCondition"].get("MaxRuntimeInSeconds", 86400) - self._trained
        if not self._machine.confined and len(hosts) > 1:
            raise ValidationError(message="several hosts need private mount namespaces, which this machine forbids")
        if self._stopping.is_set():
            return Ending.STOPPED, []
        self._enter_unless_stopping("Training")
        started = time.monotonic()
        containers = [self._start(host, hosts) for host in hosts]
        try:
            while True:
                self._woken.wait(_SYNC_SECONDS)
                self._woken.clear()
                for host in hosts:
                    if host.checkpoints is not None:
                        host.checkpoints.upload()
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
            stop(containers, self._machine.grace)
            self._trained += time.monotonic() - started

    def _start(self, host: Host, hosts: list[Host]) -> Container:
        specification = self._request["AlgorithmSpecification"]
        # As docker: an entry point replaces the image's, and `train` is what SageMaker adds to the image's own.
        command = [*specification.get("ContainerEntrypoint", []), *specification.get("ContainerArguments", [])]
        if not specification.get("ContainerEntrypoint"):
            image = specification.get("TrainingImage", "")
            command = [*self._machine.entry_point(image), *(command or ["train"])]
        stream = LogStream(self._backend, LOG_GROUP, f"{self.name}/{host.name}-{time.time_ns() // 1_000_000}")
        isolated = self._request.get("EnableNetworkIsolation", False)
        environment = self._machine.environment(host.folder.parent, isolated)
        environment |= {} if isolated else role_variables(self._backend, self._request["RoleArn"])
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
        addresses = {one.name: f"127.{high + 1}.{low}.{index}" for index, one in enumerate(hosts, 1)}
        return Container(
            self._machine, command, host.folder, environment, on_line, self._woken.set, addresses=addresses
        )


def create_job(machine: Machine, backend: SageMakerModelBackend, request: dict[str, Any]) -> TrainingJob:
    """Check a request as CreateTrainingJob does, and make the job, which is still to be started.

    Raises:
        ValidationError, ResourceInUseException: AWS would refuse it.
    """
    name, jobs = request["TrainingJobName"], backend.training_jobs
    arn = FakeTrainingJob.arn_formatter(name, backend.account_id, backend.region_name)
    checks.check_new("Training job", name, cast("dict[str, Any]", jobs), arn)
    check_job(backend, request)
    try:
        job = TrainingJob(machine, backend, request)
    except re.error as error:
        raise ValidationError(message=f"Invalid metric definition regular expression: {error}") from None
    jobs[name] = cast("FakeTrainingJob", job)
    return job


def check_job(backend: SageMakerModelBackend, request: dict[str, Any]) -> None:
    """What a training job needs, whether it is asked for alone or by a tuning job.

    Raises:
        ValidationError: AWS would refuse it.
    """
    checks.require(request, "AlgorithmSpecification", "ResourceConfig.InstanceType", "ResourceConfig.InstanceCount")
    checks.require(request, "ResourceConfig.VolumeSizeInGB", "StoppingCondition", "OutputDataConfig.S3OutputPath")
    specification = request["AlgorithmSpecification"]
    if ("TrainingImage" in specification) == ("AlgorithmName" in specification):
        raise ValidationError(message="You must specify either TrainingImage or AlgorithmName, and not both.")
    checks.check_role(backend, request["RoleArn"])
    checks.check_stopping(request["StoppingCondition"], request.get("EnableManagedSpotTraining", False))
    storage = Storage(backend)
    checks.check_bucket(storage, request["OutputDataConfig"]["S3OutputPath"])
    checks.check_channels(backend, storage, request.get("InputDataConfig", []))
    local = (request.get("CheckpointConfig") or {}).get("LocalPath")
    if local is not None and not f"{local}/".startswith(f"{MODEL_FOLDER}/"):
        raise ValidationError(message=f"CheckpointConfig.LocalPath {local} must lie in {MODEL_FOLDER}")


def find_job(backend: SageMakerModelBackend, name: str) -> TrainingJob:
    """Raises ResourceNotFound."""
    job = backend.training_jobs.get(name)
    if job is None:
        raise ResourceNotFound(message="Requested resource not found.")
    return cast("TrainingJob", job)


def operations(machine: Machine) -> dict[str, Callable[[SageMakerResponse], ActionResult]]:
    """Of SageMaker's API, by moto's names for them."""

    def create_training_job(response: SageMakerResponse) -> ActionResult:
        job = create_job(machine, response.sagemaker_backend, response.params)
        job.start()
        return ActionResult({"TrainingJobArn": job.arn})

    def describe_training_job(response: SageMakerResponse) -> ActionResult:
        return ActionResult(find_job(response.sagemaker_backend, response.params["TrainingJobName"]).describe())

    def stop_training_job(response: SageMakerResponse) -> ActionResult:
        job = find_job(response.sagemaker_backend, response.params["TrainingJobName"])
        if job.has_ended:
            raise ValidationError(
                message="The request was rejected because the training job is in status "
                f"{job.facts['TrainingJobStatus']}."
            )
        job.stop()
        return EmptyResult()

    def list_training_jobs(response: SageMakerResponse) -> ActionResult:
        jobs = cast("dict[str, TrainingJob]", response.sagemaker_backend.training_jobs)
        rows = [job.describe() for job in list(jobs.values())]
        return ActionResult(page(rows, response.params, "TrainingJobSummaries", "TrainingJob"))

    return {
        function.__name__: function
        for function in (create_training_job, describe_training_job, stop_training_job, list_training_jobs)
    }
