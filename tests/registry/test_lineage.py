"""Bins that a model has seen: found through the runs that it started from, refused or dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from registry_store import WORKSPACE
from stocktake.config.runs import TrackingConfig
from stocktake.data.ids_by_split import FILE, write_ids_by_split
from stocktake.errors import StocktakeError
from stocktake.registry.gate_inputs import ENGINE_TAG, PREDICTIONS, gather_inputs
from stocktake.registry.lineage import STARTED_FROM, file_of_splits, run_of_model, trained_bins
from stocktake.registry.registration import register_run
from stocktake.registry.versions import ModelRegistry, Version
from stocktake.tracking.runs import TrackedRun, start_run

IDS = [f"{number:02d}" for number in range(12)]
SPLIT = ["train"] * 6 + ["val"] * 2 + ["test"] * 4
TRACKING = TrackingConfig(system_metrics=False)


def ids_by_split(splits: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"id": IDS, "group": IDS, "split": splits, "phash": "0" * 16})


@pytest.fixture
def train(model_folder: Path, sqlite_store: str) -> Any:
    """train(name, splits=SPLIT, **tags): a finished run with a model, predictions and, unless None, its splits."""

    def make(name: str, splits: list[str] | None = SPLIT, **tags: str) -> TrackedRun:
        tags = {
            "stage": name,
            "task": "1-2",
            "data.fingerprint": "f",
            "data.root": "bins",
            ENGINE_TAG: "openvino",
            **tags,
        }
        with start_run(TRACKING, workspace=WORKSPACE, name=name, tags=tags) as run:
            run.log_model(model_folder)
            (run.artifacts / PREDICTIONS).parent.mkdir(parents=True)
            test = pd.DataFrame({"id": IDS, "group": IDS, "quantity": 1, "predicted": 1, "expected": 1.0})[8:]
            test.to_parquet(run.artifacts / PREDICTIONS)
            if splits is not None:
                write_ids_by_split(run.artifacts / FILE, ids_by_split(splits))
        return run

    return make


def version(registry: ModelRegistry, run: TrackedRun) -> Version:
    return register_run(registry, str(run.run_id), WORKSPACE / "runs")


def test_trained_bins_are_followed_through_all_that_a_run_started_from(registry: ModelRegistry, train: Any) -> None:
    first = train("first", [*SPLIT[:6], "train", *SPLIT[7:]])
    second = train("second")
    third = train("third", **{STARTED_FROM: f"{first.run_id}, {second.run_id}"})
    fourth = train("fourth", **{STARTED_FROM: str(third.run_id)})
    registry.client.set_tag(first.run_id, STARTED_FROM, fourth.run_id)  # a circle ends
    lineage = trained_bins(registry.connection, fourth.run_id)
    assert (len(lineage.training), len(lineage.ancestors), lineage.unknown) == (4, 3, ())
    assert max((bins.bins["split"] == "train").sum() for bins in lineage.training) == 7
    assert {bins.root for bins in lineage.training} == {"bins"}


def test_a_run_is_known_by_its_folder_without_a_store(train: Any) -> None:
    run = train("alone")
    folder = run_of_model(run.folder / "models" / "model")
    assert folder == run.folder
    lineage = trained_bins(None, folder)
    assert lineage.own is not None
    assert lineage.own.bins["id"].tolist() == IDS
    assert trained_bins(None, str(run.run_id)).unknown


@pytest.mark.parametrize("damage", ["missing", "truncated", "other columns"])
def test_a_run_without_its_ids_is_unauditable(
    registry: ModelRegistry, train: Any, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("old", None)
    if damage != "missing":
        path = tmp_path / FILE
        write_ids_by_split(path, ids_by_split(SPLIT).drop(columns="group" if damage == "other columns" else []))
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-50])
        registry.client.log_artifact(run.run_id, str(path))
    for asked in (run.run_id, None, "0" * 32):
        lineage = trained_bins(registry.connection, asked)
        assert (lineage.training, len(lineage.unknown)) == ((), 1)
    assert version(registry, run).tags["overlap"] == "unauditable"
    assert "unauditable" in capsys.readouterr().err
    inputs = gather_inputs(registry, version(registry, run), None, "workspace")
    assert len(inputs.warnings) == 1


def test_register_refuses_a_model_whose_ancestor_was_trained_on_its_test_bins(
    registry: ModelRegistry, train: Any
) -> None:
    ancestor = train("ancestor", [*SPLIT[:10], "train", "val"])
    with pytest.raises(StocktakeError, match=r"2 of the 4 bins \(10, 11\)"):
        version(registry, train("child", **{STARTED_FROM: str(ancestor.run_id)}))
    assert version(registry, ancestor).tags["overlap"] == "none"


def test_the_gate_refuses_bins_that_the_champion_was_trained_on_or_drops_them(
    registry: ModelRegistry, train: Any
) -> None:
    champion = version(registry, train("champion", [*SPLIT[:10], "train", "train"]))
    challenger = version(registry, train("challenger"))
    (reference,) = gather_inputs(registry, challenger, champion, "workspace").references
    assert "2 of the 4 bins (10, 11)" in reference.reason
    inputs = gather_inputs(registry, challenger, champion, "workspace", "drop")
    assert (inputs.dropped, inputs.warnings) == (2, ())
    (reference,) = inputs.references
    assert inputs.predictions is not None
    assert reference.predictions is not None
    assert inputs.predictions["id"].tolist() == reference.predictions["id"].tolist() == ["08", "09"]
    assert reference.reason == ""


def test_the_gate_refuses_a_challenger_that_has_seen_its_test_bins(registry: ModelRegistry, train: Any) -> None:
    run = train("challenger")
    challenger = version(registry, run)
    ancestor = train("ancestor", [*SPLIT[:11], "train"])
    registry.client.set_tag(run.run_id, STARTED_FROM, ancestor.run_id)  # as no register would let it through
    inputs = gather_inputs(registry, challenger, None, "workspace")
    assert inputs.predictions is None
    assert "1 of the 4 bins (11)" in inputs.reason


def test_splits_like_a_run_are_its_file(train: Any, tmp_path: Path) -> None:
    run = train("like-me")
    recorded = (run.artifacts / FILE).read_bytes()
    for asked in (str(run.folder), run.folder.name, str(run.artifacts / FILE)):
        assert Path(file_of_splits(asked, TRACKING, WORKSPACE)).read_bytes() == recorded
    for asked in (str(run.run_id), f"runs:/{run.run_id}", "like-me"):
        found = pd.read_parquet(file_of_splits(asked, TRACKING, tmp_path / "elsewhere"))
        pd.testing.assert_frame_equal(found, ids_by_split(SPLIT), check_dtype=False)
    for asked in (str(train("old", None).run_id), "no-such-run"):
        with pytest.raises(StocktakeError, match=asked):
            file_of_splits(asked, TRACKING, WORKSPACE)
