"""What the gate compares: predictions of the test split, from the runs of versions and of baselines."""

from __future__ import annotations

import operator
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocktake.config.data import BinsConfig
from stocktake.config.parser import option_names
from stocktake.config.runs import TrackingConfig
from stocktake.data.overlap import CHOSEN, describe_overlap, find_seen
from stocktake.evaluation.evaluation import FOLDER
from stocktake.evaluation.metrics import LOWER_IS_BETTER
from stocktake.redaction import without_credentials
from stocktake.registry.gate import Reference
from stocktake.registry.lineage import Lineage, trained_bins
from stocktake.registry.versions import ModelRegistry, Version

if TYPE_CHECKING:
    import pandas as pd

PREDICTIONS = f"{FOLDER}/test_predictions.parquet"
ENGINE_TAG = "test.engine"
"""Tag of a run whose test predictions are those of the exported model: the engine and number format that served it."""
BASELINES = ("majority", "frozen")
"""Stages that the first champion has to beat."""
_COLUMNS = {"id", "group", "quantity", "predicted", "expected"}


@dataclass(frozen=True)
class GateInputs:
    """Predictions of a challenger and of what it is compared with."""

    task: str
    fingerprint: str
    """Of the data of the challenger's run: the test split of the comparison."""
    commit: str
    predictions: pd.DataFrame | None
    reason: str
    """Why there are no predictions."""
    references: tuple[Reference, ...]
    dropped: int = 0
    """Test bins that were left out because the challenger or the champion has seen them."""
    warnings: tuple[str, ...] = ()
    """Of models whose training bins are not recorded."""


def gather_inputs(
    registry: ModelRegistry,
    version: Version,
    champion: Version | None,
    workspace: str,
    overlap: str = "refuse",
    metric: str = "macro_f1",
) -> GateInputs:
    """Fetch the predictions of a version and of the champion, or of the baselines while there is none.

    Args:
        registry: opened.
        version: the challenger.
        champion: what it is compared with.
        workspace: for the commands that make what is missing.
        overlap: refuse to compare on bins that either has seen, or drop them.
        metric: the gate's; by it, on val, the best run of a baseline is taken.
    """
    run = get_run(registry, version.run_id)
    tags: Mapping[str, str] = run.data.tags if run else {}
    source = _Source(registry, run, tags.get("task", ""), tags.get("data.fingerprint", ""), workspace, metric)
    predictions, reason = None, f"the run of {version.label} is gone"
    if run is not None:
        predictions, reason = source.of_version(version, run)
        reason = reason and f"{version.label}: {reason}"
    if champion is not None:
        references = [source.champion(champion)]
    else:
        references = [source.baseline(stage) for stage in BASELINES]
    commit = tags.get("git.commit", "")
    inputs = GateInputs(source.task, source.fingerprint, commit, predictions, reason, tuple(references))
    if run is None:
        return inputs
    models = filter(None, (version, champion))
    lineages = {model.label: trained_bins(registry.connection, model.run_id) for model in models}
    return _without_seen(inputs, lineages, version.label, run, overlap)


def _without_seen(
    inputs: GateInputs, lineages: Mapping[str, Lineage], challenger: str, run: Any, overlap: str
) -> GateInputs:
    """The inputs without what one of the models has seen: the bins, or all predictions of the model.

    Args:
        inputs: as the store has them.
        lineages: of the challenger and the champion, by their labels.
        challenger: its label.
        run: the challenger's.
        overlap: refuse or drop.
    """
    warnings = tuple(f"{model} is {lineage.warning}" for model, lineage in lineages.items() if lineage.unknown)
    inputs = replace(inputs, warnings=warnings)
    if inputs.predictions is None:
        return inputs
    own = lineages[challenger].own
    bins = inputs.predictions[["id", "group"]]
    if own is not None and bins["id"].isin(own.bins["id"]).all():
        bins = bins.merge(own.bins[["id", "phash"]], on="id")
    root, by = run.data.tags.get("data.root", ""), run.data.params.get("split.by", "group")
    seen = {model: bins[find_seen(bins, root, of.training, CHOSEN, by)] for model, of in lineages.items()}
    if overlap == "drop":
        ids = {bin_id for table in seen.values() for bin_id in table["id"]}

        def rest(table: pd.DataFrame | None) -> pd.DataFrame | None:
            return table if table is None else table[~table["id"].isin(ids)].reset_index(drop=True)

        references = tuple(replace(other, predictions=rest(other.predictions)) for other in inputs.references)
        return replace(inputs, predictions=rest(inputs.predictions), references=references, dropped=len(ids))
    for model, table in seen.items():
        reason = f"{describe_overlap(model, table, len(bins))}: --overlap drop leaves them out"
        if len(table) and model == challenger:
            inputs = replace(inputs, predictions=None, reason=reason)
        elif len(table):
            inputs = replace(inputs, references=tuple(replace(other, reason=reason) for other in inputs.references))
    return inputs


