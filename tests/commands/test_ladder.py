"""The main entry point, whole, on the tiny root."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from stocktake.commands import ladder as ladder_module
from stocktake.commands.ladder import ladder, ui_command
from stocktake.commands.register import register
from stocktake.commands.sync import sync
from stocktake.config.runs import SyncConfig, TrackingConfig
from stocktake.config.training import HeadConfig, LadderConfig, PcaSvmConfig, TrainingConfig
from stocktake.config.versions import RegisterConfig
from stocktake.errors import StocktakeError
from stocktake.stages.prepare import PreparedData, prepare_data
from stocktake.tracking.leaderboard import COLUMNS
from tiny_bins import PLAIN_BACKBONE

STAGES = ["majority", "classical", "frozen", "finetune"]


@pytest.fixture
def config(sqlite_store: str, tiny_settings: dict[str, Any]) -> LadderConfig:
    return LadderConfig(
        **tiny_settings,
        workspace="workspace",
        backbone=PLAIN_BACKBONE,
        weights="none",
        batch_size=8,
        epochs=1,
        precision="fp32",
        classical=PcaSvmConfig(pixels=16, components=20),
        head=HeadConfig(c=(1e-3, 1e-2)),
        training=TrainingConfig(augment="flip"),
    )


def runs_by_stage(store: str) -> dict[str, Any]:
    client = mlflow.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("stocktake").experiment_id])
    return {run.data.tags["stage"]: run for run in runs}


@pytest.mark.slow
def test_four_rungs_a_leaderboard_and_a_candidate(
    config: LadderConfig, sqlite_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = ladder(config)
    out = capsys.readouterr().out
    runs = runs_by_stage(sqlite_store)
    assert set(runs) == {"ladder", *STAGES}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs["ladder"]
    assert {runs[stage].data.tags["mlflow.parentRunId"] for stage in STAGES} == {parent.info.run_id}
    assert "mlflow.parentRunId" not in parent.data.tags
    for name in ("task", "data.root", "data.fingerprint", "git.commit"):
        assert len({run.data.tags[name] for run in runs.values()}) == 1, name
    assert parent.data.params["backbone"] == PLAIN_BACKBONE
    assert parent.data.params["epochs"] == "1"
    of = {"backbone": ["frozen", "finetune"], "epochs": ["finetune"], "classical.components": ["classical"]}
    for name, stages in of.items():  # a majority class has no backbone
        assert [stage for stage in STAGES if name in runs[stage].data.params] == stages, name

    scored = {stage: runs[stage].data.metrics["val/macro_f1"] for stage in STAGES}
    best = max(scored, key=scored.__getitem__)
    assert best != "majority"
    assert parent.data.tags["best"] == best
    assert metrics["val/macro_f1"] == pytest.approx(scored[best])
    assert parent.data.metrics["test/macro_f1"] == pytest.approx(runs[best].data.metrics["test/macro_f1"])

    folder = next(Path("workspace/runs").glob("ladder-*"))
    table = pd.read_csv(folder / "artifacts" / "leaderboard.csv")
    assert list(table.columns) == list(COLUMNS)
    assert sorted(table["stage"]) == sorted(STAGES)
    assert list(table["val/macro_f1"]) == sorted(scored.values(), reverse=True)
    assert table["stage"][0] == best
    assert set(table["run_id"]) == {runs[stage].info.run_id for stage in STAGES}
    assert table["n"].nunique() == 1
    client = mlflow.MlflowClient(sqlite_store, sqlite_store)
    assert "leaderboard.csv" in [one.path for one in client.list_artifacts(parent.info.run_id)]

    version = client.get_model_version_by_alias("stocktake", "candidate")
    assert version.run_id == runs[best].info.run_id
    assert version.tags["stage"] == best
    assert version.tags["task"] == "1-3"
    assert float(version.tags["val/macro_f1"]) == pytest.approx(scored[best], rel=1e-5)
    assert f"candidate: stocktake/{version.version} ({best})" in out
    assert [line for line in out.splitlines() if line.startswith("--- ")] == [f"--- {stage}" for stage in STAGES]

    again = ladder(config)
    assert again == metrics, "the same command, the same figures"
    assert int(client.get_model_version_by_alias("stocktake", "candidate").version) == int(version.version) + 1
    last = runs_by_stage(sqlite_store)
    for stage in STAGES:
        figures = [
            {name: value for name, value in one[stage].data.metrics.items() if name.startswith(("val/", "test/"))}
            for one in (runs, last)
        ]
        assert figures[0] == figures[1], stage


@pytest.mark.slow
def test_the_candidate_is_chosen_by_val(
    config: LadderConfig, sqlite_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_with_test_as_one(settings: LadderConfig) -> PreparedData:
        """In test every quantity is recorded as 1: what knows nothing is best there."""
        prepared = prepare_data(settings)
        bins = prepared.manifest.bins
        bins = bins.assign(quantity=bins["quantity"].where(bins["split"] != "test", 1))
        return replace(prepared, manifest=replace(prepared.manifest, bins=bins))

    monkeypatch.setattr(ladder_module, "prepare_data", prepare_with_test_as_one)
    config.stages = ("classical", "frozen")
    config.classical = PcaSvmConfig(pixels=16, components=20, c=1e-6)
    ladder(config)
    runs = runs_by_stage(sqlite_store)
    by_val, by_test = (
        max(config.stages, key=lambda stage: runs[stage].data.metrics[metric])
        for metric in ("val/macro_f1", "test/macro_f1")
    )
    assert by_val != by_test, "or this shows nothing"
    assert runs["ladder"].data.tags["best"] == by_val


@pytest.mark.slow
def test_a_rung_that_fails_leaves_no_run_open(
    config: LadderConfig, sqlite_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StocktakeError("the backbone went missing: put it back")

    monkeypatch.setattr("stocktake.stages.linear_probe.extract_features", fail)
    config.stages = ("majority", "frozen", "finetune")
    with pytest.raises(StocktakeError, match="went missing"):
        ladder(config)
    runs = runs_by_stage(sqlite_store)
    statuses = {stage: run.info.status for stage, run in runs.items()}
    assert statuses == {"ladder": "FAILED", "majority": "FINISHED", "frozen": "FAILED"}
    assert "went missing" in runs["ladder"].data.tags["failure"]
    for path in Path("workspace/runs").glob("*/result.json"):
        assert json.loads(path.read_text())["status"] in ("FAILED", "FINISHED")
    assert mlflow.MlflowClient(sqlite_store, sqlite_store).search_registered_models() == []


@pytest.mark.slow
def test_offline_nothing_is_lost(config: LadderConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config.tracking = TrackingConfig(offline=True, system_metrics=False)
    config.stages = ("majority",)
    metrics = ladder(config)
    assert metrics["test/recall_3"] == 1
    out = capsys.readouterr().out
    (run,) = re.findall(r"stocktake sync.*stocktake register --run (\S+)`", out)
    assert "MLflow UI: stocktake sync, then mlflow ui" in out
    statuses = [json.loads(path.read_text())["status"] for path in Path("workspace/runs").glob("*/result.json")]
    assert statuses == ["FINISHED", "FINISHED"]
    assert sync(SyncConfig())["uploaded"] == 2
    assert register(RegisterConfig(run=run)).tags["stage"] == "majority"


def test_no_rungs_are_refused(config: LadderConfig) -> None:
    config.stages = ()
    with pytest.raises(StocktakeError, match=r"--stages is empty: name at least one of majority, classical"):
        ladder(config)
    assert list(ladder_module.STAGES) == STAGES


def test_how_to_see_the_runs() -> None:
    assert ui_command("sqlite:////a/mlflow.db") == "mlflow ui --backend-store-uri sqlite:////a/mlflow.db"
    assert ui_command("http://host:5000") == "open http://host:5000"
