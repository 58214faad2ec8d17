"""`stocktake deploy` and `stocktake serve` with real servers, and what follows a failed smoke test."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stocktake.commands.serve import server_settings
from stocktake.models.export import export_model
from stocktake.serving import endpoints
from stocktake.serving.client import Client
from stocktake.serving.predictor import Predictor
from stocktake.serving.settings import ServerSettings
from tiny_bins import draw_bin, tiny_model

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(few_bins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_model(tiny_model("pca_svm", few_bins), folder)
    return folder


@pytest.fixture
def other(exported: Path, tmp_path: Path) -> Path:
    """Another model: the same one, less sure of itself."""
    folder = Path(shutil.copytree(exported, tmp_path / "other"))
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description | {"calibration": {"temperature": 3.0}}))
    return folder


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with an empty place for endpoints; what a test leaves is deleted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STOCKTAKE_STATE", str(tmp_path / "state"))
    yield tmp_path / "state"
    for endpoint in endpoints.list_endpoints():
        endpoints.delete(endpoint.name)


@pytest.fixture
def deploy(stocktake: Callable[..., Any], tiny_root: Path, state: Path) -> Callable[..., Any]:
    """deploy("--model", ...): of the tiny root, on any free port."""
    root = (
        "--root",
        str(tiny_root),
        "--task",
        "1-3",
        "--split.fractions",
        "[0.6,0.2,0.2]",
        "--split.near_duplicate_distance",
        "0",
    )

    def run(*words: str) -> Any:
        return stocktake("deploy", *root, "--server.port", "0", "--server.threads", "1", *words)

    return run


def test_a_model_is_deployed_updated_and_rolled_back(deploy: Callable[..., Any], exported: Path, other: Path) -> None:
    ended = deploy("--model", str(exported), "--server.page", "true")
    assert ended.code == 0, ended.err
    first = endpoints.get("bins")
    assert f"on {first.address}, generation 1" in ended.out
    assert "smoke test: 16 photos answered as by the model itself" in ended.out
    assert f"page:   {first.address}/\n" in ended.out
    assert f"{first.address}/invocations" in ended.out
    assert Client(first.address).predict(draw_bin(1, 1)).model_version == Predictor(exported).version

    ended = deploy("--model", str(other), "--smoke", "4")
    assert ended.code == 0, ended.err
    second = endpoints.get("bins")
    assert (second.generation, second.pid, second.version) == (2, first.pid, Predictor(other).version)
    assert second.settings["page"] is True

    # photos larger than what it takes: the server refuses what the model itself can count
    failing = ("--model", str(exported), "--server.max_request_bytes", "1024")
    ended = deploy(*failing)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "the smoke test failed: 16 of 16 photos" in ended.err
    assert "refused: the body has more than 1024 bytes" in ended.err
    assert f"the update is undone: bins serves {second.version} as before" in ended.err
    back = endpoints.get("bins")
    assert (back.status, back.version, back.settings, back.model_uri) == (
        "serving",
        second.version,
        second.settings,
        str(other),
    )
    assert Client(back.address).predict(draw_bin(1, 1)).model_version == second.version

    ended = deploy(*failing, "--on_failure", "keep")
    assert ended.code == 2
    assert "bins serves it nevertheless" in ended.err
    assert endpoints.get("bins").version == first.version


def test_a_new_endpoint_that_fails_its_smoke_test_is_left_to_look_into(
    deploy: Callable[..., Any], exported: Path
) -> None:
    ended = deploy("--model", str(exported), "--name", "trial", "--server.max_request_bytes", "1024")
    assert ended.code == 2
    assert "serves it nevertheless" in ended.err
    assert "mlflow deployments delete -t stocktake-local --name trial" in ended.err
    assert endpoints.get("trial").status == "serving"


def test_what_is_wrong_is_told_before_anything_is_deployed(
    deploy: Callable[..., Any], exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("wrokers: 2\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    for words, said in (
        (["--model", "nowhere"], "nowhere is no model folder"),
        (["--model", str(exported), "--settings", "none.yaml"], "--settings none.yaml cannot be read"),
        (["--model", str(exported), "--settings", "bad.yaml"], "--settings bad.yaml: 'wrokers' is no setting"),
        (["--model", str(exported), "--settings", "list.yaml"], "must hold settings"),
        (["--model", str(exported), "--settings", "deep.yaml"], "--settings deep.yaml cannot be read"),
        (["--model", str(exported), "--server.workers", "0"], "--server: workers 0"),
        (["--model", str(exported), "--name", "a/b"], "'a/b' is no name of an endpoint"),
        (["--model", str(exported), "--smoke", "-1"], "--smoke -1"),
    ):
        ended = deploy(*words)
        assert ended.code == 2
        assert said in ended.err
        assert endpoints.list_endpoints() == []


def test_the_shipped_settings_are_settings() -> None:
    shipped = server_settings(str(REPOSITORY / "deploy" / "local.yaml"), {"port": 0})
    settings = ServerSettings.read(shipped)
    assert (settings.port, settings.page, settings.host) == (0, True, "127.0.0.1")


def test_serve_answers_in_the_foreground(exported: Path, state: Path, tmp_path: Path) -> None:
    words = ["serve", "--model", str(exported), "--server.port", "0"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "stocktake", *words], stderr=log, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (address := re.search(r"on (http://[\d.:]+)", (tmp_path / "log").read_text())):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with urllib.request.urlopen(f"{address[1]}/ping", timeout=60) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
