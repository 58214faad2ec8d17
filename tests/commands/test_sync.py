from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest

from stocktake.commands.sync import sync
from stocktake.config.runs import SyncConfig, TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.local_store import LocalRun
from stocktake.tracking.runs import start_run

pytestmark = pytest.mark.usefixtures("sqlite_store")
OFFLINE = TrackingConfig(offline=True, system_metrics=False)
WORKSPACE = Path("workspace")


def _offline_runs() -> tuple[Path, Path]:
    with start_run(OFFLINE, workspace=WORKSPACE, name="ladder", tags={"stage": "ladder"}) as run:
        run.log_params({"seed": 0})
        assert run.run_id is None
        with run.child("frozen", {"stage": "frozen"}) as child:
            child.log_metrics({"val/macro_f1": 0.3}, step=1)
            (child.artifacts / "a.txt").write_text("a")
    assert not Path("mlruns").exists()
    return run.folder, child.folder


def test_an_offline_run_is_uploaded_once(sqlite_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    parent, child = _offline_runs()
    assert sync(SyncConfig()) == {"uploaded": 2, "pending": 0, "running": 0, "complete": 0}
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == [parent.name, child.name]
    assert sync(SyncConfig()) == {"uploaded": 0, "pending": 0, "running": 0, "complete": 2}
    client = mlflow.MlflowClient(sqlite_store)
    experiment = client.get_experiment_by_name("stocktake").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"ladder", "frozen"}
    assert runs["frozen"].data.tags["mlflow.parentRunId"] == runs["ladder"].info.run_id
    assert runs["frozen"].data.metrics == {"val/macro_f1": 0.3}
    assert runs["ladder"].data.params == {"seed": "0"}
    state = json.loads((child / "run.json").read_text())
    assert (runs["frozen"].info.start_time, runs["frozen"].info.end_time) == (state["start_ms"], state["end_ms"])
    assert json.loads((child / "result.json").read_text())["run_id"] == runs["frozen"].info.run_id
    assert [file.path for file in client.list_artifacts(runs["frozen"].info.run_id)] == ["a.txt"]


def test_runs_that_were_moved_here_are_uploaded(sqlite_store: str, tmp_path: Path) -> None:
    parent, _ = _offline_runs()
    shutil.move(WORKSPACE, tmp_path / "home")
    assert sync(SyncConfig(workspace=str(tmp_path / "home")))["uploaded"] == 2
    assert LocalRun.open(tmp_path / "home" / "runs" / parent.name).state.uploads.keys() == {sqlite_store}


def test_two_syncs_at_once_upload_once(sqlite_store: str) -> None:
    _offline_runs()
    counts: list[dict[str, int]] = []
    threads = [threading.Thread(target=lambda: counts.append(sync(SyncConfig()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(count["uploaded"] for count in counts) == [0, 2]
    client = mlflow.MlflowClient(sqlite_store)
    assert len(client.search_runs([client.get_experiment_by_name("stocktake").experiment_id])) == 2


def test_a_run_created_by_an_attempt_whose_answer_was_lost_is_found_again(sqlite_store: str) -> None:
    _, child = _offline_runs()
    sync(SyncConfig())
    folder = LocalRun.open(child)
    run_id = folder.run_id
    folder.state.uploads.clear()
    folder.save()
    assert sync(SyncConfig())["uploaded"] == 1
    assert LocalRun.open(child).run_id == run_id


DYING = """
import os, signal
from pathlib import Path
from stocktake.config.runs import TrackingConfig
from stocktake.tracking.runs import start_run
offline = TrackingConfig(offline=True, system_metrics=False)
with start_run(offline, workspace=Path("workspace"), name="a", tags={}) as run:
    run.log_metrics({"a": 1.0})
    Path("ready").touch()
    signal.pause()
"""


def test_a_run_whose_process_died_is_closed(sqlite_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", DYING])
    while not Path("ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert sync(SyncConfig()) == {"uploaded": 0, "pending": 0, "running": 1, "complete": 0}
    assert f"process {process.pid}" in capsys.readouterr().out
    process.kill()
    process.wait()
    assert sync(SyncConfig())["uploaded"] == 1
    client = mlflow.MlflowClient(sqlite_store)
    (run,) = client.search_runs([client.get_experiment_by_name("stocktake").experiment_id])
    assert run.info.status == "KILLED"
    assert str(process.pid) in run.data.tags["failure"]
    assert run.data.metrics == {"a": 1.0}
    (folder,) = (path for path in (WORKSPACE / "runs").iterdir() if path.is_dir())
    assert json.loads((folder / "result.json").read_text())["status"] == "KILLED"


def test_one_broken_folder_does_not_stop_the_others(sqlite_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    parent, child = _offline_runs()
    broken = WORKSPACE / "runs" / "a-broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    with pytest.raises(StocktakeError, match="1 of the runs"):
        sync(SyncConfig())
    assert "a-broken: not uploaded" in capsys.readouterr().out
    assert LocalRun.open(parent).is_uploaded()
    assert LocalRun.open(child).is_uploaded()


def test_another_store_takes_a_child_with_its_parent(sqlite_store: str, empty_store: Path, tmp_path: Path) -> None:
    parent, child = _offline_runs()
    sync(SyncConfig())
    LocalRun.open(child).set_tags({"later": "yes"})
    shutil.copy(empty_store, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path}/other.db"
    assert sync(SyncConfig(tracking=TrackingConfig(uri=other)))["uploaded"] == 1
    client = mlflow.MlflowClient(other)
    runs = client.search_runs([client.get_experiment_by_name("stocktake").experiment_id])
    nested = next(run for run in runs if run.info.run_name == "frozen")
    assert nested.data.tags["mlflow.parentRunId"] == LocalRun.open(parent).run_id
    assert (nested.data.tags["later"], nested.data.metrics) == ("yes", {"val/macro_f1": 0.3})


def test_a_server_that_is_away_is_named_without_its_password(capsys: pytest.CaptureFixture[str]) -> None:
    _offline_runs()
    with pytest.raises(StocktakeError, match="2 of the runs"):
        sync(SyncConfig(tracking=TrackingConfig(uri="http://ann:s3cret@127.0.0.1:9")))
    out = capsys.readouterr().out
    assert "***@127.0.0.1:9" in out
    for path in WORKSPACE.rglob("*.json"):
        assert "s3cret" not in path.read_text()
    assert "s3cret" not in out


def test_a_workspace_that_is_not_there_is_named() -> None:
    with pytest.raises(StocktakeError, match="nowhere"):
        sync(SyncConfig(workspace="nowhere"))
