"""Every entry point of MLproject, run by MLflow as a user would run it, on a few small bins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import mlflow.projects
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import ExecutionException
from mlflow.tracking import MlflowClient
from PIL import Image, ImageDraw

from stocktake.config.runs import TrackingConfig
from stocktake.registry.models import fetch_model
from stocktake.serving import endpoints

REPOSITORY = Path(__file__).parents[1]
TINY = {"image_size": "32", "backbone": "test_vit", "weights": "none"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty bins with as many squares as they are said to hold, and one record that nobody can read."""
    folder = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    (folder / "bin-images").mkdir()
    (folder / "metadata").mkdir()
    for number in range(60):
        quantity = number % 5 + 1
        photo = Image.fromarray(rng.integers(90, 130, (48, 48, 3), dtype=np.uint8))
        for x, y in rng.integers(0, 40, (quantity, 2)).tolist():
            ImageDraw.Draw(photo).rectangle((x, y, x + 7, y + 7), fill=(230, 40, 40))
        photo.save(folder / "bin-images" / f"{number:05}.jpg", quality=95)
        items = {f"A{number}": {"asin": f"A{number}", "name": None, "quantity": quantity}}
        record = {"BIN_FCSKU_DATA": items, "EXPECTED_QUANTITY": quantity}
        (folder / "metadata" / f"{number:05}.json").write_text(json.dumps(record))
    (folder / "metadata" / "99999.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an MLflow store; the tests' environment points to it."""
    folder = tmp_path_factory.mktemp("project")
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(uri, uri).create_experiment("entry points", artifact_location=str(folder / "artifacts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_REGISTRY_URI", uri)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        patch.chdir(folder)
        before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()  # another test may have set them
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        yield folder
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])


