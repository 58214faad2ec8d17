"""`stocktake eda`: explore the bins in a tracked run, with figures and one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from stocktake.config.runs import EdaConfig
from stocktake.data.manifest import build_manifest
from stocktake.evaluation.eda import explore
from stocktake.tracking.local_store import DatasetRecord
from stocktake.tracking.runs import start_run


def eda(config: EdaConfig) -> dict[str, float]:
    """Explore the bins of a task and log the result as a run.

    Returns:
        The run's metrics, `eda/...`.

    Raises:
        StocktakeError: root, list, task or workspace cannot be used.
    """
    manifest = build_manifest(config)
    root, fingerprint = manifest.source.root, manifest.fingerprint
    tags = {"stage": "eda", "task": config.task, "data.root": root, "data.fingerprint": fingerprint}
    with start_run(config.tracking, workspace=Path(config.workspace), name="eda", tags=tags) as run:
        run.log_params({"task": config.task, "seed": config.seed, "split.by": manifest.split_config.by})
        counts = {str(split): int(count) for split, count in manifest.counts().sum().items()}
        run.log_dataset(DatasetRecord("bins", fingerprint, root, rows=len(manifest.bins), profile=counts), "eda")
        exploration = explore(manifest, seed=config.seed, near=config.split.near_duplicate_distance)
        page = exploration.save(run.artifacts, root=root, task=config.task, fingerprint=fingerprint)
        run.log_metrics(exploration.metrics)
    again, ratio = exploration.metrics["eda/repeated_share"], exploration.metrics["eda/imbalance_ratio"]
    print(f"{len(manifest.bins)} bins of task {config.task} in {root}: {again:.0%} seen again,")
    print(f"{ratio:.1f} times as many of the most frequent quantity as of the least frequent\npage: {page}")
    return exploration.metrics
