"""Evaluate: on bins that the model has not seen, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from stocktake.commands.evaluate import evaluate
from stocktake.commands.train import train
from stocktake.config.data import SplitConfig
from stocktake.config.runs import EvaluateConfig
from stocktake.config.training import MajorityConfig
from stocktake.data.ids_by_split import FILE
from stocktake.errors import StocktakeError
from stocktake.stages.run import StageResult
from tiny_bins import TINY_BINS, draw_bin

pytestmark = pytest.mark.slow
FRACTIONS = (0.6, 0.2, 0.2)


def split(**settings: Any) -> SplitConfig:
    return SplitConfig(near_duplicate_distance=0, **{"fractions": FRACTIONS, **settings})


@pytest.fixture(scope="module")
def shared(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture(scope="module")
def trained(shared: Path, tiny_settings: dict[str, Any]) -> StageResult:
    """A majority class, in the store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared)
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        return train(MajorityConfig(**tiny_settings, workspace="workspace"))


@pytest.fixture(autouse=True)
def there(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def on(shared: Path, trained: StageResult, tiny_settings: dict[str, Any]) -> Callable[..., Any]:
    """on("test", root=..., ...): metrics, and the evaluation's run in the store."""

    def run(name: str, **settings: Any) -> Any:
        given = {**tiny_settings, "model": f"runs:/{trained.run.run_id}/model", "workspace": "workspace", **settings}
        given.pop("image_size")
        metrics = evaluate(EvaluateConfig(**given, on=name))
        (latest, *_) = mlflow.MlflowClient(f"sqlite:///{shared}/mlflow.db").search_runs(
            ["1"], "tags.stage = 'evaluate'"
        )
        return metrics, latest.data

    return run


def test_bins_that_the_model_was_trained_on_are_refused_by_name_and_count_or_left_out(
    on: Callable[..., Any], trained: StageResult
) -> None:
    recorded = pd.read_parquet(trained.run.artifacts / FILE)
    assert len(recorded) == TINY_BINS
    metrics, logged = on("test")
    assert metrics["test/n"] == (recorded["split"] == "test").sum()
    assert (logged.tags["overlap"], logged.params["overlap.dropped"]) == ("none", "0")
    with pytest.raises(StocktakeError, match=r"trained on (\d+) of the \1 bins .*--overlap drop"):
        on("train")
    with pytest.raises(StocktakeError, match="no bin is left"):
        on("train", overlap="drop")

    with pytest.raises(StocktakeError, match="--overlap drop") as refused:
        on("test", split=split(seed=1))
    named, count, total, ids = re.search(
        r"^(\S+), .* (\d+) of the (\d+) bins \((.*), \.\.\.\)", str(refused.value)
    ).groups()  # type: ignore[union-attr]
    assert trained.run.run_id in named
    assert set(ids.split(", ")) <= set(recorded.loc[recorded["split"] != "test", "id"])
    metrics, logged = on("test", split=split(seed=1), overlap="drop")
    assert metrics["test/n"] == int(total) - int(count) > 0
    assert logged.tags["overlap"] == f"{count} dropped"
    assert (logged.params["overlap"], logged.params["split.seed"]) == ("drop", "1")


def test_all_of_a_root_that_the_model_has_not_seen(on: Callable[..., Any], tmp_path: Path) -> None:
    """Another warehouse that numbers its bins alike."""
    root = tmp_path / "warehouse"
    for folder in ("bin-images", "metadata"):
        (root / folder).mkdir(parents=True)
    for number in range(12):
        quantity = (1, 2, 3)[number % 3]
        (root / "bin-images" / f"{number:05d}.jpg").write_bytes(draw_bin(quantity, 1000 + number))
        (root / "metadata" / f"{number:05d}.json").write_text(json.dumps({"EXPECTED_QUANTITY": quantity}))
    metrics, logged = on("all", root=str(root))
    assert (metrics["all/n"], metrics["all/accuracy"]) == (12, pytest.approx(1 / 3))
    assert (logged.tags["on"], logged.tags["overlap"]) == ("all", "none")
    metrics, _ = on("test", root=str(root), split=split(fractions=(0, 0, 1)))
    assert metrics["test/n"] == 12
    with pytest.raises(StocktakeError, match=r"the val split of .* is empty"):
        on("val", root=str(root), split=split(fractions=(0, 0, 1)))
    with pytest.raises(StocktakeError, match=r"train split of .* is empty"):
        train(MajorityConfig(root=str(root), task="1-3", split=split(fractions=(0, 0, 1))))
    with pytest.raises(StocktakeError, match="of the 96 bins"):
        on("all")


def test_a_copy_of_a_root_is_known_by_its_photos(on: Callable[..., Any], tiny_root: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_root, tmp_path / "copy")
    with pytest.raises(StocktakeError, match="of the 96 bins"):
        on("all", root=str(tmp_path / "copy"))


def test_a_model_that_nobody_can_audit_is_said_to_be(
    on: Callable[..., Any], trained: StageResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.run.folder / "models" / "model", tmp_path / "model")
    metrics, logged = on("train", model=str(tmp_path / "model"))
    assert metrics["train/n"] > 0
    assert logged.tags["overlap"] == "unauditable"
    assert "unauditable" in capsys.readouterr().err


def test_a_random_split_is_compared_by_id(on: Callable[..., Any]) -> None:
    metrics, _ = on("test", split=split(by="id"), overlap="drop")
    assert metrics["test/n"] > 0


def test_a_run_gives_its_splits_to_another_workspace(
    trained: StageResult, tiny_settings: dict[str, Any], stocktake: Callable[..., Any]
) -> None:
    """By the command line and the run's id; without it another seed is another split."""
    options = ["--root", tiny_settings["root"], "--task", "1-3", "--split.seed", "5", "--workspace", "other"]
    ended = stocktake("data", *options, "--split.like", str(trained.run.run_id))
    assert ended.code == 0, ended.err
    fingerprint = trained.run.tags["data.fingerprint"]
    assert fingerprint in ended.out
    assert fingerprint not in stocktake("data", *options).out
