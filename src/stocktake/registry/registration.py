"""A run's model becomes a version of the registered model, with the alias candidate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stocktake.config.runs import TrackingConfig
from stocktake.data.overlap import overlap_label
from stocktake.errors import StocktakeError
from stocktake.registry.lineage import check_test_split, trained_bins
from stocktake.registry.model_card_data import try_to_publish_card
from stocktake.registry.models import search_versions
from stocktake.registry.runs import find_run, list_runs
from stocktake.registry.versions import CANDIDATE, ModelRegistry, Version
from stocktake.tracking.local_store import FINISHED

MODEL = "model"
"""The name under which a run logs its model."""
COPIED_TAGS = ("task", "stage", "data.fingerprint")
"""Of the run: a version has them too."""
_MODEL_DESCRIPTION = (
    "Counts the items in a warehouse bin: image bytes in; quantity, confidence and probabilities out."
    " The alias `candidate` is the last version that was registered, `champion` the one that is deployed."
)


def register_run(registry: ModelRegistry, asked: str, runs: Path) -> Version:
    """Make a finished run's model a version, and move the alias candidate onto it.

    The same run is the same version again.

    Args:
        registry: opened.
        asked: the run's id, its name in the experiment, or its folder.
        runs: where a folder is looked for that is given by its name.

    Raises:
        StocktakeError: no such run, several of the name, not finished, not uploaded, or without a model; or a model
            that it started from was trained on bins of its test split.
    """
    run = find_run(registry, asked, runs)
    name = run.info.run_name
    if run.info.status != FINISHED:
        raise StocktakeError(f"the run {name} ({run.info.run_id}) is {run.info.status}: register one that has finished")
    model = _model(registry, run)
    tags = {key: run.data.tags[key] for key in COPIED_TAGS if key in run.data.tags}
    if (score := run.data.metrics.get("val/macro_f1")) is not None:
        tags["val/macro_f1"] = f"{score:.6g}"
    lineage = trained_bins(registry.connection, run.info.run_id)
    check_test_split(name, lineage, run.data.params.get("split.by", "group"))
    if lineage.unknown:
        print(f"warning: {name} is {lineage.warning}", file=sys.stderr)
    tags["overlap"] = overlap_label(is_auditable=not lineage.unknown)
    number = _find_or_create_version(registry, model.model_id, run.info.run_id, tags, f"Of run {name}.")
    registry.set_alias(CANDIDATE, registry.version(number))
    return registry.version(number)


def register_candidate(tracking: TrackingConfig, run: Path, workspace: Path) -> Version | None:
    """Register a run that has just finished, with its card; an error is a warning that names the command for later.

    Args:
        tracking: the store and the registered model's name.
        run: the run's folder.
        workspace: that the run's folder is in.
    """
    command = f"`stocktake register --run {run}` registers it"
    if tracking.offline:
        print(f"candidate: {run.name}; once `stocktake sync` has uploaded it, {command}")
        return None
    try:
        with ModelRegistry(tracking).opened() as registry:
            version = register_run(registry, str(run), workspace / "runs")
            print(f"candidate: {version.label} ({version.tags.get('stage', '?')}), models:/{version.name}@{CANDIDATE}")
            try_to_publish_card(registry, version, workspace)
            return version
    except StocktakeError as error:
        print(f"warning: not registered ({error}); later, {command}", file=sys.stderr)
        return None


def _find_or_create_version(
    registry: ModelRegistry, model_id: str, run_id: str, tags: dict[str, str], description: str
) -> str:
    from mlflow.exceptions import MlflowException

    client, name, source = registry.client, registry.name, f"models:/{model_id}"
    try:
        client.create_registered_model(name, description=_MODEL_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = next((version for version in search_versions(client, name) if version.source == source), None)
    if version is None:
        options = {"tags": tags, "description": description, "await_creation_for": 0, "model_id": model_id}
        version = client.create_model_version(name, source, run_id=run_id, **options)
    return str(version.version)


def _model(registry: ModelRegistry, run: Any) -> Any:
    client, run_id = registry.client, run.info.run_id
    experiments = [run.info.experiment_id]
    models = client.search_logged_models(experiments, filter_string=f"source_run_id = '{run_id}'")
    ready = [model for model in models if str(model.status) in ("READY", "LoggedModelStatus.READY")]
    if named := [model for model in ready if model.name == MODEL] or ready:
        return max(named, key=lambda model: int(model.creation_timestamp))
    children = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=6)
    hint = f"; its child runs are {list_runs(children)}" if children else ""
    raise StocktakeError(f"the run {run.info.run_name} has no model to register: give another --run{hint}")
