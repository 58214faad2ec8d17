"""A study's figures: there when they can be, a reason when not, never an error, and readable."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from optuna.trial import TrialState
from PIL import Image

from stocktake.config import FinetuneConfig
from stocktake.tuning import figures
from stocktake.tuning.figures import plot_study
from stocktake.tuning.space import Space, parse_space
from stocktake.tuning.study import OBJECTIVES, create_study, finish, make_sampler

SPACE = parse_space(
    {
        "lr": {"log_uniform": [1e-4, 1e-2]},
        "training.freeze_epochs": {"integer": [0, 2]},
        "batch_size": {"categorical": [16, 32, 64]},
        "backbone": {
            "categorical": {
                "efficientnet_lite0": {"image_size": {"categorical": [96, 128]}},
                "resnet18": {"weights": {"categorical": ["none"]}, "training.head_lr_factor": {"log_uniform": [1, 10]}},
            }
        },
    },
    FinetuneConfig(),
    "test",
)
NAMES = ["history.png", "importance.png", "parallel_coordinates.png", "slice.png", "intermediate.png"]
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def make(states: list[TrialState], objectives: int = 1, space: Space = SPACE, value: Any = None) -> optuna.Study:
    """A study in memory whose trials ended so; RUNNING ones are left running."""
    study = create_study(optuna.storages.InMemoryStorage(), "costs $5 or $6", OBJECTIVES[:objectives])
    for number, state in enumerate(states):
        trial = study.ask()
        study.sampler = make_sampler("random", 3, number)
        settings = space.suggest(trial)
        score = 0.5 - abs(math.log10(settings["lr"] / 1e-3)) / 5 if value is None else value
        for epoch in range(1, 3 if state is PRUNED else 5):
            if objectives == 1 and state is not FAIL:
                trial.report(score * epoch / 5, epoch)
        if state is not TrialState.RUNNING:
            finish(study, trial, state, [score, 20.0 + 3 * number][:objectives], reason="odd")
    return study


MIXED = [COMPLETE, COMPLETE, PRUNED, FAIL, COMPLETE, PRUNED, COMPLETE, COMPLETE, TrialState.RUNNING, COMPLETE]


@dataclass
class Drawn:
    study: optuna.Study
    told: dict[str, str]
    folder: Path
    figures: dict[str, Figure]


def draw(study: optuna.Study, folder: Path) -> Drawn:
    """The study's figures, as files and as they were when they were written."""
    kept: dict[str, Figure] = {}
    write = figures.save

    def keep(figure: Figure, path: Path, *, dpi: int) -> None:
        write(figure, path, dpi=dpi)
        kept[path.name] = figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", keep)
        return Drawn(study, plot_study(study, folder), folder, kept)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A study's figures; that drawing them changed nothing else is checked here, where it happens."""
    matplotlib.use("agg")  # as it is set there
    style = dict(matplotlib.rcParams)
    drawn = draw(make(MIXED), tmp_path_factory.mktemp("one") / "made" / "figures")
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == style
    return drawn


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return draw(make(MIXED * 2, objectives=2), tmp_path_factory.mktemp("two"))


def test_every_figure_of_a_study_is_drawn(one: Drawn) -> None:
    assert one.told == dict.fromkeys(NAMES, "")
    assert sorted(path.name for path in one.folder.iterdir()) == sorted(NAMES)
    for name in NAMES:
        with Image.open(one.folder / name) as picture:
            assert picture.format == "PNG"
            assert picture.width > 700
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20, f"{name} is empty"


