"""A run of the store, by its id, name or folder, as a version of the registered model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stocktake.errors import StocktakeError
from stocktake.registry.models import ASKED_TAG, CANDIDATE, COPIED_TAGS, version_of_model
from stocktake.registry.versions import ModelRegistry, Version
from stocktake.tracking.local_store import FINISHED, RUNNING, LocalRun, now_ms

MODEL = "model"
"""The name under which a run logs its model."""


def register_run(registry: ModelRegistry, asked: str, runs: Path) -> Version:
    """Make a finished run's model a version, and point the alias candidate at it.

    Asked twice for the same run it is the same version.

    Args:
        registry: opened.
        asked: the run's id, its name in the experiment, or its folder.
        runs: where a folder is looked for that is given by its name.

    Raises:
        StocktakeError: no such run, several of the name, not finished, or without a model.
    """
    run = _find(registry, asked, runs)
    name = run.info.run_name
    if run.info.status != FINISHED:
        raise StocktakeError(f"the run {name} ({run.info.run_id}) is {run.info.status}: register one that has finished")
    model = _model(registry, run)
    tags = {key: run.data.tags[key] for key in COPIED_TAGS if key in run.data.tags}
    if (score := run.data.metrics.get("val/macro_f1")) is not None:
        tags["val/macro_f1"] = f"{score:.6g}"
    moment = str(now_ms())
    number = version_of_model(
        registry.client, registry.name, model.model_id, run.info.run_id, {**tags, ASKED_TAG: moment}, f"Of run {name}."
    )
    version = registry.version(number)
    registry.set_alias(CANDIDATE, version)
    registry.set_tag(version, ASKED_TAG, moment)  # what an older run asks for later does not take the alias
    return registry.version(number)


def _find(registry: ModelRegistry, asked: str, runs: Path) -> Any:
    from mlflow.exceptions import MlflowException

    folder = next((path for path in (Path(asked), runs / asked) if (path / "run.json").is_file()), None)
    run_id = _uploaded(folder, runs) if folder else asked
    client = registry.client
    if re.fullmatch(r"[0-9a-f]{32}", run_id):
        try:
            return client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise StocktakeError(f"there is no run {run_id} in {registry.connection.shown}: correct --run") from error
    experiment_name = registry.tracking.experiment
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        names = ", ".join(repr(one.name) for one in client.search_experiments(max_results=30))
        raise StocktakeError(f"there is no experiment {experiment_name!r}: --tracking.experiment can be {names}")
    quoted = asked.replace("'", "")
    found = client.search_runs(
        [experiment.experiment_id],
        f"attributes.run_name = '{quoted}'",
        order_by=["attributes.start_time DESC"],
        max_results=6,
    )
    if len(found) == 1:
        return found[0]
    if found:
        raise StocktakeError(f"several runs are named {asked}: give the id of one as --run, such as {_listed(found)}")
    latest = client.search_runs(
        [experiment.experiment_id], "attributes.status = 'FINISHED'", order_by=["attributes.start_time DESC"]
    )[:6]
    there = f"--run can be {_listed(latest)}" if latest else "it has no finished run"
    raise StocktakeError(f"no run folder and no run {asked!r} in the experiment {experiment_name!r}: {there}")


def _uploaded(path: Path, runs: Path) -> str:
    """The id of a run folder's run."""
    folder = LocalRun.open(path)
    if folder.state.status == RUNNING:
        raise StocktakeError(f"{path} has not finished: register a run that has")
    run_id = folder.state.upload.run_id
    if run_id is None or folder.pending():
        missing = ", ".join(folder.pending())
        raise StocktakeError(
            f"{path} is not in the store in full ({missing}): `stocktake sync --workspace {runs.parent}` uploads it"
        )
    return run_id


def _model(registry: ModelRegistry, run: Any) -> Any:
    """The run's model."""
    client, run_id = registry.client, run.info.run_id
    experiments = [run.info.experiment_id]
    held = client.search_logged_models(experiments, filter_string=f"source_run_id = '{run_id}'")
    ready = [model for model in held if str(model.status) in ("READY", "LoggedModelStatus.READY")]
    named = [model for model in ready if model.name == MODEL] or ready
    if named:
        return max(named, key=lambda model: int(model.creation_timestamp))
    below = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=6)
    hint = f"; its child runs are {_listed(below)}" if below else ""
    raise StocktakeError(f"the run {run.info.run_name} has no model to register: give another --run{hint}")


def _listed(runs: list[Any]) -> str:
    """Runs as one would choose between them."""
    shown = []
    for run in runs:
        score = run.data.metrics.get("val/macro_f1")
        told = f", val/macro_f1 {score:.3f}" if score is not None else ""
        shown.append(f"{run.info.run_id} ({run.info.run_name}{told})")
    return ", ".join(shown)
