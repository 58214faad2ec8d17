from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.registry.models import fetch_model, register_candidate
from stocktake.tracking.runs import TrackedRun, start_run

QUIET = TrackingConfig(system_metrics=False)


def _registered(model_folder: Path, score: float = 0.3) -> tuple[TrackedRun, str | None]:
    tags = {"stage": "frozen", "task": "1-5", "data.fingerprint": "f1"}
    with start_run(QUIET, workspace=Path("workspace"), name="frozen", tags=tags) as run:
        run.log_metrics({"val/macro_f1": score})
        run.log_model(model_folder)
        version = register_candidate(run, "counter", tags={"k": 1}, description="A *head*.")
        assert register_candidate(run, "counter", tags={"k": 1}, description="A *head*.") == version
    return run, version


def test_a_model_goes_in_and_comes_out(client: Any, model_folder: Path) -> None:
    run, version = _registered(model_folder)
    assert version == "1"
    _, second = _registered(model_folder, 0.4)
    assert second == "2"
    held = client.get_model_version("counter", "1")
    assert (
        held.tags.items()
        >= {"stage": "frozen", "task": "1-5", "data.fingerprint": "f1", "val/macro_f1": "0.3", "k": "1"}.items()
    )
    assert held.description == "A *head*."
    assert held.run_id == run.run_id
    assert client.get_registered_model("counter").description
    assert client.get_model_version_by_alias("counter", "candidate").version == 2
    for uri in (
        "models:/counter/1",
        "models:/counter@candidate",
        "models:/counter/latest",
        f"runs:/{run.run_id}/model",
    ):
        folder = fetch_model(uri, Path("fetched"))
        assert (folder / "data" / "weights.bin").stat().st_size == 1000
        assert "model_id: m-" in (folder / "MLmodel").read_text()
    assert fetch_model(str(model_folder), Path("unused")) == model_folder
    assert not Path("unused").exists()


def test_what_is_missing_is_named_with_what_there_is(client: Any, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StocktakeError, match="no registered model"):
        fetch_model("models:/counter/1", tmp_path / "fetched")
    run, _ = _registered(model_folder)
    for uri in ("models:/counter/7", "models:/counter@champion", "models:/other/latest"):
        with pytest.raises(StocktakeError, match="models:/counter/1 @candidate"):
            fetch_model(uri, tmp_path / "fetched")
    with pytest.raises(StocktakeError, match=f"runs:/{run.run_id}/model"):
        fetch_model(f"runs:/{run.run_id}/other", tmp_path / "fetched")
    with pytest.raises(StocktakeError, match="no run"):
        fetch_model(f"runs:/{'0' * 32}/model", tmp_path / "fetched")
    with pytest.raises(StocktakeError, match="no model folder"):
        fetch_model("somewhere", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_a_folder_with_something_else_in_it_is_not_replaced(client: Any, model_folder: Path) -> None:
    _registered(model_folder)
    Path("precious").mkdir()
    Path("precious", "letter.txt").write_text("dear")
    with pytest.raises(StocktakeError, match="precious"):
        fetch_model("models:/counter/1", Path("precious"))
    assert Path("precious", "letter.txt").read_text() == "dear"


def test_a_run_without_a_model_registers_nothing(client: Any, model_folder: Path) -> None:
    with start_run(QUIET, workspace=Path("workspace"), name="a", tags={}) as run:
        with pytest.raises(StocktakeError, match="no model"):
            register_candidate(run, "counter", tags={}, description="")
        with pytest.raises(StocktakeError, match="MLmodel"):
            run.log_model(model_folder / "data")


def test_files_that_change_are_another_model(client: Any, model_folder: Path) -> None:
    with start_run(QUIET, workspace=Path("workspace"), name="a", tags={}) as run:
        run.log_model(model_folder)
        run.flush()
        (model_folder / "data" / "weights.bin").write_bytes(b"other")
        run.log_model(model_folder)
    experiment = client.get_run(run.run_id).info.experiment_id
    assert len(client.search_logged_models([experiment])) == 2
    assert (fetch_model(f"runs:/{run.run_id}/model", Path("fetched")) / "data" / "weights.bin").read_bytes() == b"other"
