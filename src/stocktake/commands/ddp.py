"""`stocktake ddp`: finetune in several processes, which torchrun starts, restarts and ends."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import stocktake
from stocktake import distributed
from stocktake.config.training import DdpConfig, FinetuneConfig
from stocktake.distributed import JobFailedError
from stocktake.errors import StocktakeError
from stocktake.machine import cores
from stocktake.signals import handlers_restored
from stocktake.stages.prepare import prepare_data
from stocktake.stages.run import end_failed_run, find_run, plain
from stocktake.tracking.local_store import FAILED, KILLED

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

PROGRAM = (sys.executable, str(Path(stocktake.__file__).parent))
"""`python -m stocktake`, also from a checkout that is not installed."""
_SHUTDOWN_SECONDS = 15
"""For the processes to end on SIGTERM; SIGKILL follows."""


def ddp(config: DdpConfig) -> None:
    """Prepare the photos, then train in `nproc` processes on each of `nnodes` machines.

    Raises:
        StocktakeError: settings that cannot be, or a port in use.
        JobFailedError: a process failed, and no restart was left; its run is FAILED.
    """
    config.check_batch(config.nproc * config.nnodes)
    _endpoint(config.rendezvous, config.nnodes, config.node_rank)
    prepare_data(config)
    job = uuid.uuid4().hex
    names = {field.name for field in dataclasses.fields(FinetuneConfig)}
    settings = {name: plain(value) for name, value in dataclasses.asdict(config).items() if name in names}
    settings["training"]["world_size"] = config.nproc * config.nnodes
    with tempfile.TemporaryDirectory() as folder:
        experiment = Path(folder) / "experiment.yaml"
        experiment.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        try:
            launch(
                ["train", "--all_settings", str(experiment)],
                nproc=config.nproc,
                nnodes=config.nnodes,
                node_rank=config.node_rank,
                rendezvous=config.rendezvous,
                max_restarts=config.max_restarts,
                timeout=config.training.collective_timeout,
                job=job,
            )
        except BaseException as error:
            if (run := find_run(Path(config.workspace) / "runs", job)) is not None:
                status = FAILED if isinstance(error, Exception) else KILLED
                end_failed_run(run, config.tracking, status, str(error))
            raise


def launch(
    arguments: Sequence[str],
    *,
    nproc: int,
    nnodes: int = 1,
    node_rank: int = 0,
    rendezvous: str | None = None,
    max_restarts: int = 0,
    timeout: float = 300.0,
    job: str | None = None,
    program: Sequence[str] | None = None,
) -> None:
    """Run `stocktake ARGUMENTS` in several processes through torchrun, until all have ended without error.

    They share the cores of this machine, unless OMP_NUM_THREADS says how many threads each is to have. SIGTERM and
    Ctrl-C are passed on to them. On one machine nothing listens on another address than 127.0.0.1. To be called in the
    main thread.

    Args:
        arguments: a command that may run in several processes, and its options.
        nproc: processes on this machine.
        nnodes: machines.
        node_rank: this machine's number.
        rendezvous: host:port of machine 0; needed for several machines.
        max_restarts: how often all processes are started again when one has failed.
        timeout: seconds to wait for the other machines.
        job: identifies the job in the tags of its run.
        program: what the arguments are given to. Default: PROGRAM.

    Raises:
        JobFailedError: a process failed; names it, and its error.
        StocktakeError: a port in use, fewer GPUs than processes, or machines that did not come.
        KeyboardInterrupt, SystemExit: Ctrl-C, SIGTERM; the processes have ended.
    """
    distributed.choose_backend(nproc)
    host, port = _endpoint(rendezvous, nnodes, node_rank)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError, rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    rendezvous_handler_registry.register("loopback", _loopback_rendezvous)
    variables = {"OMP_NUM_THREADS": str(max(1, cores() // nproc)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    variables = {name: os.environ.get(name, value) for name, value in variables.items()}
    variables[distributed.LAUNCHER] = job or uuid.uuid4().hex
    with (
        tempfile.TemporaryDirectory() as errors,
        _environment(variables),
        _quiet_torchrun(),
        handlers_restored(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    ):
        settings = LaunchConfig(
            min_nodes=nnodes,
            max_nodes=nnodes,
            nproc_per_node=nproc,
            run_id=f"stocktake-{port}",
            rdzv_backend="loopback" if nnodes == 1 else "static",
            rdzv_endpoint=f"{host}:{port}",
            rdzv_configs={"timeout": int(timeout), "rank": node_rank},
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=errors),
            local_addr=host if nnodes == 1 else None,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        try:
            first, *rest = program or PROGRAM
            elastic_launch(settings, first)(*rest, *arguments)
        except ChildFailedError as error:
            raise _first_failure(error.failures) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        except (RendezvousError, RuntimeError) as error:
            if nnodes == 1:
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise StocktakeError(
                f"ddp: the {nnodes} machines do not meet at {host}:{port} ({reason}): give --rendezvous an address of "
                "machine 0 that all reach, and start the command on each"
            ) from None


def _endpoint(rendezvous: str | None, nnodes: int, node_rank: int) -> tuple[str, int]:
    """Host and port where the processes meet; port 0 is any that is free.

    Raises:
        StocktakeError: none is given for several machines, it is no address, or its port is in use on machine 0.
    """
    if rendezvous is None:
        if nnodes > 1:
            raise StocktakeError(f"--nnodes {nnodes} needs --rendezvous host:port, an address of machine 0")
        return "127.0.0.1", 0
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise StocktakeError(f"--rendezvous {rendezvous} must be host:port, such as 10.0.0.1:29500")
    if nnodes == 1:
        host = "127.0.0.1"
    if node_rank == 0:
        try:
            socket.create_server((host, int(port))).close()
        except OSError as error:
            raise StocktakeError(
                f"--rendezvous {rendezvous}: port {port} cannot be used on this machine ({error.strerror}): "
                "give another one"
            ) from None
    return host, int(port)


def _loopback_rendezvous(params: RendezvousParameters) -> RendezvousHandler:
    """torchrun's static rendezvous of one machine, on a store that listens on the loopback interface alone.

    torch's own stores listen on every interface, and their clients unpickle what they read.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class LoopbackRendezvous(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return "loopback"

    host, _, port = params.endpoint.rpartition(":")
    listener = socket.create_server((host, int(port)))
    port = listener.getsockname()[1]
    handler = LoopbackRendezvous(host, int(port), 0, 1, params.run_id, params.config["timeout"])
    handler._store = TCPStore(
        host, int(port), is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return handler


def _first_failure(failures: Mapping[int, Any]) -> JobFailedError:
    """The failure that came first; a lost connection or SIGTERM only follows from another one."""

    def order(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        message = _message(failure)
        if message.startswith("PeerLostError") or failure.exitcode == -signal.SIGTERM:
            return 2, failure.timestamp
        return int(not message and failure.exitcode > 0), failure.timestamp

    rank = min(failures, key=order)
    failure = failures[rank]
    name = f"rank {rank} (process {failure.pid})"
    if message := _message(failure):
        kind, _, text = message.partition(": ")
        shown = text if kind in ("StocktakeError", "PeerLostError") else message
        return JobFailedError(f"ddp: {name} failed: {shown}", exit_code=failure.exitcode)
    if failure.exitcode < 0:
        memory = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        return JobFailedError(
            f"ddp: {name} was killed by {signal.Signals(-failure.exitcode).name}{memory}", exit_code=1
        )
    return JobFailedError(f"ddp: {name} ended with exit code {failure.exitcode}", exit_code=failure.exitcode)


def _message(failure: Any) -> str:
    """The first line of the error that a process has recorded; empty where it has recorded none."""
    message = failure.error_file_data.get("message")
    return str(message["message"]).splitlines()[0] if isinstance(message, dict) else ""


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set for the processes that are started in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _quiet_torchrun() -> Iterator[None]:
    """Its reports of a failure are replaced by our one line."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:  # many have a level of their own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
