"""Each rung alone, for real, on the tiny root: its run, its files, its figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest

from stocktake.cli import parse
from stocktake.commands.evaluate import evaluate
from stocktake.commands.train import train
from stocktake.config.runs import EvaluateConfig, ImageConfig
from stocktake.config.training import (
    ClassicalConfig,
    FinetuneConfig,
    FrozenConfig,
    MajorityConfig,
    PcaSvmConfig,
    TrainingConfig,
)
from stocktake.errors import StocktakeError
from stocktake.models.checkpoint import load_model
from stocktake.models.inference import predict
from stocktake.serving.predictor import Predictor
from stocktake.stages.prepare import PreparedData, prepare_data
from stocktake.stages.run import StageResult, flatten
from stocktake.training.fit import EpochLogger
from tiny_bins import PLAIN_BACKBONE

NETWORK = {"backbone": PLAIN_BACKBONE, "weights": "none", "batch_size": 8, "precision": "fp32"}
FINETUNE = {**NETWORK, "epochs": 2, "training": TrainingConfig(augment="flip")}
FILES = {
    "config.yaml",
    "environment.txt",
    "splits.parquet",
    "checkpoint/model.json",
    "checkpoint/model.safetensors",
    *(
        f"evaluation/{split}_{name}"
        for split in ("val", "test")
        for name in (
            "metrics.json",
            "confusion_matrix.json",
            "confusion_matrix.png",
            "per_class.csv",
            "predictions.parquet",
            "reliability.csv",
            "reliability.png",
        )
    ),
}


@pytest.fixture
def make_config(sqlite_store: str, tiny_settings: dict[str, Any]) -> Callable[..., Any]:
    """A config of a class over the tiny root; the workspace lies in the test's own folder."""

    def make(kind: type, **settings: Any) -> Any:
        return kind(**{**tiny_settings, "workspace": "workspace", **settings})

    return make


