"""What each split may change: with other quantities recorded in test, every stage's model is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stocktake.config.training import HeadConfig, PcaSvmConfig, TrainingConfig
from stocktake.data.splits import Split
from stocktake.stages.prepare import PreparedData
from stocktake.stages.run import evaluate_and_log
from stocktake.stages.table import STAGES
from stocktake.tracking.runs import TrackedRun
from tiny_bins import PLAIN_BACKBONE, tiny_model


def recorded_as_one(prepared: PreparedData, *splits: Split) -> PreparedData:
    """The same bins, with a recorded quantity of 1 in these splits."""
    bins = prepared.manifest.bins
    quantity = bins["quantity"].where(~bins["split"].isin(splits), 1)
    return replace(prepared, manifest=replace(prepared.manifest, bins=bins.assign(quantity=quantity)))


def val_figures(run: TrackedRun) -> list[float]:
    """The figures on val that a stage has logged while it trained."""
    return [point.value for point in run.read_metrics()[0] if "val" in point.name]


def trained(
    stage: str, prepared: PreparedData, tiny_settings: dict[str, Any], folder: Path
) -> tuple[dict[str, Tensor], list[float]]:
    """The model's weights, and what the stage chose them by."""
    settings: dict[str, Any] = {**tiny_settings, "workspace": str(folder)}
    if stage == "classical":
        settings |= {"classical": PcaSvmConfig(pixels=8, components=5)}
    if stage in ("frozen", "finetune"):
        settings |= {"backbone": PLAIN_BACKBONE, "weights": "none", "precision": "fp32"}
    if stage == "frozen":
        settings |= {"head": HeadConfig(c=(1e-4, 1.0))}
    if stage == "finetune":
        settings |= {"epochs": 1, "batch_size": 16, "training": TrainingConfig(augment="none")}
    run = TrackedRun.create(folder, name=stage)
    model = STAGES[stage].train(run, STAGES[stage].config(**settings), prepared)
    return model.state_dict(), val_figures(run)


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_does_not_depend_on_the_test_split(
    stage: str, tiny_bench: PreparedData, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    changed = recorded_as_one(tiny_bench, "test")
    (first, figures), (second, same_figures) = (
        trained(stage, prepared, tiny_settings, tmp_path / name)
        for name, prepared in (("as it is", tiny_bench), ("changed", changed))
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert figures == same_figures
    assert bool(figures) == (stage in ("frozen", "finetune"))


@pytest.mark.parametrize("stage", ["majority", "classical"])
def test_a_stage_without_choices_depends_on_train_alone(
    stage: str, tiny_bench: PreparedData, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    changed = recorded_as_one(tiny_bench, "val", "test")
    (first, _), (second, _) = (
        trained(stage, prepared, tiny_settings, tmp_path / name)
        for name, prepared in (("as it is", tiny_bench), ("changed", changed))
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_temperature_and_set_threshold_are_fitted_on_val(
    tiny_bench: PreparedData, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    model, config = tiny_model("majority", tiny_bench), STAGES["majority"].config(**tiny_settings)

    def calibration(name: str, *splits: Split) -> tuple[float, float]:
        run = TrackedRun.create(tmp_path, name=name)
        run.set_tags({"stage": "majority"})
        metrics = evaluate_and_log(run, model, config, recorded_as_one(tiny_bench, *splits))
        return metrics["calibration/temperature"], metrics["calibration/set_threshold"]

    as_it_is = calibration("as it is")
    assert calibration("test", "test") == as_it_is
    temperature, threshold = calibration("val", "val")
    assert temperature != as_it_is[0]
    assert threshold != as_it_is[1]
