"""Entry points as training jobs of the local AWS, by MLflow's own commands: results, interruptions, ends, ways home.

Users and jobs have the rights of deploy/policies and no others.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run
from mlflow.exceptions import ExecutionException

from emulated_aws import EmulatedAws, eventually
from stocktake.aws.connection import Aws
from stocktake.aws.jobs import Job
from stocktake.aws.results import collect_results
from stocktake.commands.evaluate import evaluate
from stocktake.commands.jobs import jobs
from stocktake.config import EvaluateConfig, JobsConfig, SplitConfig, TrackingConfig
from stocktake.tracking.local_store import LocalRun
from tiny_bins import TINY_JOB, tiny_root
from tracking_server import TrackingServer, lay_out_store

__all__ = ["tiny_root"]
pytestmark = [pytest.mark.aws, pytest.mark.slow, pytest.mark.timeout(600)]
PROJECT = Path(__file__).parents[2]
TINY = {
    **TINY_JOB,
    "epochs": "3",
}


class Proxy:
    """A way to a server that is cut for good when a request with these bytes comes by."""

    def __init__(self, port: int, until: bytes) -> None:
        self._port, self._until = port, until
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.is_cut = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.is_cut.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while not self.is_cut.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(65536):
                if self._until in data:
                    self.close()
                if self.is_cut.is_set():
                    return
                target.sendall(data)


@dataclass
class Site:
    """The local AWS, a tracking server, an experiment in it, a root in S3, and a folder to work in."""

    emulator: EmulatedAws
    port: int
    experiment: str
    root: str
    folder: Path
    role: str

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.uri, self.uri)

    def settings(self, **changes: Any) -> dict[str, Any]:
        given = {"role": self.role, "bucket": f"s3://{self.emulator.bucket}/stocktake", "image": "image:1"}
        return {**given, "max_run_seconds": 600, "prices": str(PROJECT / "deploy" / "prices.yaml"), **changes}

    def parameters(self, **changes: str) -> dict[str, str]:
        return {**TINY, "root": self.root, "workspace": str(self.folder), **changes}

    def submit(self, entry_point: str = "finetune", *, settings: dict[str, Any], **parameters: str) -> Run:
        """`mlflow run -b sagemaker` in this process: the run."""
        mlflow.set_tracking_uri(self.uri)
        done = mlflow.projects.run(
            str(PROJECT),
            entry_point,
            parameters=self.parameters(**parameters),
            experiment_id=self.experiment,
            backend="sagemaker",
            backend_config=settings,
            synchronous=False,  # as the command line has it
        )
        return self.client.get_run(done.run_id)

    def newest(self) -> Run:
        return self.client.search_runs([self.experiment], max_results=1)[0]

    def steps(self, run: Run, metric: str) -> list[int]:
        return sorted(point.step for point in self.client.get_metric_history(run.info.run_id, metric))


@pytest.fixture(scope="module")
def site(
    emulator: EmulatedAws, rights: Any, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    for path in [*tiny_root.glob("bin-images/*"), *tiny_root.glob("metadata/*")]:
        emulator.put(f"tiny/{path.relative_to(tiny_root)}", path.read_bytes())
    server = TrackingServer(folder / "server", lay_out_store(tmp_path_factory))
    with pytest.MonkeyPatch.context() as patch, server:
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
            patch.delenv(name)
        for name, value in rights.environment.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        patch.chdir(folder)
        before = mlflow.get_tracking_uri()
        experiment = mlflow.MlflowClient(server.uri).create_experiment("jobs")
        root = f"s3://{emulator.bucket}/tiny"
        yield Site(emulator, server.port, experiment, root, folder / "workspace", rights.role)
        mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def plain(site: Site) -> tuple[Run, str]:
    """A job as a user starts it, by the command line, that nothing happens to: its run, and what was said."""
    config = site.folder.parent / "sagemaker.json"
    config.write_text(json.dumps(site.settings(tags={"team": "counting"})))
    words = [word for name, value in site.parameters().items() for word in ("-P", f"{name}={value}")]
    command = [sys.executable, "-m", "mlflow", "run", str(PROJECT), "-b", "sagemaker", "--backend-config", str(config)]
    done = subprocess.run(
        [*command, "-e", "finetune", "--experiment-name", "jobs", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return site.newest(), done.stdout


def scores(run: Run) -> dict[str, float]:
    """What was measured, without what was timed."""
    return {name: value for name, value in run.data.metrics.items() if name.startswith(("val/", "test/", "train/"))}


def test_a_job_logs_into_the_run_that_mlflow_opened(site: Site, plain: tuple[Run, str]) -> None:
    run, said = plain
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert (tags["stage"], tags["arrived"], tags["data.root"]) == ("finetune", "live", site.root)
    assert run.data.params["epochs"] == "3"
    assert run.data.metrics["test/n"] > 0
    assert site.steps(run, "val/macro_f1")[:3] == [1, 2, 3]
    stored = {one.path for one in site.client.list_artifacts(run.info.run_id, "evaluation")}
    assert "evaluation/test_confusion_matrix.png" in stored
    (model,) = site.client.search_logged_models([site.experiment], f"source_run_id = '{run.info.run_id}'")
    assert str(model.status) == "READY"
    (brought,) = site.folder.glob(f"runs/{tags['stocktake.folder']}")
    assert (brought / "models" / "model" / "MLmodel").is_file()
    assert json.loads(run.inputs.dataset_inputs[0].dataset.source)["uri"] == site.root
    assert len(site.client.search_runs([site.experiment])) == 1, "one job, one run"
    assert "about $0.2300 an hour" in said
    assert "epoch=3 " in said
    assert "its results arrived live" in said


def test_the_run_says_what_its_job_was(site: Site, plain: tuple[Run, str], capsys: pytest.CaptureFixture[str]) -> None:
    tags = plain[0].data.tags
    job = site.emulator.job(tags["job.name"])
    assert tags["job.arn"] == job["TrainingJobArn"]
    assert tags["job.state"] == "Completed"
    assert tags["job.instance"] == "1 x ml.m5.xlarge"
    assert int(tags["job.billed_seconds"]) == job["BillableTimeInSeconds"]
    assert tags["job.cost"].startswith("$")
    assert tags["job.name"] in tags["job.logs"]
    assert {"Key": "team", "Value": "counting"} in site.emulator.client("sagemaker").list_tags(
        ResourceArn=job["TrainingJobArn"]
    )["Tags"]
    jobs(JobsConfig(prices=str(PROJECT / "deploy" / "prices.yaml")))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if tags["job.name"] in line]
    assert "Completed" in line
    assert line.endswith(plain[0].info.run_id)


def test_following_a_job_again_changes_nothing(site: Site, plain: tuple[Run, str]) -> None:
    run, _ = plain
    before = sorted(path.name for path in site.folder.glob("runs/*"))
    jobs(JobsConfig(follow=run.data.tags["job.name"], workspace=str(site.folder)))
    assert sorted(path.name for path in site.folder.glob("runs/*")) == before
    again = site.client.get_run(run.info.run_id)
    assert (again.info.status, again.data.metrics) == ("FINISHED", run.data.metrics)
    assert again.data.tags["arrived"] == "live"


def test_an_interrupted_spot_job_that_loses_its_tracking_ends_with_the_same_figures(
    site: Site, plain: tuple[Run, str]
) -> None:
    proxy = Proxy(site.port, until=b'"val/macro_f1"')  # the first figures of an epoch
    environment = {"SAGEMAKER_LOCAL_INTERRUPT_AFTER": "epoch=2 "}
    run = site.submit(settings=site.settings(spot=True, tracking_uri=proxy.uri, environment=environment))
    job, log = site.emulator.job(run.data.tags["job.name"]), site.emulator.log(run.data.tags["job.name"])
    assert "Interrupted" in [one["Status"] for one in job["SecondaryStatusTransitions"]]
    assert any("going on with finetune-" in line for line in log)
    assert proxy.is_cut.is_set()
    assert run.info.status == "FINISHED"
    assert run.data.tags["arrived"] == "with the job's output"
    assert "failure" not in run.data.tags
    assert set(site.steps(run, "train/loss")) == {1, 2, 3}
    assert scores(run) == pytest.approx(scores(plain[0]), rel=1e-5, abs=1e-6)
    models = site.client.search_logged_models([site.experiment], f"source_run_id = '{run.info.run_id}'")
    assert len(models) == 1


def test_two_machines_train_one_model(site: Site, tiny_root: Path) -> None:
    run = site.submit(settings=site.settings(instance_count=2))
    assert run.info.status == "FINISHED"
    assert (run.data.tags["stage"], run.data.tags["world_size"], run.data.tags["nodes"]) == ("ddp", "2", "2")
    assert run.data.tags["arrived"] == "live"
    here = evaluate(
        EvaluateConfig(
            model=str(site.folder / "runs" / run.data.tags["stocktake.folder"] / "models" / "model"),
            root=str(tiny_root),
            task="1-3",
            split=SplitConfig(fractions=(0.6, 0.2, 0.2), near_duplicate_distance=0),
            workspace=str(site.folder / "here"),
            tracking=TrackingConfig(offline=True, system_metrics=False),
        )
    )
    for name in ("test/n", "test/accuracy", "test/macro_f1", "test/mae"):
        assert here[name] == pytest.approx(run.data.metrics[name], abs=1e-9), name


def test_a_stopped_job_is_killed_and_keeps_what_it_has(site: Site) -> None:
    settings = site.settings(**{"async": True, "network_isolation": True})
    run = site.submit(settings=settings, epochs="100000", **{"training.patience": "100000"})
    assert run.info.status == "RUNNING"
    name = run.data.tags["job.name"]
    eventually(lambda: any("epoch=1 " in line for line in site.emulator.log(name)))
    jobs(JobsConfig(stop=name, workspace=str(site.folder)))
    run = site.client.get_run(run.info.run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["job.state"] == "Stopped"
    assert run.data.tags["failure"]
    assert site.steps(run, "val/macro_f1")[0] == 1


def test_a_failed_job_says_why(site: Site) -> None:
    with pytest.raises(ExecutionException, match=r"Failed: AlgorithmError: --training\.world_size 3, but the job has"):
        site.submit(settings=site.settings(), **{"training.world_size": "3"})
    run = site.newest()
    assert run.info.status == "FAILED"
    assert "--training.world_size 3" in run.data.tags["failure"]
    assert run.data.tags["job.state"] == "Failed"


def test_a_job_that_was_killed_outright_comes_home_from_its_checkpoints(site: Site, tmp_path: Path) -> None:
    run_id = site.client.create_run(site.experiment).info.run_id
    folder = LocalRun.create(
        tmp_path / "there", name="lost", experiment="jobs", tracking_uri=None, attach_run_id=run_id
    )
    folder.append_metrics({"val/macro_f1": 0.25}, 1)
    (folder.path / "checkpoints").mkdir()
    (folder.path / "checkpoints" / "last.ckpt").write_bytes(b"heavy")
    for path in folder.path.rglob("*"):
        if path.is_file():
            inside = path.relative_to(tmp_path / "there")
            site.emulator.put(f"checkpoints/lost/runs/{inside}", path.read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    description = {
        "TrainingJobName": "stocktake-lost",
        "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/stocktake-lost",
        "TrainingJobStatus": "Failed",
        "FailureReason": "InternalServerError: the machine is gone",
        "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1},
        "Environment": {"MLFLOW_RUN_ID": run_id},
        "CreationTime": now,
        "OutputDataConfig": {"S3OutputPath": f"s3://{site.emulator.bucket}/nothing"},
        "CheckpointConfig": {"S3Uri": f"s3://{site.emulator.bucket}/checkpoints/lost"},
    }
    arrival = collect_results(Aws(), Job(description), tmp_path / "here", TrackingConfig(uri=site.uri), None, print)
    assert [path.name for path in arrival.folders] == [folder.path.name]
    assert not (arrival.folders[0] / "checkpoints").exists()
    run = site.client.get_run(run_id)
    assert (run.info.status, run.data.metrics["val/macro_f1"]) == ("FAILED", 0.25)
    collect_results(Aws(), Job(description), tmp_path / "here", TrackingConfig(uri=site.uri), None, print)
    assert [path.name for path in (tmp_path / "here" / "runs").glob("[!.]*")] == [folder.path.name]
    assert run.data.tags["failure"] == "InternalServerError: the machine is gone"


def test_a_root_that_is_not_there_is_refused(site: Site) -> None:
    before = len(site.client.search_runs([site.experiment]))
    with pytest.raises(ExecutionException, match="nothing lies there"):
        site.submit(settings=site.settings(), root=f"{site.root}-not")
    with pytest.raises(ExecutionException, match="backend config: bucket s3://no-such-bucket"):
        site.submit(settings=site.settings(bucket="s3://no-such-bucket"))
    assert len(site.client.search_runs([site.experiment])) == before
