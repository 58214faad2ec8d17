"""Run folders that somebody else has written: `sync` must neither send credentials nor files of this machine."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from stocktake.commands.sync import sync
from stocktake.config.runs import SyncConfig, TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.known_stores import FILE
from stocktake.tracking.local_store import LocalRun
from stocktake.tracking.runs import start_run

OFFLINE = TrackingConfig(offline=True, system_metrics=False)
WORKSPACE = Path("workspace")


class _Listener(BaseHTTPRequestHandler):
    """Answers as a tracking server in good health would, and keeps the credentials it gets."""

    credentials: list[str | None]

    def do_GET(self) -> None:
        self.credentials.append(self.headers.get("Authorization"))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def attacker() -> Iterator[tuple[str, list[str | None]]]:
    """The address of a listener, and what it was sent."""
    handler = type("Handler", (_Listener,), {"credentials": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.credentials
    server.shutdown()
    thread.join()
    server.server_close()


def _offline_run(workspace: Path = WORKSPACE) -> Path:
    with start_run(OFFLINE, workspace=workspace, name="a", tags={}) as run:
        run.log_metrics({"a": 1.0})
    return run.folder


def _edit(folder: Path, **values: object) -> None:
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | values))


def test_credentials_go_to_known_addresses_only(
    attacker: tuple[str, list[str | None]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri, credentials = attacker
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    elsewhere = _offline_run(tmp_path / "elsewhere")
    _edit(elsewhere, tracking_uri=uri)
    inode = elsewhere.parent.stat().st_ino
    (elsewhere.parent / FILE).write_text(f"{inode} {uri}\n")
    shutil.copytree(elsewhere.parent, WORKSPACE / "runs")  # the whole folder of runs, with its list of addresses
    with pytest.raises(StocktakeError, match="1 of the runs"):
        sync(SyncConfig())
    assert credentials == []
    sync(SyncConfig(tracking=TrackingConfig(uri=uri)))  # given by the user
    assert credentials
    assert credentials[0] is not None


def test_a_run_of_this_workspace_goes_where_it_was_meant_to_go(sqlite_store: str) -> None:
    config = TrackingConfig(uri=sqlite_store, offline=True, system_metrics=False)
    with start_run(config, workspace=WORKSPACE, name="a", tags={}):
        pass
    assert sync(SyncConfig())["uploaded"] == 1


def test_links_are_not_followed(client: Any, model_folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "private"
    secret.mkdir()
    (secret / "id_rsa").write_text("s3cret")
    (secret / "params.json").write_text('{"p": "s3cret"}')
    with start_run(OFFLINE, workspace=WORKSPACE, name="a", tags={}) as run:
        (run.artifacts / "own.txt").write_text("own")
        run.log_model(model_folder)
    (run.artifacts / "file").symlink_to(secret / "id_rsa")
    (run.artifacts / "folder").symlink_to(secret)
    (run.folder / "models" / "model" / "key").symlink_to(secret / "id_rsa")
    (run.folder / "params.json").symlink_to(secret / "params.json")
    (WORKSPACE / "runs" / "linked").symlink_to(_offline_run(tmp_path / "other"))
    assert sync(SyncConfig())["uploaded"] == 1
    (stored,) = client.search_runs([client.get_experiment_by_name("stocktake").experiment_id])
    assert [file.path for file in client.list_artifacts(stored.info.run_id)] == ["own.txt"]
    assert stored.data.params == {}
    uploaded = [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()]
    assert any(path.name == "weights.bin" for path in uploaded)
    assert not [path for path in uploaded if b"s3cret" in path.read_bytes()]


@pytest.mark.parametrize(
    "values", [{"parent": "../../x"}, {"parent": ".."}, {"models": ["/etc"]}, {"models": ["../x"]}]
)
def test_names_that_lead_out_of_the_folder_are_refused(values: dict[str, object]) -> None:
    folder = _offline_run()
    _edit(folder, **values)
    with pytest.raises(StocktakeError, match=str(folder)):
        LocalRun.open(folder)
