"""Entry points as training jobs of the emulator: results, interruptions, several instances, ends.

Users and jobs have the rights of deploy/policies and no others.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.exceptions import ExecutionException

from aws_site import PROJECT, Site, make_site
from emulated_aws import EmulatedAws, eventually
from stocktake.commands.evaluate import evaluate
from stocktake.commands.jobs import jobs
from stocktake.config.aws import JobsConfig
from stocktake.config.data import SplitConfig
from stocktake.config.runs import EvaluateConfig, TrackingConfig
from tiny_bins import tiny_root
from tracking_server import TrackingServer

__all__ = ["tiny_root"]
pytestmark = [pytest.mark.aws, pytest.mark.slow, pytest.mark.timeout(600)]


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


@pytest.fixture(scope="module")
def site(
    emulator: EmulatedAws, rights: Any, tiny_root: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("training")
    with (
        TrackingServer(folder / "server", empty_store) as server,
        make_site(emulator, rights, tiny_root, folder, server.uri) as site,
    ):
        yield site


@pytest.fixture(scope="module")
def plain(site: Site) -> tuple[Run, str]:
    """A job as a user starts it, by the command line, that nothing happens to: its run, and the output."""
    config = site.workspace.parent / "sagemaker.json"
    config.write_text(json.dumps(site.settings(tags={"team": "counting"})))
    words = [word for name, value in site.parameters(epochs="3").items() for word in ("-P", f"{name}={value}")]
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
    run, output = plain
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert (tags["stage"], tags["results.source"], tags["data.root"]) == ("finetune", "live", site.root)
    assert run.data.params["epochs"] == "3"
    assert run.data.metrics["test/n"] > 0
    assert site.steps(run, "val/macro_f1")[:3] == [1, 2, 3]
    stored = {entry.path for entry in site.client.list_artifacts(run.info.run_id, "evaluation")}
    assert "evaluation/test_confusion_matrix.png" in stored
    (model,) = site.client.search_logged_models([site.experiment], f"source_run_id = '{run.info.run_id}'")
    assert str(model.status) == "READY"
    (folder,) = site.workspace.glob("runs/finetune-*")
    assert (folder / "models" / "model" / "MLmodel").is_file()
    assert json.loads(run.inputs.dataset_inputs[0].dataset.source)["uri"] == site.root
    assert len(site.client.search_runs([site.experiment])) == 1, "one job, one run"
    assert "epoch=3 " in output


def test_the_run_says_what_its_job_was(site: Site, plain: tuple[Run, str], capsys: pytest.CaptureFixture[str]) -> None:
    tags = plain[0].data.tags
    job = site.emulator.job(tags["job.name"])
    assert tags["job.arn"] == job["TrainingJobArn"]
    assert tags["job.state"] == "Completed"
    assert tags["job.instance"] == "1 x ml.m5.xlarge"
    assert int(tags["job.billed_seconds"]) == job["BillableTimeInSeconds"]
    assert tags["job.name"] in tags["job.logs"]
    assert {"Key": "team", "Value": "counting"} in site.emulator.client("sagemaker").list_tags(
        ResourceArn=job["TrainingJobArn"]
    )["Tags"]
    before = sorted(path.name for path in site.workspace.glob("runs/*"))
    jobs(JobsConfig(follow=tags["job.name"], workspace=str(site.workspace)))
    assert sorted(path.name for path in site.workspace.glob("runs/*")) == before
    again = site.client.get_run(plain[0].info.run_id)
    assert (again.info.status, again.data.metrics) == ("FINISHED", plain[0].data.metrics)
    assert again.data.tags == tags, "following a job again changes nothing"
    capsys.readouterr()
    jobs(JobsConfig())
    lines = capsys.readouterr().out.splitlines()
    assert any(tags["job.name"][:20] in line for line in lines)


def test_an_interrupted_spot_job_that_loses_its_tracking_ends_with_the_same_figures(
    site: Site, plain: tuple[Run, str]
) -> None:
    proxy = Proxy(int(site.uri.rpartition(":")[2]), until=b'"val/macro_f1"')  # the first figures of an epoch
    environment = {"SAGEMAKER_LOCAL_INTERRUPT_AFTER": "epoch=2 "}
    settings = site.settings(spot=True, tracking_uri=proxy.uri, environment=environment)
    run = site.submit("finetune", settings, epochs="3")
    job, log = site.emulator.job(run.data.tags["job.name"]), site.emulator.log(run.data.tags["job.name"])
    assert "Interrupted" in [transition["Status"] for transition in job["SecondaryStatusTransitions"]]
    assert any("resuming finetune-" in line for line in log)
    assert proxy.is_cut.is_set()
    assert run.info.status == "FINISHED"
    assert run.data.tags["results.source"] == "job output"
    assert "failure" not in run.data.tags
    assert set(site.steps(run, "train/loss")) == {1, 2, 3}
    assert scores(run) == pytest.approx(scores(plain[0]), rel=1e-5, abs=1e-6)
    models = site.client.search_logged_models([site.experiment], f"source_run_id = '{run.info.run_id}'")
    assert len(models) == 1


def test_two_instances_train_one_model(site: Site, tiny_root: Path) -> None:
    run = site.submit("finetune", site.settings(instance_count=2), epochs="1")
    assert run.info.status == "FINISHED"
    assert (run.data.tags["stage"], run.data.tags["world_size"], run.data.tags["nodes"]) == ("ddp", "2", "2")
    assert run.data.tags["results.source"] == "live"
    (folder,) = site.workspace.glob("runs/ddp-*")
    metrics = evaluate(
        EvaluateConfig(
            model=str(folder / "models" / "model"),
            root=str(tiny_root),
            task="1-3",
            split=SplitConfig(fractions=(0.6, 0.2, 0.2), near_duplicate_distance=0),
            workspace=str(site.workspace.parent / "here"),
            tracking=TrackingConfig(offline=True, system_metrics=False),
        )
    )
    for name in ("test/n", "test/accuracy", "test/macro_f1", "test/mae"):
        assert metrics[name] == pytest.approx(run.data.metrics[name], abs=1e-9), name


def test_a_stopped_job_is_killed_and_keeps_what_it_has(site: Site) -> None:
    settings = site.settings(network_isolation=True)
    run = site.submit("finetune", settings, wait=False, epochs="100000", **{"training.patience": "100000"})
    assert run.info.status == "RUNNING"
    name = run.data.tags["job.name"]
    eventually(lambda: any("epoch=1 " in line for line in site.emulator.log(name)))
    jobs(JobsConfig(stop=name, workspace=str(site.workspace)))
    run = site.client.get_run(run.info.run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["job.state"] == "Stopped"
    assert run.data.tags["failure"]
    assert site.steps(run, "val/macro_f1")[0] == 1


def test_a_failed_job_says_why(site: Site) -> None:
    with pytest.raises(ExecutionException):
        site.submit("finetune", **{"training.world_size": "3"})
    run = site.newest()
    assert run.info.status == "FAILED"
    assert "--training.world_size 3" in run.data.tags["failure"]
    assert run.data.tags["job.state"] == "Failed"
