"""Endpoints of this machine with real processes: found again, updated under load, killed, revived, deleted."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from stocktake.data.images import PhotoError
from stocktake.errors import StocktakeError
from stocktake.serving import deployment, endpoints
from stocktake.serving.client import Client
from stocktake.serving.endpoints import Endpoint
from stocktake.serving.predictor import Prediction, Predictor
from tiny_bins import draw_bin

PHOTO = draw_bin(2, 700)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place for endpoints; what a test leaves is deleted."""
    monkeypatch.setenv("STOCKTAKE_STATE", str(tmp_path / "state"))
    yield tmp_path / "state"
    for endpoint in endpoints.list_endpoints():
        endpoints.delete(endpoint.name)


@pytest.fixture
def other_folder(exported_model: Path, tmp_path: Path) -> Path:
    """Another model: the same one, less sure of itself."""
    folder = Path(shutil.copytree(exported_model, tmp_path / "other"))
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description | {"calibration": {"temperature": 3.0}}))
    return folder


@pytest.fixture
def broken_folder(exported_model: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(exported_model, tmp_path / "broken"))
    (folder / "model.onnx").write_bytes(b"no graph")
    return folder


def create(folder: Path, name: str = "bins", **settings: Any) -> Endpoint:
    return endpoints.create(name, folder, model_uri=str(folder), settings={"port": 0, "threads": 1, **settings})


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return value


def ended(pids: tuple[int, ...]) -> bool:
    return not any(deployment.process_start(pid) for pid in pids)


def test_it_outlives_the_call_and_is_found_by_another_process(state: Path, exported_model: Path) -> None:
    created = create(exported_model, workers=2)
    assert (created.status, created.generation, created.error) == ("serving", 1, None)
    assert created.version == Predictor(exported_model).version
    assert len(created.workers) == 2
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / "bins").stat().st_mode & 0o777 == 0o700
    assert all("-P" in psutil.Process(pid).cmdline() for pid in (created.pid, *created.workers))

    code = "from stocktake.serving import endpoints; print(endpoints.get('bins').address, endpoints.get('bins').pid)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == [created.address, str(created.pid)]
    assert endpoints.list_endpoints() == [created]

    answer = Client(created.address).predict(PHOTO)
    (own,) = Predictor(exported_model).predict([PHOTO])
    assert (answer.quantity, answer.model_version) == (own.quantity, own.model_version)
    assert answer.probabilities == pytest.approx(own.probabilities, abs=1e-4)
    several = list(Client(created.address).predict_all([PHOTO, b"no photo", PHOTO]))
    assert several[0] == several[2]
    assert isinstance(several[1], PhotoError)

    endpoints.delete("bins")
    assert created.pid
    assert ended((created.pid, *created.workers))
    assert not (state / "bins").exists()
    assert endpoints.list_endpoints() == []
    with pytest.raises(StocktakeError, match=r"there is no endpoint bins .*there are: none"):
        endpoints.get("bins")
    with pytest.raises(StocktakeError, match="does not answer"):
        Client(created.address).predict(PHOTO)


def test_a_full_server_is_asked_again(state: Path, exported_model: Path) -> None:
    created = create(exported_model, max_queue=1)
    client = Client(created.address)

    def was_full() -> bool:
        answers = list(client.predict_all([PHOTO] * 8, at_once=8))
        assert [type(answer) for answer in answers] == [Prediction] * 8
        return '"status": 503' in created.log.read_text()

    wait_for(was_full, "a request that it had no room for")


