"""CPU, memory, disk, network and GPU use of this machine, measured by MLflow's monitors.

MLflow's thread logs to a store; it asks the store before every sample, and ends when the store is away.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

SECONDS = 10.0


class SystemMetrics:
    """Samples every 10 seconds, or MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, in a thread."""

    def __init__(self, log: Callable[[Mapping[str, float], int], None]) -> None:
        """`log` takes metrics named system/... and a step that counts samples; it is called in the thread."""
        kinds: tuple[Any, ...] = (CPUMonitor, DiskMonitor, NetworkMonitor)
        self._monitors = [kind() for kind in kinds]
        with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
            self._monitors.append(GPUMonitor())  # type: ignore[no-untyped-call]
        interval: Any = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
        self._interval = float(interval.get() or SECONDS)
        self._log = log
        self._step = 0
        self._last = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="system-metrics")

    def start(self) -> None:
        """Start the thread."""
        for monitor in self._monitors:  # CPU use is measured since the sample before
            monitor.collect_metrics()
            monitor.clear_metrics()
        self._thread.start()

    def finish(self) -> None:
        """End the thread. A run shorter than the interval gets one sample too."""
        self._stopping.set()
        self._thread.join()
        if time.monotonic() - self._last > self._interval / 2:
            self._sample()

    def _work(self) -> None:
        while not self._stopping.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        self._last = time.monotonic()
        sample: dict[str, float] = {}
        try:
            for monitor in self._monitors:
                monitor.collect_metrics()
                sample |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            self._log({f"system/{name}": value for name, value in sample.items()}, self._step)
        except OSError as error:  # a full disk, or /proc out of reach: no reason to end a run
            logging.getLogger(__name__).debug("no sample of system metrics: %s", error)
        self._step += 1
