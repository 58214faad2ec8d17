"""Which bins a model was trained on: as its run recorded them, and the runs whose weights it started from."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stocktake.config.runs import TrackingConfig
from stocktake.data.ids_by_split import FILE, RUN_COLUMNS, read_ids_by_split, write_ids_by_split
from stocktake.data.overlap import CHOSEN, TrainingBins, describe_overlap, find_seen
from stocktake.errors import StocktakeError
from stocktake.registry.runs import find_run
from stocktake.registry.versions import ModelRegistry
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection
from stocktake.tracking.local_store import LocalRun

STARTED_FROM = "started_from"
"""Tag of a run that began with the weights of others: their ids, separated by commas."""


@dataclass(frozen=True)
class Lineage:
    """The trainings behind a model."""

    own: TrainingBins | None
    """Of the model's run; None: not recorded."""
    ancestors: tuple[TrainingBins, ...]
    """Of the runs that it started from."""
    unknown: tuple[str, ...]
    """Runs among all of these whose ids by split are not recorded: what they saw cannot be audited."""

    @property
    def training(self) -> tuple[TrainingBins, ...]:
        """All that are recorded."""
        return (self.own, *self.ancestors) if self.own else self.ancestors

    @property
    def warning(self) -> str:
        """What cannot be audited; empty if all can."""
        if not self.unknown:
            return ""
        return f"unauditable: no {FILE} in {', '.join(self.unknown)}, so nobody can say which bins it was trained on"


def trained_bins(connection: Connection | None, run: str | Path | None) -> Lineage:
    """The bins of a training run and of those it started from, however many.

    Args:
        connection: the store; None: there is none, and only run folders can be read.
        run: its id, its folder, or None where the model has none.
    """
    training: dict[str | Path | None, TrainingBins | None] = {}
    pending = [run]
    while pending:
        current = pending.pop(0)
        if current in training:
            continue
        tags, bins = _recorded(connection, current)
        training[current] = None if bins is None else TrainingBins(bins, tags.get("data.root", ""))
        pending += [run_id for name in tags.get(STARTED_FROM, "").split(",") if (run_id := name.strip())]
    unknown = tuple(f"run {key}" if key else "its missing run" for key, bins in training.items() if bins is None)
    own = training.pop(run)
    return Lineage(own, tuple(filter(None, training.values())), unknown)


def check_test_split(model: str, lineage: Lineage, by: str) -> None:
    """Raises StocktakeError if the model started from one that was trained on bins of its own test split."""
    if lineage.own is None:
        return
    bins, root = lineage.own.bins, lineage.own.root
    in_test = (bins["split"] == "test").to_numpy()
    seen = find_seen(bins, root, lineage.ancestors, CHOSEN, by) & in_test
    if seen.any():
        overlap = describe_overlap(model, bins[seen], int(in_test.sum()))
        raise StocktakeError(
            f"{overlap} of its test split: train it again with the splits of that run, --split.like RUN"
        )


def run_of_model(folder: Path) -> str | Path | None:
    """The run of a saved model: its id, or its folder where the model lies in one; None: it says none."""
    if (folder.parent.parent / "run.json").is_file():
        return folder.parent.parent
    run_id = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8")).get("run_id")
    return str(run_id) if run_id else None


def file_of_splits(asked: str, tracking: TrackingConfig, workspace: Path) -> str:
    """The file of ids by split that --split.like means: a file, a run folder's, or a run's, which is downloaded.

    Raises:
        StocktakeError: no such run, or it recorded none.
    """
    for path in (Path(asked), workspace / "runs" / asked):
        if path.is_file():
            return str(path)
        if (path / "artifacts" / FILE).is_file():
            return str(path / "artifacts" / FILE)
    registry = ModelRegistry(tracking)
    with registry.opened():
        run = find_run(registry, asked, workspace / "runs", "--split.like")
        target = workspace / "manifests" / f"like-{run.info.run_id}.parquet"
        if not target.is_file():
            _, bins = _recorded(registry.connection, run.info.run_id)
            if bins is None:
                raise StocktakeError(f"--split.like {asked}: the run recorded no {FILE}: give another run, or a file")
            write_ids_by_split(target, bins)
    return str(target)


def open_store(tracking: TrackingConfig) -> Connection | None:
    """The store; None offline."""
    if tracking.offline:
        return None
    connection = Connection(resolve(tracking))
    connection.open()
    return connection


def _recorded(connection: Connection | None, run: str | Path | None) -> tuple[dict[str, str], Any]:
    """A run's tags, and its ids by split; None where it has none."""
    if isinstance(run, Path):
        tags, path = LocalRun.open(run).tags, run / "artifacts" / FILE
        return tags, _read(path) if path.is_file() else None
    if run is None or connection is None:
        return {}, None
    from mlflow.exceptions import MlflowException

    try:
        tags = connection.client.get_run(run).data.tags
        if FILE not in {file.path for file in connection.client.list_artifacts(run)}:
            return tags, None
        with tempfile.TemporaryDirectory() as temporary:
            return tags, _read(Path(connection.client.download_artifacts(run, FILE, temporary)))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}, None


def _read(path: Path) -> Any:
    """The ids by split; None where the file is damaged or another's."""
    try:
        bins = read_ids_by_split(path)
    except ValueError:
        return None
    is_whole = set(RUN_COLUMNS) <= set(bins.columns) and bins["phash"].str.fullmatch("[0-9a-f]{16}").all()
    return bins if is_whole else None
