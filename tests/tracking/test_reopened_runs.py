"""Runs that another process started, or was killed in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.local_store import FAILED, LocalRun
from stocktake.tracking.runs import start_run
from stocktake.tracking.sync import end_run

QUIET = TrackingConfig(system_metrics=False)
WORKSPACE = Path("workspace")


IN_A_RUN = """
import signal, sys
from pathlib import Path
from stocktake.config.runs import TrackingConfig
from stocktake.tracking.runs import start_run
quiet = TrackingConfig(system_metrics=False)
tags = {"stage": "trial"}
with start_run(quiet, workspace=Path("workspace"), name="trial", tags=tags, parent=Path(sys.argv[1])) as run:
    run.log_params({"lr": 0.1})
    run.log_metrics({"val/macro_f1": 0.25}, step=1)
    run.flush()
    print(run.folder, flush=True)
    signal.pause()
"""


def _killed_child(parent: Path) -> Path:
    process = subprocess.Popen([sys.executable, "-c", IN_A_RUN, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    with pytest.raises(StocktakeError, match=f"process {process.pid}"):
        LocalRun.reopen(folder)
    assert not end_run(folder, QUIET, status=FAILED, reason="it is alive")
    process.kill()
    process.wait()
    process.stdout.close()
    return folder


def test_a_child_of_another_process_is_ended_and_gone_on_with_in_the_same_run(client: Any) -> None:
    with start_run(QUIET, workspace=WORKSPACE, name="tune", tags={}) as parent:
        folder = _killed_child(parent.folder)
        run_id = LocalRun.open(folder).run_id
        assert client.get_run(run_id).info.status == "RUNNING"
        assert client.get_run(run_id).data.tags["mlflow.parentRunId"] == parent.run_id

        assert end_run(folder, QUIET, status=FAILED, reason="killed by signal 9")
        assert client.get_run(run_id).info.status == "FAILED"
        assert client.get_run(run_id).data.tags["failure"] == "killed by signal 9"

        with (folder / "metrics.csv").open("a") as file:
            file.write("17000000,2,val/macr")  # as a process leaves it that is killed in mid-write
        with start_run(QUIET, workspace=WORKSPACE, name="trial", tags={"stage": "trial"}, reopen=folder) as again:
            assert client.get_run(run_id).info.status == "RUNNING"
            again.log_params({"lr": 0.2})
            again.log_metrics({"val/macro_f1": 0.5}, step=2)
        stored = client.get_run(run_id)
        assert (again.run_id, stored.info.status) == (run_id, "FINISHED")
        assert stored.data.params == {"lr": "0.1"}
        assert "failure" not in stored.data.tags
        history = client.get_metric_history(run_id, "val/macro_f1")
        assert [(point.step, point.value) for point in history] == [(1, 0.25), (2, 0.5)]
        assert again.is_uploaded()
        assert not end_run(folder, QUIET, status=FAILED, reason="it has finished")
        assert client.get_run(run_id).info.status == "FINISHED"


def test_a_run_is_ended_on_disk_when_the_store_is_away(client: Any) -> None:
    with start_run(QUIET, workspace=WORKSPACE, name="a", tags={}) as run:
        pass
    folder = LocalRun.reopen(run.folder)
    folder.release()
    away = TrackingConfig(uri="http://127.0.0.1:9")
    assert end_run(run.folder, away, status=FAILED, reason="gone")
    assert LocalRun.open(run.folder).state.status == "FAILED"
    assert not LocalRun.open(run.folder).is_uploaded()


def test_the_run_that_mlflow_opened_says_where_it_goes_on(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_run(QUIET, workspace=WORKSPACE, name="a", tags={}) as run:
        pass
    opened = client.create_run(client.get_experiment_by_name("stocktake").experiment_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    with start_run(QUIET, workspace=WORKSPACE, name="a", tags={}, reopen=run.folder) as again:
        assert again.run_id == run.run_id
    assert client.get_run(opened.info.run_id).data.tags["stocktake.continued_in"] == run.run_id
