"""`stocktake sync`: upload the runs that a tracking server could not take when they ran."""

from __future__ import annotations

from pathlib import Path

from stocktake.config.runs import SyncConfig
from stocktake.errors import StocktakeError


def sync(config: SyncConfig) -> dict[str, int]:
    """Upload every run folder of the workspace that no store has in full, and print a line for each.

    Returns:
        How many runs were `uploaded`, are still `running`, and were `complete` already; `pending` is 0.

    Raises:
        StocktakeError: there is no workspace, or something is still pending.
    """
    from stocktake.tracking.sync import sync_runs

    workspace = Path(config.workspace)
    if not workspace.is_dir():
        raise StocktakeError(f"there is no workspace {workspace}: name the folder of the runs with --workspace")
    counts = sync_runs(workspace / "runs", config.tracking, print)
    if counts["pending"]:
        raise StocktakeError(
            f"{counts['pending']} of the runs in {workspace / 'runs'} could not be uploaded (see above):"
            " start the server or correct --tracking.uri, and run `stocktake sync` again"
        )
    if not counts["uploaded"]:
        print(f"nothing to upload from {workspace / 'runs'}")
    return counts
