"""Who a process is, how processes join, wait for each other, and end when one of them fails; and a process alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from process_pair import ProcessGroup, free_port, pair
from stocktake import ranks
from stocktake.errors import StocktakeError
from stocktake.ranks import World, joined, world_from_env
from stocktake.ranks.meeting import choose_interface

__all__ = ["pair"]

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "GROUP_RANK")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """environment(RANK=1, ...): what torchrun would have set, and nothing else of it."""
    others = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE")
    for name in (*NAMES, *others, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)

    def put(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return put


def start(code: str, **variables: object) -> subprocess.Popen[str]:
    """A process that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        text=True,
    )


# Alone ----------------------------------------------------------------------------------------------------------------


def test_a_process_alone_is_first_and_needs_no_torch() -> None:
    code = """
import sys
from stocktake import ranks
assert ranks.world_from_env() == ranks.World() and ranks.is_rank_zero()
with ranks.joined(timeout=1) as world, ranks.local_rank_zero_first(), ranks.with_root_cause():
    assert world == ranks.world() == ranks.World()
    assert ranks.run_on_rank_zero(lambda: 3) == ranks.broadcast(3) == 3
    assert ranks.gather("a") == ["a"]
    assert not ranks.is_gone(0)
assert ranks.job() is None
assert "torch" not in sys.modules and "psutil" not in sys.modules
"""
    variables = {name: value for name, value in os.environ.items() if name not in NAMES}
    subprocess.run([sys.executable, "-c", code], check=True, env=variables)


def test_one_process_of_torchrun_is_alone_too(environment: Any) -> None:
    environment(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, TORCHELASTIC_RESTART_COUNT=2)
    with joined(timeout=1) as world:
        assert world == ranks.world() == World(attempt=2)
    assert ranks.world() == World()


# The environment ------------------------------------------------------------------------------------------------------


def test_the_world_is_what_torchrun_says(environment: Any) -> None:
    environment(RANK=5, WORLD_SIZE=6, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, GROUP_RANK=2, GROUP_WORLD_SIZE=3)
    environment(TORCHELASTIC_RUN_ID="abc")
    assert world_from_env() == World(rank=5, size=6, local_rank=1, local_size=2, node=2, nodes=3)
    assert ranks.is_rank_zero(), "nobody has joined"
    assert ranks.job() == ranks.job_of(os.getppid(), "abc") == f"abc@{socket.gethostname()}:{os.getppid()}"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "one", "WORLD_SIZE": 2}, "RANK=one in the environment is no number"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2 LOCAL_RANK=2 is no process of WORLD_SIZE=2"),
        (
            {"RANK": 2, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_WORLD_SIZE": 2},
            "WORLD_SIZE=3 is not 2 machines with 1 processes each",
        ),
        ({"RANK": 0, "WORLD_SIZE": 2}, "MASTER_ADDR is not set: start the job with torchrun"),
    ],
)
def test_an_environment_that_cannot_be_is_told(variables: dict[str, Any], said: str, environment: Any) -> None:
    environment(**variables)
    with pytest.raises(StocktakeError, match=said), joined(timeout=1):
        pass


@pytest.mark.parametrize(("size", "said"), [(2, "but 2 processes were started"), (1, "but 1 process was started")])
def test_another_number_of_processes_than_wanted_is_told(size: int, said: str, environment: Any) -> None:
    environment(RANK=0, WORLD_SIZE=size)
    with pytest.raises(StocktakeError, match=f"--training.world_size 3, {said}"), joined(timeout=1, expected=3):
        pass


def test_torchrun_is_told_of_the_error(environment: Any, tmp_path: Path) -> None:
    environment(RANK=0, WORLD_SIZE=2, TORCHELASTIC_ERROR_FILE=tmp_path / "error.json")
    assert not ranks.error_recorded()
    with pytest.raises(StocktakeError), joined(timeout=1, expected=3):
        pass
    assert "StocktakeError: --training.world_size 3" in (tmp_path / "error.json").read_text()
    assert not ranks.error_recorded(), "no launcher reads it"
    environment(STOCKTAKE_LAUNCHER=1)
    assert ranks.error_recorded()


# Meeting --------------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_told(environment: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(StocktakeError, match=f"MASTER_PORT {port} is in use"), joined(timeout=1):
            pass


