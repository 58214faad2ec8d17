"""How the processes of a job find each other: through a store of keys, of torchrun or of rank 0."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from stocktake.errors import StocktakeError
from stocktake.ranks.world import World, number

PREFIX = "stocktake"
"""Of our keys in the store."""


@dataclass(frozen=True)
class Process:
    """One of the job's."""

    rank: int
    node: int
    host: str
    pid: int
    nonce: str
    """Its own word, for this attempt alone."""


def address() -> str:
    """Where the processes meet."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def is_torchruns_store() -> bool:
    """Whether the store is held by torchrun's agent, and not by rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def below(prefix: str, store: Any) -> Any:
    """The keys of a store that begin with a prefix."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(prefix, store)


def connect(there: World, timeout: float) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT: torchrun's, or else held by rank 0."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise StocktakeError(f"WORLD_SIZE={there.size}, but {missing[0]} is not set: start the job with torchrun")
    holds = there.rank == 0 and not is_torchruns_store()
    try:
        return TCPStore(
            os.environ["MASTER_ADDR"],
            number("MASTER_PORT"),
            is_master=holds,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except (DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise StocktakeError(
                f"MASTER_PORT {os.environ['MASTER_PORT']} is in use on this machine: give another --master-port, "
                "or none"
            ) from None
        raise StocktakeError(
            f"rank {there.rank} does not reach {address()} ({first_line(error)}): is the first machine's job "
            "started, and its port open?"
        ) from None


def shake_hands(tcp: Any, there: World, deadline: float) -> tuple[str, list[Process], int]:
    """A name that only these very processes know, who they are, and which attempt it is.

    torchrun's store outlives an attempt, so that what lies in it may be of processes that are dead. Each process says
    hello under a word of its own; the first one names the group of those that it found, again when one is new, until
    each has seen itself in it.
    """
    store = below(PREFIX, tcp)
    me = Process(there.rank, there.node, socket.gethostname(), os.getpid(), uuid.uuid4().hex)
    mine = json.dumps(asdict(me))
    store.set(f"hello {there.rank}", mine)
    attempt = int(store.add("attempts", 1)) - 1 if there.rank == 0 else 0
    found: list[str] = []
    name, acknowledged = "", ""
    while True:
        came = [rank for rank in range(there.size) if store.check([f"hello {rank}"])]
        if there.rank == 0 and len(came) == there.size:
            hellos = [bytes(hello).decode() for hello in store.multi_get([f"hello {rank}" for rank in came])]
            if hellos != found:
                found, name = hellos, uuid.uuid4().hex[:12]
                store.set("group", json.dumps({"name": name, "hellos": found, "attempt": attempt}))
            if store.add(f"seen {name}", 0) == there.size - 1:
                store.set(f"go {name}", "")
                break
        elif there.rank and store.check(["group"]):
            group = json.loads(store.get("group"))
            if group["hellos"][there.rank : there.rank + 1] == [mine] and group["name"] != acknowledged:
                found, acknowledged, attempt = group["hellos"], group["name"], group["attempt"]
                store.add(f"seen {acknowledged}", 1)
            if acknowledged and store.check([f"go {acknowledged}"]):
                name = acknowledged
                break
        if time.monotonic() > deadline:
            missing = ", ".join(str(rank) for rank in range(there.size) if rank not in came)
            raise StocktakeError(
                f"{len(came)} of {there.size} processes came to {address()} in time"
                f"{f'; rank {missing} did not' * bool(missing)}: start them all, or wait longer with "
                "--training.collective_timeout"
            )
        time.sleep(0.02)
    return name, [Process(**json.loads(hello)) for hello in found], attempt


def choose_interface(there: World) -> list[str]:
    """Name the network interface by which the processes talk, unless the user has; the variables that were set.

    gloo asks for the machine's own name, which is often 127.0.1.1, or a network that the other machines do not see.
    """
    import psutil

    local = "127.0.0.1"
    if there.nodes > 1:
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing: asks for the way
            local = probe.getsockname()[0]
    variables = ["GLOO_SOCKET_IFNAME"]
    if there.nodes > 1:
        if local.startswith("127."):
            return []
        variables.append("NCCL_SOCKET_IFNAME")
    variables = [variable for variable in variables if variable not in os.environ]
    for name, addresses in psutil.net_if_addrs().items():
        if local in [address.address for address in addresses]:
            os.environ.update(dict.fromkeys(variables, name))
            return variables
    return []


def first_line(error: BaseException) -> str:
    """Of what the error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
