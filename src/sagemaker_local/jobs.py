"""What training, tuning and transform jobs have in common: a thread that runs them, and their operations."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from moto.core.responses import ActionResult, EmptyResult
from moto.core.utils import camelcase_to_underscores, utcnow
from moto.iam.models import iam_backends
from moto.sagemaker.exceptions import ResourceInUseException, ResourceNotFound, ValidationError
from moto.sagemaker.models import SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemaker.utils import arn_formatter

from sagemaker_local.context import EmulatorContext
from sagemaker_local.listings import page
from sagemaker_local.storage import Storage

Operations = dict[str, Callable[[SageMakerResponse], ActionResult]]
"""By moto's names, such as create_training_job."""
ENDED = ("Completed", "Failed", "Stopped")
_MOST_REASON = 1024
"""Characters of a FailureReason."""


class JobError(Exception):
    """Why a job failed, in the words of its FailureReason."""


class Job(ABC):
    """One job: its description, and the thread that runs it."""

    KIND: ClassVar[str]
    """TrainingJob, HyperParameterTuningJob or TransformJob: prefix of the members of its description."""
    ARN_KIND: ClassVar[str]

    def __init__(self, context: EmulatorContext, backend: SageMakerModelBackend, request: dict[str, Any]) -> None:
        self.name: str = request[f"{self.KIND}Name"]
        self.arn = arn_formatter(self.ARN_KIND, self.name, backend.account_id, backend.region_name)
        self.tags: list[dict[str, str]] = request.get("Tags") or []
        self.on_end: Callable[[], None] = lambda: None
        self._context, self._backend, self._request = context, backend, request
        self._storage = Storage(backend)
        self._guard = threading.RLock()
        self._stopping, self._woken = threading.Event(), threading.Event()
        now = utcnow()
        self.description: dict[str, Any] = {name: value for name, value in request.items() if name != "Tags"} | {
            f"{self.KIND}Arn": self.arn,
            f"{self.KIND}Status": "InProgress",
            "CreationTime": now,
            "LastModifiedTime": now,
        }

    @property
    def status(self) -> str:
        """InProgress, Stopping, Completed, Failed or Stopped."""
        return str(self.description[f"{self.KIND}Status"])

    @property
    def has_ended(self) -> bool:
        """True once the status is the last one."""
        return self.status in ENDED

    def start(self) -> None:
        """Run it in a thread."""
        threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def stop(self) -> None:
        """Ask it to end."""
        with self._guard:
            if self.status == "InProgress":
                self._stopping.set()
                self.description |= {f"{self.KIND}Status": "Stopping", "LastModifiedTime": utcnow()}
        self._woken.set()

    def describe(self) -> dict[str, Any]:
        """Return the answer of its Describe operation."""
        with self._guard:
            return dict(self.description)

    @abstractmethod
    def run(self) -> str:
        """Do the work; return the last status.

        Raises:
            JobError: it failed.
        """

    def finish(self, status: str, reason: str) -> None:
        """Write the end into the description."""
        now = utcnow()
        self.description |= {f"{self.KIND.removesuffix('Job')}EndTime": now, "LastModifiedTime": now}
        if reason:
            self.description["FailureReason"] = reason[:_MOST_REASON]
        self.description[f"{self.KIND}Status"] = status

    def _run(self) -> None:
        reason = ""
        try:
            status = self.run()
        except JobError as error:
            status, reason = "Failed", str(error)
        except Exception as error:  # any error must end the job: it would be in progress for ever
            status, reason = "Failed", f"InternalServerError: {type(error).__name__}: {error}"
        with self._guard:
            self.finish(status, reason)
        self.on_end()


def job_operations(
    kind: type[Job], create: Callable[[SageMakerModelBackend, dict[str, Any]], Job]
) -> tuple[Operations, Callable[[SageMakerResponse], Any]]:
    """Return the Create, Describe, Stop and List operations of a kind of job, and what looks a job up by a request.

    `create` checks a request and returns the job, which is then started.
    """
    snake = camelcase_to_underscores(kind.KIND)

    def find(response: SageMakerResponse) -> Any:
        jobs: dict[str, Job] = getattr(response.sagemaker_backend, f"{snake}s")
        if response.params[f"{kind.KIND}Name"] not in jobs:
            raise ResourceNotFound(message="Requested resource not found.")
        return jobs[response.params[f"{kind.KIND}Name"]]

    def create_job(response: SageMakerResponse) -> ActionResult:
        job = create(response.sagemaker_backend, response.params)
        job.start()
        return ActionResult({f"{kind.KIND}Arn": job.arn})

    def describe_job(response: SageMakerResponse) -> ActionResult:
        return ActionResult(find(response).describe())

    def stop_job(response: SageMakerResponse) -> ActionResult:
        job = find(response)
        if job.has_ended:
            raise ValidationError(message=f"The request was rejected because the job is in status {job.status}.")
        job.stop()
        return EmptyResult()

    def list_jobs(response: SageMakerResponse) -> ActionResult:
        jobs: dict[str, Job] = getattr(response.sagemaker_backend, f"{snake}s")
        rows = [job.describe() for job in list(jobs.values())]
        return ActionResult(page(rows, response.params, f"{kind.KIND}Summaries", kind.KIND))

    operations: Operations = {
        f"create_{snake}": create_job,
        f"describe_{snake}": describe_job,
        f"stop_{snake}": stop_job,
        f"list_{snake}s": list_jobs,
    }
    return operations, find


def check_new(kind: str, name: str, jobs: dict[str, Any]) -> None:
    """Raise ResourceInUseException if the account has a job of this name."""
    if name in jobs:
        raise ResourceInUseException(
            message=f"{kind} names must be unique within an AWS account and region: {name} exists"
        )


def check_role(backend: SageMakerModelBackend, arn: str) -> None:
    """Raise ValidationError if there is no such role, or SageMaker may not assume it."""
    roles = iam_backends[backend.account_id][backend.partition].roles.values()
    role = next((role for role in roles if role.arn == arn), None)
    if role is None or "sagemaker.amazonaws.com" not in str(role.assume_role_policy_document):
        raise ValidationError(
            message=f"Could not assume role {arn}. Please ensure that the role exists and allows principal "
            "'sagemaker.amazonaws.com' to assume the role."
        )


def check_bucket(storage: Storage, uri: str) -> None:
    """Raise ValidationError if there is no such bucket."""
    if not storage.has_bucket(uri):
        raise ValidationError(message=f"The S3 bucket of {uri} does not exist or cannot be accessed by the role.")


def check_source(storage: Storage, uri: str, region: str) -> None:
    """Raise ValidationError if no object lies under the prefix."""
    if not storage.keys(uri):
        raise ValidationError(
            message=f'No S3 objects found under S3 URL "{uri}" given in input data source. Please ensure that the '
            f"bucket exists in the selected region ({region}), that objects exist under that S3 prefix, and that the "
            'role has "s3:ListBucket" permissions on the bucket.'
        )
