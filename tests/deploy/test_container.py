"""The serving image without a Docker engine: its steps and its start command in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from stocktake.models.export import export_model
from stocktake.serving.predictor import Predictor
from stocktake.serving.pyfunc import save_pyfunc
from tiny_bins import draw_bin, tiny_model

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = (REPOSITORY / "deploy" / "images" / "serving" / "Dockerfile").read_text()
LOCK = REPOSITORY / "deploy" / "images" / "serving" / "requirements.lock"
LARGEST = 400 * 2**20


@dataclass(frozen=True)
class Installed:
    """The image's environment."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def run(self, code: str, *arguments: str) -> str:
        command = [self.python, "-I", "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """What the Dockerfile's RUN lines make: the locked requirements and the project's wheel, nothing else."""
    uv = shutil.which("uv") or str(REPOSITORY / ".uv" / "bin" / "uv")
    folder = tmp_path_factory.mktemp("image")
    built, venv = folder / "wheels", folder / "venv"
    environment = {**os.environ, "VIRTUAL_ENV": str(venv), "UV_LINK_MODE": "copy"}
    for command in (
        [uv, "build", "--quiet", "--wheel", "--out-dir", str(built), str(REPOSITORY)],
        [uv, "venv", "--quiet", "--python", sys.executable, str(venv)],
        [uv, "pip", "sync", "--quiet", "--require-hashes", str(LOCK)],
        [uv, "pip", "install", "--quiet", "--no-deps", "--no-index", "--find-links", str(built), "stocktake"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return Installed(venv)


@pytest.fixture(scope="module")
def model_folder(few_bins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model where SageMaker unpacks it: /opt/ml/model."""
    folder = tmp_path_factory.mktemp("container")
    export_model(tiny_model("pca_svm", few_bins), folder / "counter")
    return save_pyfunc(folder / "counter", folder / "opt" / "ml" / "model", draw_bin(1, 0))


def setting(name: str) -> str:
    """What the Dockerfile's ENV gives a variable."""
    found = re.search(rf"\b{name}=(\S+)", DOCKERFILE)
    assert found, f"the Dockerfile sets no {name}"
    return found[1]


@pytest.mark.slow
def test_the_environment_is_small_and_has_no_training_library(installed: Installed) -> None:
    size = sum(path.lstat().st_size for path in installed.folder.rglob("*") if not path.is_symlink())
    assert size <= LARGEST, f"{size / 2**20:.0f} MB"
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    assert installed.run(code, "torch", "torchvision", "sklearn", "scipy", "pyarrow", "matplotlib") == "[]"


@pytest.mark.slow
def test_mlflow_loads_the_model_there(installed: Installed, model_folder: Path, tmp_path: Path) -> None:
    photo = draw_bin(2, 7)
    (tmp_path / "photo.jpg").write_bytes(photo)
    code = (
        "import sys, pathlib, pandas as pd, mlflow.pyfunc\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "row = model.predict(pd.DataFrame({'photo': [pathlib.Path(sys.argv[2]).read_bytes()]})).iloc[0]\n"
        "print(int(row.quantity), round(float(row.confidence), 4))\n"
    )
    (expected,) = Predictor(model_folder).predict([photo])
    said = installed.run(code, str(model_folder), str(tmp_path / "photo.jpg"))
    assert said == f"{expected.quantity} {round(expected.confidence, 4)}"


@pytest.mark.slow
def test_it_starts_as_sagemaker_starts_it_and_ends_when_told(
    installed: Installed, model_folder: Path, tmp_path: Path
) -> None:
    assert re.search(r'^CMD \["serve"\]$', DOCKERFILE, re.MULTILINE)
    assert setting("STOCKTAKE_MODEL_DIR") == "/opt/ml/model"
    port = _free_port()
    environment = {
        "PATH": f"{installed.folder / 'bin'}:/usr/bin:/bin",
        "PYTHONUNBUFFERED": setting("PYTHONUNBUFFERED"),
        "STOCKTAKE_MODEL_DIR": str(model_folder),  # stands for /opt/ml/model
        "STOCKTAKE_HOST": "127.0.0.1",  # the image's 0.0.0.0 is for within a container
        "SAGEMAKER_BIND_TO_PORT": str(port),
    }
    log = tmp_path / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(["serve"], env=environment, cwd="/", stdout=file, stderr=file)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/ping", server, log)
        photo = draw_bin(3, 11)
        request = urllib.request.Request(f"{address}/invocations", photo, {"Content-Type": "image/jpeg"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            said = json.load(answer)
        (expected,) = Predictor(model_folder).predict([photo])
        assert said["quantity"] == expected.quantity
        assert said["confidence"] == pytest.approx(expected.confidence, abs=1e-4)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


@pytest.mark.slow
def test_what_needs_more_is_told_there(installed: Installed) -> None:
    command = [str(installed.folder / "bin" / "stocktake"), "train", "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=installed.folder)
    assert done.returncode == 2
    assert "train needs " in done.stderr
    assert "pip install 'stocktake[serving,training]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_image_runs_as_an_ordinary_user() -> None:
    lines = DOCKERFILE.splitlines()
    assert "USER stocktake" in lines
    assert lines.index("USER stocktake") < lines.index('CMD ["serve"]')
    assert setting("STOCKTAKE_HOST") == "0.0.0.0"


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
