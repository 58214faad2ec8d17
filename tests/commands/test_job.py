"""A command inside a training container: a folder laid out as SageMaker does, and what lies in it afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stocktake.cli import parse
from stocktake.commands.job import job, read_instances, unfinished_run
from stocktake.config.aws import JobConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.local_store import FINISHED, KILLED, LocalRun
from tiny_bins import PLAIN_BACKBONE, TINY_SIZE

RUN_ID = "0123456789abcdef0123456789abcdef"
TINY = {
    "task": "1-3",
    "image_size": str(TINY_SIZE),
    "split.fractions": "[0.6,0.2,0.2]",
    "split.near_duplicate_distance": "0",
}
NETWORK = {"backbone": PLAIN_BACKBONE, "weights": "none", "precision": "fp32", "tracking.system_metrics": "false"}


@pytest.fixture
def container(tmp_path: Path, tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """container(command="majority", ...): a base folder with these hyperparameters and the tiny root as a channel."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_RUN_ID", RUN_ID)

    def lay_out(hosts: tuple[str, ...] = ("algo-1",), **hyperparameters: str) -> Path:
        base = tmp_path / "ml"
        (base / "input" / "config").mkdir(parents=True)
        (base / "input" / "data").mkdir()
        (base / "input" / "data" / "bins").symlink_to(tiny_root)
        resources = {"current_host": hosts[0], "hosts": list(hosts), "network_interface_name": "lo"}
        (base / "input" / "config" / "resourceconfig.json").write_text(json.dumps(resources))
        (base / "input" / "config" / "hyperparameters.json").write_text(json.dumps(hyperparameters))
        return base

    return lay_out


@pytest.mark.slow
def test_results_lie_where_sagemaker_collects_them(container: Callable[..., Path]) -> None:
    base = container(command="majority", **TINY)
    job(JobConfig(base=str(base)))
    (run,) = (base / "output" / "data" / "runs").iterdir()
    folder = LocalRun.open(run)
    assert folder.state.status == FINISHED
    assert folder.state.attach_run_id == RUN_ID, "it is the run of MLFLOW_RUN_ID"
    assert folder.run_id is None, "no server was given"
    assert folder.final_metrics()["test/n"] > 0
    assert (base / "model" / "MLmodel").is_file()
    assert (base / "checkpoints" / "runs" / run.name / "run.json").is_file()
    assert not (base / "output" / "failure").exists()


