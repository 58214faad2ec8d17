from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.runs import DatasetRecord, start_run

QUIET = TrackingConfig(system_metrics=False)
WORKSPACE = Path("workspace")


def test_importing_runs_does_not_import_mlflow() -> None:
    script = "import sys, stocktake.tracking.runs, stocktake.registry.models; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_everything_of_a_run_is_on_disk_and_in_the_store(client: Any, model_folder: Path, tmp_path: Path) -> None:
    with start_run(QUIET, workspace=WORKSPACE, name="ladder", tags={"stage": "ladder"}) as run:
        run.log_params({"seed": 0, "lr": 1e-3})
        run.log_params({"seed": 1})
        run.log_dataset(DatasetRecord("bins", "abc", "/bins", 12, {"classes": 5}))
        (run.artifacts / "figures").mkdir()
        (run.artifacts / "figures" / "a.json").write_text("{}")
        with run.child("frozen", {"stage": "frozen"}) as child:
            for step in range(3):
                child.log_metrics({"val/macro_f1": step / 10, "train/loss": float("nan")}, step=step)
            child.log_model(model_folder)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "ladder"
    assert stored.data.params == {"seed": "0", "lr": "0.001"}
    assert stored.data.tags["stage"] == "ladder"
    assert len(stored.data.tags["git.commit"]) == 40
    assert stored.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert [file.path for file in client.list_artifacts(run.run_id, "figures")] == ["figures/a.json"]
    assert stored.info.artifact_uri.startswith(str(tmp_path / "mlruns"))
    nested = client.get_run(child.run_id)
    assert nested.data.tags["mlflow.parentRunId"] == run.run_id
    history = client.get_metric_history(child.run_id, "val/macro_f1")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    (model,) = client.search_logged_models([stored.info.experiment_id])
    assert (model.name, model.source_run_id, str(model.status)) == ("model", child.run_id, "READY")
    assert {metric.key: metric.value for metric in client.get_logged_model(model.model_id).metrics} == {
        "val/macro_f1": 0.2
    }
    assert [output.model_id for output in nested.outputs.model_outputs] == [model.model_id]
    result = json.loads((child.folder / "result.json").read_text())
    assert result["run_id"] == child.run_id
    assert result["metrics"]["val/macro_f1"] == 0.2
    assert run.is_uploaded()
    assert child.is_uploaded()
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_locks_lie_beside_what_they_lock(sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a temporary folder that all users share, another one could hold them, or put a link in their place."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    with start_run(QUIET, workspace=WORKSPACE, name="a", tags={}):
        pass
    assert [*(tmp_path / "shared").rglob("*.lock")] == []


def test_the_experiment_page_shows_the_leaderboard(client: Any) -> None:
    with start_run(QUIET, workspace=WORKSPACE, name="a", tags={}):
        pass
    tags = client.get_experiment_by_name("stocktake").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(tags["mlflow.sharedViewState.leaderboard"])
    assert view["orderByKey"] == "metrics.`val/macro_f1`"


def test_flushing_again_changes_nothing(client: Any) -> None:
    with start_run(QUIET, workspace=WORKSPACE, name="a", tags={}) as run:
        run.log_metrics({"a": 1.0}, step=0)
        run.flush()
        run.flush()
    assert len(client.get_metric_history(run.run_id, "a")) == 1


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("bad http://ann:s3cret@host\nand more"), "FAILED", "ValueError: bad http://***@host"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
        (SystemExit(3), "FAILED", "SystemExit: 3"),
    ],
)
def test_an_exception_ends_the_run_and_its_children(
    client: Any, error: BaseException, status: str, reason: str
) -> None:
    with (
        pytest.raises(type(error)),
        start_run(QUIET, workspace=WORKSPACE, name="a", tags={}) as run,
        run.child("b", {}) as child,
    ):
        child.log_metrics({"a": 1.0})
        raise error
    for ended in (run, child):
        stored = client.get_run(ended.run_id)
        assert (stored.info.status, stored.data.tags["failure"]) == (status, reason)
        assert json.loads((ended.folder / "result.json").read_text())["status"] == status


