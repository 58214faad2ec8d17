"""MLflow's project backend: `mlflow run . -b sagemaker --backend-config deploy/sagemaker.json -e finetune -P ...`.

MLflow's command line does not wait for the backends of others and names the run only after `run`: there `run` takes the
name itself and follows the job, unless the settings say "async": true. From Python `run` returns at once, and MLflow
waits if it is called with synchronous=True.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from mlflow.entities import RunTag
from mlflow.exceptions import ExecutionException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun
from mlflow.projects.utils import fetch_and_validate_project, get_or_create_run
from mlflow.tracking import MlflowClient

from stocktake.aws.jobs import COMPLETED, Job, TuningJob, find_job, stop_job
from stocktake.aws.results import RUN_STATES, job_tags
from stocktake.aws.settings import read_job_settings
from stocktake.aws.submission import Submission, UnknownOutcomeError, prepare
from stocktake.aws.watch import left_running, watch
from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.connection import brief
from stocktake.tracking.local_store import KILLED, RUNNING


class SubmittedJob(SubmittedRun):
    """A job, as `mlflow.run(..., synchronous=False)` returns it."""

    def __init__(self, submission: Submission, run_id: str, tracking: TrackingConfig) -> None:
        """`submission` was sent."""
        super().__init__()
        self._submission = submission
        self._run_id = run_id
        self._tracking = tracking
        self._ended: Job | None = None

    @property
    def run_id(self) -> str:
        """MLflow's."""
        return self._run_id

    @property
    def job_name(self) -> str:
        """SageMaker's."""
        return self._submission.name

    def wait(self) -> bool:
        """Follow the job to its end and collect its results; whether it completed.

        Raises:
            ExecutionException: the job is left running, or AWS refuses to say more of it.
        """
        if self._ended is None:
            try:
                workspace = self._submission.parameters.workspace
                self._ended = watch(self._submission.aws, self.job_name, workspace, self._tracking)
            except StocktakeError as error:
                raise ExecutionException(" ".join(str(error).split())) from None
        if self._ended is None:  # MLflow would take a return for the run's end
            raise ExecutionException(left_running(self.job_name))
        return self._ended.status == COMPLETED

    @property
    def reason(self) -> str:
        """Why the job did not complete."""
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
        """Check and submit; on the command line also follow the job to its end.

        Raises:
            ExecutionException: something is wrong, in a line; or the job did not complete.
        """
        # The plugin for managed servers complains, harmlessly, in every request to another server.
        logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)
        command_line = click.get_current_context(silent=True)
        parameters = {name: str(value) for name, value in (params or {}).items()}
        try:
            settings = read_job_settings(backend_config)
            project = Path(fetch_and_validate_project(project_uri, version, entry_point, parameters))  # type: ignore[no-untyped-call]
            submission = prepare(project, entry_point, parameters, settings, tracking_uri)
            run = get_or_create_run(  # type: ignore[no-untyped-call]
                None, project_uri, experiment_id, str(project), version, entry_point, parameters
            )
            run_id: str = run.info.run_id
            if command_line is not None and (run_name := command_line.params.get("run_name")):
                MlflowClient().update_run(run_id, name=run_name)
            _submit(submission, run_id, run.data.tags.get("mlflow.source.git.commit"))
        except StocktakeError as error:
            raise ExecutionException(" ".join(str(error).split())) from None
        submitted = SubmittedJob(submission, run_id, TrackingConfig(uri=tracking_uri))
        if command_line is not None and not settings.async_ and not submitted.wait():
            raise ExecutionException(submitted.reason)
        return submitted


def _submit(submission: Submission, run_id: str, commit: str | None) -> None:
    """Create the job. The run is FAILED only if there is no job: a job that exists is paid for, and has a run."""
    client, name = MlflowClient(), submission.name
    try:
        client.log_batch(run_id, tags=[RunTag("mlflow.project.backend", "sagemaker"), RunTag("job.name", name)])
        job = submission.create(submission.upload_inputs(), run_id)
    except UnknownOutcomeError:
        raise
    except BaseException as error:
        client.set_tag(run_id, "failure", brief(error) or type(error).__name__)
        client.set_terminated(run_id, "FAILED")
        raise
    print(f"submitted {name}, MLflow run {run_id}; follow it with `stocktake jobs --follow {name}`", flush=True)
    try:
        tags = job_tags(submission.aws, job)
        if isinstance(job, TuningJob):
            from stocktake.aws.tuning_watch import tuning_tags

            tags = tuning_tags(submission.aws, job)
        tags |= {"git.commit": commit} if commit else {}
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    except KeyboardInterrupt:
        print(f"stopping {name}", flush=True)
        stop_job(submission.aws, name)
    except Exception as error:  # whatever a tracking server does, the job goes on
        print(f"warning: the run {run_id} does not say what its job is: {brief(error)}", flush=True)