@pytest.fixture
def project(store: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> Project:
    """The repository as an MLflow project with a store and a workspace of its own."""
    return Project(store, root, capfd)


@dataclass(frozen=True)
class ProjectRun:
    """What an entry point printed, and the run that MLflow opened for it."""

    stdout: str
    stderr: str
    run_id: str
    succeeded: bool


class Project:
    def __init__(self, folder: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.root = root
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri, self.uri)
        self.experiment = self.client.get_experiment_by_name("entry points").experiment_id
        self._capfd = capfd

    def run(self, entry: str, check: bool = True, **parameters: str) -> ProjectRun:
        """What `mlflow run . -e ENTRY` does, without another start of MLflow's command line."""
        if entry not in ("registry", "predict"):
            parameters = {"workspace": str(self.folder / "workspace"), **parameters}
        before = {run.info.run_id for run in self.client.search_runs([self.experiment])}
        self._capfd.readouterr()
        try:
            mlflow.projects.run(
                str(REPOSITORY),
                entry,
                parameters={name.replace("__", "."): value for name, value in parameters.items()},
                experiment_name="entry points",
                env_manager="local",
            )
            succeeded = True
        except ExecutionException:
            succeeded = False
        out, err = self._capfd.readouterr()
        assert succeeded or not check, out + err
        opened = [run for run in self.client.search_runs([self.experiment]) if run.info.run_id not in before]
        outermost = [run.info.run_id for run in opened if "mlflow.parentRunId" not in run.data.tags]
        assert len(outermost) == 1, "the command opened a second run beside MLflow's"
        return ProjectRun(out, err, outermost[0], succeeded)


def test_main_climbs_the_ladder_and_registers_a_candidate(project: Project, tmp_path: Path) -> None:
    done = project.run("main", root=str(project.root), epochs="1", lr="1e-3", seed="3", **TINY)
    run = project.client.get_run(done.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "ladder"
    assert run.data.params["lr"] == "1e-3"  # as it was given, and logged once
    assert run.data.params["seed"] == "3"
    children = project.client.search_runs([project.experiment], f"tags.`mlflow.parentRunId` = '{done.run_id}'")
    assert {child.data.tags["stage"] for child in children} == {"majority", "classical", "frozen", "finetune"}
    assert {child.info.status for child in children} == {"FINISHED"}
    best = max(children, key=lambda child: child.data.metrics["val/macro_f1"])
    version = project.client.get_model_version_by_alias("stocktake", "candidate")
    registered = project.client.get_run(version.run_id)
    assert registered.data.metrics["val/macro_f1"] == best.data.metrics["val/macro_f1"]
    assert f"candidate: stocktake/{version.version}" in done.stdout
    assert "mlflow ui --backend-store-uri" in done.stdout
    for child in children:
        assert 0 <= child.data.metrics["test/macro_f1_low"] <= child.data.metrics["test/macro_f1_high"] <= 1
        assert child.inputs.dataset_inputs[0].dataset.digest == child.data.tags["data.fingerprint"]
        stored = {file.path for file in project.client.list_artifacts(child.info.run_id, "evaluation")}
        assert {"evaluation/test_confusion_matrix.png", "evaluation/test_confusion_matrix.json"} <= stored

    tracking = TrackingConfig(uri=project.uri)
    model = mlflow.pyfunc.load_model(str(fetch_model("models:/stocktake@candidate", tmp_path / "model", tracking)))
    photo = (project.root / "bin-images" / "00001.jpg").read_bytes()
    answer = model.predict(pd.DataFrame({"photo": [photo]}))
    assert answer["quantity"][0] in range(1, 6)

    done = project.run("evaluate", model="models:/stocktake@candidate", root=str(project.root), on="val")
    assert f"macro-F1 {best.data.metrics['val/macro_f1']:.3f}" in done.stdout

    done = project.run("compare", tracking__experiment="entry points")
    assert (project.folder / "workspace" / "compare" / "leaderboard.html").exists()
    assert all(stage in done.stdout for stage in ("majority", "classical", "frozen", "finetune"))


def test_a_stage_in_two_processes_is_the_run_that_mlflow_opened(project: Project) -> None:
    run_id = project.run("ddp", root=str(project.root), epochs="1", nproc="2", **TINY).run_id
    run = project.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["stage"], run.data.tags["world_size"]) == ("ddp", "2")
    assert 0 <= run.data.metrics["val/macro_f1"] <= 1
    assert run.data.metrics["test/n"] > 0


def test_tune_searches_in_the_run_that_mlflow_opened(project: Project) -> None:
    parameters = {"image_size": "32", "stage": "classical", "trials": "2", "sampler": "random"}
    run_id = project.run("tune", root=str(project.root), **parameters).run_id
    run = project.client.get_run(run_id)
    assert (run.info.status, run.data.tags["stage"]) == ("FINISHED", "tune")
    children = project.client.search_runs([project.experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert sorted(child.info.run_name for child in children) == ["trial-000", "trial-001"]
    assert run.data.metrics["val/macro_f1"] == max(child.data.metrics["val/macro_f1"] for child in children)


def test_from_a_run_to_a_served_count(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKTAKE_STATE", str(project.folder / "endpoints"))
    trained = project.run("majority", root=str(project.root), image_size="32").run_id
    done = project.run("register", run=trained)
    version = project.client.get_model_version_by_alias("stocktake", "candidate")
    assert version.run_id == trained
    assert f"stocktake/{version.version}" in done.stdout

    done = project.run("promote", force="true", reason="nothing better yet")
    assert project.client.get_model_version_by_alias("stocktake", "champion").version == version.version
    assert "by force" in done.stdout
    done = project.run("registry")
    assert "nothing better yet" in done.stdout
    done = project.run("rollback", check=False)
    assert not done.succeeded
    assert "first champion" in done.stderr

    try:
        done = project.run("deploy", root=str(project.root), name="from-a-run", server="{port: 0, workers: 1}")
        assert "photos answered as by the model itself" in done.stdout
        photos = str(project.root / "bin-images")
        done = project.run("predict", photos=photos, endpoint="from-a-run", format="csv")
        rows = [line for line in done.stdout.splitlines() if ".jpg," in line]
        assert len(rows) == 60
        assert all(f"stocktake/{version.version}" in row for row in rows)
    finally:
        endpoints.delete("from-a-run")


def test_data_and_eda(project: Project) -> None:
    done = project.run("data", root=str(project.root), export=str(project.folder / "tree"))
    assert "metadata/99999.json: record is not JSON" in done.stdout
    assert len(list((project.folder / "tree").glob("*/*/*.jpg"))) == 60
    run_id = project.run("eda", root=str(project.root)).run_id
    assert "eda.html" in {file.path for file in project.client.list_artifacts(run_id)}


def test_the_command_line_of_mlflow_names_a_value_of_the_wrong_type(project: Project) -> None:
    command = [sys.executable, "-m", "mlflow", "run", str(REPOSITORY), "--env-manager=local", "-e", "finetune"]
    words = ["--experiment-name", "entry points", "-P", f"root={project.root}", "-P", "lr=abc"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "--lr abc" in done.stderr
    latest = project.client.search_runs([project.experiment], order_by=["start_time DESC"], max_results=1)[0]
    assert (latest.info.status, latest.data.params["lr"]) == ("FAILED", "abc")
