"""Two machines: network namespaces joined by a veth pair, a `stocktake ddp` and a workspace of its own in each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest

from tiny_bins import PLAIN_BACKBONE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = "29611"


@dataclass(frozen=True)
class Machine:
    """A network namespace with one address."""

    namespace: str
    interface: str

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.namespace, *words], check=True, capture_output=True, text=True)

    def cut_off(self) -> None:
        """Nothing comes in or goes out any more, and nobody is told."""
        self.ip("link", "set", self.interface, "down")


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines that reach each other, made and removed here; skipped only outside of CI, without root or `ip`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        give_up = pytest.fail if "CI" in os.environ else pytest.skip
        give_up("network namespaces need root and `ip` (iproute2)")
    made = tuple(
        Machine(f"stocktake-{os.getpid()}-{number}", f"st{os.getpid() % 100000}n{number}") for number in (0, 1)
    )
    try:
        for machine in made:
            done = subprocess.run(["ip", "netns", "add", machine.namespace], capture_output=True, text=True)
            assert done.returncode == 0, f"network namespaces are not allowed here: {done.stderr.strip()}"
        one, other = made
        ends = ["type", "veth", "peer", "name", other.interface, "netns", other.namespace]
        done = subprocess.run(
            ["ip", "link", "add", one.interface, "netns", one.namespace, *ends], capture_output=True, text=True
        )
        assert done.returncode == 0, f"veth pairs are not allowed here: {done.stderr.strip()}"
        for machine, address in zip(made, ADDRESSES, strict=True):
            machine.ip("addr", "add", f"{address}/24", "dev", machine.interface)
            machine.ip("link", "set", machine.interface, "up")
            machine.ip("link", "set", "lo", "up")
        yield one, other
    finally:
        for machine in made:
            subprocess.run(["ip", "netns", "del", machine.namespace], capture_output=True)


@pytest.fixture
def start(
    machines: tuple[Machine, Machine], tiny_root: Path, sqlite_store: str, tmp_path: Path
) -> Iterator[Callable[..., list[subprocess.Popen[bytes]]]]:
    """start("--epochs", "2"): the same command on both machines; those that still run at the end are killed."""
    processes: list[subprocess.Popen[bytes]] = []

    # what another test's job has left in this process is not the machines'
    own = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}

    def begin(*more: str) -> list[subprocess.Popen[bytes]]:
        for node, machine in enumerate(machines):
            words = [
                "--nnodes",
                "2",
                "--nproc",
                "1",
                "--node_rank",
                str(node),
                "--rendezvous",
                f"{ADDRESSES[0]}:{PORT}",
            ]
            words += ["--root", str(tiny_root), "--task", "1-3", "--image_size", "32", "--batch_size", "16"]
            words += ["--backbone", PLAIN_BACKBONE, "--weights", "none", "--precision", "fp32"]
            words += [
                "--split.fractions",
                "[0.6,0.2,0.2]",
                "--split.near_duplicate_distance",
                "0",
                "--training.patience",
                "1000",
            ]
            words += ["--workspace", str(tmp_path / f"machine-{node}"), "--tracking.uri", sqlite_store]
            words += ["--tracking.system_metrics", "false", *more]
            command = [sys.executable, "-m", "stocktake", "ddp", *words]
            with (tmp_path / f"log-{node}.txt").open("wb") as log:
                inside = ["ip", "netns", "exec", machine.namespace, *command]
                processes.append(subprocess.Popen(inside, stdout=log, stderr=log, env=own))
        return processes

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def logs(folder: Path) -> str:
    return "".join(f"--- machine {node}\n{(folder / f'log-{node}.txt').read_text()}" for node in (0, 1))


def the_run(sqlite_store: str) -> mlflow.entities.Run:
    client = mlflow.MlflowClient(sqlite_store, sqlite_store)
    experiment = client.get_experiment_by_name("stocktake")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def test_two_machines_train_one_run(
    start: Callable[..., list[subprocess.Popen[bytes]]], sqlite_store: str, tmp_path: Path
) -> None:
    for process in start("--epochs", "1"):
        assert process.wait(300) == 0, logs(tmp_path)
    run = the_run(sqlite_store)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["world_size"], run.data.tags["nodes"], run.data.tags["backend"]) == ("2", "2", "gloo")
    assert run.data.metrics["test/n"] == 18
    assert "epoch=" not in (tmp_path / "log-1.txt").read_text()
    assert not list((tmp_path / "machine-1" / "runs").glob("*"))  # the run is the first machine's


def test_a_machine_that_is_cut_off_ends_the_job(
    start: Callable[..., list[subprocess.Popen[bytes]]],
    machines: tuple[Machine, Machine],
    sqlite_store: str,
    tmp_path: Path,
) -> None:
    processes = start("--epochs", "2000", "--training.schedule", "constant", "--training.collective_timeout", "10")
    deadline = time.monotonic() + 200
    while "epoch=2 " not in (tmp_path / "log-0.txt").read_text():
        assert time.monotonic() < deadline, logs(tmp_path)
        assert all(process.poll() is None for process in processes), logs(tmp_path)
        time.sleep(0.2)
    machines[1].cut_off()
    began = time.monotonic()
    for process in processes:
        assert process.wait(120) != 0, logs(tmp_path)
    assert time.monotonic() - began < 90
    run = the_run(sqlite_store)
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"].startswith("ddp: rank 0 "), json.dumps(dict(run.data.tags), indent=1)
    for node in (0, 1):
        log = (tmp_path / f"log-{node}.txt").read_text().splitlines()
        assert [line[:20] for line in log if line.startswith("stocktake: ")] == [f"stocktake: ddp: rank {node}"[:20]]
