"""The emulator as a process: what it prints, where it listens, what is left of it when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from emulated_aws import PATIENCE, EmulatedAws, eventually
from sagemaker_local import container_init
from sagemaker_local.containers import Container, start_all
from sagemaker_local.context import EmulatorContext
from sagemaker_local.model_servers import HOST, reserve_port

pytestmark = pytest.mark.aws


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def is_alive(process: int) -> bool:
    """False also for a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_prints_variables_and_listens_on_loopback_only(emulator: EmulatedAws) -> None:
    assert emulator.environment.keys() == {
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_DEFAULT_REGION",
        "SAGEMAKER_VALIDATE_ROLE",
        "SAGEMAKER_LOCAL_BUCKET",
        "SAGEMAKER_LOCAL_ROLE",
    }
    assert "-P" in emulator.process.args, "modules of the current folder are not imported"
    port = int(emulator.endpoint.rpartition(":")[2])
    with socket.create_connection((HOST, port), timeout=PATIENCE):
        pass
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", port))  # an address that only a server on all of them would have
    assert emulator.client("iam").get_role(RoleName=emulator.role.rpartition("/")[2])
    assert emulator.client("sts").get_caller_identity()["Account"] in emulator.role


@pytest.mark.slow
def test_killed_it_leaves_no_process_and_no_file(state: Path) -> None:
    start = partial(EmulatedAws.start, "--state", str(state), "--grace", "1")
    first = start()
    try:
        script = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
        first.train("orphan", script, program="python")
        processes = [int(word) for word in eventually(lambda: first.log("orphan/"))[0].split()]
        assert all(map(is_alive, processes))
    finally:
        first.process.send_signal(signal.SIGKILL)
        first.close()
    eventually(lambda: not any(map(is_alive, processes)))
    eventually(lambda: not list(state.iterdir()))

    second = start()
    try:
        # A job that does not end is killed with all its processes, those of another session among them.
        script = "trap '' TERM; setsid sleep 600 & echo $$ $!; wait"
        second.train("endless", script, StoppingCondition={"MaxRuntimeInSeconds": 1})
        job = second.ended("endless")
        assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")
        assert not any(is_alive(int(word)) for word in second.log("endless/")[0].split())
    finally:
        second.close()
    assert list(state.iterdir()) == []
    assert second.process.returncode == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--port", "{port}"], "--port"),
        (["--state", "{state}/none"], "--state"),
        (["--port", "70000"], "--port"),
        (["--image", "no-command"], "--image"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(
    emulator: EmulatedAws, state: Path, options: list[str], name: str
) -> None:
    port = emulator.endpoint.rpartition(":")[2]
    words = [word.format(port=port, state=state) for word in ["--state", "{state}", *options]]
    command = [sys.executable, "-m", "sagemaker_local", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert name in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_the_help_has_examples() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "sagemaker_local", "--help"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "sagemaker-local --port" in ended.stdout
    assert "--image" in ended.stdout


@pytest.fixture
def context(tmp_path: Path) -> EmulatorContext:
    """Of an emulator on a machine that allows no mount namespaces."""
    return EmulatorContext(tmp_path, "us-east-1", "http://127.0.0.1:1", has_namespaces=False, grace=1.0)


def container(context: EmulatorContext, folder: Path, script: str, on_line: Callable[[str], None]) -> Container:
    environment = context.container_environment(folder.parent, {})
    return Container(context, ["sh", "-c", script], folder, environment, on_line)


def test_without_a_mount_namespace_the_base_folder_is_a_variable(context: EmulatorContext, tmp_path: Path) -> None:
    folder = tmp_path / "1" / "algo-1" / "ml"
    folder.mkdir(parents=True)
    lines: list[str] = []
    started = container(context, folder, "echo $SAGEMAKER_BASE_DIR /opt/ml; exit 5", lines.append)
    assert started.wait(PATIENCE) == 5
    assert lines == [f"{folder} {folder}"]


def test_a_host_that_cannot_be_started_ends_the_others(context: EmulatorContext, tmp_path: Path) -> None:
    folder = tmp_path / "1" / "algo-1" / "ml"
    folder.mkdir(parents=True)
    lines: list[str] = []

    def start_first() -> Container:
        first = container(context, folder, "echo $$; exec sleep 600", lines.append)
        eventually(lambda: lines)
        return first

    missing = tmp_path / "1" / "algo-2" / "ml"
    with pytest.raises(FileNotFoundError):
        start_all([start_first, lambda: container(context, missing, "true", lines.append)], grace=1.0)
    assert not is_alive(int(lines[0]))
    assert not context.running


def test_a_reserved_port_is_kept_from_others_and_taken_by_its_server() -> None:
    with reserve_port() as reservation:
        port = reservation.getsockname()[1]
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind((HOST, port))
        with socket.create_server((HOST, port)) as server, socket.create_connection((HOST, port)):
            assert server.getsockname()[1] == port


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
        with subprocess.Popen(command, stdin=subprocess.PIPE, **nobody) as process:
            assert process.wait(PATIENCE) == 0
        assert (root / "host" / "ml" / "seen").read_text() == "65534\n"