def test_nobody_at_the_address_is_told(environment: Any) -> None:
    environment(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    with pytest.raises(StocktakeError, match=r"rank 1 does not reach 127.0.0.1:\d+"), joined(timeout=1):
        pass


def test_processes_that_do_not_come_are_named(environment: Any) -> None:
    environment(RANK=0, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    said = "1 of 3 processes came to .* in time; rank 1, 2 did not"
    with pytest.raises(StocktakeError, match=said), joined(timeout=1):
        pass
    assert ranks.world() == World()


def test_one_machines_processes_talk_by_the_loopback_unless_told(environment: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # put back at the end, to what it was
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    choose_interface(World(size=2, local_size=2))
    chosen = os.environ["GLOO_SOCKET_IFNAME"]
    assert "127.0.0.1" in [address.address for address in psutil.net_if_addrs()[chosen]]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    choose_interface(World(size=2, local_size=2))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0"


# Together -------------------------------------------------------------------------------------------------------------


def _together() -> dict[str, Any]:
    world = ranks.world()
    with joined(timeout=1, expected=17) as inner:  # nothing new: a block within the block
        assert inner is world
    began = time.monotonic()
    with ranks.local_rank_zero_first():
        if world.local_rank == 0:
            time.sleep(0.3)
        done = time.monotonic()
    return {
        "world": world,
        "first": ranks.is_rank_zero(),
        "from first": ranks.run_on_rank_zero(lambda: f"of {world.rank}"),
        "broadcast": ranks.broadcast(world.rank),
        "gather": ranks.gather(world.rank * 10),
        "led": done - began > 0.25,
        "gone": ranks.is_gone(1),
    }


def test_they_agree(pair: ProcessGroup) -> None:
    told = pair.run(_together)
    assert [one.pop("world") for one in told] == [
        World(rank=rank, size=2, local_rank=rank, local_size=2, backend="gloo") for rank in range(2)
    ]
    assert [one.pop("first") for one in told] == [True, False]
    agreed = {"from first": "of 0", "broadcast": 0, "gather": [0, 10], "led": True, "gone": False}
    assert told == [agreed, agreed]


WAITING = """
import os, sys, time
from stocktake import ranks
try:
    with ranks.joined(timeout=2) as world:
        print("joined", flush=True)
        with ranks.local_rank_zero_first():
            time.sleep(4 if world.rank == 0 else 0)
        print(ranks.gather(world.rank), flush=True)
        if world.rank == 0:
            print(time.time(), flush=True)
            if sys.argv[-1] == "dies":
                os._exit(7)
            raise ValueError("no bins")
        ranks.run_on_rank_zero(lambda: None)
except BaseException as error:
    print(time.time(), type(error).__name__, error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dies", "fails"])
def test_a_leader_is_waited_for_as_long_as_it_lives(way: str) -> None:
    """Longer than the timeout, and no longer than a moment when it is gone."""
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    # torchrun's store, that outlives the processes
    code = WAITING.replace("sys.argv[-1]", repr(way))
    holder = start(HOLDER.format(port=shared["MASTER_PORT"]))
    assert holder.stdout is not None
    holder.stdout.readline()
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    processes = [start(code, RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(2)]
    first, second = (process.communicate(timeout=90)[0].splitlines() for process in processes)
    holder.kill()
    holder.wait()
    assert first[:2] == second[:2] == ["joined", "[0, 1]"]
    moment, name, said = second[2].split(" ", 2)
    assert float(moment) - float(first[2]) < 10
    reason = {
        "dies": "ended without a word: killed, or out of memory",
        "fails": "failed: ValueError: no bins",
    }[way]
    assert (name, said) == ("RankFailedError", f"rank 0 (process {processes[0].pid}) {reason}")


HOLDER = """
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", {port}, is_master=True, wait_for_workers=False)
print("ready", flush=True)
import time; time.sleep(120)
"""

DEAF = """
import ctypes, os, signal
from types import SimpleNamespace
from stocktake.ranks import group
group._DEAF_SECONDS = 1
pulse = group.Pulse(SimpleNamespace(set=lambda *_: None), 0)
signal.signal(signal.SIGTERM, lambda *_: pulse.heeded.set())
signal.set_wakeup_fd(pulse.wakeup)
print(os.getpid(), flush=True)
mutex = ctypes.create_string_buffer(64)
for _ in range(2):  # the second time it waits as a collective does: Python hears no signal
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_process_that_cannot_hear_is_ended() -> None:
    process = start(DEAF)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


def test_processes_end_with_their_launcher() -> None:
    launcher = start(
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])".replace(
            "sys.argv[1]", repr(DEAF)
        ),
        TORCHELASTIC_RUN_ID="x",
    )
    assert launcher.stdout is not None
    process = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    process.wait(20)
    launcher.wait()
