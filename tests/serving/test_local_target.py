"""MLflow's own commands and client against this machine's deployment target, with a real store."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException

from stocktake.config.runs import TrackingConfig
from stocktake.registry.registration import register_candidate
from stocktake.serving import endpoints
from stocktake.serving.client import Client
from stocktake.serving.local_target import target_help
from stocktake.serving.predictor import FOLDER, Predictor
from stocktake.serving.pyfunc import SIGNATURE, save_pyfunc
from stocktake.tracking.runs import start_run
from tiny_bins import draw_bin

PHOTOS = [draw_bin(quantity, 720 + quantity) for quantity in (1, 2, 3)]


@pytest.fixture(scope="module")
def saved(exported_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MLflow model of the tiny counter."""
    folder = tmp_path_factory.mktemp("saved")
    return save_pyfunc(Path(shutil.copytree(exported_model, folder / FOLDER)), folder / "model", PHOTOS[0])


@pytest.fixture
def registered(saved: Path, sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store in the environment with versions 1 and 2 of stocktake; 1 is the champion."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_store)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", sqlite_store)
    quiet = TrackingConfig(system_metrics=False)
    for _ in range(2):
        with start_run(quiet, workspace=Path("workspace"), name="classical", tags={"stage": "classical"}) as run:
            run.log_model(saved)
        assert register_candidate(quiet, run.folder, Path("workspace")) is not None
    client = MlflowClient(sqlite_store, sqlite_store)
    assert len(client.search_model_versions("name = 'stocktake'")) == 2
    client.set_registered_model_alias("stocktake", "champion", "1")
    return sqlite_store


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place for endpoints; what a test leaves is deleted."""
    monkeypatch.setenv("STOCKTAKE_STATE", str(tmp_path / "state"))
    yield tmp_path / "state"
    for endpoint in endpoints.list_endpoints():
        endpoints.delete(endpoint.name)


@pytest.fixture
def client(state: Path) -> Any:
    return get_deploy_client("stocktake-local")


def mlflow(*words: str) -> str:
    """`mlflow deployments ...`, as somebody types it."""
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "deployments", *words], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_mlflows_commands_from_create_to_delete(registered: str, state: Path, tmp_path: Path) -> None:
    target = ("-t", "stocktake-local", "--name", "bins")
    said = mlflow("create", *target, "-m", "models:/stocktake@champion", "-C", "port=0", "-C", "workers=2")
    assert "python_function deployment bins is created" in said
    created = endpoints.get("bins")
    assert (created.status, created.version, created.model_uri) == (
        "serving",
        "stocktake/1",
        "models:/stocktake@champion",
    )
    (tmp_path / "bin.jpg").write_bytes(PHOTOS[2])
    (tmp_path / "photos.json").write_text(json.dumps({"photo": [str(tmp_path / "bin.jpg")]}))
    answer = json.loads(mlflow("predict", *target, "-I", str(tmp_path / "photos.json")).splitlines()[-1])
    assert answer["model_version"] == {"0": "stocktake/1"}

    assert "Deployment bins is updated" in mlflow("update", *target, "-m", "models:/stocktake/2")
    assert Client(created.address).predict(PHOTOS[0]).model_version == "stocktake/2"
    assert "Deployment bins is deleted" in mlflow("delete", *target)
    assert not (state / "bins").exists()


@pytest.mark.slow
def test_run_local_and_its_help(saved: Path, state: Path, tmp_path: Path) -> None:
    shown = target_help()
    assert "-C port=0" in shown
    assert "max_queue" in shown
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (tmp_path / "numpy.py").write_text(f"open({str(tmp_path / 'attacked')!r}, 'w')")
    words = ["run-local", "-t", "stocktake-local", "--name", "trial", "-m", str(saved), "-C", f"port={port}"]
    with subprocess.Popen([sys.executable, "-P", "-m", "mlflow", "deployments", *words], cwd=tmp_path) as process:
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            assert Client(f"http://127.0.0.1:{port}").predict(PHOTOS[0]).quantity in (1, 2, 3)
            assert endpoints.list_endpoints() == []
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert not (tmp_path / "attacked").exists()
        finally:
            process.kill()


def test_the_client_describes_updates_and_deletes(client: Any, saved: Path, registered: str, state: Path) -> None:
    created = client.create_deployment("bins", "models:/stocktake/latest", config={"port": "0", "threads": "1"})
    assert created.items() >= {"name": "bins", "flavor": "python_function", "model_version": "stocktake/2"}.items()
    assert client.get_deployment("bins") == created
    assert client.get_deployment(None, endpoint="bins") == created
    assert client.list_deployments() == [created]
    assert Path(created["log"]).exists()
    with pytest.raises(MlflowException, match="there is a deployment bins already") as caught:
        client.create_deployment("bins", str(saved))
    assert caught.value.error_code == "RESOURCE_ALREADY_EXISTS"

    updated = client.update_deployment("bins", config={"workers": "2"})
    assert updated["model_version"] == "stocktake/2"
    assert len(updated["workers"]) == 2
    assert client.update_deployment("bins", str(saved))["model_version"] == Predictor(saved).version
    with pytest.raises(MlflowException, match="host and port cannot change"):
        client.update_deployment("bins", config={"port": "1024"})

    client.delete_deployment("bins")
    client.delete_deployment("bins")  # no error: MLflow's contract
    with pytest.raises(MlflowException, match="there is no endpoint bins") as caught:
        client.get_deployment("bins")
    assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"
    with pytest.raises(MlflowException, match="there is no endpoint bins"):
        client.update_deployment("bins", str(saved))


def test_photos_come_in_every_form(client: Any, saved: Path, tmp_path: Path) -> None:
    client.create_deployment("bins", str(saved), config={"port": 0})
    expected = [count.quantity for count in Predictor(saved).predict(PHOTOS)]
    paths = [tmp_path / f"{number}.jpg" for number in range(3)]
    for path, photo in zip(paths, PHOTOS, strict=True):
        path.write_bytes(photo)
    for inputs in (
        pd.DataFrame({"photo": PHOTOS}),
        pd.DataFrame({"photo": [base64.b64encode(photo).decode() for photo in PHOTOS], "bin": [1, 2, 3]}),
        {"photo": [str(path) for path in paths]},
        PHOTOS,
    ):
        answers = client.predict("bins", inputs)
        assert list(answers["quantity"]) == expected
        assert list(answers.columns) == SIGNATURE.outputs.input_names()
        assert all(sum(shares.values()) == pytest.approx(1) for shares in answers["probabilities"])
    assert list(client.predict(endpoint="bins", inputs={"photo": PHOTOS[0]})["quantity"]) == expected[:1]
    for inputs, said in (
        (pd.DataFrame({"picture": PHOTOS}), "no column 'photo' but picture"),
        ({"picture": PHOTOS}, "must look like"),
        ([PHOTOS[0], b"no photo"], "photo 1: "),
        ([PHOTOS[0], 3], "photo 1 is neither bytes"),
        (["nowhere.jpg"], "photo 0 is neither bytes"),
    ):
        with pytest.raises(MlflowException, match=said):
            client.predict("bins", inputs)


def test_what_is_wrong_is_told_by_name(client: Any, saved: Path, registered: str, state: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ({"model_uri": "models:/stocktake@nobody"}, "nobody"),
        ({"model_uri": "nowhere"}, "there is no model folder nowhere"),
        ({"model_uri": str(tmp_path)}, "holds no exported model"),
        ({"model_uri": str(saved), "config": {"wrokers": "2"}}, "'wrokers' is no setting of a server: they are host"),
        ({"model_uri": str(saved), "config": {"workers": "0"}}, "workers 0"),
        ({"model_uri": str(saved), "flavor": "sklearn"}, "not sklearn"),
        ({"model_uri": str(saved), "endpoint": "other"}, "leave --endpoint other out"),
    ):
        with pytest.raises(MlflowException, match=said):
            client.create_deployment("bins", **arguments)
        assert client.list_deployments() == []
    with pytest.raises(MlflowException, match="is no name of an endpoint"):
        client.create_deployment("../bins", str(saved))
    with pytest.raises(MlflowException, match="which deployment"):
        client.predict(None, PHOTOS)
