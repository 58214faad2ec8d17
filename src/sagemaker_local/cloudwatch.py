"""Log streams and metrics of jobs and endpoints in CloudWatch, within the server's process."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from typing import Any

from moto.cloudwatch.models import cloudwatch_backends
from moto.core.utils import utcnow
from moto.logs.models import logs_backends
from moto.sagemaker.models import SageMakerModelBackend

_MOST_CHARACTERS = 250_000
"""Of a log event; CloudWatch takes 256 KB."""


class LogStream:
    """One stream of a log group; both are created if they are missing."""

    def __init__(self, backend: SageMakerModelBackend, group: str, name: str) -> None:
        self._logs = logs_backends[backend.account_id][backend.region_name]
        self._group, self.name = group, name
        self._guard = threading.Lock()
        if group not in self._logs.groups:
            self._logs.create_log_group(group, {})
        if name not in self._logs.groups[group].streams:
            self._logs.create_log_stream(group, name)

    def write(self, line: str) -> None:
        """Append an event."""
        event = {"timestamp": int(time.time() * 1000), "message": line[:_MOST_CHARACTERS] or " "}
        with self._guard:
            self._logs.put_log_events(self._group, self.name, [event])


class JobMetrics:
    """What a job's regular expressions match in its log lines."""

    NAMESPACE = "/aws/sagemaker/TrainingJobs"

    def __init__(self, backend: SageMakerModelBackend, job: str, definitions: Sequence[dict[str, str]]) -> None:
        self._cloudwatch = cloudwatch_backends[backend.account_id][backend.region_name]
        self._job = job
        self._patterns = [(metric["Name"], re.compile(metric["Regex"])) for metric in definitions]
        self._guard = threading.Lock()
        self.values: dict[str, list[float]] = {}
        """Values of every metric, in order."""
        self.final: dict[str, dict[str, Any]] = {}
        """Last value of every metric, as in FinalMetricDataList."""

    def read(self, line: str) -> None:
        """Record the metrics of a log line."""
        for name, pattern in self._patterns:
            match = pattern.search(line)
            if match is None or not match.groups():
                continue
            try:
                value = float(match.group(1))
            except (ValueError, TypeError):
                continue
            now = utcnow()
            with self._guard:
                self.values.setdefault(name, []).append(value)
                self.final[name] = {"MetricName": name, "Value": value, "Timestamp": now}
                dimensions = [{"Name": "TrainingJobName", "Value": self._job}]
                datum = {"MetricName": name, "Value": value, "Timestamp": now, "Dimensions": dimensions}
                self._cloudwatch.put_metric_data(self.NAMESPACE, [datum])
