"""`tune` as tuning jobs of the local AWS: trials as child runs, failures, early ends, throttling, warm starts."""

from __future__ import annotations

import collections
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run
from mlflow.exceptions import ExecutionException

from emulated_aws import EmulatedAws, eventually
from stocktake.aws.connection import Aws
from stocktake.aws.tuning_jobs import stop_search
from stocktake.aws.tuning_watch import follow_search
from stocktake.cli import parse
from stocktake.commands.jobs import jobs
from stocktake.config import JobsConfig, TrackingConfig
from stocktake.errors import StocktakeError
from tiny_bins import PLAIN_BACKBONE, TINY_JOB, tiny_root
from tracking_server import lay_out_store

__all__ = ["tiny_root"]
pytestmark = [pytest.mark.aws, pytest.mark.slow, pytest.mark.timeout(600)]
PROJECT = Path(__file__).parents[2]
PRICES = str(PROJECT / "deploy" / "prices.yaml")
TINY = {
    **TINY_JOB,
    "sampler": "random",
    "pruner": "none",
    "workers": "2",
}
SPACE = {
    "lr": {"type": "float", "low": 3e-4, "high": 3e-3, "log": True},
    "training.optimizer": {"choices": ["adamw", "sgd"]},
    "weights": {"choices": ["none", "not-there.pth"]},  # the second fails in the container
    "epochs": {"type": "int", "low": 1, "high": 2},
}
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Throttle:
    """A way to the local AWS where each of SageMaker's operations is refused a few times before it is answered."""

    def __init__(self, endpoint: str, times: int) -> None:
        self.refused: collections.Counter[str] = collections.Counter()
        throttle = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                operation = self.headers.get("X-Amz-Target", "").rpartition(".")[2]
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if operation and throttle.refused[operation] < times:
                    throttle.refused[operation] += 1
                    self.reply(400, {}, b'{"__type": "ThrottlingException", "message": "Rate exceeded"}')
                    return
                request = urllib.request.Request(endpoint + self.path, body or None, method=self.command)
                for name, value in self.headers.items():
                    request.add_header(name, value)
                try:
                    with _direct.open(request) as answer:
                        self.reply(answer.status, dict(answer.headers), answer.read())
                except urllib.error.HTTPError as error:
                    self.reply(error.code, dict(error.headers), error.read())

            do_GET = do_PUT = do_POST = do_HEAD = answer  # noqa: N815 - http.server's names

            def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                left_out = ("connection", "content-length", "date", "server", "transfer-encoding")
                for name, value in headers.items():
                    if name.lower() not in left_out:
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Site:
    """The local AWS, a store, an experiment in it, a root in S3, and a folder to work in."""

    emulator: EmulatedAws
    uri: str
    experiment: str
    root: str
    folder: Path
    role: str

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.uri, self.uri)

    def settings(self, **changes: Any) -> dict[str, Any]:
        given = {"role": self.role, "bucket": f"s3://{self.emulator.bucket}/stocktake/tuning", "prices": PRICES}
        return {**given, "image": "somewhere/stocktake-training:latest", "max_run_seconds": 600, **changes}

    def submit(self, space: dict[str, Any], settings: dict[str, Any] | None = None, **parameters: str) -> Run:
        """`mlflow run -b sagemaker -e tune` in this process: the run."""
        path = self.folder / f"{abs(hash(json.dumps(space)))}.space.yaml"
        path.write_text(json.dumps(space))
        mlflow.set_tracking_uri(self.uri)
        done = mlflow.projects.run(
            str(PROJECT),
            "tune",
            parameters={**TINY, "root": self.root, "workspace": str(self.folder), "space": str(path), **parameters},
            experiment_id=self.experiment,
            backend="sagemaker",
            backend_config=settings or self.settings(),
            synchronous=False,
        )
        return self.client.get_run(done.run_id)

    def children(self, run: Run) -> list[Run]:
        """By number."""
        found = self.client.search_runs([self.experiment], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        return sorted(found, key=lambda child: int(child.data.tags["trial"]))

    def newest(self) -> Run:
        return self.client.search_runs([self.experiment], "tags.stage = 'tune'", max_results=1)[0]


@pytest.fixture(scope="module")
def site(
    emulator: EmulatedAws, rights: Any, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "workspace").mkdir()
    for path in [*tiny_root.glob("bin-images/*"), *tiny_root.glob("metadata/*")]:
        emulator.put(f"tiny-tuning/{path.relative_to(tiny_root)}", path.read_bytes())
    (folder / "mlflow.db").write_bytes(lay_out_store(tmp_path_factory).read_bytes())
    uri = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
            patch.delenv(name)
        for name, value in rights.environment.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.chdir(folder)
        before = mlflow.get_tracking_uri()
        experiment = mlflow.MlflowClient(uri, uri).create_experiment("tuning", artifact_location=str(folder / "stored"))
        root = f"s3://{emulator.bucket}/tiny-tuning"
        yield Site(emulator, uri, experiment, root, folder / "workspace", rights.role)
        mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def searched(site: Site) -> Run:
    """A search that was submitted, left alone, and then followed while AWS throttles."""
    run = site.submit(SPACE, site.settings(**{"async": True}), trials="3", seed="15")  # a bad choice, then good ones
    assert run.info.status == "RUNNING"
    assert site.children(run) == []
    throttle = Throttle(site.emulator.endpoint, times=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", throttle.endpoint)
        jobs(JobsConfig(follow=run.data.tags["job.name"], workspace=str(site.folder), prices=PRICES))
    throttle.close()
    for operation in ("DescribeHyperParameterTuningJob", "DescribeTrainingJob"):
        assert throttle.refused[operation] == 2, throttle.refused
    return site.client.get_run(run.info.run_id)


def test_every_trial_is_a_child_run(site: Site, searched: Run) -> None:
    assert searched.info.status == "FINISHED"
    assert searched.info.run_name == "tune"
    children = site.children(searched)
    assert [child.info.run_name for child in children] == ["trial-001", "trial-002", "trial-003"]
    states = [child.info.status for child in children]
    assert states == ["FAILED", "FINISHED", "FINISHED"]
    for child in children:
        params, tags = child.data.params, child.data.tags
        assert 3e-4 <= float(params["lr"]) <= 3e-3
        assert (tags["stage"], tags["trial.stage"], tags["data.root"]) == ("trial", "finetune", site.root)
        assert params["root"] == site.root
        job = site.emulator.job(tags["job.name"])
        assert int(tags["job.billed_seconds"]) == job["BillableTimeInSeconds"]
        assert tags["job.name"] in tags["job.logs"]
        assert not [name for name in child.data.metrics if name.startswith("test/")], "no trial sees the test split"
        if child.info.status == "FAILED":
            assert params["weights"] == "not-there.pth"
            assert "not-there.pth" in tags["failure"]
            assert tags["trial.state"] == "failed"
            continue
        history = site.client.get_metric_history(child.info.run_id, "val/macro_f1")
        assert sorted(point.step for point in history) == [*range(1, int(params["epochs"]) + 2)]
        stored = {one.path for one in site.client.list_artifacts(child.info.run_id)}
        assert {"checkpoint", "evaluation", "config.yaml", "experiment.yaml"} <= stored


def test_the_best_trial_is_an_experiment(site: Site, searched: Run, tmp_path: Path) -> None:
    children = site.children(searched)
    finished = [child for child in children if child.info.status == "FINISHED"]
    best = max(finished, key=lambda child: (child.data.metrics["val/macro_f1"], -int(child.data.tags["trial"])))
    tags = searched.data.tags
    assert (tags["best"], tags["best.run"]) == (best.info.run_name, best.info.run_id)
    assert searched.data.metrics["best/val_macro_f1"] == pytest.approx(best.data.metrics["val/macro_f1"], abs=1e-6)
    assert f"| {best.data.tags['trial']} | " in tags["mlflow.note.content"]
    assert "3 trials of finetune (2 complete, 1 failed) by SageMaker's Random search." in tags["mlflow.note.content"]
    billed = sum(int(child.data.tags["job.billed_seconds"]) for child in children)
    assert int(tags["job.billed_seconds"]) == billed
    assert tags["job.cost"].startswith("$")
    path = Path(site.client.download_artifacts(searched.info.run_id, "best.yaml", str(tmp_path)))
    assert path.read_text().startswith("# stocktake train --experiment best.yaml\n")
    config = parse("finetune", ["--experiment", str(path)])
    assert (config.root, config.task, config.backbone) == (site.root, "1-3", PLAIN_BACKBONE)
    assert config.training.optimizer == best.data.params["training.optimizer"]
    assert config.lr == pytest.approx(float(best.data.params["lr"]))
    table = Path(site.client.download_artifacts(searched.info.run_id, "trials.csv", str(tmp_path))).read_text()
    assert len(table.splitlines()) == 4


def test_following_it_again_from_elsewhere_changes_nothing(
    site: Site, searched: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {child.info.run_id: dict(child.data.metrics) for child in site.children(searched)}
    points = site.client.get_metric_history(searched.info.run_id, "best/val_macro_f1")
    jobs(JobsConfig(follow=searched.data.tags["job.name"], workspace=str(tmp_path), prices=PRICES))
    assert {child.info.run_id: dict(child.data.metrics) for child in site.children(searched)} == before
    again = site.client.get_run(searched.info.run_id)
    assert again.data.tags == searched.data.tags
    assert len(site.client.get_metric_history(searched.info.run_id, "best/val_macro_f1")) == len(points)
    capsys.readouterr()
    jobs(JobsConfig(prices=PRICES))
    lines = [line for line in capsys.readouterr().out.splitlines() if searched.data.tags["job.name"] in line]
    assert len(lines) == 1, "its trials are not listed beside it"
    assert "Completed, 3 of 3 trials" in lines[0]


def test_another_store_is_refused_by_name(
    site: Site, searched: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "other.db").write_bytes(lay_out_store(tmp_path_factory).read_bytes())
    other = TrackingConfig(uri=f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(StocktakeError, match=r"does not have the run .*: give the --tracking\.uri that it was"):
        jobs(JobsConfig(follow=searched.data.tags["job.name"], workspace=str(tmp_path), tracking=other))


def test_a_search_begins_with_an_earlier_one(site: Site, searched: Run) -> None:
    earlier = searched.data.tags["job.name"]
    space = {"classical.components": {"type": "int", "low": 5, "high": 20}, "classical.pixels": {"choices": [8, 16]}}
    changes = {"stage": "classical", "trials": "1", "sampler": "tpe"}
    with pytest.raises(ExecutionException, match=f"warm_start {earlier} had other ranges: give the same space"):
        site.submit(space, site.settings(warm_start=[earlier]), **changes)
    with pytest.raises(ExecutionException, match="warm_start nobody: "):
        site.submit(space, site.settings(warm_start=["nobody"]), **changes)
    run = site.submit(space, site.settings(warm_start=[earlier], warm_start_type="TransferLearning"), **changes)
    assert run.info.status == "FINISHED"
    assert run.data.tags["job.strategy"] == "Bayesian"
    job = site.emulator.client("sagemaker").describe_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=run.data.tags["job.name"]
    )
    assert job["WarmStartConfig"]["WarmStartType"] == "TransferLearning"
    (child,) = site.children(run)
    assert child.data.metrics["val/macro_f1"] == pytest.approx(run.data.metrics["best/val_macro_f1"], abs=1e-6)


def test_trials_that_are_ended_keep_what_they_have(site: Site) -> None:
    space = {"lr": {"type": "float", "low": 1e-4, "high": 1e-3, "log": True}}
    forever = {"trials": "3", "epochs": "100000", "training.patience": "100000"}
    # Spot jobs keep checkpoints, each trial its own: what a busy machine kills before it has closed its run is there
    run = site.submit(space, site.settings(spot=True, **{"async": True}), **forever)
    name = run.data.tags["job.name"]
    watched: list[Any] = []
    watcher = threading.Thread(
        target=lambda: watched.append(
            follow_search(Aws(), name, site.folder, TrackingConfig(uri=site.uri), None, print, poll_seconds=0.5)
        )
    )
    watcher.start()
    eventually(lambda: any("epoch=1 " in line for line in site.emulator.log(f"{name}-001-")))
    first = site.children(run)[0]
    assert first.info.status == "RUNNING"
    # As SageMaker ends a trial that has fallen behind
    site.emulator.client("sagemaker").stop_training_job(TrainingJobName=first.data.tags["job.name"])
    eventually(lambda: site.children(run)[0].info.status == "KILLED")
    stop_search(Aws(), name)
    watcher.join(120)
    assert [one.status for one in watched] == ["Stopped"]
    run = site.client.get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["failure"]) == ("KILLED", "the tuning job was stopped")
    children = site.children(run)
    assert {child.info.status for child in children} == {"KILLED"}
    assert children[0].data.tags["trial.state"] == "pruned"
    assert children[0].data.tags["trial.reason"].startswith("stopped early by SageMaker")
    assert {child.data.tags["trial.state"] for child in children[1:]} == {"interrupted"}
    assert site.client.get_metric_history(first.info.run_id, "val/macro_f1")[0].step == 1
    assert "best" not in run.data.tags, "none has trained to its end"


def test_a_search_whose_trials_all_fail_says_why(site: Site) -> None:
    space = {"classical.components": {"type": "int", "low": 5, "high": 20}}
    with pytest.raises(ExecutionException, match="Failed: All training jobs failed"):
        site.submit(space, stage="classical", trials="1", task="7-9")
    run = site.newest()
    assert run.info.status == "FAILED"
    assert "trial-001: AlgorithmError: " in run.data.tags["failure"]
    assert "7-9" in run.data.tags["failure"]
    with pytest.raises(StocktakeError, match="Failed: All training jobs failed"):
        jobs(JobsConfig(follow=run.data.tags["job.name"], workspace=str(site.folder)))