def test_a_study_with_two_objectives_has_its_front(two: Drawn) -> None:
    told = dict(two.told)
    assert told.pop("intermediate.png") == "trials with two objectives report nothing on their way"
    assert told == dict.fromkeys([*NAMES[:4], "pareto_front.png"], "")
    assert not (two.folder / "intermediate.png").exists()
    assert (two.folder / "pareto_front.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ([], ["needs 1 completed trial, there are 0", *["needs 2 completed trials, there are 0"] * 3, "no trial has"]),
        ([FAIL, FAIL], ["needs 1", "needs 2", "needs 2", "needs 2", "no trial has reported a value on its way"]),
        ([COMPLETE], ["", *["needs 2 completed trials, there is 1"] * 3, ""]),
        ([PRUNED, TrialState.RUNNING], ["needs 1 completed trial, there are 0", "needs 2", "needs 2", "needs 2", ""]),
        ([COMPLETE, COMPLETE], ["", "", "", "", ""]),
    ],
    ids=["none", "failed", "one", "pruned", "two"],
)
def test_a_small_study_says_what_it_needs(states: list[TrialState], told: list[str], tmp_path: Path) -> None:
    reasons = plot_study(make(states), tmp_path)
    assert [*reasons] == NAMES
    for (name, reason), start in zip(reasons.items(), told, strict=True):
        assert reason.startswith(start), f"{name}: {reason}"
        assert bool(reason) == bool(start), f"{name}: {reason}"
        assert (tmp_path / name).exists() == (not reason)


def test_nothing_to_tell_apart_is_no_error(tmp_path: Path) -> None:
    fixed = parse_space({"lr": {"categorical": [1e-3]}}, FinetuneConfig(), "fixed")
    reasons = plot_study(make([COMPLETE] * 3, space=fixed), tmp_path / "fixed")
    alike = "no parameter has had two values in completed trials"
    assert reasons == dict(zip(NAMES, ["", alike, alike, alike, ""], strict=True))
    level = plot_study(make([COMPLETE] * 4, value=0.25), tmp_path / "level")  # all trials equally good
    assert all(not reason.startswith("cannot be drawn") for reason in level.values()), level


def test_a_figure_that_cannot_be_drawn_is_told_and_a_full_disk_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **settings: Any) -> None:
        raise IndexError("list index\nout of range")

    monkeypatch.setattr(figures.draw, "plot_slice", broken)
    assert plot_study(make([COMPLETE] * 2), tmp_path)["slice.png"] == (
        "cannot be drawn: IndexError: list index out of range"
    )
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        plot_study(make([COMPLETE] * 2), tmp_path / "file")
    assert pyplot.get_fignums() == []


def test_labels_do_not_overlap_and_all_settings_are_named_in_full(one: Drawn, two: Drawn) -> None:
    for name, figure in [*one.figures.items(), *two.figures.items()]:
        assert "costs $5 or $6: " in figure.get_suptitle()
        texts = []
        for axes in figure.axes:
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                shown = [label for label in labels if label.get_text() and label.get_visible()]
                boxes = [label.get_window_extent() for label in shown if label.get_rotation() == 0]
                for box, other in itertools.combinations(boxes, 2):
                    assert not box.overlaps(other), f"{name}: {[label.get_text() for label in shown]}"
            texts += [
                axes.get_xlabel(),
                *(label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())),
            ]
        if figure in two.figures.values() and name in ("importance.png", "parallel_coordinates.png", "slice.png"):
            for setting in ("lr", "training.freeze_epochs", "batch_size", "backbone", "training.head_lr_factor"):
                assert any(text.split("\n")[0].split(" ")[0] == setting for text in texts), f"{name}: {setting}"
            assert not any("weights" in text for text in texts), f"{name}: weights never varied"


def test_pruned_trials_are_marked_and_the_best_is_named(one: Drawn) -> None:
    best = one.study.best_trial.number
    (axes,) = one.figures["intermediate.png"].axes
    crosses = sorted(float(line.get_xdata()[0]) for line in axes.get_lines() if line.get_marker() == "x")
    assert crosses == [2.0, 2.0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(legend) == sorted(["completed", "pruned", "unfinished", f"the best, trial {best}"])
    (axes,) = one.figures["history.png"].axes
    marks = {line.get_label(): [*line.get_xdata()] for line in axes.get_lines() if line.get_marker() in ("x", "v")}
    assert marks == {"pruned": [2, 5], "failed": [3]}
    assert f"by trial {best}" in one.figures["history.png"].get_suptitle()


def test_colours_mean_the_same_trial_in_every_panel(one: Drawn) -> None:
    panels = [axes for axes in one.figures["slice.png"].axes if axes.get_xlabel()]
    assert len(panels) >= 4
    assert {dots.get_clim() for axes in panels for dots in axes.collections} == {(0, 9)}
