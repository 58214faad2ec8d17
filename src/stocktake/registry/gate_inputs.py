"""What the gate judges by: predictions of the test split, from the runs of versions and of baselines."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocktake.config import BinsConfig, TrackingConfig
from stocktake.registry.gate import Reference
from stocktake.registry.versions import ModelRegistry, Version
from stocktake.tracking.addresses import without_credentials

if TYPE_CHECKING:
    import pandas as pd

PREDICTIONS = "evaluation/test_predictions.parquet"
BASELINES = ("majority", "frozen")
"""Stages that the first champion has to beat."""
_NEEDED = {"id", "group", "quantity", "predicted"}


@dataclass(frozen=True)
class Challenger:
    """A version on its way through the gate, and what it is held against."""

    version: Version
    task: str
    fingerprint: str
    """Of its run's data: whose test split is judged on."""
    commit: str
    predictions: pd.DataFrame | None
    trouble: str
    """Why there are no predictions."""
    references: tuple[Reference, ...]


def gather(registry: ModelRegistry, version: Version, champion: Version | None, workspace: str) -> Challenger:
    """Fetch the predictions of a version and of the champion, or of the baselines while there is none.

    Args:
        registry: opened.
        version: the challenger.
        champion: what it is held against.
        workspace: for the commands that make what is missing.
    """
    run = _run(registry, version.run_id)
    tags: Mapping[str, str] = run.data.tags if run else {}
    task, fingerprint = tags.get("task", ""), tags.get("data.fingerprint", "")
    commands = _Commands(run, registry.tracking, workspace)
    predictions, trouble = None, f"the run of {version.label} is gone"
    if run is not None:
        predictions, trouble = _predictions_of(registry, run, version, task, fingerprint)
        trouble = trouble and f"{version.label}: {trouble}"
    if champion is not None:
        references = [_champion(registry, champion, task, fingerprint, run, commands)]
    else:
        references = [_baseline(registry, stage, run, task, fingerprint, commands) for stage in BASELINES]
    commit = tags.get("git.commit", "")
    return Challenger(version, task, fingerprint, commit, predictions, trouble, tuple(references))


def _champion(
    registry: ModelRegistry, champion: Version, task: str, fingerprint: str, challengers: Any, commands: _Commands
) -> Reference:
    name = f"champion {champion.label}"
    run = _run(registry, champion.run_id)
    own = (run.data.tags.get("task"), run.data.tags.get("data.fingerprint")) if run else ("", "")
    if run is not None and own == (task, fingerprint):
        predictions, trouble = _predictions_of(registry, run, champion, task, fingerprint)
    else:
        predictions, trouble = _evaluated(registry, champion, task, fingerprint, challengers), ""
        if predictions is None:
            trouble = (
                f"it was measured on task {own[0] or '?'}, data {own[1] or '?'}, not task {task}, data {fingerprint}"
            )
    return Reference(name, predictions, trouble, commands.evaluate(champion) if predictions is None else "")


def _baseline(
    registry: ModelRegistry, stage: str, run: Any, task: str, fingerprint: str, commands: _Commands
) -> Reference:
    name = f"{stage} baseline"
    if run is None:
        return Reference(name, None, "the version's run is gone", guards_recall=False)
    if run.data.tags.get("stage") == stage:
        return Reference(name, None, f"the version is a {stage} baseline itself", guards_recall=False)
    found = registry.client.search_runs(
        [run.info.experiment_id],
        f"tags.stage = '{stage}' AND tags.task = '{task}' AND tags.`data.fingerprint` = '{fingerprint}'"
        " AND attributes.status = 'FINISHED'",
        order_by=["metrics.`val/macro_f1` DESC"],
        max_results=20,
    )
    for one in found:
        if "val/macro_f1" in one.data.metrics and (predictions := _fetch(registry, one.info.run_id)) is not None:
            return Reference(name, predictions, guards_recall=False)
    experiment = registry.client.get_experiment(run.info.experiment_id).name
    trouble = f"there is no run of it on task {task}, data {fingerprint} in the experiment {experiment!r}"
    return Reference(name, None, trouble, commands.train(stage, experiment), guards_recall=False)


