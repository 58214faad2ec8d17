"""Optuna's own plots of a study, as PNG files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from optuna import visualization
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

_LOGGER = logging.getLogger(__name__)


def plot_study(study: Study, folder: Path) -> None:
    """Draw a study into a folder, which is made when it is not there.

    `history.png`, `importances.png`, `parallel_coordinate.png`, `slice.png`, `intermediate_values.png`, and
    `pareto_front.png` of a study with two objectives. What Optuna cannot draw yet, such as importances after one trial,
    is left out.
    """
    from matplotlib import pyplot

    matplotlib.use("agg")  # no window system
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in _plots(study).items():
        with pyplot.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                axes = np.ravel(np.asarray(draw(), dtype=object))[0]
                axes.get_figure().savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
            except OSError:
                raise  # such as a full disk
            except Exception as error:  # a plot must not cost the study its end
                _LOGGER.debug("no %s.png: %s", name, error)
            finally:
                pyplot.close("all")


def _plots(study: Study) -> dict[str, Callable[[], Any]]:
    plots = visualization.matplotlib
    name = (study.metric_names or ["value"])[0]
    is_single = len(study.directions) == 1
    target: Callable[[FrozenTrial], float] | None = None if is_single else _first_value
    drawn: dict[str, Callable[[], Any]] = {}
    if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        drawn["history"] = lambda: plots.plot_optimization_history(study, target=target, target_name=name)
        drawn["importances"] = lambda: plots.plot_param_importances(study, target=target, target_name=name)
        drawn["parallel_coordinate"] = lambda: plots.plot_parallel_coordinate(study, target=target, target_name=name)
        drawn["slice"] = lambda: plots.plot_slice(study, target=target, target_name=name)
    if any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        drawn["intermediate_values"] = lambda: plots.plot_intermediate_values(study)
    if not is_single:
        drawn["pareto_front"] = lambda: plots.plot_pareto_front(study)
    return drawn


def _first_value(trial: FrozenTrial) -> float:
    return float(trial.values[0])
