"""A tracking server that dies under a run costs the run nothing but the upload."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from stocktake.commands.sync import sync
from stocktake.config.runs import SyncConfig, TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.registry.models import fetch_model
from stocktake.registry.registration import register_candidate
from stocktake.tracking.local_store import LocalRun
from stocktake.tracking.runs import start_run

WORKSPACE = Path("workspace")
STEPS = 40


@pytest.mark.slow
def test_a_server_killed_under_a_run(
    server: Any, model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrackingConfig(uri=server.uri, system_metrics=False)
    with start_run(config, workspace=WORKSPACE, name="ladder", tags={"stage": "ladder"}) as run:
        run.log_params({"seed": 0})
        run.log_metrics({"odd": float("nan"), "large": float("inf")})
        with run.child("first", {"stage": "majority"}) as first:
            first.log_metrics({"val/macro_f1": 0.1})
        with run.child("second", {"stage": "frozen", "task": "1-5"}) as second:
            for step in range(STEPS):
                if step == STEPS // 2:
                    second.flush()
                    server.kill()
                    died = time.monotonic()
                second.log_metrics({"val/macro_f1": step / STEPS, "train/loss": 1.0}, step=step)
                second.flush()
            second.log_params({"late": 1})
            (second.artifacts / "curves").mkdir()
            (second.artifacts / "curves" / "a.csv").write_text("1\n")
            second.log_model(model_folder)
        with run.child("third", {"stage": "finetune"}) as third:
            third.log_metrics({"val/macro_f1": 0.3})
        with pytest.raises(ZeroDivisionError), run.child("fourth", {}) as fourth:
            raise ZeroDivisionError("no")
    assert time.monotonic() - died < 20
    assert third.run_id is None
    for ended in (run, second, third, fourth):
        assert {"run.json", "metrics.csv", "tags.json", "result.json"} <= {path.name for path in ended.folder.iterdir()}
    assert json.loads((second.folder / "result.json").read_text())["metrics"]["val/macro_f1"] == (STEPS - 1) / STEPS
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(warnings) == 1
    assert "stocktake sync" in warnings[0]
    assert server.uri in warnings[0]

    with pytest.raises(StocktakeError, match="4 of the runs"):
        sync(SyncConfig(workspace=str(WORKSPACE)))
    server.start()
    capsys.readouterr()
    counts = sync(SyncConfig(workspace=str(WORKSPACE)))
    assert (counts["uploaded"], counts["complete"]) == (4, 1)
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert sync(SyncConfig(workspace=str(WORKSPACE))) == {"uploaded": 0, "pending": 0, "running": 0, "complete": 5}

    import mlflow

    client = mlflow.MlflowClient(server.uri, server.uri)
    experiment = client.get_experiment_by_name("stocktake").experiment_id
    stored = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert {name: run.info.status for name, run in stored.items()} == {
        **dict.fromkeys(("ladder", "first", "second", "third"), "FINISHED"),
        "fourth": "FAILED",
    }
    assert all(stored[name].data.tags["mlflow.parentRunId"] == run.run_id for name in stored if name != "ladder")
    assert stored["fourth"].data.tags["failure"] == "ZeroDivisionError: no"
    second_id = stored["second"].info.run_id
    assert stored["second"].data.params == {"late": "1"}
    for name in ("val/macro_f1", "train/loss"):
        history = client.get_metric_history(second_id, name)
        assert sorted(point.step for point in history) == list(range(STEPS))
    assert [file.path for file in client.list_artifacts(second_id, "curves")] == ["curves/a.csv"]
    (model,) = client.search_logged_models([experiment])
    assert (model.name, model.source_run_id, str(model.status)) == ("model", second_id, "READY")
    named = TrackingConfig(uri=server.uri, model_name="counter", system_metrics=False)
    assert register_candidate(named, second.folder, WORKSPACE) is not None
    version = client.get_model_version_by_alias("counter", "candidate")
    assert version.source == f"models:/{model.model_id}"
    assert version.tags["val/macro_f1"] == "0.975"
    fetched = fetch_model("models:/counter@candidate", Path("fetched"), config)
    assert (fetched / "data" / "weights.bin").read_bytes() == (model_folder / "data" / "weights.bin").read_bytes()
    ended = json.loads((third.folder / "run.json").read_text())["end_ms"]
    assert stored["third"].info.end_time == ended

    # A server that hangs costs the time of one request, and one that comes back takes what it missed.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with start_run(config, workspace=WORKSPACE, name="hung", tags={}) as hung:
        os.killpg(server.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        hung.log_metrics({"a": 1.0}, step=0)
        hung.flush()  # a request, once repeated, and a health check
        assert time.monotonic() - began < 2 + 1 + 2 + 3 + 2
        began = time.monotonic()
        for step in range(1, 20):
            hung.log_metrics({"a": 1.0}, step=step)
            hung.flush()
        assert time.monotonic() - began < 1
        assert not hung.is_uploaded()
        os.killpg(server.process.pid, signal.SIGCONT)
    assert hung.is_uploaded()
    assert len(client.get_metric_history(hung.run_id, "a")) == 20

    # The same store under another address is no other store.
    folder = LocalRun.open(third.folder)
    folder.set_tags({"later": "yes"})
    other = server.uri.replace("127.0.0.1", "localhost")
    assert sync(SyncConfig(workspace=str(WORKSPACE), tracking=TrackingConfig(uri=other)))["uploaded"] >= 1
    assert len(client.search_runs([experiment])) == 6
    assert client.get_run(stored["third"].info.run_id).data.tags["later"] == "yes"

    # A password in the address goes nowhere but to the server.
    secret = TrackingConfig(uri=server.uri.replace("//", "//ann:s3cret@"), system_metrics=False)
    with (
        pytest.raises(ValueError, match="s3cret"),
        start_run(secret, workspace=Path("other"), name="a", tags={"tracking": str(secret.uri)}) as run,
    ):
        run.log_params({"tracking.uri": secret.uri})
        raise ValueError(f"no {secret.uri}")
    assert run.run_id is not None
    captured = capsys.readouterr()
    written = [path for root in (Path("other"), server.folder) for path in root.rglob("*") if path.is_file()]
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
    assert "s3cret" not in captured.out + captured.err