def check_run(rung: StageResult, config: ImageConfig, command: str, store: str, prepared: PreparedData) -> None:
    """What every rung leaves behind."""
    run = rung.run
    assert rung.stage == command
    calibrated = ("ece", "ece_uncalibrated", "loss_uncalibrated", "set_coverage", "set_coverage_low", "set_size")
    for name in ("accuracy", "macro_f1", "rmse", "mae", "within_1", "recall_3", "loss", "n", *calibrated):
        assert {f"val/{name}", f"test/{name}"} <= set(rung.metrics), name
    assert rung.metrics["test/macro_f1_low"] <= rung.metrics["test/macro_f1"] <= rung.metrics["test/macro_f1_high"]
    assert rung.metrics["test/n"] == len(prepared.manifest.split("test"))
    assert rung.metrics["val/loss"] <= rung.metrics["val/loss_uncalibrated"] + 1e-6, "the temperature is fitted on val"

    files = {path.relative_to(run.artifacts).as_posix() for path in run.artifacts.rglob("*") if path.is_file()}
    assert files >= FILES
    assert not [name for name in files if name.endswith((".part", ".pkl"))]
    again = parse(command, ["--experiment", str(run.artifacts / "config.yaml")])
    untold = {"tracking", "workspace", "resume"}
    given, found = ({key: v for key, v in asdict(one).items() if key not in untold} for one in (config, again))
    assert found == given
    environment = (run.artifacts / "environment.txt").read_text().splitlines()
    assert any(line.startswith("torch==") for line in environment)
    assert environment == sorted(environment, key=str.lower)

    result = json.loads((run.folder / "result.json").read_text())
    assert result["status"] == "FINISHED"
    assert result["metrics"]["test/macro_f1"] == pytest.approx(rung.metrics["test/macro_f1"])
    told = pd.read_csv(run.folder / "metrics.csv").groupby("metric")["value"].last()
    assert told["val/macro_f1"] == pytest.approx(rung.metrics["val/macro_f1"])
    predictions = pd.read_parquet(run.artifacts / "evaluation" / "test_predictions.parquet")
    accuracy = (predictions["predicted"] == predictions["quantity"]).mean()
    assert rung.metrics["test/accuracy"] == pytest.approx(accuracy)

    model, test = load_model(run.artifacts / "checkpoint"), prepared.manifest.split("test")
    shares = predict(model, prepared.photos, test["hash"].tolist(), 16, next(iter(model.state_dict().values())).device)
    assert ((shares.argmax(1) + 1) == predictions["predicted"]).all(), "the saved model is the one that was evaluated"

    counter = Predictor(run.folder / "models" / "model")
    assert counter.description["check"]["passed"] is True
    assert counter.description["calibration"]["temperature"] == pytest.approx(told["calibration/temperature"])
    served = counter.probabilities(prepared.photos.read(test["hash"].tolist()))
    columns = [f"p_{label}" for label in counter.labels]
    np.testing.assert_allclose(predictions[columns], served, atol=1e-6, err_msg="what is reported is what is served")
    assert run.tags["test.engine"] == counter.engine

    logged = mlflow.MlflowClient(store).get_run(run.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.tags["stage"] == command
    assert logged.data.tags["task"] == "1-3"
    assert logged.data.tags["data.fingerprint"] == prepared.manifest.fingerprint
    assert logged.data.metrics["test/macro_f1"] == pytest.approx(rung.metrics["test/macro_f1"])
    assert logged.data.params["image_size"] == "32"
    assert logged.inputs.dataset_inputs[0].dataset.digest == prepared.manifest.fingerprint


def check_evaluation(rung: StageResult, make_config: Callable[..., Any]) -> None:
    """The logged model, served from the store, has the figures that its run told."""
    settings = {"model": f"runs:/{rung.run.run_id}/model", "batch_size": 5}
    shared = {"root", "task", "split", "tracking", "workspace"}
    given = {key: v for key, v in vars(make_config(ImageConfig)).items() if key in shared}
    metrics = evaluate(EvaluateConfig(**given, **settings))
    for name in ("macro_f1", "accuracy", "rmse", "macro_f1_low", "n"):
        assert metrics[f"test/{name}"] == pytest.approx(rung.metrics[f"test/{name}"], abs=1e-6), name
    assert not [name for name in metrics if name.startswith("val/")]


@pytest.mark.slow
def test_majority(make_config, sqlite_store: str) -> None:
    config = make_config(MajorityConfig)
    rung = train(config)
    prepared = prepare_data(config)
    check_run(rung, config, "majority", sqlite_store, prepared)
    assert rung.metrics["test/recall_3"] == 1
    assert rung.metrics["test/accuracy"] == pytest.approx((prepared.manifest.split("test")["quantity"] == 3).mean())
    check_evaluation(rung, make_config)

    shared = vars(make_config(ImageConfig))
    given = {key: shared[key] for key in ("root", "split", "tracking", "workspace")}
    model = f"runs:/{rung.run.run_id}/model"
    with pytest.raises(StocktakeError, match=r"--task 1-5 does not fit .*give its own, 1-3"):
        evaluate(EvaluateConfig(**given, model=model, task="1-5"))
    on_val = evaluate(EvaluateConfig(**given, model=str(rung.run.folder / "models" / "model"), task="1-3", on="val"))
    assert on_val["val/macro_f1"] == pytest.approx(rung.metrics["val/macro_f1"], abs=1e-6)


@pytest.mark.slow
def test_classical(make_config, sqlite_store: str) -> None:
    config = make_config(ClassicalConfig, classical=PcaSvmConfig(pixels=16, components=20))
    rung = train(config)
    check_run(rung, config, "classical", sqlite_store, prepare_data(config))
    assert rung.metrics["val/macro_f1"] > 0.5
    assert rung.backbone is None
    check_evaluation(rung, make_config)


@pytest.mark.slow
def test_frozen(make_config, sqlite_store: str) -> None:
    config = make_config(FrozenConfig, **NETWORK)
    rung = train(config)
    prepared = prepare_data(config)
    check_run(rung, config, "frozen", sqlite_store, prepared)
    first = json.loads((rung.run.folder / "result.json").read_text())["metrics"]
    assert first["features/computed"] == len(prepared.manifest.bins)
    heads = pd.read_csv(rung.run.folder / "metrics.csv").query("metric == 'head/val_macro_f1'")["value"]
    assert len(heads) == len(config.head.c)
    assert rung.metrics["val/macro_f1"] == pytest.approx(max(heads), abs=1e-6), "the best head on val was kept"

    again = train(config)
    second = json.loads((again.run.folder / "result.json").read_text())["metrics"]
    assert second["features/computed"] == 0
    assert again.metrics == rung.metrics
    check_evaluation(again, make_config)


@pytest.mark.slow
def test_finetune(make_config, sqlite_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(FinetuneConfig, **FINETUNE)
    rung = train(config)
    out = capsys.readouterr().out
    assert len(re.findall(r"^epoch=\d train_loss=\S+ .*val_macro_f1=\S+ elapsed_sec=\S+$", out, re.M)) == 2
    assert f"TEST: loss={rung.metrics['test/loss']:.6f} acc={rung.metrics['test/accuracy']:.6f}" in out
    check_run(rung, config, "finetune", sqlite_store, prepare_data(config))
    assert (rung.run.artifacts / "curves.png").is_file()
    told = pd.read_csv(rung.run.folder / "metrics.csv")
    curve = told[(told["metric"] == "val/macro_f1") & (told["step"] <= 2)]["value"]
    assert len(curve) == 2
    assert rung.metrics["val/macro_f1"] == pytest.approx(max(curve), abs=1e-6)
    final = json.loads((rung.run.folder / "result.json").read_text())["metrics"]
    assert final["val/macro_f1"] == pytest.approx(rung.metrics["val/macro_f1"]), "not the last epoch's"
    assert list(curve)[int(final["best_epoch"]) - 1] == max(curve)
    check_evaluation(rung, make_config)


@pytest.mark.slow
def test_finetune_goes_on_from_a_run_folder(make_config, sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stocktake.models.precision._cpu_has_bf16", lambda: False)
    config = make_config(FinetuneConfig, **FINETUNE | {"precision": "auto"})
    whole = train(config)

    def interrupt(_line: EpochLogger, trainer: Any, _module: Any) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(EpochLogger, "on_train_epoch_start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    killed = next(
        path.parent
        for path in Path("workspace/runs").glob("*/result.json")
        if json.loads(path.read_text())["status"] == "KILLED"
    )
    monkeypatch.setattr("stocktake.models.precision._cpu_has_bf16", lambda: True)  # on another machine
    resumed = train(replace(config, resume=str(killed)))
    assert resumed.run.tags["precision"] == "fp32"
    assert resumed.metrics == whole.metrics
    assert resumed.run.run_id != whole.run.run_id
    assert resumed.run.tags["resumed_from"] == str(killed)
    epochs = pd.read_csv(resumed.run.folder / "metrics.csv").query("metric == 'train/loss'")["step"]
    assert list(epochs) == [2]

    with pytest.raises(StocktakeError, match="give the folder of a run"):
        train(replace(config, resume="workspace"))
    with pytest.raises(StocktakeError, match="trained on other data"):
        train(replace(config, resume=str(killed), task="1-2"))
    with pytest.raises(StocktakeError, match=r"--lr 0.001 \(now 0.5\)"):
        train(replace(config, resume=str(killed), lr=0.5))
    failed = [one for one in _runs(sqlite_store) if one.info.status == "FAILED"]
    assert len(failed) == 3
    assert not [one for one in _runs(sqlite_store) if one.info.status == "RUNNING"]


def _runs(store: str) -> list[Any]:
    client = mlflow.MlflowClient(store)
    return list(client.search_runs([client.get_experiment_by_name("stocktake").experiment_id]))


def test_settings_are_flat_and_dotted() -> None:
    assert flatten({"a": 1, "b": {"c": (1, 2), "d": {"e": None}}}) == {"a": 1, "b.c": [1, 2], "b.d.e": None}
