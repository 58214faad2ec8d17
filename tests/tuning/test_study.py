"""Studies: what they keep, how many trials are left, what prunes them, and which failures are alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import Trial, TrialState

from stocktake.config.training import FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.tuning.plots import plot_study
from stocktake.tuning.space import parse_space
from stocktake.tuning.storage import open_storage
from stocktake.tuning.study import (
    KIND,
    OBJECTIVES,
    REASON,
    StudySpec,
    best_trial,
    create_study,
    failure_kind,
    failure_streak,
    load_study,
    make_pruner,
    make_sampler,
    trials_left,
)

SPACE = parse_space(
    {
        "lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
        "epochs": {"type": "int", "low": 2, "high": 8},
        "backbone": {"choices": ["resnet18", "resnet34"]},
    },
    FinetuneConfig(),
    "test",
)
SPEC = StudySpec(
    stage="finetune",
    objectives=OBJECTIVES[:1],
    sampler="random",
    pruner="none",
    seed=0,
    trials=9,
    fingerprint="f1",
    space=SPACE,
    config=FinetuneConfig(root="here", weight_decay=0.1),
)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Optuna needs a second for the tables of a new one."""
    path = tmp_path_factory.mktemp("empty") / "study.db"
    open_storage(f"sqlite:///{path}")
    return path.read_bytes()


@pytest.fixture
def url(empty_database: bytes, tmp_path: Path) -> str:
    (tmp_path / "study.db").write_bytes(empty_database)
    return f"sqlite:///{tmp_path}/study.db"


def value_of(settings: dict[str, Any]) -> float:
    """A made-up macro-F1 of settings."""
    return 0.5 - abs(settings["lr"] - 2e-3) * 20


def test_a_study_keeps_what_its_trials_share(url: str) -> None:
    create_study(open_storage(url), "s", SPEC)
    own = FinetuneConfig(workspace="elsewhere")
    study, spec = load_study(open_storage(url), "s", own)
    assert spec == dataclasses.replace(SPEC, config=dataclasses.replace(SPEC.config, workspace="elsewhere"))
    assert study.metric_names == ["val/macro_f1"]
    with pytest.raises(StocktakeError, match="other"):
        load_study(open_storage(url), "other")


def test_machines_share_a_study_only_with_the_same_spec(url: str) -> None:
    create_study(open_storage(url), "s", SPEC).ask()
    elsewhere = dataclasses.replace(SPEC, trials=20, config=dataclasses.replace(SPEC.config, root="there"))
    assert len(create_study(open_storage(url), "s", elsewhere).trials) == 1
    for changed, name in (
        (dataclasses.replace(SPEC, fingerprint="f2"), "fingerprint"),
        (dataclasses.replace(SPEC, config=dataclasses.replace(SPEC.config, weight_decay=0.2)), "weight_decay"),
    ):
        with pytest.raises(StocktakeError, match=name):
            create_study(open_storage(url), "s", changed)


def test_a_repeated_trial_does_not_count_twice(url: str) -> None:
    study = create_study(open_storage(url), "s", SPEC)
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        study.tell(study.ask(), 0.5 if state is TrialState.COMPLETE else None, state)
    study.ask()
    study.enqueue_trial({"lr": 1e-3})
    assert trials_left(study, 9) == 5  # running ones count, waiting ones do not
    study.tell(3, state=TrialState.FAIL)
    retry: Any = optuna.storages.RetryHeartbeatStaleTrialCallback()
    retry(study, study.trials[3])
    assert trials_left(study, 9) == 6
    study.ask()
    study.ask()
    assert trials_left(study, 9) == 4


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_a_trials_parameters_follow_from_seed_and_number(name: str) -> None:
    drawn = []
    for seed in (0, 0, 1):
        study = optuna.create_study(direction="maximize")
        for number in range(9):
            study.sampler = make_sampler(name, seed, number)
            study.optimize(lambda trial: value_of(SPACE.suggest(trial)), n_trials=1)
        drawn.append([trial.params for trial in study.trials])
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len({params["lr"] for params in drawn[0]}) == 9


@pytest.mark.parametrize("name", ["asha", "hyperband", "median", "none"])
def test_pruners_end_what_learns_nothing(name: str) -> None:
    def objective(trial: Trial) -> float:
        for epoch in range(1, 8):
            trial.report(epoch / 10 + trial.number / 100 if trial.number % 2 == 0 else 0.01, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 0.5

    study = optuna.create_study(study_name=name, direction="maximize", pruner=make_pruner(name, 8))
    study.optimize(objective, n_trials=12)
    pruned = [trial.number for trial in study.trials if trial.state is TrialState.PRUNED]
    assert all(number % 2 for number in pruned)
    assert len(pruned) >= 3 if name != "none" else not pruned
    assert isinstance(make_pruner(name, 1), optuna.pruners.NopPruner)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lr 0.01 must be below 1e-3", "lr 0.02 must be below 5E-4"),
        ("weights /a/b.pth: no such file", "weights /c/d/e.pth: no such file"),
        ("cannot read runs/a1/b.png", "cannot read runs/c3/d.png"),
        ("at 0x7f3a", "at 0x1"),
        ("loss is nan after 3 steps", "loss is inf after -12 steps"),
        ("http://u:p@a/b refused", "http://c refused"),
        ("first 1\nmore", "first 2"),
    ],
)
def test_failures_for_one_cause_are_one_kind(one: str, other: str) -> None:
    assert failure_kind(ValueError(one)) == failure_kind(ValueError(other))
    assert failure_kind(ValueError(one)) != failure_kind(TypeError(one))
    assert failure_kind(ValueError(one)) != failure_kind(ValueError(f"else {other}"))


def test_a_streak_is_failures_of_one_kind_with_nothing_between() -> None:
    study = optuna.create_study(direction="maximize")
    first = study.ask()  # still running while the others fail

    def fail(reason: str | None) -> str | None:
        trial = study.ask()
        if reason:
            trial.set_user_attr(REASON, reason)
            trial.set_user_attr(KIND, failure_kind(ValueError(reason)))
        study.tell(trial, state=TrialState.FAIL)
        return failure_streak(study)

    assert failure_streak(study) is None
    assert [fail("lr 0.1 is odd"), fail("lr 0.2 is odd"), fail("lr 0.3 is odd")] == [None, None, "lr 0.3 is odd"]
    assert failure_streak(study, length=4) is None
    study.tell(first, 0.5)  # the first by number, the last to end
    assert [fail("a"), fail("b"), fail("b"), fail("b")] == [None, None, None, "b"]
    assert [fail(None), fail(None), fail(None)] == [None] * 3  # killed processes are no failures alike


def test_plots_of_a_study_and_of_one_that_has_nothing_yet(tmp_path: Path) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.set_metric_names([*OBJECTIVES])
    plot_study(study, tmp_path / "empty")
    assert best_trial(study) is None
    study.optimize(lambda trial: (value_of(SPACE.suggest(trial)), trial.params["epochs"]), n_trials=5)
    plot_study(study, tmp_path / "both")
    names = {"history.png", "importances.png", "parallel_coordinate.png", "slice.png", "pareto_front.png"}
    assert {path.name for path in (tmp_path / "both").iterdir()} == names
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "both").iterdir())
