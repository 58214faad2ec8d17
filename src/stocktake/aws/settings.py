"""Where and how a training job runs: what `mlflow run . -b sagemaker --backend-config FILE.json` reads."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stocktake.errors import StocktakeError
from stocktake.tracking.addresses import absolute

_MLFLOW = {"ENV_MANAGER", "SYNCHRONOUS", "DOCKER_ARGS", "STORAGE_DIR", "build_image", "docker_auth"}
"""What MLflow itself adds to every backend's settings."""
_DAY = 86_400
_WARM_STARTS = ("IdenticalDataAndAlgorithm", "TransferLearning")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/\S+")
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/\S*)?")


@dataclass(frozen=True)
class JobSettings:
    """How a job runs. In the file, `async` is `async_` without the underscore; names that begin with _ are comments."""

    role: str
    """ARN of the role that the job runs as."""
    bucket: str
    """s3://bucket/prefix for code, files, checkpoints and output."""
    image: str
    """Container image with Python 3.11 or later; what requirements.lock lists is installed into it if it is missing.
    For tune one that starts with deploy/images/training/train."""
    region: str | None = None
    """AWS region. Default: AWS_DEFAULT_REGION, or the profile's."""
    instance_type: str = "ml.m5.xlarge"
    """Machines to train on."""
    instance_count: int = 1
    """How many of them. More than one: finetune and ddp only, one process a GPU (or one a machine without)."""
    volume_gb: int = 30
    """Disk of each machine."""
    max_run_seconds: int = 4 * 3600
    """The job is stopped after this long; its run is then KILLED and keeps what it has."""
    spot: bool = False
    """Spare capacity at a lower price; an interrupted job goes on at the batch it was at."""
    max_wait_seconds: int | None = None
    """Spot: how long to wait for capacity and run, together. Default: max_run_seconds and an hour."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the job, for cost reports and policies."""
    kms_key: str | None = None
    """Key that encrypts output, uploads and, where the machine allows it, the disk."""
    subnets: list[str] = field(default_factory=list)
    """VPC: the job's subnets; needs security_groups."""
    security_groups: list[str] = field(default_factory=list)
    """VPC: the job's security groups; needs subnets."""
    network_isolation: bool = False
    """No network at all: tracking and every result come home with the job's output."""
    tracking_uri: str | None = None
    """MLflow server as the job reaches it, or the ARN of a managed one. Default: this machine's, if it is such."""
    keep_alive_seconds: int = 0
    """Keep the machines warm for the next job of the same kind (billed); 0: no."""
    warm_start: list[str] = field(default_factory=list)
    """tune only: names of at most 5 earlier tuning jobs, whose trials it begins with."""
    warm_start_type: str = "IdenticalDataAndAlgorithm"
    """IdenticalDataAndAlgorithm: the earlier jobs had this search's ranges and data. TransferLearning: others."""
    async_: bool = False
    """Return as soon as the job is submitted; `stocktake jobs --follow NAME` brings the results home."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further variables for the job. Anybody who may describe the job can read them."""
    upload_bins: bool = False
    """Upload a root that is a folder of this machine, if it holds at most 2,000 files."""
    prices: str = "deploy/prices.yaml"
    """YAML with what machines cost; relative to the project."""

    def __post_init__(self) -> None:
        if not _ROLE.fullmatch(self.role):
            raise StocktakeError(f"role {self.role!r} must be a role's ARN: arn:aws:iam::123456789012:role/NAME")
        if not _BUCKET.fullmatch(self.bucket):
            raise StocktakeError(f"bucket {self.bucket!r} must be s3://bucket/prefix")
        if not self.image.strip():
            raise StocktakeError("image is empty: give the address of a container image")
        for name, least, most in (
            ("instance_count", 1, 128),
            ("volume_gb", 1, 16_384),
            ("max_run_seconds", 60, 28 * _DAY),
            ("keep_alive_seconds", 0, 21_600),
        ):
            if not least <= getattr(self, name) <= most:
                raise StocktakeError(f"{name} {getattr(self, name)} must be from {least} to {most}")
        if self.max_wait_seconds is not None and not self.spot:
            raise StocktakeError("max_wait_seconds is for spot jobs: set spot to true, or leave it out")
        if self.max_wait_seconds is not None and self.max_wait_seconds < self.max_run_seconds:
            raise StocktakeError(
                f"max_wait_seconds {self.max_wait_seconds} must be at least max_run_seconds ({self.max_run_seconds}): "
                "it counts waiting and running together"
            )
        if self.spot and self.keep_alive_seconds:
            raise StocktakeError("keep_alive_seconds: spot machines cannot be kept warm; leave one of the two out")
        if bool(self.subnets) != bool(self.security_groups):
            raise StocktakeError("subnets and security_groups belong together: give both, or neither")
        if self.warm_start_type not in _WARM_STARTS:
            raise StocktakeError(f"warm_start_type {self.warm_start_type!r} must be {' or '.join(_WARM_STARTS)}")
        if self.tracking_uri is not None and not is_remote(self.tracking_uri):
            raise StocktakeError(
                f"tracking_uri {self.tracking_uri!r}: a job reaches http(s) servers and SageMaker ARNs only"
            )
        if self.tracking_uri is not None:
            absolute(self.tracking_uri)  # its form

    @property
    def wait_seconds(self) -> int | None:
        """What a spot job may wait and run together; None for another job."""
        if not self.spot:
            return None
        return self.max_wait_seconds or self.max_run_seconds + 3600

    @property
    def place(self) -> str:
        """bucket without a slash at its end."""
        return self.bucket.rstrip("/")


def is_remote(uri: str) -> bool:
    """Whether a tracking URI means the same on another machine."""
    return uri.startswith(("http://", "https://", "arn:aws"))


def read_settings(given: object) -> JobSettings:
    """The settings in what MLflow hands a backend: the file's content, already read.

    Raises:
        StocktakeError: an unknown name, a missing one, or a value of another type, by its name.
    """
    if not isinstance(given, dict):
        if isinstance(given, str):  # MLflow reads no file but a .json
            raise StocktakeError(f"--backend-config {given} must be a .json file, such as deploy/sagemaker.json")
        raise StocktakeError("--backend-config must hold settings, such as deploy/sagemaker.json")
    kinds = typing.get_type_hints(JobSettings)
    names = {one.name.rstrip("_"): one for one in dataclasses.fields(JobSettings)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in _MLFLOW or name.startswith("_"):
            continue
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]}?" if close else f"they are {', '.join(names)}"
            raise StocktakeError(f"backend config: {name!r} is no setting of a job: {hint}")
        kind = kinds[names[name].name]
        if not _fits(value, kind):
            shown = getattr(kind, "__name__", None) if not typing.get_args(kind) else None
            raise StocktakeError(f"backend config: {name} {json.dumps(value)} must be of type {shown or kind}")
        values[names[name].name] = value
    required = [one.name for one in names.values() if _is_required(one)]
    missing = [name for name in required if values.get(name, "").startswith("<") or name not in values]
    if missing:
        raise StocktakeError(
            f"backend config: {', '.join(missing)} must be given: --backend-config FILE.json, as deploy/sagemaker.json"
        )
    return JobSettings(**values)


def project_file(project: Path, given: str) -> Path:
    """A path of the settings, from the project's folder."""
    return project / Path(given).expanduser()


def _is_required(one: dataclasses.Field[Any]) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def _fits(value: object, kind: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, parts[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, parts[1]) for one in value.values())
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
