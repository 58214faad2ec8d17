"""Runs become versions, found by number and alias."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry_store import RUNS, WORKSPACE, make_run
from stocktake.commands.sync import sync
from stocktake.config.runs import SyncConfig, TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.registry.registration import register_candidate, register_run
from stocktake.registry.versions import ModelRegistry
from stocktake.tracking.runs import start_run

QUIET = TrackingConfig(system_metrics=False)
OFFLINE = TrackingConfig(system_metrics=False, offline=True)


def test_a_run_is_registered_by_id_name_and_folder_and_stays_one_version(
    registry: ModelRegistry, model_folder: Path
) -> None:
    run = make_run(model_folder, "wide")
    make_run(model_folder, "deep")
    first = register_run(registry, str(run.run_id), RUNS)
    assert (first.label, first.uri, first.aliases, first.run_id) == (
        "stocktake/1",
        "models:/stocktake/1",
        ("candidate",),
        run.run_id,
    )
    tags = {"stage": "wide", "task": "1-3", "data.fingerprint": "f1", "val/macro_f1": "0.3"}
    assert first.tags.items() >= tags.items()
    assert registry.registered().description
    assert register_run(registry, "deep", RUNS).aliases == ("candidate",)
    assert registry.version("1").aliases == ()
    for asked in ("wide", str(run.folder), run.folder.name):
        assert register_run(registry, asked, RUNS).number == 1
    assert registry.version("candidate").number == 1
    assert [version.number for version in registry.versions()] == [1, 2]


def test_a_run_that_cannot_be_registered_is_named_with_the_way_out(registry: ModelRegistry, model_folder: Path) -> None:
    with pytest.raises(StocktakeError, match=r"--tracking\.experiment"):
        register_run(registry, "frozen", RUNS)
    with start_run(QUIET, workspace=WORKSPACE, name="ladder", tags={"stage": "ladder"}) as run:
        with run.child("best", {"stage": "best"}) as child:
            child.log_model(model_folder)
        run.flush()
        for asked in (str(run.folder), str(run.run_id)):
            with pytest.raises(StocktakeError, match="finished"):
                register_run(registry, asked, RUNS)
    with pytest.raises(StocktakeError, match=rf"{child.run_id} \(best\)"):
        register_run(registry, "ladder", RUNS)
    with pytest.raises(StocktakeError, match=rf"'lader'.*{run.run_id} \(ladder\)"):
        register_run(registry, "lader", RUNS)
    with pytest.raises(StocktakeError, match="0000"):
        register_run(registry, "0" * 32, RUNS)
    twice = [make_run(model_folder, "twice").run_id for _ in range(2)]
    with pytest.raises(StocktakeError, match=rf"{twice[1]}.*{twice[0]}"):
        register_run(registry, "twice", RUNS)


def test_an_offline_run_is_registered_after_its_sync(
    registry: ModelRegistry, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(model_folder, "later", OFFLINE)
    with pytest.raises(StocktakeError, match="stocktake sync --workspace workspace"):
        register_run(registry, run.folder.name, RUNS)
    assert register_candidate(OFFLINE, run.folder, WORKSPACE) is None
    assert f"stocktake register --run {run.folder}" in capsys.readouterr().out
    assert register_candidate(QUIET, run.folder, WORKSPACE) is None
    assert f"stocktake register --run {run.folder}" in capsys.readouterr().err
    sync(SyncConfig())
    version = register_candidate(QUIET, run.folder, WORKSPACE)
    assert version is not None
    assert (version.label, version.aliases) == ("stocktake/1", ("candidate",))
    assert (WORKSPACE / "registry" / "stocktake-1" / "card.html").is_file()


def test_a_version_that_is_not_there_is_named_with_those_that_are(three: ModelRegistry) -> None:
    for asked in ("9", "champion", "²"):
        with pytest.raises(StocktakeError, match=rf"{asked}: --version can be 1, 2, 3, or candidate \(3\)"):
            three.version(asked)
    with (
        pytest.raises(StocktakeError, match=r"'other' .*--model_name can be stocktake"),
        ModelRegistry(TrackingConfig(model_name="other")).opened() as other,
    ):
        other.versions()
    with (
        pytest.raises(StocktakeError, match=r"--tracking\.offline"),
        ModelRegistry(TrackingConfig(offline=True)).opened(),
    ):
        pass
