"""Figures of a study: what was found when, which settings mattered, how the trials went.

Drawn by Optuna, then made readable: it sizes its figures for a handful of short parameter names.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.ticker
import numpy as np
from optuna.distributions import IntDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as draw

from stocktake.evaluation.figures import BLUE, GREY, INK, ORANGE, PALE, headline, plain, save
from stocktake.tuning.study import best_trial, objectives_of, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4
"""Panels side by side in the slice figure."""


class _SkippedError(Exception):
    """Why a figure cannot be drawn yet."""


def plot_study(study: Study, folder: Path) -> dict[str, str]:
    """Draw a study into a folder, which is made when it is not there.

    `history.png`, `importance.png`, `parallel_coordinates.png`, `slice.png`, `intermediate.png`, and
    `pareto_front.png` of a study with two objectives. Each is written beside its place and then moved there.

    Returns:
        File name -> "", or why the figure was skipped, in a line. A small study is no error.
    """
    figures: dict[str, Callable[[Study], Figure]] = {
        "history.png": _history,
        "importance.png": _importance,
        "parallel_coordinates.png": _parallel_coordinates,
        "slice.png": _slice,
        "intermediate.png": _intermediate,
    }
    if len(study.directions) > 1:
        figures["pareto_front.png"] = _pareto_front
    return {name: _drawn(make, study, folder / name) for name, make in figures.items()}


def _drawn(make: Callable[[Study], Figure], study: Study, path: Path) -> str:
    with _apart():
        try:
            save(make(study), path, dpi=110)
        except _SkippedError as reason:
            return str(reason)
        except OSError:
            raise  # such as a full disk
        except Exception as error:  # a figure that Optuna or matplotlib cannot draw must not cost the study its end
            logging.getLogger(__name__).debug("%s", path, exc_info=True)
            return f"cannot be drawn: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


@contextmanager
def _apart() -> Iterator[None]:
    """Leave no trace: Optuna draws with pyplot, changes its style for good, and warns of its own experiments."""
    from matplotlib import pyplot

    matplotlib.use("agg")  # no window system
    before = set(pyplot.get_fignums())
    with pyplot.rc_context({"figure.constrained_layout.use": True}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for number in set(pyplot.get_fignums()) - before:
                pyplot.close(number)


# The figures ----------------------------------------------------------------------------------------------------------


def _history(study: Study) -> Figure:
    trials = _completed(study, 1)
    objective = objectives_of(study)[0]
    axes = draw.plot_optimization_history(study, target=_target(study), target_name=objective)
    figure = _sized(axes, 8.0, 4.4)
    _restyle(axes, _counts(study), "Trial", objective)
    axes.locator_params(axis="x", integer=True)
    dots, line = axes.collections[0], axes.lines[0] if axes.lines else None
    dots.set(color=BLUE, zorder=3, label="a trial")
    if line is not None:
        line.set(color=ORANGE, alpha=1, drawstyle="steps-post", label="best so far")
    others = [trial.number for trial in study.get_trials(deepcopy=False) if trial.state in _MARKS]
    for state, (color, word) in _MARKS.items():
        numbers = [trial.number for trial in study.get_trials(deepcopy=False) if trial.state is state]
        axes.plot(
            numbers,
            [0.02] * len(numbers),
            "x" if state is TrialState.PRUNED else "v",
            color=color,
            ms=5,
            transform=axes.get_xaxis_transform(),
            label=word if numbers else None,
        )
    numbers = [trial.number for trial in trials] + others
    axes.set_xlim(min(numbers) - 0.7, max(numbers) + 0.7)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.06 * (high - low), high)  # room for the marks below
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, labelcolor=INK)
    best = max(trials, key=lambda trial: (trial.values[0], -trial.number))
    headline(figure, f"{study.study_name}: best {objective} {best.values[0]:.3f}, by trial {best.number}")
    return figure


_MARKS = {TrialState.PRUNED: ("#9A9A9A", "pruned"), TrialState.FAIL: (ORANGE, "failed")}


def _importance(study: Study) -> Figure:
    names = _varying(_completed(study, 2))
    axes = draw.plot_param_importances(study, params=names)
    if not axes.patches:
        raise _SkippedError("no setting's importance can be told from these trials")
    figure = _sized(axes, 8.0, 1.6 + 0.42 * len(names))
    _restyle(axes, _counts(study), "Share of the spread that the setting explains (PED-ANOVA)", "")
    axes.set_yticks(axes.get_yticks(), [_short(label.get_text()) for label in axes.get_yticklabels()])
    axes.grid(visible=False, axis="y")
    for number, patch in enumerate(axes.patches):
        patch.set_color((BLUE, ORANGE)[number // len(names)])  # a bar a setting for the one objective, then the other
    for text in axes.texts:
        text.set(fontsize=9, color=INK)
        text.set_x(text.get_position()[0] + 0.005)
    if len(study.directions) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    elif legend := axes.get_legend():
        legend.remove()
    headline(figure, f"{study.study_name}: which settings mattered")
    return figure


def _parallel_coordinates(study: Study) -> Figure:
    trials = _completed(study, 2)
    names = _varying(trials)
    objectives = objectives_of(study)
    axes = draw.plot_parallel_coordinate(study, params=names, target_name=objectives[0])
    figure = _sized(axes, 2.6 + 1.7 * (len(names) + len(objectives) - 1), 5.4)
    axes.set_title("", loc="center")
    axes.set_title(_counts(study), loc="left", fontsize=9.5, color=GREY, pad=14)
    lines = axes.collections[-1]
    lines.set(linewidth=1.6, alpha=0.85, cmap=_cut("Blues_r" if len(objectives) > 1 else "Blues"))
    labels = [*objectives, *(_short(name, "\n") for name in names)]  # Optuna's are cut off after some letters
    axes.set_xticks(axes.get_xticks(), labels, rotation=0, fontsize=9, color=INK)
    axes.tick_params(axis="x", length=0, pad=8)
    bar, *others = figure.axes[1:]  # the colour bar was made before the axes of the settings
    bar.set_ylabel("Pareto rank" if len(objectives) > 1 else objectives[0], fontsize=9, color=INK)
    for one, name in zip(others, [*objectives[1:], *names], strict=True):
        if one.get_yscale() == "log":
            _plain_numbers(one.yaxis)
        texts = [label.get_text() for label in one.get_yticklabels()]
        if any(name not in trial.params for trial in trials) and "None" in texts:
            one.set_yticklabels(["-" if text == "None" else text for text in texts])  # does not hold there
        elif any(isinstance(trial.distributions.get(name), IntDistribution) for trial in trials):
            one.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=8, integer=True))
    for one in figure.axes:
        one.tick_params(axis="y", labelsize=8, colors=INK)
        one.set_facecolor("none")
        one.grid(visible=False)
        for spine in one.spines.values():
            spine.set_color(GREY)
        for label in one.get_yticklabels(which="both"):
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6})
    headline(figure, f"{study.study_name}: the completed trials, a line each")
    return figure


def _slice(study: Study) -> Figure:
    from matplotlib.gridspec import GridSpec

    trials = _completed(study, 2)
    names = _varying(trials)
    objective = objectives_of(study)[0]
    drawn = draw.plot_slice(study, params=names, target=_target(study), target_name=objective)
    panels: list[Axes] = [*np.ravel(np.asarray(drawn, dtype=object))]
    figure = _figure(panels[0])
    figure.axes[-1].remove()  # the colour bar; it is made anew beside the grid
    rows = math.ceil(len(panels) / _COLUMNS)
    columns = min(len(panels), _COLUMNS)
    _sized(panels[0], 1.6 + 2.7 * columns, 1.5 + 2.5 * rows)
    grid = GridSpec(rows, columns, figure=figure)
    for number, (axes, name) in enumerate(zip(panels, sorted(names), strict=True)):
        axes.set_subplotspec(grid[number // columns, number % columns])
        _restyle(axes, "", _short(name, "\n"), objective if number % columns == 0 else "")
        axes.set_title("")
        axes.tick_params(labelleft=number % columns == 0, labelbottom=True)
        texts = [label.get_text().strip("'") for label in axes.get_xticklabels()]
        low, high = axes.get_xlim()
        if any(isinstance(trial.params.get(name), str) for trial in trials):
            axes.set_xticks(axes.get_xticks(), texts, rotation=20 if max(map(len, texts)) > 8 else 0, ha="right")
            axes.set_xlim(-0.5, len(texts) - 0.5)
        elif axes.get_xscale() == "log":
            axes.set_xlim(low * (low / high) ** 0.06, high * (high / low) ** 0.06)
            _plain_numbers(axes.xaxis)
        else:
            axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
            if _whole(trials, name):
                axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=6, integer=True))
        for dots in axes.collections:
            dots.set(edgecolor="white", linewidth=0.5, cmap=_cut("Blues"), sizes=[34])
            dots.set_clim(0, max(trial.number for trial in trials))  # Optuna scales each panel by itself
    bar = figure.colorbar(panels[0].collections[0], ax=panels, aspect=30, pad=0.02)
    bar.set_label("Trial", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK, length=0)
    bar.outline.set_visible(False)
    bar.locator = matplotlib.ticker.MaxNLocator(integer=True)
    headline(figure, f"{study.study_name}: {objective} by setting, later trials darker")
    return figure


def _intermediate(study: Study) -> Figure:
    if len(study.directions) > 1:
        raise _SkippedError("trials with two objectives report nothing on their way")
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False) if trial.intermediate_values}
    if not trials:
        raise _SkippedError("no trial has reported a value on its way")
    axes = draw.plot_intermediate_values(study)
    figure = _sized(axes, 8.0, 4.6)
    objective = objectives_of(study)[0]
    _restyle(axes, _counts(study), "Epoch", objective)
    axes.locator_params(axis="x", integer=True)
    if legend := axes.get_legend():
        legend.remove()
    best = best_trial(study)
    named: dict[str, Any] = {}
    for line in axes.get_lines():
        trial = trials[int(str(line.get_label()).removeprefix("Trial"))]
        word, color, width, order = _way(trial, best)
        line.set(color=color, linewidth=width, alpha=1, zorder=order, marker=".", markersize=3)
        if trial.state in _MARKS:
            x, y = np.asarray(line.get_xdata())[-1], np.asarray(line.get_ydata())[-1]
            (line,) = axes.plot(x, y, "x" if trial.state is TrialState.PRUNED else "v", color=color, ms=7, zorder=order)
        named.setdefault(word, line)
    axes.legend(
        [*named.values()],
        [*named],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    headline(figure, f"{study.study_name}: {objective} on the way")
    return figure


def _way(trial: FrozenTrial, best: FrozenTrial | None) -> tuple[str, str, float, int]:
    """How a trial's curve is drawn: what it is called, its colour, its width, how far in front."""
    if best is not None and trial.number == best.number:
        return f"the best, trial {best.number}", BLUE, 2.6, 5
    if trial.state in _MARKS:
        color, word = _MARKS[trial.state]
        return word, color, 0.7, 1
    if trial.state is TrialState.COMPLETE:
        return "completed", "#8FB8D8", 1.2, 2
    return "unfinished", PALE, 1.2, 1  # running, or killed


