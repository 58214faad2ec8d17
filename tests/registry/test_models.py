"""Models come out of the store as they went in, by any address."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry_store import make_run
from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.registry.models import fetch_model, resolve_alias, version_label
from stocktake.registry.versions import ModelRegistry


def test_a_model_comes_out_by_any_address(three: ModelRegistry, model_folder: Path) -> None:
    run_id = three.version("1").run_id
    for uri in (
        "models:/stocktake/1",
        "models:/stocktake@candidate",
        "models:/stocktake/latest",
        f"runs:/{run_id}/model",
    ):
        folder = fetch_model(uri, Path("fetched"))
        assert (folder / "data" / "weights.bin").stat().st_size == 1000
        assert "model_id: m-" in (folder / "MLmodel").read_text()
    assert fetch_model(str(model_folder), Path("unused")) == model_folder
    assert not Path("unused").exists()


def test_an_address_is_resolved_to_a_version(three: ModelRegistry) -> None:
    three.set_alias("champion", three.version("1"))
    for address, label in (
        ("models:/stocktake@champion", "stocktake/1"),
        ("models:/stocktake/latest", "stocktake/3"),
        ("models:/stocktake/2", "stocktake/2"),
        ("models:/stocktake@nobody", None),
        ("models:/other/latest", None),
        (f"runs:/{three.version('1').run_id}/model", None),
        ("some/folder", None),
    ):
        assert version_label(resolve_alias(address, TrackingConfig())) == label


def test_what_is_missing_is_named_with_what_exists(three: ModelRegistry, tmp_path: Path) -> None:
    for uri in ("models:/stocktake/7", "models:/stocktake@champion", "models:/other/latest"):
        with pytest.raises(StocktakeError, match="models:/stocktake/3, models:/stocktake@candidate"):
            fetch_model(uri, tmp_path / "fetched")
    run_id = three.version("1").run_id
    with pytest.raises(StocktakeError, match=f"runs:/{run_id}/model"):
        fetch_model(f"runs:/{run_id}/other", tmp_path / "fetched")
    with pytest.raises(StocktakeError, match="no run"):
        fetch_model(f"runs:/{'0' * 32}/model", tmp_path / "fetched")
    with pytest.raises(StocktakeError, match="somewhere"):
        fetch_model("somewhere", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_a_folder_with_something_else_in_it_is_not_replaced(three: ModelRegistry) -> None:
    Path("precious").mkdir()
    Path("precious", "letter.txt").write_text("dear")
    with pytest.raises(StocktakeError, match="precious"):
        fetch_model("models:/stocktake/1", Path("precious"))
    assert Path("precious", "letter.txt").read_text() == "dear"


def test_an_empty_registry_says_so(registry: ModelRegistry, model_folder: Path) -> None:
    make_run(model_folder, "one")
    with pytest.raises(StocktakeError, match="no registered model"):
        fetch_model("models:/stocktake/1", Path("fetched"))
