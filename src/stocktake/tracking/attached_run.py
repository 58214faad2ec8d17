"""The run that `mlflow run` has opened for this process: the one place that reads MLFLOW_RUN_ID."""

from __future__ import annotations

import os

VARIABLE = "MLFLOW_RUN_ID"


def attached_run_id() -> str | None:
    """Its id; None if there is none, or it has been taken."""
    return os.environ.get(VARIABLE) or None


def take_attached_run_id() -> str | None:
    """Its id, for the one run that continues it: runs started later, and child processes, do not get it."""
    return os.environ.pop(VARIABLE, None) or None