@pytest.mark.slow
def test_a_trial_of_a_tuning_job_keeps_its_run_to_itself(
    container: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID")
    monkeypatch.setenv("TRAINING_JOB_NAME", "search-001-abc")
    monkeypatch.setenv("STOCKTAKE_ROOT", "s3://some-bucket/bins")
    chosen = {"classical.components": "7", "_tuning_objective_metric": "val/macro_f1"}
    base = container(command="tune", stage="classical", **TINY, **chosen, **{"tracking.system_metrics": "false"})
    (base / "input" / "data" / "files").mkdir()
    space = {"classical.components": {"type": "int", "low": 5, "high": 20}}
    (base / "input" / "data" / "files" / "search-space.json").write_text(json.dumps(space))
    job(JobConfig(base=str(base)))
    (run,) = (base / "output" / "data" / "runs").iterdir()
    folder = LocalRun.open(run)
    assert (folder.state.status, folder.state.attach_run_id) == (FINISHED, None)
    assert (folder.params["classical.components"], folder.params["root"]) == ("7", "s3://some-bucket/bins")
    metrics = folder.final_metrics()
    assert not [name for name in metrics if name.startswith("test/")], "no trial looks at test"
    assert f"trial ended: val_macro_f1={metrics['val/macro_f1']:.6f}" in capfd.readouterr().out
    again = parse("classical", ["--experiment", str(run / "artifacts" / "experiment.yaml")])
    assert (again.classical.components, again.root, again.task) == (7, "s3://some-bucket/bins", "1-3")
    assert (base / "checkpoints" / "search-001-abc" / "runs" / run.name).is_dir(), "trials share one place in S3"
    assert (run / "artifacts" / "checkpoint").is_dir()


@pytest.mark.slow
def test_the_failure_is_the_last_line_of_the_command(container: Callable[..., Path]) -> None:
    base = container(command="majority", **TINY | {"task": "7-9"})
    with pytest.raises(SystemExit) as exited:
        job(JobConfig(base=str(base)))
    assert exited.value.code == 2
    assert "7-9" in (base / "output" / "failure").read_text()


@pytest.mark.slow
def test_sigterm_ends_the_run_as_killed_with_a_checkpoint(container: Callable[..., Path]) -> None:
    base = container(command="finetune", **TINY, **NETWORK, epochs="100000", **{"training.patience": "100000"})
    log = base / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stocktake", "job", "--base", str(base)], stdout=output, stderr=output
        )
    try:
        _eventually(lambda: b"epoch=2 " in log.read_bytes() or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM, log.read_text()
    finally:
        process.kill()
    (run,) = (base / "output" / "data" / "runs").iterdir()
    assert LocalRun.open(run).state.status == KILLED
    assert LocalRun.open(run).final_metrics()["val/macro_f1"] >= 0
    assert not (run / "checkpoints").exists(), "weights stay behind"
    kept = base / "checkpoints" / "runs" / run.name
    assert (kept / "checkpoints" / "last.ckpt").is_file()
    assert unfinished_run(base / "checkpoints" / "runs") == kept, "a job that starts again goes on with it"


@pytest.mark.parametrize(
    ("hyperparameters", "named"),
    [
        ({}, "the hyperparameter command is ''"),
        ({"command": "promote"}, "the hyperparameter command is 'promote'"),
        ({"command": "finetune", "training.world_size": "3"}, "--training.world_size 3"),
        ({"command": "ddp", "nproc": "2", "training.world_size": "4"}, "--training.world_size 4"),
    ],
)
def test_a_job_that_was_put_together_wrongly_says_so(
    container: Callable[..., Path], hyperparameters: dict[str, str], named: str
) -> None:
    base = container(**hyperparameters)
    with pytest.raises(StocktakeError) as refused:
        job(JobConfig(base=str(base)))
    assert named in str(refused.value)
    assert named in (base / "output" / "failure").read_text()


def test_no_container_is_said(stocktake: Callable[..., Any], tmp_path: Path) -> None:
    ended = stocktake("job", "--base", str(tmp_path))
    assert ended.code == 2
    assert "`stocktake job` is for training containers" in ended.err


def test_a_container_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "stocktake.py").write_text(f"open({str(tmp_path / 'attacked')!r}, 'w')")
    variables = os.environ | {"SAGEMAKER_BASE_DIR": str(tmp_path / "ml"), "STOCKTAKE_PYTHON": sys.executable}
    command = ["sh", str(Path(__file__).parents[2] / "deploy" / "start_job.sh")]
    ended = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert not (tmp_path / "attacked").exists()
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), "there is no job in the folder"


def test_as_many_instances_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"current_host": "algo-10", "hosts": ["algo-10", "algo-2", "algo-1"], "network_interface_name": "eth0"}
    instances = read_instances(resources)
    assert (instances.hosts, instances.rank) == (("algo-1", "algo-2", "algo-10"), 2)
    monkeypatch.setenv("STOCKTAKE_INSTANCE_COUNT", "2")
    with pytest.raises(StocktakeError, match="not 2"):
        read_instances(resources)


def test_a_run_without_a_checkpoint_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", RUN_ID)
    made = {"experiment": "e", "tracking_uri": None, "attach_run_id": RUN_ID}
    finished, begun = (LocalRun.create(tmp_path, name=name, **made) for name in ("finished", "begun"))
    finished.finish(FINISHED, None)
    assert unfinished_run(tmp_path) is None
    assert finished.folder.exists()
    assert not begun.folder.exists(), "two folders for one run would say two things"


def _eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