def _pareto_front(study: Study) -> Figure:
    _completed(study, 1)
    front = pareto_front(study)
    objectives = objectives_of(study)
    axes = draw.plot_pareto_front(study, target_names=[*objectives])
    figure = _sized(axes, 7.2, 4.8)
    _restyle(axes, _counts(study), objectives[0], objectives[1])
    for dots in axes.collections:
        on_front = dots.get_label() == "Best Trial"
        dots.set(color=ORANGE if on_front else "#8FB8D8", label="on the front" if on_front else "beaten", sizes=[42])
    steps = sorted(front, key=lambda trial: trial.values[0])
    points = np.array([trial.values for trial in steps])
    axes.plot(points[:, 0], points[:, 1], color=ORANGE, linewidth=1, drawstyle="steps-pre", zorder=1)
    for trial in steps:
        axes.annotate(f"{trial.number}", trial.values, xytext=(5, 5), textcoords="offset points", fontsize=8, color=INK)
    axes.margins(0.08)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, labelcolor=INK)
    headline(figure, f"{study.study_name}: {len(front)} trials that no other beats in both (numbered)")
    return figure


# Their parts ----------------------------------------------------------------------------------------------------------


def _completed(study: Study, least: int) -> list[FrozenTrial]:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(trials) < least:
        raise _SkippedError(f"needs {least} completed trial{'s' if least > 1 else ''}, there {_are(len(trials))}")
    return trials


