"""The lock of promotions: held by one process at a time, let go of however it ends, taken over when it is stale."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from stocktake.errors import StocktakeError
from stocktake.registry.promotion import PROMOTED, history, set_champion
from stocktake.registry.promotion_lock import lock_name, promotion_lock
from stocktake.registry.versions import ModelRegistry
from versioned_model import crowned, lock_names, registry, three

__all__ = ["registry", "three"]


def test_the_lock_is_told_and_let_go_of(three: ModelRegistry) -> None:
    def fail() -> None:
        with promotion_lock(three.client, three.name):
            assert lock_names(three) == [lock_name(three.name)]
            with (
                pytest.raises(StocktakeError, match=rf"by .*@.* \(process {os.getpid()}\); nothing was changed"),
                promotion_lock(three.client, three.name),
            ):
                pass
            assert lock_names(three) == [lock_name(three.name)]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert lock_names(three) == []


def test_a_lock_that_somebody_took_over_changes_nothing(three: ModelRegistry) -> None:
    with promotion_lock(three.client, three.name) as lock:
        three.client.set_registered_model_tag(lock_name(three.name), "token", "another")
        three.client.set_registered_model_tag(lock_name(three.name), "owner", "eve@elsewhere")
        with pytest.raises(StocktakeError, match="eve@elsewhere took over"):
            set_champion(three, lock, three.version("1"), None, forced=False, reason=None, figures={})
    assert lock_names(three) == [lock_name(three.name)], "it is eve's to remove"
    assert three.aliases() == {"candidate": 3}
    three.client.delete_registered_model(lock_name(three.name))
    with promotion_lock(three.client, three.name) as lock:
        three.client.delete_registered_model(lock_name(three.name))
        with pytest.raises(StocktakeError, match="somebody took over"):
            lock.still_held()


def test_a_champion_that_moved_meanwhile_is_noticed(three: ModelRegistry) -> None:
    crowned(three, 1)
    with promotion_lock(three.client, three.name) as lock:
        champion = three.champion()
        three.client.set_registered_model_alias(three.name, "champion", "2")
        with pytest.raises(StocktakeError, match="is version 2 by now, and the gate compared with version 1"):
            set_champion(three, lock, three.version("3"), champion, forced=False, reason=None, figures={})
    assert three.aliases()["champion"] == 2


def test_of_several_who_find_a_stale_lock_one_at_a_time_takes_it(three: ModelRegistry) -> None:
    import mlflow

    name = lock_name(three.name)
    old = {"token": "gone", "owner": "ghost@nowhere (process 1)", "seen_ms": "1000"}
    three.client.create_registered_model(name, tags=old)
    inside, most, done, told = 0, 0, [], []
    guard, start = threading.Lock(), threading.Barrier(3)

    def take() -> None:
        nonlocal inside, most
        client = mlflow.MlflowClient(three.connection.stores.tracking, three.connection.stores.registry)
        start.wait()
        try:
            with promotion_lock(client, three.name):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.3)
                with guard:
                    inside -= 1
                    done.append(1)
        except StocktakeError as error:
            told.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert done
    assert len(done) + len(told) == 3
    assert all("is being promoted" in one or "keep promoting" in one for one in told)
    assert lock_names(three) == []


def test_a_removal_that_was_killed_is_removed_too(three: ModelRegistry) -> None:
    name = lock_name(three.name)
    for stale in (name, f"{name}.gone"):
        three.client.create_registered_model(stale, tags={"token": "gone", "owner": "ghost", "seen_ms": "1000"})
    with promotion_lock(three.client, three.name):
        assert lock_names(three) == [name]
    assert lock_names(three) == []


HOLDER = """
import sys
from stocktake.config import TrackingConfig
from stocktake.registry.promotion_lock import promotion_lock
from stocktake.registry.versions import ModelRegistry
with ModelRegistry(TrackingConfig(uri=sys.argv[1])).opened() as registry:
    with promotion_lock(registry.client, registry.name):
        print("held", flush=True)
        sys.stdin.readline()
"""
RACER = """
import sys
from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.registry.promotion import challenge, set_champion
from stocktake.registry.promotion_lock import promotion_lock
from stocktake.registry.versions import ModelRegistry
with ModelRegistry(TrackingConfig(uri=sys.argv[1])).opened() as registry:
    version, champion = registry.version(sys.argv[2]), registry.champion()
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with promotion_lock(registry.client, registry.name) as lock:
            set_champion(registry, lock, version, champion, forced=False, reason=None, figures={})
    except StocktakeError as error:
        print(error, flush=True)
    else:
        print("won", flush=True)
"""


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """started(program, *arguments): a real process, which has said its first word."""
    processes = []

    def start(program: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() in ("held", "ready")
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_of_two_processes_one_wins_and_the_other_is_told(
    three: ModelRegistry, store: str, started: Callable[..., subprocess.Popen[str]]
) -> None:
    racers = [started(RACER, store, number) for number in ("1", "2")]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    assert sorted(one == "won" for one in said) == [False, True]
    loser = next(one for one in said if one != "won")
    assert "is being promoted or rolled back by" in loser or "by now, and the gate compared with none" in loser
    assert three.aliases()["champion"] == said.index("won") + 1
    assert [one.action for one in history(three.versions())] == [PROMOTED]
    assert lock_names(three) == []


def test_a_terminated_process_lets_go_and_a_killed_one_is_waited_for(
    three: ModelRegistry, store: str, started: Callable[..., subprocess.Popen[str]]
) -> None:
    holder = started(HOLDER, store)
    holder.send_signal(signal.SIGTERM)
    assert holder.wait(60) == 143
    assert lock_names(three) == []
    holder = started(HOLDER, store)
    holder.kill()
    holder.wait(60)
    with pytest.raises(
        StocktakeError, match=rf"process {holder.pid}\).*if its process was killed, after \d\d:\d\d UTC"
    ):
        crowned(three, 1)
    three.client.set_registered_model_tag(lock_name(three.name), "seen_ms", "1000")
    crowned(three, 1)
    assert lock_names(three) == []
