"""Runs in the store, by whatever names them: an id, a name, a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stocktake.errors import StocktakeError
from stocktake.registry.versions import ModelRegistry
from stocktake.tracking.local_store import RUNNING, LocalRun


def find_run(registry: ModelRegistry, asked: str, runs: Path, option: str = "--run") -> Any:
    """MLflow's run.

    Args:
        registry: opened.
        asked: the run's id (or runs:/ID), its name in the experiment, or its folder.
        runs: where a folder is looked for that is given by its name.
        option: names it in errors.

    Raises:
        StocktakeError: no such run, several of the name, or not uploaded.
    """
    from mlflow.exceptions import MlflowException

    folder = next((path for path in (Path(asked), runs / asked) if (path / "run.json").is_file()), None)
    run_id = _uploaded(folder, runs) if folder else asked.removeprefix("runs:/")
    client = registry.client
    if re.fullmatch(r"[0-9a-f]{32}", run_id):
        try:
            return client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise StocktakeError(
                f"there is no run {run_id} in {registry.connection.shown}: correct {option}"
            ) from error
    experiment_name = registry.tracking.experiment
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        names = ", ".join(repr(experiment.name) for experiment in client.search_experiments(max_results=30))
        raise StocktakeError(f"there is no experiment {experiment_name!r}: --tracking.experiment can be {names}")

    def search(condition: str) -> list[Any]:
        order = ["attributes.start_time DESC"]
        return list(client.search_runs([experiment.experiment_id], condition, order_by=order, max_results=6))

    quoted = asked.replace("'", "")
    matches = search(f"attributes.run_name = '{quoted}'")
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise StocktakeError(
            f"several runs are named {asked}: give the id of one as {option}, such as {list_runs(matches)}"
        )
    latest = search("attributes.status = 'FINISHED'")
    hint = f"{option} can be {list_runs(latest)}" if latest else "it has no finished run"
    raise StocktakeError(f"no run folder and no run {asked!r} in the experiment {experiment_name!r}: {hint}")


def _uploaded(path: Path, runs: Path) -> str:
    """Return the id of a run folder's run."""
    folder = LocalRun.open(path)
    if folder.state.status == RUNNING:
        raise StocktakeError(f"{path} has not finished: register a run that has")
    run_id = folder.run_id
    if run_id is None or not folder.is_uploaded():
        raise StocktakeError(
            f"{path} is not in the store in full: `stocktake sync --workspace {runs.parent}` uploads it"
        )
    return run_id


def list_runs(runs: list[Any]) -> str:
    """Runs with what one would choose between them by."""
    shown = []
    for run in runs:
        score = run.data.metrics.get("val/macro_f1")
        figure = f", val/macro_f1 {score:.3f}" if score is not None else ""
        shown.append(f"{run.info.run_id} ({run.info.run_name}{figure})")
    return ", ".join(shown)
