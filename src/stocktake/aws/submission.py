"""From `mlflow run . -b sagemaker` to a job: everything is checked, then sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocktake.aws.connection import Aws, AwsError, split_uri, translate_aws_errors
from stocktake.aws.jobs import Job, TuningJob, find_job, new_name, stop_job
from stocktake.aws.packaging import SOURCE, ArtifactUploader, pack_source
from stocktake.aws.parameters import Parameters, read_parameters
from stocktake.aws.request import BINS, CODE, FILES, training_job, tuning_job
from stocktake.aws.settings import JobSettings, is_remote
from stocktake.errors import StocktakeError
from stocktake.redaction import redact, without_credentials


class UnknownOutcomeError(StocktakeError):
    """AWS did not answer: the job may exist, and cost money, or not."""


@dataclass(frozen=True)
class Submission:
    """A training or tuning job that is not sent yet; all that can be checked without AWS creating it is checked."""

    aws: Aws
    settings: JobSettings
    parameters: Parameters
    name: str
    tracking_uri: str | None
    """As the job reaches it; None: it does not."""
    source: bytes

    def upload_inputs(self) -> dict[str, str]:
        """Upload what the job needs; channel -> prefix.

        Raises:
            AwsError: S3 refuses.
        """
        uploader = ArtifactUploader(self.aws.s3, self.settings.prefix, self.settings.kms_key)
        with translate_aws_errors(f"upload to {self.settings.prefix}"):
            inputs = {CODE: uploader.put(CODE, {SOURCE: self.source})}
            if self.parameters.files:
                inputs[FILES] = uploader.put(FILES, self.parameters.files)
        if self.parameters.root:
            inputs[BINS] = _as_prefix(self.parameters.root)
        return inputs

    def create(self, inputs: Mapping[str, str], run_id: str) -> Job | TuningJob:
        """Create the job. One that exists after an interrupt of the user is stopped.

        A request whose answer was lost, and that botocore sent again, is refused because the name is taken: if the
        job of that name has our run, it is the one that was asked for.

        Raises:
            AwsError: SageMaker refuses it.
            UnknownOutcomeError: it is not known whether the job exists.
        """
        spec = self.parameters.tuning
        try:
            with translate_aws_errors("SageMaker refuses the job"):
                if spec is not None:
                    request = tuning_job(self.name, self.settings, self.parameters, spec, inputs, run_id=run_id)
                    self.aws.sagemaker.create_hyper_parameter_tuning_job(**request)
                else:
                    request = self._training_job(inputs, run_id)
                    self.aws.sagemaker.create_training_job(**request)
        except (AwsError, KeyboardInterrupt) as error:
            if isinstance(error, AwsError) and not (error.is_transient or error.code == "ResourceInUse"):
                raise
            if (job := self._find(run_id)) is None:
                raise
            return stop_job(self.aws, self.name) if isinstance(error, KeyboardInterrupt) else job
        return find_job(self.aws, self.name)

    def _training_job(self, inputs: Mapping[str, str], run_id: str) -> dict[str, Any]:
        return training_job(
            self.name, self.settings, self.parameters, inputs, run_id=run_id, tracking_uri=self.tracking_uri
        )

    def _find(self, run_id: str) -> Job | TuningJob | None:
        """The job, if it exists and is this one."""
        try:
            job = find_job(self.aws, self.name)
        except AwsError as error:
            if error.code in ("ValidationException", "ResourceNotFound"):
                return None
            raise UnknownOutcomeError(
                f"it is not known whether {self.name} was created ({error}): see `stocktake jobs --follow {self.name}`"
            ) from None
        return job if job.run_id == run_id else None


def prepare(
    project: Path, entry_point: str, parameters: Mapping[str, str], settings: JobSettings, client_uri: str
) -> Submission:
    """Check everything that can be checked: settings, parameters, the root, the bucket.

    Args:
        project: a checkout.
        entry_point: of MLproject.
        parameters: what -P gives.
        settings: where and how the job runs.
        client_uri: this machine's tracking URI.

    Raises:
        StocktakeError: names the setting or parameter that has to change.
    """
    checked = read_parameters(project, entry_point, parameters, settings)
    tracking_uri = settings.tracking_uri or (client_uri if is_remote(client_uri) else None)
    if tracking_uri is not None and without_credentials(tracking_uri) != tracking_uri:
        raise StocktakeError(
            f"the tracking URI {redact(tracking_uri)} has credentials in it, which anybody could read who may describe "
            "the job: give it without them, and let the job's server do with its network or role"
        )
    source = pack_source(project)
    bucket = split_uri(settings.bucket)[0]
    aws = Aws(settings.region, bucket_owner=settings.bucket_owner, owned_buckets=(bucket,))
    if checked.root is not None:
        root_bucket, prefix = split_uri(_as_prefix(checked.root))
        with translate_aws_errors(f"-P root={checked.root}"):
            listed = aws.s3.list_objects_v2(Bucket=root_bucket, Prefix=prefix, MaxKeys=1)
        if not listed.get("KeyCount"):
            raise StocktakeError(f"-P root={checked.root} is empty: it must hold bin-images/ and metadata/")
    with translate_aws_errors(f"backend config: bucket {settings.bucket}"):
        aws.s3.head_bucket(Bucket=bucket)
    return Submission(aws, settings, checked, new_name(checked.command), tracking_uri, source)


def _as_prefix(root: str) -> str:
    return root.rstrip("/") + "/"