def get_run(registry: ModelRegistry, run_id: str | None) -> Any:
    """Return MLflow's run; None where it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = registry.client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run is not None and run.info.lifecycle_stage == "active" else None


@dataclass(frozen=True)
class _Source:
    """The store as the source of predictions on one test split."""

    registry: ModelRegistry
    run: Any
    """The challenger's; None if it is gone."""
    task: str
    fingerprint: str
    workspace: str
    metric: str

    def champion(self, champion: Version) -> Reference:
        run = get_run(self.registry, champion.run_id)
        task, data = (run.data.tags.get(name) for name in ("task", "data.fingerprint")) if run else (None, None)
        if run is not None and (task, data) == (self.task, self.fingerprint):
            predictions, reason = self.of_version(champion, run)
        else:
            predictions = self._of_evaluate_run(champion)
            reason = f"it was measured on task {task or '?'}, data {data or '?'}, not {self._split}"
        name = f"champion {champion.label}"
        if predictions is not None:
            return Reference(name, predictions)
        hint = self._command("evaluate", {"model": champion.uri}, self.registry.tracking.experiment)
        return Reference(name, None, reason, hint)

    def baseline(self, stage: str) -> Reference:
        """The stage's finished run on the split that is best on val by the gate's metric."""
        name = f"{stage} baseline"
        if self.run is None:
            return Reference(name, None, "the version's run is gone", guards_recall=False)
        if self.run.data.tags.get("stage") == stage:
            return Reference(name, None, f"the version is a {stage} baseline itself", guards_recall=False)
        experiment = self.run.info.experiment_id
        best_first = f"metrics.`val/{self.metric}` {'ASC' if self.metric in LOWER_IS_BETTER else 'DESC'}"
        for run in self._search([experiment], f"tags.stage = '{stage}'", best_first):
            if f"val/{self.metric}" in run.data.metrics and (predictions := self._fetch(run)) is not None:
                return Reference(name, predictions, guards_recall=False)
        experiment_name = self.registry.client.get_experiment(experiment).name
        reason = f"there is no run of it on {self._split} in the experiment {experiment_name!r}"
        size = self.run.data.params.get("image_size")
        hint = self._command(stage, {"image_size": size} if size else {}, experiment_name)
        return Reference(name, None, reason, hint, guards_recall=False)

    def of_version(self, version: Version, run: Any) -> tuple[pd.DataFrame | None, str]:
        """Those of the version's own run or, where it has none, of an `evaluate` run; or why there are none."""
        if not self.task or not self.fingerprint:
            return None, f"its run {run.info.run_name} has no tags task and data.fingerprint"
        predictions = self._fetch(run)
        if predictions is None:
            predictions = self._of_evaluate_run(version)
        if predictions is not None:
            return predictions, ""
        evaluate = self._command("evaluate", {"model": version.uri}, self.registry.tracking.experiment)
        missing = f"{PREDICTIONS} by the exported model (tag {ENGINE_TAG})"
        return None, f"its run {run.info.run_name} has no {missing}; `{evaluate}` makes them"

    @property
    def _split(self) -> str:
        return f"task {self.task}, data {self.fingerprint}"

    def _of_evaluate_run(self, version: Version) -> pd.DataFrame | None:
        """Of the version's latest `evaluate` run on the split, in the challenger's or the config's experiment."""
        experiments = {self.run.info.experiment_id} if self.run is not None else set()
        if (own := self.registry.client.get_experiment_by_name(self.registry.tracking.experiment)) is not None:
            experiments.add(own.experiment_id)
        condition = f"tags.stage = 'evaluate' AND tags.`model.version` = '{version.label}' AND tags.on = 'test'"
        runs = self._search(sorted(experiments), condition, "attributes.start_time DESC")
        tables = (self._fetch(run) for run in runs)
        return next((table for table in tables if table is not None), None)

    def _search(self, experiments: list[str], condition: str, order: str) -> list[Any]:
        """Finished runs on the split."""
        split = f"tags.task = '{self.task}' AND tags.`data.fingerprint` = '{self.fingerprint}'"
        condition = f"{condition} AND {split} AND attributes.status = 'FINISHED'"
        return list(self.registry.client.search_runs(experiments, condition, order_by=[order], max_results=20))

    def _fetch(self, run: Any) -> pd.DataFrame | None:
        """The run's predictions of its test split by the exported model; None if it has none, or of another form."""
        import pandas as pd

        run_id, client, folder = run.info.run_id, self.registry.client, PREDICTIONS.rpartition("/")[0]
        if ENGINE_TAG not in run.data.tags or PREDICTIONS not in {
            file.path for file in client.list_artifacts(run_id, folder)
        }:
            return None
        with tempfile.TemporaryDirectory() as temporary:
            table = pd.read_parquet(Path(client.download_artifacts(run_id, PREDICTIONS, temporary)))
        return table if set(table.columns) >= _COLUMNS else None

    def _command(self, name: str, options: Mapping[str, str], experiment: str) -> str:
        """A command on the bins of the challenger's run."""
        params: Mapping[str, str] = self.run.data.params if self.run else {}
        defaults, tracking = BinsConfig(), self.registry.tracking
        bins = {option: params[option] for option in option_names(BinsConfig) if params.get(option, "None") != "None"}
        bins["workspace"] = self.workspace
        if "root" not in params and self.run and "data.root" in self.run.data.tags:
            bins["root"] = self.run.data.tags["data.root"]
        changed = {option: text for option, text in bins.items() if text != _as_param(defaults, option)}
        stores = {"tracking.uri": tracking.uri, "tracking.registry_uri": tracking.registry_uri}
        where = {option: without_credentials(uri) for option, uri in stores.items() if uri}
        if experiment != TrackingConfig().experiment:
            where["tracking.experiment"] = experiment
        words = [f"--{option} {shlex.quote(text)}" for option, text in {**options, **changed, **where}.items()]
        return " ".join(["stocktake", name, *words])


def _as_param(settings: object, option: str) -> str:
    """A setting as a run's params have it."""
    value = operator.attrgetter(option)(settings)
    return str(list(value) if isinstance(value, tuple) else value)
