"""Where and how a job runs: the settings that `mlflow run . -b sagemaker --backend-config FILE.json` reads."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from stocktake.config.parser import read_settings
from stocktake.config.settings import Settings
from stocktake.errors import StocktakeError
from stocktake.redaction import redact
from stocktake.tracking.addresses import absolute

_ADDED_BY_MLFLOW = {"ENV_MANAGER", "SYNCHRONOUS", "DOCKER_ARGS", "STORAGE_DIR", "build_image", "docker_auth"}
_DAY = 86_400
_FORMS = {
    "role": (r"arn:aws[a-z-]*:iam::\d{12}:role/\S+", "a role's ARN: arn:aws:iam::123456789012:role/NAME"),
    "bucket": (r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/\S*)?", "s3://bucket/prefix"),
    "image": (r"[^<\s]\S*", "the address of a container image"),
    "bucket_owner": (r"\d{12}", "an account's id: 12 digits"),
    "tracking_uri": (r"(https?://|arn:aws).*", "an http(s) server or a SageMaker ARN: a job reaches no other"),
}


@dataclass
class JobSettings(Settings):
    """How a job runs. In the file `async_` is written `async`; names that begin with _ are comments."""

    role: str
    """ARN of the role that the job runs as."""
    bucket: str
    """s3://bucket/prefix for code, files, checkpoints and output."""
    image: str
    """Container image with Python 3.11 or later; the packages of deploy/images/training/requirements.lock are installed
    into it if they are missing. For tune one that starts deploy/images/training/train."""
    region: str | None = None
    """AWS region. Default: AWS_DEFAULT_REGION, or the profile's."""
    bucket_owner: str | None = None
    """Account that must own the bucket: S3 refuses every request if it has another owner."""
    instance_type: str = "ml.m5.xlarge"
    """Instances to train on."""
    instance_count: Annotated[int, Field(ge=1, le=128)] = 1
    """How many of them. More than one: finetune and ddp only, one process a GPU (or one an instance without)."""
    volume_gb: Annotated[int, Field(ge=1, le=16_384)] = 30
    """Disk of each instance."""
    max_run_seconds: Annotated[int, Field(ge=60, le=28 * _DAY)] = 4 * 3600
    """The job is stopped after this long; its run is then KILLED and keeps what it has."""
    spot: bool = False
    """Spare capacity at a lower price; an interrupted job goes on from its last checkpoint."""
    max_wait_seconds: int | None = None
    """Spot: how long to wait for capacity and run, together. Default: max_run_seconds and an hour."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the job, for cost reports and policies."""
    kms_key: str | None = None
    """Key that encrypts output, uploads and, where the instance allows it, the disk."""
    subnets: list[str] = field(default_factory=list)
    """VPC: the job's subnets; needs security_groups."""
    security_groups: list[str] = field(default_factory=list)
    """VPC: the job's security groups; needs subnets."""
    network_isolation: bool = False
    """No network at all: metrics and every result arrive with the job's output."""
    tracking_uri: str | None = None
    """MLflow server as the job reaches it, or the ARN of a managed one. Default: this machine's, if it is such."""
    keep_alive_seconds: Annotated[int, Field(ge=0, le=21_600)] = 0
    """Keep the instances warm for the next job of the same kind (billed); 0: no."""
    warm_start: list[str] = field(default_factory=list)
    """tune only: names of at most 5 earlier tuning jobs, whose trials it begins with."""
    warm_start_type: Literal["IdenticalDataAndAlgorithm", "TransferLearning"] = "IdenticalDataAndAlgorithm"
    """IdenticalDataAndAlgorithm: the earlier jobs had this search's ranges and data. TransferLearning: others."""
    async_: bool = False
    """Return as soon as the job is submitted; `stocktake jobs --follow NAME` collects the results."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further variables for the job. Anybody who may describe the job can read them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (pattern, form) in _FORMS.items():
            value = getattr(self, name)
            if value is not None and not re.fullmatch(pattern, value):
                raise StocktakeError(f"backend config: {name} {redact(value)!r} must be {form}")
        if self.max_wait_seconds is not None and not self.spot:
            raise StocktakeError("backend config: max_wait_seconds is for spot jobs: set spot to true, or leave it out")
        if self.max_wait_seconds is not None and self.max_wait_seconds < self.max_run_seconds:
            raise StocktakeError(
                f"backend config: max_wait_seconds {self.max_wait_seconds} counts waiting and running: it must "
                f"be at least max_run_seconds ({self.max_run_seconds})"
            )
        if self.spot and self.keep_alive_seconds:
            raise StocktakeError("backend config: keep_alive_seconds: spot instances cannot be kept warm")
        if bool(self.subnets) != bool(self.security_groups):
            raise StocktakeError("backend config: subnets and security_groups belong together: give both, or neither")
        if self.tracking_uri is not None:
            absolute(self.tracking_uri)  # raises for a malformed one

    @property
    def wait_seconds(self) -> int | None:
        """What a spot job may wait and run together; None for another job."""
        if not self.spot:
            return None
        return self.max_wait_seconds or self.max_run_seconds + 3600

    @property
    def prefix(self) -> str:
        """bucket without a slash at its end."""
        return self.bucket.rstrip("/")


def is_remote(uri: str) -> bool:
    """Whether a tracking URI means the same on another machine."""
    return uri.startswith(("http://", "https://", "arn:aws"))


def read_job_settings(content: object) -> JobSettings:
    """Check the content of a backend config, as MLflow hands it to a backend.

    Raises:
        StocktakeError: an unknown setting, a missing one or a value that it cannot have, by its name.
    """
    if not isinstance(content, dict):  # MLflow hands on the path of a file that does not end in .json
        raise StocktakeError(f"--backend-config {content} must be a .json file, such as deploy/sagemaker.json")
    values = {name: value for name, value in content.items() if name not in _ADDED_BY_MLFLOW and name[:1] != "_"}
    if "async" in values:
        values["async_"] = values.pop("async")
    return read_settings(JobSettings, values, "backend config")
