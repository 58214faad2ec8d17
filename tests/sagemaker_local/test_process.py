"""The local AWS as a process: what it prints, where it listens, what is left of it when it is killed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emulated_aws import PATIENCE, EmulatedAws, eventually, start_emulator
from sagemaker_local import container_init
from sagemaker_local.containers import Container, Machine

pytestmark = pytest.mark.aws


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def is_alive(process: int) -> bool:
    """Whether it runs: a zombie whom nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_prints_what_to_set_and_listens_on_loopback_only(emulator: EmulatedAws) -> None:
    assert emulator.environment.keys() == {
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_DEFAULT_REGION",
        "SAGEMAKER_VALIDATE_ROLE",
        "SAGEMAKER_LOCAL_BUCKET",
        "SAGEMAKER_LOCAL_ROLE",
    }
    port = int(emulator.endpoint.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE):
        pass
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", port))  # an address that only a server on all of them would have
    assert emulator.client("iam").get_role(RoleName=emulator.role.rpartition("/")[2])
    assert emulator.client("sts").get_caller_identity()["Account"] in emulator.role


def test_killed_it_leaves_no_process_and_no_file(state: Path) -> None:
    first = start_emulator(state)
    try:
        script = """
import os, subprocess, time
left = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(os.getpid(), left.pid, flush=True)
time.sleep(600)
"""
        first.train("orphan", script, program="python")
        processes = [int(word) for word in eventually(lambda: first.log("orphan/"))[0].split()]
        assert all(map(is_alive, processes))
    finally:
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    eventually(lambda: not any(map(is_alive, processes)))
    eventually(lambda: not list(state.iterdir()))

    left = state / "stocktake-rehearsal-left"  # by one whose machine went down
    left.mkdir()
    (left / "server.lock").touch()
    second = start_emulator(state)
    try:
        assert len(list(state.iterdir())) == 1  # its own
        other = start_emulator(state)  # leaves what belongs to a living one alone
        other.close()
        assert len(list(state.iterdir())) == 1
        second.train("after", "true")
        assert second.ended("after")["TrainingJobStatus"] == "Completed"
    finally:
        second.close()
    assert list(state.iterdir()) == []
    assert second.process.returncode == 0


def test_a_port_in_use_is_said(stocktake: Callable[..., Any], emulator: EmulatedAws, state: Path) -> None:
    state.mkdir()
    port = emulator.endpoint.rpartition(":")[2]
    ended = stocktake("rehearse", "--port", port, "--state", str(state))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"--port {port} cannot be had: Address already in use" in ended.err
    ended = stocktake("rehearse", "--state", str(state / "none"))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "No such file or directory" in ended.err


def test_without_a_mount_namespace_the_base_folder_is_told(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "us-east-1", False, 1.0, 1.0, {}, numbers=itertools.count(1))
    folder = tmp_path / "1" / "algo-1" / "ml"
    folder.mkdir(parents=True)
    lines: list[str] = []
    command = ["sh", "-c", "echo $SAGEMAKER_BASE_DIR /opt/ml; exit 5"]
    container = Container(machine, command, folder, machine.environment(folder.parent), lines.append)
    assert container.wait(PATIENCE) == 5
    assert lines == [f"{folder} {folder}"]


SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")


@pytest.mark.skipif(os.getuid() != 0 or SYSTEM_PYTHON is None, reason="becomes another user, with a Python for all")
def test_an_ordinary_user_gets_a_namespace_too_where_the_machine_allows_it() -> None:
    nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    if subprocess.run(["unshare", "--user", "--mount", "true"], check=False, **nobody).returncode:
        pytest.skip("this machine forbids user namespaces")
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own folders are closed to others
        root = Path(temporary)
        (root / "host" / "ml").mkdir(parents=True)
        for folder in (root, root / "host", root / "host" / "ml"):
            folder.chmod(0o777)
        script = shutil.copy(container_init.__file__, root / "init.py")
        order = {
            "command": ["sh", "-c", "id -u > /opt/ml/seen; ls / > /dev/null"],
            "folder": str(root / "host" / "ml"),
            "hosts": None,
        }
        command = [SYSTEM_PYTHON, "-I", "-S", script, json.dumps(order)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, **nobody) as container:
            assert container.wait(PATIENCE) == 0
        assert (root / "host" / "ml" / "seen").read_text() == "65534\n"
