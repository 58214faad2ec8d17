"""From `mlflow run . -b sagemaker` to a job: everything is checked, then sent."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stocktake.aws.connection import Aws, translate_aws_errors
from stocktake.aws.jobs import describe
from stocktake.aws.packaging import ArtifactUploader, bin_files, pack_source, split_uri
from stocktake.aws.parameters import Parameters, read_parameters
from stocktake.aws.prices import Prices, read_prices, told
from stocktake.aws.request import Inputs, job_name, training_job
from stocktake.aws.results import job_tags
from stocktake.aws.settings import JobSettings, is_remote, project_file
from stocktake.aws.tuning_jobs import check_parents, describe_search
from stocktake.aws.tuning_request import tuning_job, tuning_name
from stocktake.aws.tuning_watch import search_tags
from stocktake.aws.watch import say
from stocktake.errors import StocktakeError
from stocktake.redaction import redact, without_credentials


@dataclass(frozen=True)
class Submission:
    """A training or tuning job that is about to be: everything about it is checked, and nothing is sent."""

    aws: Aws
    project: Path
    settings: JobSettings
    parameters: Parameters
    name: str
    tracking_uri: str | None
    """As the job reaches it; None: it does not."""
    source: bytes
    prices: Prices | None

    def send(self, run_id: str) -> dict[str, str]:
        """Upload what the job needs and create it; what the run is to say of it.

        Raises:
            StocktakeError: S3 or SageMaker refuse.
        """
        shelf = ArtifactUploader(self.aws.s3, self.settings.place, self.settings.kms_key)
        root, files = self.parameters.root, self.parameters.files
        with translate_aws_errors(f"upload to {self.settings.place}"):
            bins = _as_prefix(root) if root and root.startswith("s3://") else None
            if root and bins is None:
                bins = shelf.put_bins(self.project / root)
            inputs = Inputs(shelf.put_source(self.source), bins, shelf.put_files(files) if files else None)
        with translate_aws_errors("SageMaker refuses the job"):
            if (search := self.parameters.search) is not None:
                request = tuning_job(self.name, self.settings, self.parameters, search, inputs, run_id=run_id)
                self.aws.sagemaker.create_hyper_parameter_tuning_job(**request)
                return search_tags(self.aws, describe_search(self.aws, self.name))
            request = training_job(
                self.name, self.settings, self.parameters, inputs, run_id=run_id, tracking_uri=self.tracking_uri
            )
            self.aws.sagemaker.create_training_job(**request)
        return job_tags(self.aws, describe(self.aws, self.name), self.prices)

    def estimate(self) -> tuple[float | None, float | None]:
        """Dollars an hour, and at most."""
        if self.prices is None:
            return None, None
        settings, search = self.settings, self.parameters.search
        at_once, in_all = (search.workers, search.trials) if search else (1, 1)
        hourly, most = (
            self.prices.estimate(settings.instance_type, times * settings.instance_count, seconds, spot=settings.spot)
            for times, seconds in ((at_once, 3600), (in_all, settings.max_run_seconds))
        )
        return hourly, most


def prepare(
    project: Path, entry_point: str, parameters: Mapping[str, str], settings: JobSettings, client_uri: str
) -> Submission:
    """Check everything that can be checked: settings, parameters, the request, the root, the bucket.

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
    search = checked.search
    name = tuning_name() if search else job_name(checked.command)
    tracking_uri = settings.tracking_uri or (client_uri if is_remote(client_uri) else None)
    if tracking_uri is not None and without_credentials(tracking_uri) != tracking_uri:
        raise StocktakeError(
            f"the tracking URI {redact(tracking_uri)} has credentials in it, which anybody could read who may describe "
            "the job: give it without them, and let the job's server do with its network or role"
        )
    somewhere = Inputs(f"{settings.place}/code/", f"{settings.place}/bins/", f"{settings.place}/files/")
    if search:
        request = tuning_job(name, settings, checked, search, somewhere, run_id="0" * 32)
    else:
        training_job(name, settings, checked, somewhere, run_id="0" * 32, tracking_uri=tracking_uri)
    prices = read_prices(project_file(project, settings.prices))
    source = pack_source(project)
    aws = Aws(settings.region)
    _check_root(aws, project, checked.root, settings)
    with translate_aws_errors(f"backend config: bucket {settings.bucket}"):
        aws.s3.head_bucket(Bucket=split_uri(settings.bucket)[0])
    if settings.warm_start:
        ranges = request["HyperParameterTuningJobConfig"]["ParameterRanges"]
        check_parents(aws, settings.warm_start, ranges, settings.warm_start_type)
    return Submission(aws, project, settings, checked, name, tracking_uri, source, prices)


def git_commit(project: Path) -> str | None:
    """The commit of a checkout."""
    done = subprocess.run(["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def tell_estimate(submission: Submission) -> None:
    """What the job may cost."""
    hourly, most = submission.estimate()
    settings, prices = submission.settings, submission.prices
    what = f"{settings.instance_count} x {settings.instance_type}{', spot' if settings.spot else ''}"
    if search := submission.parameters.search:
        what = f"{search.trials} trials, {search.workers} at a time, each on {what}"
    if hourly is None or prices is None:
        say(f"{what}: no price of it in {settings.prices}")
    else:
        say(
            f"{what}: about {told(hourly)} an hour, at most {told(most)} in {settings.max_run_seconds / 3600:.3g} h "
            f"{'each ' if search else ''}(prices of {prices.date}, {prices.region})"
        )


def _check_root(aws: Aws, project: Path, root: str | None, settings: JobSettings) -> None:
    """Raises StocktakeError for a root that the job could not read."""
    if root is None:
        return
    if root.startswith("s3://"):
        bucket, prefix = split_uri(_as_prefix(root))
        with translate_aws_errors(f"-P root={root}"):
            found = aws.s3.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        if not found.get("KeyCount"):
            raise StocktakeError(f"-P root={root}: nothing lies there; it must hold bin-images/ and metadata/")
        return
    if "://" in root:
        raise StocktakeError(f"-P root={root}: a job reads s3:// addresses")
    if not settings.upload_bins:
        raise StocktakeError(
            f"-P root={root} is a folder of this machine, which a job does not see: publish it "
            f"(`stocktake data --root {root} --publish s3://...`) and give that address, or set upload_bins to true"
        )
    bin_files(project / root)


def _as_prefix(root: str) -> str:
    return root.rstrip("/") + "/"
