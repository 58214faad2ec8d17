"""MLflow's project backend: `mlflow run . -b sagemaker --backend-config deploy/sagemaker.json -e finetune -P ...`.

MLflow's command line does not wait for the backends of others, so that `run` waits itself, unless the settings say
"async": true.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.exceptions import ExecutionException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun
from mlflow.projects.utils import fetch_and_validate_project, get_or_create_run
from mlflow.tracking import MlflowClient

from stocktake.aws.jobs import COMPLETED, Job
from stocktake.aws.prices import told
from stocktake.aws.results import RUN_STATES
from stocktake.aws.settings import read_settings
from stocktake.aws.submission import Submission, git_commit, prepare, tell_estimate
from stocktake.aws.tuning_jobs import TuningJob
from stocktake.aws.watch import find_job, say, stop_job, watch
from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.local_store import KILLED, RUNNING


class SubmittedJob(SubmittedRun):
    """A job, as `mlflow.run(..., synchronous=False)` hands it out."""

    def __init__(self, submission: Submission, run_id: str, tracking: TrackingConfig) -> None:
        """`submission` was sent."""
        super().__init__()
        self._submission = submission
        self._run_id = run_id
        self._tracking = tracking
        self._ended: Job | TuningJob | None = None

    @property
    def run_id(self) -> str:
        """MLflow's."""
        return self._run_id

    @property
    def job_name(self) -> str:
        """SageMaker's."""
        return self._submission.name

    def wait(self) -> bool:
        """Follow the job to its end and bring its results home; whether it completed."""
        if self._ended is None:
            job = watch(
                self._submission.aws,
                self.job_name,
                self._submission.parameters.workspace,
                self._tracking,
                self._submission.prices,
            )
            if job is None:
                return True
            self._ended = job
        return self._ended.status == COMPLETED

    @property
    def reason(self) -> str:
        """What to say of a job that did not complete."""
        job = self._ended or find_job(self._submission.aws, self.job_name)
        return f"{job.name} {job.status}{f': {job.failure}' if job.failure else ''}"

    def get_status(self) -> str:
        """MLflow's word for the job's state."""
        job = find_job(self._submission.aws, self.job_name)
        return RUN_STATES.get(job.status, KILLED) if job.has_ended else RUNNING

    def cancel(self) -> None:
        """Stop the job and wait for its end."""
        stop_job(self._submission.aws, self.job_name)
        self.wait()


class SageMakerBackend(AbstractBackend):
    """Submits an entry point as a training job, `tune` as a tuning job."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, str] | None,
        version: str | None,
        backend_config: Any,
        tracking_uri: str,
        experiment_id: str,
    ) -> SubmittedJob:
        """Check, submit, and unless the settings say async, wait.

        Raises:
            ExecutionException: something is wrong, in a line; or the job did not complete.
        """
        # The plugin that comes with sagemaker complains, harmlessly, in every request to a server.
        logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)
        parameters = {name: str(value) for name, value in (params or {}).items()}
        try:
            settings = read_settings(backend_config)
            project = Path(fetch_and_validate_project(project_uri, version, entry_point, parameters))  # type: ignore[no-untyped-call]
            submission = prepare(project, entry_point, parameters, settings, tracking_uri)
            tell_estimate(submission)
            run = get_or_create_run(  # type: ignore[no-untyped-call]
                None, project_uri, experiment_id, str(project), version, entry_point, parameters
            )
            submitted = SubmittedJob(submission, run.info.run_id, TrackingConfig(uri=tracking_uri))
            self._send(submission, run.info.run_id)
            is_done = True if settings.async_ else submitted.wait()
        except StocktakeError as error:
            raise ExecutionException(" ".join(str(error).split())) from None
        if not is_done:
            raise ExecutionException(submitted.reason)
        return submitted

    def _send(self, submission: Submission, run_id: str) -> None:
        """Send the job; the run says which one it is, or why there is none."""
        client = MlflowClient()
        client.set_tag(run_id, "mlflow.project.backend", "sagemaker")
        try:
            tags = submission.send(run_id)
        except BaseException as error:
            client.set_tag(run_id, "failure", " ".join(str(error).split())[:5000])
            client.set_terminated(run_id, "FAILED")
            raise
        if commit := git_commit(submission.project):
            tags["git.commit"] = commit
        if (most := submission.estimate()[1]) is not None:
            tags["job.cost_at_most"] = told(most)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
        name = submission.name
        say(f"submitted {name}, MLflow run {run_id}; follow it with `stocktake jobs --follow {name}`")
