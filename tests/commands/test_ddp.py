"""Jobs of two processes as a user starts them: one run, restarts, faults that end the job, one line for what failed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pandas as pd
import psutil
import pytest

from stocktake.commands.ddp import _first_failure, ddp, launch
from stocktake.config.data import SplitConfig
from stocktake.config.training import DdpConfig, FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.models.checkpoint import load_model
from stocktake.models.inference import predict
from stocktake.stages.finetune import LR_RULE
from stocktake.stages.prepare import prepare_data
from tiny_bins import PLAIN_BACKBONE

FAULTY = str(Path(__file__).with_name("faulty_rank.py"))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WITHIN_SECONDS = 30
"""Of a fault, the job has ended."""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    pid: int | None
    """Of the process that had the fault."""
    seconds: float
    """From the fault to the end."""

    @property
    def printed(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("stocktake: ")]


class Job:
    """Two processes over the tiny root, in the current folder and its store."""

    def __init__(self, folder: Path, store: str, root: Path) -> None:
        self.folder = folder
        self.client = mlflow.MlflowClient(store)
        self._fault = folder / "fault"
        words = {"root": root, "task": "1-3", "split.fractions": "[0.6,0.2,0.2]", "split.near_duplicate_distance": 0}
        words |= {"image_size": 32, "backbone": PLAIN_BACKBONE, "weights": "none", "precision": "fp32"}
        words |= {"batch_size": 8, "epochs": 3, "lr": 3e-4, "tracking.system_metrics": "false"}
        words |= {"training.collective_timeout": 60}
        self.words = [word for name, value in words.items() for word in (f"--{name}", str(value))]

    def start(self, *command: str, fault: str = "9 9 9 none") -> subprocess.Popen[str]:
        environment = os.environ | {"FAULT": fault, "FAULT_FILE": str(self._fault), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, *self.words],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, process: subprocess.Popen[str]) -> Ended:
        out, err = process.communicate(timeout=150)
        pid = int(self._fault.read_text()) if self._fault.exists() else None
        seconds = time.time() - self._fault.stat().st_mtime if pid else 0.0
        return Ended(process.returncode, out, err, pid, seconds)

    def fault(self) -> int:
        """The process that has come to where its fault is."""
        deadline = time.monotonic() + 120
        while not self._fault.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return int(self._fault.read_text())

    @property
    def run(self) -> Any:
        """The one that there is in the store."""
        (run,) = self.client.search_runs([self.client.get_experiment_by_name("stocktake").experiment_id])
        return run

    @property
    def run_folder(self) -> Path:
        (folder,) = (self.folder / "workspace" / "runs").glob("*/run.json")
        return folder.parent


@pytest.fixture
def job(sqlite_store: str, tiny_root: Path) -> Job:
    return Job(Path.cwd(), sqlite_store, tiny_root)


# Whole jobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_goes_on(job: Job, tiny_settings: dict[str, Any]) -> None:
    """And all that a job leaves behind: one run, by rank 0, as finetune leaves it."""
    command = (sys.executable, FAULTY, "ddp", "--nproc", "2", "--max_restarts", "1")
    ended = job.wait(job.start(*command, fault="1 0 3 kill"))
    assert ended.code == 0, ended.err
    assert ended.printed == []
    assert re.findall(r"^epoch=(\d)", ended.out, re.M) == ["1", "2", "3"], "it went on from the second epoch"
    assert ended.out.count("bins of task 1-3") == 1, "printed by the launcher"
    assert f"resuming workspace/runs/{job.run_folder.name}" in ended.out

    run = job.run
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert (tags["stage"], tags["world_size"], tags["backend"], tags["nodes"]) == ("ddp", "2", "gloo", "1")
    assert tags["restarts"] == "1"
    assert "failure" not in tags
    params = run.data.params
    assert (params["global_batch"], params["batch_per_process"], params["threads_per_process"]) == ("8", "4", "1")
    assert params["lr_rule"] == LR_RULE
    assert params["training.world_size"] == "2"
    points = job.client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in points] == [1, 2, 3]

    prepared = prepare_data(FinetuneConfig(**tiny_settings, workspace="workspace"))
    test = prepared.manifest.split("test")
    model = load_model(job.run_folder / "artifacts" / "checkpoint")
    shares = predict(model, prepared.photos, test["hash"].tolist(), 8, next(model.parameters()).device)
    kept = pd.read_parquet(job.run_folder / "artifacts" / "evaluation" / "test_predictions.parquet")
    assert ((shares.argmax(1) + 1) == kept["predicted"]).all()
    assert run.data.metrics["test/n"] == len(test) == len(kept)
    assert run.data.metrics["test/accuracy"] == pytest.approx((kept["predicted"] == kept["quantity"]).mean())
    assert (job.run_folder / "models" / "model" / "MLmodel").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message", "code"),
    [
        ("0 0 2 kill", "rank 0 (process {pid}) was killed by SIGKILL (out of memory?)", 1),
        ("1 0 2 mend", "rank 1 (process {pid}) failed: --lr is off: give another", 2),
    ],
)
def test_one_line_names_the_process_that_failed_and_the_run_is_failed(
    fault: str, message: str, code: int, job: Job
) -> None:
    ended = job.wait(job.start(sys.executable, FAULTY, "ddp", "--nproc", "2", fault=fault))
    assert ended.seconds < WITHIN_SECONDS
    message = message.format(pid=ended.pid)
    assert (ended.code, ended.printed) == (code, [f"stocktake: ddp: {message}"])
    assert len(ended.err.splitlines()) == 1, ended.err
    assert (job.run.info.status, job.run.data.tags["failure"]) == ("FAILED", f"ddp: {message}")
    assert json.loads((job.run_folder / "result.json").read_text())["status"] == "FAILED"


@pytest.mark.slow
def test_an_error_of_one_process_ends_torchruns_job_too(job: Job) -> None:
    ended = job.wait(job.start(*TORCHRUN, FAULTY, "train", fault="1 0 2 raise"))
    assert ended.code != 0
    assert ended.seconds < WITHIN_SECONDS
    assert 'raise ValueError("boom")' in ended.err
    assert "ChildFailedError" in ended.err
    assert job.run.info.status in ("FAILED", "KILLED")


@pytest.mark.slow
def test_sigterm_ends_all_processes_and_nothing_listens_beyond_the_loopback(job: Job) -> None:
    process = job.start(sys.executable, FAULTY, "ddp", "--nproc", "2", fault="1 0 2 wait")
    job.fault()
    launcher = psutil.Process(process.pid)
    workers = launcher.children(recursive=True)
    assert len(workers) == 2
    listening = [
        connection.laddr.ip
        for member in (launcher, *workers)
        for connection in member.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}, "the store's clients unpickle what they read"
    process.send_signal(signal.SIGTERM)
    ended = job.wait(process)
    assert ended.code == 128 + signal.SIGTERM
    assert ended.err == ""
    assert not any(worker.is_running() for worker in workers)
    assert job.run.info.status == "KILLED"


# Before anything is started -------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.launcher.api

    monkeypatch.setattr(torch.distributed.launcher.api, "elastic_launch", None)


@pytest.mark.usefixtures("nothing_started")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"batch_size": 7}, "--batch_size 7"),
        ({"batch_size": 4, "nproc": 3}, "--batch_size 4"),
        ({"nnodes": 2}, "--rendezvous host:port"),
        ({"rendezvous": "here"}, "--rendezvous here"),
        ({"rendezvous": "127.0.0.1:99999"}, "--rendezvous 127.0.0.1:99999"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(StocktakeError, match=re.escape(named)):
        ddp(DdpConfig(workspace=str(tmp_path), **settings))


@pytest.mark.usefixtures("nothing_started")
def test_a_port_in_use_is_named_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StocktakeError, match=f"--rendezvous {place}: port .* cannot be used on this machine"):
            launch(["train"], nproc=2, rendezvous=place)


@pytest.mark.usefixtures("nothing_started")
def test_fewer_gpus_than_processes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(StocktakeError, match=r'2 processes on a machine with 1 GPU: .* CUDA_VISIBLE_DEVICES=""'):
        launch(["train"], nproc=2)


def test_machines_that_do_not_come_are_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StocktakeError, match=f"the 2 machines do not meet at 127.0.0.1:{port} .*1/2"):
        launch(["train"], nproc=1, nnodes=2, rendezvous=f"127.0.0.1:{port}", timeout=1)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "STOCKTAKE_LAUNCHER" not in os.environ


# Which process failed first -------------------------------------------------------------------------------------------


def failed(exitcode: int, message: str | None = None, timestamp: int = 0, pid: int = 7) -> SimpleNamespace:
    data = {"message": "<NONE>" if message is None else {"message": message}}
    return SimpleNamespace(exitcode=exitcode, error_file_data=data, timestamp=timestamp, pid=pid)


LOST = "PeerLostError: rank 0 lost the connection to another process (closed)"


@pytest.mark.parametrize(
    ("failures", "rank", "code"),
    [
        ({0: failed(2, LOST), 1: failed(1, "ValueError: boom", 1)}, 1, 1),
        ({0: failed(2, LOST), 1: failed(-signal.SIGKILL, timestamp=1)}, 1, 1),
        ({0: failed(-signal.SIGTERM), 1: failed(3)}, 1, 3),
        ({2: failed(2, LOST), 3: failed(-signal.SIGTERM, timestamp=1)}, 2, 2),
        ({0: failed(2, "StocktakeError: --lr", 5), 1: failed(2, "StocktakeError: --wd", 4)}, 1, 2),
        ({0: failed(-signal.SIGSEGV), 1: failed(1)}, 0, 1),
    ],
)
def test_the_first_failure_is_named_and_not_what_follows(failures: dict[int, Any], rank: int, code: int) -> None:
    error = _first_failure(failures)
    assert f"rank {rank} (process 7)" in str(error)
    assert error.exit_code == code


def test_a_command_for_one_process_refuses_several(
    monkeypatch: pytest.MonkeyPatch, stocktake: Callable[..., Any]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    ended = stocktake("ladder")
    assert (ended.code, ended.err) == (
        2,
        "stocktake: ladder runs in one process, not 2: torchrun is for stocktake train\n",
    )


def test_bins_that_differ_between_machines_are_named(tiny_root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("stocktake.distributed.gather", lambda value: [value, "another"])
    config = FinetuneConfig(
        root=str(tiny_root),
        task="1-3",
        image_size=32,
        split=SplitConfig(fractions=(0.6, 0.2, 0.2), near_duplicate_distance=0),
        workspace=str(tmp_path),
    )
    with pytest.raises(StocktakeError, match=r"holds other bins for rank 1 \(fingerprint another\)"):
        prepare_data(config)
