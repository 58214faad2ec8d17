"""`serve` as SageMaker starts it and as people do: real processes, signals, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from serving_process import eventually, head
from stocktake.errors import StocktakeError
from stocktake.serving.client import Client
from stocktake.serving.deployment import process_start
from stocktake.serving.predictor import Predictor
from stocktake.serving.serve import deployment_of
from stocktake.serving.settings import ServerSettings
from tiny_bins import draw_bin

PHOTO = draw_bin(3, 710)
COMMAND = [sys.executable, "-P", "-m", "stocktake.serving.serve"]


class Served:
    """A running `serve` in a folder."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.log = folder / "log.txt"
        own = {name: value for name, value in os.environ.items() if not name.startswith(("STOCKTAKE_", "SAGEMAKER_"))}
        own |= {"STOCKTAKE_PORT": "0", "STOCKTAKE_THREADS": "1"} | environment
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*COMMAND, *arguments], cwd=folder, env=own, stdout=log, stderr=log)

    @property
    def address(self) -> str:
        """Once it serves."""
        return str(self.wait_for(r"serving \S+ on (http://\S+)\n")[1])

    @property
    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def wait_for(self, pattern: str) -> re.Match[str]:
        """A text in its log."""
        found: re.Match[str] = eventually(lambda: re.search(pattern, self.log.read_text()), pattern)
        return found


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """serve("MODEL", STOCKTAKE_WORKERS="2"): in a folder with somebody else's files, which must not run as code."""
    for name in ("numpy", "starlette", "openvino", "stocktake"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'attacked')!r}, 'w')")
    started: list[Served] = []

    def start(*arguments: str, **environment: str) -> Served:
        started.append(Served(tmp_path, *arguments, **environment))
        return started[-1]

    yield start
    for served in started:
        served.process.kill()
        served.process.wait()
    assert not (tmp_path / "attacked").exists()


def test_as_sagemaker_starts_it(serve: Callable[..., Served], exported_model: Path) -> None:
    """By variables alone. SIGTERM ends all processes with 0, after the requests that have begun."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free_port = listener.getsockname()[1]
    served = serve(
        STOCKTAKE_MODEL_DIR=str(exported_model),
        STOCKTAKE_MODEL_VERSION="stocktake/7",
        STOCKTAKE_HOST="0.0.0.0",
        STOCKTAKE_PORT="",
        SAGEMAKER_BIND_TO_PORT=str(free_port),
        SAGEMAKER_MODEL_SERVER_WORKERS="2",
        SAGEMAKER_BATCH="true",
    )
    assert served.address == f"http://127.0.0.1:{free_port}"
    bad = urllib.request.Request(f"{served.address}/invocations", b"no photo", {"Content-Type": "image/jpeg"})
    with urllib.request.urlopen(bad, timeout=30) as answer:
        assert json.load(answer)["error"], "another status than 200 would end a batch transform job"
    prediction = Client(served.address).predict(PHOTO)
    (own,) = Predictor(exported_model).predict([PHOTO])
    assert (prediction.quantity, prediction.model_version) == (own.quantity, "stocktake/7")
    workers = served.workers
    assert len(workers) == 2
    with socket.create_connection(("127.0.0.1", free_port), timeout=60) as slow:
        slow.sendall(head(len(PHOTO)) + PHOTO[:100])
        Client(served.address).predict(PHOTO)  # by now the other one's head has been read
        served.process.terminate()
        time.sleep(0.5)
        assert served.process.poll() is None
        slow.sendall(PHOTO[100:])
        assert slow.makefile("rb").read().startswith(b"HTTP/1.1 200")
    assert served.process.wait(60) == 0
    assert not [worker for worker in workers if process_start(worker.pid)]


def test_workers_do_not_outlive_a_killed_supervisor(serve: Callable[..., Served], exported_model: Path) -> None:
    served = serve(str(exported_model), STOCKTAKE_WORKERS="2")
    assert served.address
    workers = served.workers
    assert all("-P" in worker.cmdline() for worker in workers)
    served.process.kill()
    served.process.wait()
    eventually(lambda: not any(process_start(worker.pid) for worker in workers), "the end of the workers")


def test_a_reload_serves_what_the_folder_holds_now(
    serve: Callable[..., Served], exported_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported_model, tmp_path / "model"))
    served = serve("model")
    client = Client(served.address)
    before = client.predict(PHOTO).model_version
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text("{")
    served.process.send_signal(signal.SIGHUP)
    served.wait_for("is served as before")
    assert client.predict(PHOTO).model_version == before
    (folder / "model.json").write_text(text + "\n")
    served.process.send_signal(signal.SIGHUP)
    eventually(lambda: client.predict(PHOTO).model_version != before, "the other version")
    assert client.predict(PHOTO).model_version == Predictor(folder).version


@pytest.mark.parametrize(
    ("model", "code", "reason"),
    [("nowhere", 2, "nowhere"), ("MODEL", 2, "port TAKEN is in use"), (".", 1, "holds no exported model")],
)
def test_a_start_that_fails_says_why(
    model: str, code: int, reason: str, serve: Callable[..., Served], exported_model: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = str(listener.getsockname()[1])
        served = serve(model.replace("MODEL", str(exported_model)), STOCKTAKE_PORT="0" if model == "." else taken)
        assert served.process.wait(60) == code
    assert reason.replace("TAKEN", taken) in served.log.read_text()
    assert "Traceback" not in served.log.read_text()


def test_it_starts_without_what_a_container_lacks() -> None:
    heavy = ("torch", "mlflow", "jsonargparse", "pandas", "numpy", "openvino", "starlette", "docstring_parser")
    code = f"import sys, stocktake.serving.serve; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_help_explains_every_setting() -> None:
    shown = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"STOCKTAKE_{setting.upper()}" in shown for setting in ServerSettings.__dataclass_fields__)
    assert "Processes that share the address" in " ".join(shown.split())


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    environment = {"STOCKTAKE_PORT": "1", "SAGEMAKER_BIND_TO_PORT": "2", "SAGEMAKER_MODEL_SERVER_WORKERS": "2"}
    assert deployment_of(str(tmp_path), environment).server.port == 1
    del environment["STOCKTAKE_PORT"]
    server = deployment_of(None, environment | {"STOCKTAKE_MODEL_DIR": str(tmp_path)}).server
    assert (server.port, server.workers) == (2, 2)
    assert server.threads == max(1, len(os.sched_getaffinity(0)) // 2)
    with pytest.raises(StocktakeError, match=r"^SAGEMAKER_MODEL_SERVER_WORKERS: workers x"):
        deployment_of(None, {"SAGEMAKER_MODEL_SERVER_WORKERS": "x"})
    with pytest.raises(StocktakeError, match="no model folder /opt/ml/model"):
        deployment_of(None, {})


def test_a_message_and_its_newline_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers share the log: a line in two writes gets another process's line into its middle."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    log, stderr = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps writes apart
    with log, stderr:
        code = "from stocktake.serving import supervisor as s; s.configure_logging(); s.log.info('it is damaged')"
        subprocess.run([sys.executable, "-P", "-c", code], stderr=stderr, check=True, timeout=60)
        stderr.close()
        written = log.recv(65_536)
        assert written.endswith(b"\n")
        assert b"damaged" in written
