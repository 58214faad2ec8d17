"""`stocktake eda`: a tracked run with its metrics, its data and the page."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from stocktake.commands.eda import eda
from stocktake.config.runs import EdaConfig, TrackingConfig
from stocktake.errors import StocktakeError


def test_an_exploration_is_a_run(sqlite_store: str, tmp_path: Path, tiny_root: Path) -> None:
    tracking = TrackingConfig(uri=sqlite_store, system_metrics=False)
    metrics = eda(EdaConfig(root=str(tiny_root), task="1-2", workspace=str(tmp_path / "workspace"), tracking=tracking))
    client = mlflow.MlflowClient(sqlite_store)
    [run] = client.search_runs([client.get_experiment_by_name("stocktake").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "eda"
    logged = {name: value for name, value in run.data.metrics.items() if name.startswith("eda/")}
    assert logged == pytest.approx(metrics)
    [dataset] = run.inputs.dataset_inputs
    assert dataset.dataset.digest == run.data.tags["data.fingerprint"]
    assert {"eda.html", "classes.png"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(StocktakeError, match="nowhere"):
        eda(EdaConfig(root=str(tmp_path / "nowhere"), workspace=str(tmp_path / "workspace")))