def _are(count: int) -> str:
    return f"are {count}" if count != 1 else "is 1"


def _varying(trials: Sequence[FrozenTrial]) -> list[str]:
    """The parameters that had more than one value, by name."""
    values: dict[str, set[Any]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    names = sorted(name for name, seen in values.items() if len(seen) > 1)
    if not names:
        raise _SkippedError("no parameter has had two values in completed trials")
    return names


def _target(study: Study) -> Callable[[FrozenTrial], float] | None:
    """The first objective, where Optuna wants to be told which."""
    return (lambda trial: trial.values[0]) if len(study.directions) > 1 else None


def _counts(study: Study) -> str:
    """How many trials there are, by state."""
    trials = study.get_trials(deepcopy=False)
    words = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    counts = {word: sum(trial.state is state for trial in trials) for state, word in words.items()}
    told = [f"{count} {word}" for word, count in counts.items() if count or word == "completed"]
    return f"{len(trials)} trials: {', '.join(told)}"


def _short(name: str, separator: str = " ") -> str:
    """A parameter's name with the choice that it holds under behind it: `image_size (backbone=resnet18)`."""
    way, _, setting = name.rpartition("/")
    if separator == "\n":
        way = way.replace("=", "=\n")
    return f"{setting}{separator}({way})" if way else name


def _cut(name: str) -> Any:
    """A colour map without its palest part, which is lost on white."""
    from matplotlib.colors import ListedColormap

    ends = (0.0, 0.75) if name.endswith("_r") else (0.25, 1.0)
    return ListedColormap(matplotlib.colormaps[name](np.linspace(*ends, 256)))


def _figure(axes: Any) -> Figure:
    figure: Figure = axes.get_figure()
    return figure


def _sized(axes: Any, width: float, height: float) -> Figure:
    """The figure of Optuna's axes, in inches and laid out without overlap."""
    figure = _figure(axes)
    figure.set_layout_engine("constrained")
    figure.set_size_inches(width, height)
    figure.set_facecolor("white")
    return figure


def _restyle(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title("", loc="center")
    plain(axes, title, xlabel, ylabel)
    axes.set_title(title, loc="left", fontsize=9.5, color=GREY)
    axes.set_facecolor("white")
    axes.grid(visible=True, color=PALE, linewidth=0.8)
    axes.grid(visible=False, which="minor")


def _whole(trials: Sequence[FrozenTrial], name: str) -> bool:
    """Whether a parameter has whole numbers only."""
    return all(isinstance(trial.params.get(name, 0), int) for trial in trials)


def _plain_numbers(axis: Any) -> None:
    """Mark a logarithmic axis at round numbers, written out: 0.0005. The longer it is, the rounder they are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1, 2, 3, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 1.6 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
