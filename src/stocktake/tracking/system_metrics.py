"""CPU, memory, disk, network and GPU use of this machine, sampled by MLflow's own monitors."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

SECONDS = 10.0
_MONITORS: tuple[Any, ...] = (CPUMonitor, DiskMonitor, NetworkMonitor)
_INTERVAL: Any = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL


class FolderMonitor(SystemMetricsMonitor):
    """MLflow's monitor, with the run folder where it has a store.

    MLflow's own asks the store before every sample, and ends when the store is away.
    """

    def __init__(self, record: Callable[[Mapping[str, float], int], None]) -> None:
        """`record` takes metrics named system/... and a step that counts samples; it is called in a thread."""
        # Not super().__init__: it opens the store.
        self.monitors: list[Any] = [monitor() for monitor in _MONITORS]
        log = logging.getLogger("mlflow.system_metrics.system_metrics_monitor")
        level = log.level
        log.setLevel(logging.ERROR)  # "Skip logging GPU metrics" is no news on a laptop
        gpu = self._initialize_gpu_monitor()
        log.setLevel(level)
        if gpu is not None:
            self.monitors.append(gpu)
        self._record = record
        self._interval = float(_INTERVAL.get() or SECONDS)
        self._step = 0
        self._last = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self.monitor, daemon=True, name="system-metrics")

    def start(self) -> None:
        """Sample every 10 seconds, or MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL."""
        self._collect()  # CPU use is counted since the last look; the first look has none
        self._clear()
        self._thread.start()

    def monitor(self) -> None:
        """The thread."""
        while not self._stopping.wait(self._interval):
            self._sample()

    def finish(self) -> None:
        """End the thread. A run shorter than the interval gets one sample too."""
        self._stopping.set()
        self._thread.join()
        if time.monotonic() - self._last > self._interval / 2:
            self._sample()

    def _sample(self) -> None:
        self._last = time.monotonic()
        try:
            self._collect()
            sample: dict[str, float] = {}
            for monitor in self.monitors:
                sample.update(monitor.aggregate_metrics())
            self._record({f"system/{name}": value for name, value in sample.items()}, self._step)
        except OSError as error:  # a full disk, or /proc out of reach: no reason to end a run
            logging.getLogger(__name__).debug("no sample of system metrics: %s", error)
        self._step += 1
        self._clear()

    def _collect(self) -> None:
        self.collect_metrics()  # type: ignore[no-untyped-call]

    def _clear(self) -> None:
        for monitor in self.monitors:
            monitor.clear_metrics()
