"""Tags that say which code, user and commit a run comes from."""

from __future__ import annotations

import getpass
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import stocktake


def source_tags(*, attached: bool = False) -> dict[str, str]:
    """Version, program, user and git commit. A run that `mlflow run` opened (`attached`) has its source already."""
    tags = {"stocktake.version": stocktake.__version__}
    if not attached:
        tags |= {"mlflow.source.name": Path(sys.argv[0]).name or "stocktake", "mlflow.source.type": "LOCAL"}
        with suppress(OSError, KeyError, ImportError):  # a container may have no user name
            tags["mlflow.user"] = getpass.getuser()
    package = Path(stocktake.__file__).parent
    # An installed package says nothing about the checkout that its environment happens to lie in.
    folder = Path.cwd() if "site-packages" in package.parts else package
    if commit := git(folder, "rev-parse", "HEAD"):
        tags |= {"git.commit": commit, "mlflow.source.git.commit": commit}
        if git(folder, "status", "--porcelain", "--untracked-files=no"):
            tags["git.dirty"] = "true"
    return tags


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None outside of a checkout, or without git. A checkout's fsmonitor program is not run."""
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
