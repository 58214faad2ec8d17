"""What torchrun's environment says, joining a process group, its collectives; and a process outside of a job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from process_pair import ProcessGroup, free_port, pair
from stocktake import distributed
from stocktake.distributed import World, process_group, world_from_env
from stocktake.errors import StocktakeError

__all__ = ["pair"]

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """environment(RANK=1, ...): what torchrun would have set, and nothing else of it."""
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC_", "MASTER_", *NAMES))]:
        monkeypatch.delenv(name)

    def put(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return put


def test_a_single_process_is_rank_zero_and_needs_no_torch() -> None:
    code = """
import sys
from stocktake import distributed
assert distributed.world_from_env() == distributed.World() and distributed.is_rank_zero()
with distributed.process_group(timeout=1) as world, distributed.local_rank_zero_first():
    assert world == distributed.world() == distributed.World()
    assert distributed.run_on_rank_zero(lambda: 3) == distributed.broadcast(3) == 3
    assert distributed.gather("a") == ["a"]
assert distributed.job_id() is None
assert "torch" not in sys.modules and "psutil" not in sys.modules
"""
    variables = {name: value for name, value in os.environ.items() if name not in NAMES}
    subprocess.run([sys.executable, "-c", code], check=True, env=variables)


def test_the_world_is_read_from_torchruns_environment(environment: Any) -> None:
    environment(RANK=5, WORLD_SIZE=6, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, TORCHELASTIC_RESTART_COUNT=2)
    environment(TORCHELASTIC_RUN_ID="abc")
    assert world_from_env() == World(rank=5, size=6, local_rank=1, local_size=2, nodes=3, restarts=2)
    assert distributed.is_rank_zero(), "the group has not been joined"
    assert distributed.job_id() == f"abc@{os.getppid()}"
    environment(STOCKTAKE_LAUNCHER="def")
    assert distributed.job_id() == "def"


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "one", "WORLD_SIZE": 2}, "RANK=one"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2 WORLD_SIZE=2"),
        ({"RANK": 2, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}, "LOCAL_WORLD_SIZE=2"),
        ({"RANK": 0, "WORLD_SIZE": 2}, "MASTER_ADDR"),
    ],
)
def test_a_contradictory_environment_is_an_error(variables: dict[str, Any], named: str, environment: Any) -> None:
    environment(**variables)
    with pytest.raises(StocktakeError, match=named), process_group(timeout=1):
        pass


@pytest.mark.parametrize("size", [1, 2])
def test_another_world_size_than_expected_is_an_error(size: int, environment: Any) -> None:
    environment(RANK=0, WORLD_SIZE=size)
    with pytest.raises(StocktakeError, match="world_size 3"), process_group(timeout=1, expected=3):
        pass


def test_an_error_is_recorded_for_torchrun(environment: Any, tmp_path: Path) -> None:
    environment(RANK=0, WORLD_SIZE=2, TORCHELASTIC_ERROR_FILE=tmp_path / "error.json")
    with pytest.raises(StocktakeError), process_group(timeout=1, expected=3):
        pass
    assert "StocktakeError: --training.world_size 3" in (tmp_path / "error.json").read_text()
    assert not distributed.error_recorded(), "no launcher of ours reads it"
    environment(STOCKTAKE_LAUNCHER="job")
    assert distributed.error_recorded()


def test_nobody_at_the_address_is_an_error(environment: Any) -> None:
    port = free_port()
    environment(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with pytest.raises(StocktakeError, match=f"127.0.0.1:{port}"), process_group(timeout=1):
        pass
    assert distributed.world() == World()


def _collectives() -> dict[str, Any]:
    world = distributed.world()
    with process_group(timeout=1, expected=17) as inner:  # a block within the block does nothing
        assert inner is world
    began = time.monotonic()
    with distributed.local_rank_zero_first():
        if world.local_rank == 0:
            time.sleep(0.3)
        done = time.monotonic()
    listening = [connection.laddr for connection in psutil.Process().net_connections() if connection.status == "LISTEN"]
    return {
        "world": world,
        "rank zero": distributed.is_rank_zero(),
        "on rank zero": distributed.run_on_rank_zero(lambda: f"of {world.rank}"),
        "broadcast": distributed.broadcast(world.rank),
        "gather": distributed.gather(world.rank * 10),
        "waited": done - began > 0.25,
        "interface": psutil.net_if_addrs()[os.environ["GLOO_SOCKET_IFNAME"]],
        "gloo": {laddr.ip for laddr in listening if laddr.port != int(os.environ["MASTER_PORT"])},
    }


def test_collectives_of_two_processes(pair: ProcessGroup) -> None:
    results = pair.run(_collectives)
    assert [result.pop("world") for result in results] == [
        World(rank=rank, size=2, local_rank=rank, local_size=2, backend="gloo") for rank in range(2)
    ]
    assert [result.pop("rank zero") for result in results] == [True, False]
    expected = {"on rank zero": "of 0", "broadcast": 0, "gather": [0, 10], "waited": True}
    for result in results:
        assert result.pop("gloo") <= {"127.0.0.1"}, "one machine's processes talk through the loopback"
        assert "127.0.0.1" in {address.address for address in result.pop("interface")}, "whatever its name resolves to"
        assert result == expected
