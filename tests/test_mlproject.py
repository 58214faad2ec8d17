"""Every entry point of MLproject, run by MLflow as a user would run it, on a few small bins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image, ImageDraw

from stocktake.config import TrackingConfig
from stocktake.registry.models import fetch_model
from stocktake.serving import endpoints

REPOSITORY = Path(__file__).parents[1]
TINY = {"image_size": "32", "backbone": "mobilenet_v3_small", "weights": "none"}
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
def project(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Project:
    """The repository as an MLflow project with a store and a workspace of its own."""
    return Project(tmp_path_factory.mktemp("project"), root)


class Project:
    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.root = root
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri, self.uri)
        self.experiment = self.client.create_experiment("entry points", artifact_location=str(folder / "artifacts"))

    def run(self, entry: str, check: bool = True, **parameters: str) -> tuple[subprocess.CompletedProcess[str], str]:
        """`mlflow run . -e ENTRY`; what it printed and the id of the run that it opened."""
        keeps_nothing = entry in ("registry", "predict")
        given = parameters if keeps_nothing else {"workspace": str(self.folder / "workspace"), **parameters}
        words = [word for name, value in given.items() for word in ("-P", f"{name.replace('__', '.')}={value}")]
        command = [sys.executable, "-m", "mlflow", "run", str(REPOSITORY), "--env-manager=local", "-e", entry]
        before = {run.info.run_id for run in self.client.search_runs([self.experiment])}
        done = subprocess.run(
            [*command, "--experiment-name", "entry points", *words],
            env=os.environ
            | {
                "MLFLOW_TRACKING_URI": self.uri,
                "MLFLOW_REGISTRY_URI": self.uri,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            cwd=self.folder,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        opened = [run for run in self.client.search_runs([self.experiment]) if run.info.run_id not in before]
        outermost = [run.info.run_id for run in opened if "mlflow.parentRunId" not in run.data.tags]
        assert len(outermost) == 1, "the command opened a second run beside MLflow's"
        return done, outermost[0]


def test_main_climbs_the_ladder_and_registers_a_candidate(project: Project, tmp_path: Path) -> None:
    done, run_id = project.run("main", root=str(project.root), epochs="1", lr="1e-3", seed="3", **TINY)
    run = project.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "ladder"
    assert run.data.params["lr"] == "1e-3"  # as it was given, and logged once
    assert run.data.params["seed"] == "3"
    children = project.client.search_runs([project.experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert {child.data.tags["stage"] for child in children} == {"majority", "classical", "frozen", "finetune"}
    assert {child.info.status for child in children} == {"FINISHED"}
    best = max(children, key=lambda child: child.data.metrics["val/macro_f1"])
    version = project.client.get_model_version_by_alias("stocktake", "candidate")
    registered = project.client.get_run(version.run_id)
    assert registered.data.metrics["val/macro_f1"] == best.data.metrics["val/macro_f1"]
    assert f"candidate: stocktake version {version.version}" in done.stdout
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

    done, _ = project.run("evaluate", model="models:/stocktake@candidate", root=str(project.root), on="val")
    assert f"macro-F1 {best.data.metrics['val/macro_f1']:.3f}" in done.stdout

    done, _ = project.run("compare", tracking__experiment="entry points")
    assert (project.folder / "workspace" / "compare" / "leaderboard.html").exists()
    assert all(stage in done.stdout for stage in ("majority", "classical", "frozen", "finetune"))


@pytest.mark.parametrize("entry", ["majority", "classical", "frozen", "finetune", "ddp"])
def test_each_rung_is_an_entry_point(project: Project, entry: str) -> None:
    parameters = {"image_size": "32"} if entry in ("majority", "classical") else dict(TINY)
    if entry in ("finetune", "ddp"):
        parameters["epochs"] = "1"
    if entry == "ddp":
        parameters["nproc"] = "2"
    _, run_id = project.run(entry, root=str(project.root), **parameters)
    run = project.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == entry
    assert 0 <= run.data.metrics["val/macro_f1"] <= 1
    assert run.data.metrics["test/n"] > 0


def test_tune_searches_in_the_run_that_mlflow_opened(project: Project) -> None:
    parameters = {"image_size": "32", "stage": "classical", "trials": "2", "sampler": "random"}
    _, run_id = project.run("tune", root=str(project.root), **parameters)
    run = project.client.get_run(run_id)
    assert (run.info.status, run.data.tags["stage"]) == ("FINISHED", "tune")
    children = project.client.search_runs([project.experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert sorted(child.info.run_name for child in children) == ["trial-000", "trial-001"]
    assert run.data.metrics["val/macro_f1"] == max(child.data.metrics["val/macro_f1"] for child in children)


def test_from_a_run_to_a_served_count(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKTAKE_STATE", str(project.folder / "endpoints"))
    _, trained = project.run("majority", root=str(project.root), image_size="32")
    done, _ = project.run("register", run=trained)
    version = project.client.get_model_version_by_alias("stocktake", "candidate")
    assert version.run_id == trained
    assert f"stocktake/{version.version}" in done.stdout

    done, _ = project.run("promote", force="true", reason="nothing better yet")
    assert project.client.get_model_version_by_alias("stocktake", "champion").version == version.version
    assert "by force" in done.stdout
    done, _ = project.run("registry")
    assert "nothing better yet" in done.stdout
    done, _ = project.run("rollback", check=False)
    assert done.returncode != 0
    assert "first champion" in done.stderr

    try:
        done, _ = project.run("deploy", root=str(project.root), name="from-a-run", server="{port: 0, workers: 1}")
        assert "photos answered as by the model itself" in done.stdout
        photos = str(project.root / "bin-images")
        done, _ = project.run("predict", photos=photos, endpoint="from-a-run", format="csv")
        rows = [line for line in done.stdout.splitlines() if ".jpg," in line]
        assert len(rows) == 60
        assert all(f"stocktake/{version.version}" in row for row in rows)
    finally:
        endpoints.delete("from-a-run")


def test_data_and_eda(project: Project) -> None:
    done, _ = project.run("data", root=str(project.root), export=str(project.folder / "tree"))
    assert "metadata/99999.json: record is not JSON" in done.stdout
    assert len(list((project.folder / "tree").glob("*/*/*.jpg"))) == 60
    _, run_id = project.run("eda", root=str(project.root))
    assert "eda.html" in {file.path for file in project.client.list_artifacts(run_id)}


def test_a_value_of_the_wrong_type_fails_with_its_name(project: Project) -> None:
    done, run_id = project.run("finetune", check=False, root=str(project.root), lr="abc")
    assert done.returncode != 0
    assert 'stocktake: finetune: Parser key "lr"' in done.stderr
    assert project.client.get_run(run_id).info.status == "FAILED"