class Load:
    """Four clients that ask without a pause, two of them over one connection each."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._place = (parts.hostname or "", parts.port)
        self._ending = threading.Event()
        self.answered: list[list[str]] = [[], [], [], []]
        self.faults: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(4)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        kept = http.client.HTTPConnection(*self._place, timeout=60)
        while not self._ending.is_set() and not self.faults:
            connection = kept if number < 2 else http.client.HTTPConnection(*self._place, timeout=60)
            headers = {"Content-Type": "image/jpeg"} | ({} if number < 2 else {"Connection": "close"})
            try:
                connection.request("POST", "/invocations", PHOTO, headers)
                answer = connection.getresponse()
                body = json.loads(answer.read())
                if answer.status != 200:
                    self.faults.append(f"client {number}: status {answer.status}: {body}")
                else:
                    self.answered[number].append(body["model_version"])
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.faults.append(f"client {number}: {error!r}")
            finally:
                if number >= 2:
                    connection.close()

    def go_on(self, version: str, requests: int = 15) -> None:
        """Until every client has had so many further answers of this version."""
        before = [len(versions) for versions in self.answered]

        def enough() -> bool:
            later = [versions[start:] for versions, start in zip(self.answered, before, strict=True)]
            return bool(self.faults) or all(versions.count(version) >= requests for versions in later)

        wait_for(enough, f"answers of {version}")

    def end(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(60)
        assert self.faults == []


def test_an_update_drops_no_request_and_a_failing_one_changes_nothing(
    state: Path, exported_model: Path, other_folder: Path, broken_folder: Path
) -> None:
    first, second = Predictor(exported_model).version, Predictor(other_folder).version
    created = create(exported_model, workers=2)
    load = Load(created.address)
    try:
        load.go_on(first)
        updated = endpoints.update("bins", other_folder, model_uri="other", settings={"workers": 1})
        assert ended(created.workers)
        since = [len(versions) + 1 for versions in load.answered]  # an answer may be on its way yet
        load.go_on(second)
        assert (updated.version, updated.generation, updated.address) == (second, 2, created.address)
        assert (updated.pid, updated.model_uri) == (created.pid, "other")
        assert updated.settings == created.settings | {"workers": 1}

        with pytest.raises(StocktakeError, match=r"(?s)served as before.*damaged"):
            endpoints.update("bins", broken_folder, model_uri="broken")
        load.go_on(second)
        left = endpoints.get("bins")
        assert (left.status, left.generation, left.model_uri) == ("serving", 2, "other")
        assert left.error is not None
        with pytest.raises(StocktakeError, match="holds no exported model"):
            endpoints.update("bins", state)
        with pytest.raises(StocktakeError, match="'wrokers' is no setting"):
            endpoints.update("bins", settings={"wrokers": 1})
        with pytest.raises(StocktakeError, match="host and port cannot change"):
            endpoints.update("bins", settings={"port": 1024})
        assert [copy.name for copy in (state / "bins" / "model").iterdir()] == ["2"]

        again = endpoints.update("bins")
        load.go_on(second)
        assert again.generation > 2
        assert again.error is None
    finally:
        load.end()
    for versions, start in zip(load.answered, since, strict=True):
        assert set(versions[start:]) == {second}


def test_a_killed_worker_is_replaced(state: Path, exported_model: Path) -> None:
    created = create(exported_model, workers=2)
    (killed, other), client = created.workers, Client(created.address)
    os.kill(killed, signal.SIGKILL)
    replaced = wait_for(
        lambda: len(workers := endpoints.get("bins").workers) == 2 and killed not in workers and workers,
        "another worker",
    )
    assert other in replaced
    client.predict(PHOTO)
    os.kill(other, signal.SIGKILL)
    os.kill(next(pid for pid in replaced if pid != other), signal.SIGKILL)
    client.predict(PHOTO)  # waits in the socket's queue until a worker is back


def test_a_killed_supervisor_is_dead_and_an_update_revives_it(state: Path, exported_model: Path) -> None:
    created = create(exported_model)
    assert created.pid
    os.kill(created.pid, signal.SIGKILL)
    wait_for(lambda: ended((created.pid or 0, *created.workers)), "its end, and that of its workers")
    dead = endpoints.get("bins")
    assert (dead.status, dead.pid, dead.workers) == ("dead", None, ())
    assert dead.error is not None
    assert "update starts it again" in dead.error
    with pytest.raises(StocktakeError, match="dead: an update starts it again"):
        create(exported_model)
    revived = endpoints.update("bins")
    assert (revived.status, revived.address, revived.version) == ("serving", created.address, created.version)
    assert Client(revived.address).predict(PHOTO).model_version == created.version


def test_one_that_was_told_to_end_is_stopped_and_can_be_deleted(state: Path, exported_model: Path) -> None:
    created = create(exported_model)
    assert created.pid
    os.kill(created.pid, signal.SIGTERM)
    wait_for(lambda: endpoints.get("bins").pid is None, "its end")
    assert endpoints.get("bins").status == "stopped"
    endpoints.delete("bins")
    assert not (state / "bins").exists()


def test_a_failed_start_shows_its_log_and_leaves_nothing(
    state: Path, exported_model: Path, broken_folder: Path
) -> None:
    for attempt, said in (
        (lambda: create(broken_folder), r"(?s)bins did not start.*damaged"),
        (lambda: create(state.parent / "nowhere"), "holds no exported model"),
        (lambda: create(exported_model, wrokers=2), "'wrokers' is no setting of a server"),
        (lambda: create(exported_model, workers="many"), "workers many"),
        (lambda: create(exported_model, host="192.0.2.1"), "192.0.2.1"),
    ):
        with pytest.raises(StocktakeError, match=said):
            attempt()
        assert endpoints.list_endpoints() == []
        assert not (state / "bins").exists()
    mine = [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    assert not [one for one in mine if "stocktake.serving" in " ".join(one.cmdline())]


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "x" * 64])
def test_a_name_that_is_no_folder_is_refused(name: str, state: Path, exported_model: Path) -> None:
    with pytest.raises(StocktakeError, match="is no name of an endpoint"):
        create(exported_model, name)
    assert endpoints.list_endpoints() == []


def test_of_two_that_take_a_name_at_once_one_wins(state: Path, exported_model: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        tries = [threads.submit(create, exported_model) for _ in range(2)]
    faults = [error for one in tries if (error := one.exception())]
    assert len(faults) == 1
    assert "there is an endpoint bins already" in str(faults[0])
    assert Client(endpoints.get("bins").address).predict(PHOTO)


def test_a_number_that_another_program_has_now_is_never_signalled(state: Path, exported_model: Path) -> None:
    created = create(exported_model)
    assert created.pid
    os.kill(created.pid, signal.SIGKILL)
    wait_for(lambda: ended((created.pid or 0, *created.workers)), "its end, and that of its workers")
    with subprocess.Popen(["sleep", "600"]) as bystander:
        try:
            path = state / "bins" / "state.json"
            written = json.loads(path.read_text())
            written["supervisor"]["pid"] = bystander.pid
            written["workers"] = [{"pid": bystander.pid, "started": written["supervisor"]["started"]}]
            path.write_text(json.dumps(written))
            assert endpoints.get("bins").status == "dead"
            endpoints.delete("bins")
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_the_log_is_bounded_and_a_folder_removed_by_hand_ends_the_server(state: Path, exported_model: Path) -> None:
    created = create(exported_model)
    os.truncate(created.log, 11_000_000)
    older = created.log.with_name("server.log.1")
    wait_for(older.exists, "an older log")
    wait_for(lambda: created.log.stat().st_size < 1_000_000, "a shorter log")
    shutil.rmtree(state / "bins")
    assert created.pid
    wait_for(lambda: ended((created.pid or 0, *created.workers)), "the end of what nobody could find again")


def test_damaged_files_are_told_with_the_way_out(state: Path, exported_model: Path) -> None:
    create(exported_model)
    path = state / "bins" / "state.json"
    good = path.read_text()
    for content in ("{", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(StocktakeError, match="delete the endpoint bins and create it again"):
            endpoints.get("bins")
    path.write_text(good)


@pytest.mark.parametrize("address", ["", "bins", "ftp://host", "http://", "http://host:port"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    with pytest.raises(StocktakeError, match="is no address of a server"):
        Client(address)
