"""`stocktake ddp`: finetune in several processes, started and watched by torchrun's agent."""

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
from typing import Any

import yaml

import stocktake
from stocktake import ranks
from stocktake.commands.stage_runs import end_dead_run, find_run, plain
from stocktake.config import DdpConfig, FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.machine import cores
from stocktake.ranks import JobFailedError
from stocktake.tracking.local_store import FAILED, KILLED

PROGRAM = (sys.executable, str(Path(stocktake.__file__).parent))
"""`python -m stocktake`, also from a checkout that is not installed."""
_AGENT = "torch.distributed.elastic"
_LEAVE_SECONDS = 15
"""For the processes to close what they have open, once the launcher was told to end."""


def ddp(config: DdpConfig) -> None:
    """Train in `nproc` processes on each of `nnodes` machines.

    Raises:
        StocktakeError: settings that cannot be, or a port in use.
        JobFailedError: a process failed, and no restart was left.
    """
    config.check_batch(config.nproc * config.nnodes)
    run_id = uuid.uuid4().hex if config.nnodes == 1 else f"stocktake-{config.rendezvous}"
    settings = {
        field.name: plain(dataclasses.asdict(config)[field.name]) for field in dataclasses.fields(FinetuneConfig)
    }
    settings["training"]["world_size"] = config.nproc * config.nnodes
    with tempfile.TemporaryDirectory() as folder, _run_ended(config, ranks.job_of(os.getpid(), run_id)):
        experiment = Path(folder) / "experiment.yaml"
        experiment.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        launch(
            ["train", "--experiment", str(experiment)],
            nproc=config.nproc,
            nnodes=config.nnodes,
            node_rank=config.node_rank,
            rendezvous=config.rendezvous,
            max_restarts=config.max_restarts,
            timeout=config.training.collective_timeout,
            run_id=run_id,
        )


@contextmanager
def _run_ended(config: DdpConfig, job: str) -> Iterator[None]:
    """No run stays RUNNING of a job that is over."""
    try:
        yield
    except BaseException as error:
        folder = find_run(Path(config.workspace) / "runs", job)
        if folder is not None:
            has_failed = isinstance(error, Exception)
            end_dead_run(folder, config.tracking, FAILED if has_failed else KILLED, str(error))
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
    run_id: str | None = None,
    program: Sequence[str] | None = None,
) -> None:
    """Run `stocktake ARGUMENTS` in several processes, until all have ended well.

    They share the cores of this machine out, unless OMP_NUM_THREADS says how many threads each is to have. What they
    print is seen as it comes. SIGTERM and Ctrl-C are handed on to them. To be called in the main thread.

    Args:
        arguments: a command of the command line that is made for several processes, and its options.
        nproc: processes on this machine.
        nnodes: machines.
        node_rank: which one this is.
        rendezvous: host:port of machine 0; needed for more than one.
        max_restarts: how often all begin again when one has failed.
        timeout: seconds that the other machines are waited for.
        run_id: names the job, the same on all machines.
        program: what the arguments are given to. Default: PROGRAM.

    Raises:
        JobFailedError: a process failed; says which, and why.
        StocktakeError: a port in use, fewer GPUs than processes, or machines that did not come.
        KeyboardInterrupt, SystemExit: Ctrl-C, SIGTERM; the processes have ended.
    """
    ranks.choose_backend(nproc)
    endpoint = _endpoint(rendezvous, nnodes, node_rank)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    variables = {"OMP_NUM_THREADS": str(_threads(nproc)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    variables = {name: os.environ.get(name, value) for name, value in variables.items()} | {ranks.LAUNCHER: "1"}
    with tempfile.TemporaryDirectory() as errors, _environment(variables), _quiet_torchrun(), _signals_restored():
        settings = LaunchConfig(
            min_nodes=nnodes,
            max_nodes=nnodes,
            nproc_per_node=nproc,
            run_id=run_id or uuid.uuid4().hex,
            rdzv_backend="c10d" if nnodes == 1 else "static",
            rdzv_endpoint=endpoint,
            rdzv_configs={"timeout": int(timeout)} | ({} if nnodes == 1 else {"rank": node_rank}),
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=errors),
            local_addr=endpoint.rpartition(":")[0] if nnodes == 1 else None,
            shutdown_timeout=_LEAVE_SECONDS,
        )
        try:
            first, *rest = program or PROGRAM
            elastic_launch(settings, first)(*rest, *arguments)
        except ChildFailedError as error:
            raise _failure(error.failures) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        except (RendezvousError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise StocktakeError(
                f"ddp: the {nnodes} machines do not meet at {endpoint} ({reason}): give --rendezvous an address of "
                "machine 0 that all reach, and start the command on each"
            ) from None


def _endpoint(rendezvous: str | None, nnodes: int, node_rank: int) -> str:
    """host:port where the processes meet; port 0 is any that is free.

    Raises:
        StocktakeError: none is given for several machines, it is no address, or its port is in use on machine 0.
    """
    if rendezvous is None:
        if nnodes > 1:
            raise StocktakeError(f"--nnodes {nnodes} needs --rendezvous host:port, an address of machine 0")
        return "127.0.0.1:0"
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise StocktakeError(f"--rendezvous {rendezvous} must be host:port, such as 10.0.0.1:29500")
    if node_rank == 0:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise StocktakeError(
                    f"--rendezvous {rendezvous}: port {port} cannot be used on this machine ({error.strerror}): "
                    "give another one"
                ) from None
    return rendezvous


def _failure(failures: Mapping[int, Any]) -> JobFailedError:
    """The failure that came first, without those that only followed from it."""

    def order(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        told = _told(failure)
        is_consequence = told.startswith("RankFailedError") if told else failure.exitcode == -signal.SIGTERM
        return (2 if is_consequence else 1 if not told else 0), failure.timestamp

    rank = min(failures, key=order)
    failure = failures[rank]
    told = _told(failure)
    name = f"rank {rank} (process {failure.pid})"
    if told.startswith("RankFailedError: "):  # of another machine
        return JobFailedError(f"ddp: {told.removeprefix('RankFailedError: ')}", exit_code=1)
    if told:
        return JobFailedError(
            f"ddp: {name} failed: {told.removeprefix('StocktakeError: ')}", exit_code=failure.exitcode
        )
    if failure.exitcode < 0:
        killed = f"was killed by {signal.Signals(-failure.exitcode).name}"
        memory = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        return JobFailedError(f"ddp: {name} {killed}{memory}", exit_code=1)
    return JobFailedError(f"ddp: {name} ended with exit code {failure.exitcode}", exit_code=failure.exitcode)


def _told(failure: Any) -> str:
    """The error that a process left behind, in a line; empty when it left none."""
    message = failure.error_file_data.get("message")
    return str(message["message"]).splitlines()[0] if isinstance(message, dict) else ""


def _threads(nproc: int) -> int:
    return max(1, cores() // nproc)


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
    """Its reports of what it does, and of what failed, are told by us in a line."""
    loggers = [logging.getLogger(name) for name in [*logging.root.manager.loggerDict] if name.startswith(_AGENT)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # many have a level of their own
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _signals_restored() -> Iterator[None]:
    """torchrun's agent leaves its handlers behind."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