def test_sigterm_ends_the_run(client: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), start_run(QUIET, workspace=WORKSPACE, name="a", tags={}) as run:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    stored = client.get_run(run.run_id)
    assert (stored.info.status, stored.data.tags["failure"]) == ("KILLED", "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_goes_on_in_the_run_that_mlflow_run_opened(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = client.create_experiment("project")
    opened = client.create_run(experiment, run_name="bold-shrike-512")
    client.log_param(opened.info.run_id, "lr", "1e-3")
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    config = TrackingConfig(experiment="another", system_metrics=False)
    with start_run(config, workspace=WORKSPACE, name="finetune", tags={}) as run:
        assert "MLFLOW_RUN_ID" not in os.environ
        run.log_params({"lr": 0.001, "seed": 0})
        with run.child("inner", {}) as child:
            pass
    assert run.run_id == opened.info.run_id
    stored = client.get_run(run.run_id)
    assert stored.info.run_name == "finetune"
    assert stored.data.params == {"lr": "1e-3", "seed": "0"}
    assert client.get_run(child.run_id).info.experiment_id == experiment
    assert client.get_experiment_by_name("another") is None
    with start_run(QUIET, workspace=WORKSPACE, name="next", tags={}) as following:
        pass
    assert following.run_id != run.run_id


def test_a_name_that_somebody_gave_stays(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = client.create_run("0", run_name="my-run-1")
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    with start_run(QUIET, workspace=WORKSPACE, name="finetune", tags={}) as run:
        pass
    assert client.get_run(run.run_id).info.run_name == "my-run-1"


def test_a_run_to_attach_to_that_is_not_there(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with (
        pytest.raises(StocktakeError, match="MLFLOW_RUN_ID"),
        start_run(QUIET, workspace=WORKSPACE, name="a", tags={}),
    ):
        pass
    assert not list((WORKSPACE / "runs").glob("*/"))


def test_a_deleted_experiment_is_named(client: Any) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    config = TrackingConfig(experiment="gone", system_metrics=False)
    with pytest.raises(StocktakeError, match="deleted"), start_run(config, workspace=WORKSPACE, name="a", tags={}):
        pass


def test_system_metrics_appear_in_a_short_run(client: Any) -> None:
    with start_run(TrackingConfig(), workspace=WORKSPACE, name="a", tags={}) as run, run.child("b", {}) as child:
        pass
    for ended in (run, child):
        names = client.get_run(ended.run_id).data.metrics
        assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(names)


@pytest.mark.parametrize("answers", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["refused", "silent"])
def test_a_server_that_is_down_at_the_start_is_named(answers: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers:
            listener.listen()  # takes the connection and says nothing
        uri = f"http://ann:s3cret@127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        with (
            pytest.raises(StocktakeError) as caught,
            start_run(TrackingConfig(uri=uri), workspace=WORKSPACE, name="a", tags={}),
        ):
            pass
    assert time.monotonic() - began < 15
    message = str(caught.value)
    assert "s3cret" not in message
    assert "***@127.0.0.1" in message
    assert "--tracking.uri" in message
    assert "--tracking.offline" in message
    assert not WORKSPACE.exists()


def test_a_store_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, but a letter to nobody in particular" * 20)
    config = TrackingConfig(uri="sqlite:///text.db")
    with pytest.raises(StocktakeError, match=r"text\.db"), start_run(config, workspace=WORKSPACE, name="a", tags={}):
        pass


def _one_of_four(number: int) -> None:
    with start_run(QUIET, workspace=Path("workspace"), name=f"run-{number}", tags={}) as run:
        for step in range(5):
            run.log_metrics({"a": float(step)}, step=step)
            run.flush()


@pytest.mark.slow
def test_four_processes_on_a_fresh_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # not each of them has to import MLflow
    processes = [context.Process(target=_one_of_four, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("stocktake").experiment_id])
    assert sorted(run.info.run_name for run in runs) == [f"run-{number}" for number in range(4)]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(len(client.get_metric_history(run.info.run_id, "a")) == 5 for run in runs)