def _predictions_of(
    registry: ModelRegistry, run: Any, version: Version, task: str, fingerprint: str
) -> tuple[pd.DataFrame | None, str]:
    """Those of the version's own run or, where it has none, of an `evaluate` run; or why there are none."""
    if not task or not fingerprint:
        return None, f"its run {run.info.run_name} has no tags task and data.fingerprint"
    predictions = _fetch(registry, run.info.run_id)
    if predictions is None:
        predictions = _evaluated(registry, version, task, fingerprint, run)
    return predictions, "" if predictions is not None else f"its run {run.info.run_name} has no {PREDICTIONS}"


def _evaluated(
    registry: ModelRegistry, version: Version, task: str, fingerprint: str, beside: Any
) -> pd.DataFrame | None:
    """From the latest `evaluate` of the version on the split, in the experiment of a run or of the config."""
    client = registry.client
    experiments = {beside.info.experiment_id} if beside is not None else set()
    if (experiment := client.get_experiment_by_name(registry.tracking.experiment)) is not None:
        experiments.add(experiment.experiment_id)
    found = client.search_runs(
        sorted(experiments),
        f"tags.stage = 'evaluate' AND tags.`model.version` = '{version.label}' AND tags.on = 'test'"
        f" AND tags.task = '{task}' AND tags.`data.fingerprint` = '{fingerprint}' AND attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=5,
    )
    tables = (_fetch(registry, run.info.run_id) for run in found)
    return next((table for table in tables if table is not None), None)


def _fetch(registry: ModelRegistry, run_id: str) -> pd.DataFrame | None:
    """The run's predictions of its test split; None if it has none, or a table of another form."""
    import pandas as pd

    folder = PREDICTIONS.rpartition("/")[0]
    if PREDICTIONS not in {file.path for file in registry.client.list_artifacts(run_id, folder)}:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        table = pd.read_parquet(Path(registry.client.download_artifacts(run_id, PREDICTIONS, temporary)))
    return table if set(table.columns) >= _NEEDED else None


def _run(registry: ModelRegistry, run_id: str | None) -> Any:
    """The run; None where it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = registry.client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run is not None and run.info.lifecycle_stage == "active" else None


class _Commands:
    """Commands that make what the gate misses, on the bins of a run."""

    def __init__(self, run: Any, tracking: TrackingConfig, workspace: str) -> None:
        params: Mapping[str, str] = run.data.params if run else {}
        defaults = _flat(asdict(BinsConfig()))
        held = {name: params[name] for name in defaults if params.get(name, "None") != "None"}
        held.pop("workspace", None)
        held["workspace"] = workspace
        if "root" not in params and run and "data.root" in run.data.tags:
            held["root"] = run.data.tags["data.root"]
        self._bins = {name: text for name, text in held.items() if text != str(defaults[name])}
        self._image_size = params.get("image_size")
        self._tracking = tracking

    def evaluate(self, version: Version) -> str:
        """Of a version on the test split."""
        return self._command("evaluate", {"model": version.uri}, self._tracking.experiment)

    def train(self, stage: str, experiment: str) -> str:
        """Of a baseline."""
        own = {"image_size": self._image_size} if self._image_size else {}
        return self._command(stage, own, experiment)

    def _command(self, name: str, own: Mapping[str, str], experiment: str) -> str:
        tracking = self._tracking
        stores = {"uri": tracking.uri, "registry_uri": tracking.registry_uri}
        options = {**own, **self._bins}
        options |= {f"tracking.{key}": without_credentials(uri) for key, uri in stores.items() if uri}
        if experiment != TrackingConfig().experiment:
            options["tracking.experiment"] = experiment
        return " ".join(["stocktake", name, *(f"--{key} {shlex.quote(text)}" for key, text in options.items())])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested settings with dotted names and values as a run's params have them."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
