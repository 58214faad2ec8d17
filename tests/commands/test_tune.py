"""Studies for real on the tiny root: worker processes, killed ones too, a SQLite store, the files they leave."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState

from stocktake.cli import parse
from stocktake.commands.frozen import frozen
from stocktake.commands.trial import StudyFolder
from stocktake.commands.tune import tune
from stocktake.config import TrackingConfig, TrainingConfig, TuneConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.addresses import Stores
from stocktake.tracking.connection import Connection
from stocktake.tracking.local_store import LocalRun
from tiny_bins import PLAIN_BACKBONE, TINY_BACKBONE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MakeConfig = Callable[..., TuneConfig]


@pytest.fixture(scope="module")
def make_config(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """make_config(folder, space, **settings): a search over the tiny root, with a store of its own in the folder."""

    def make(folder: Path, space: dict[str, Any], /, **settings: Any) -> TuneConfig:
        folder.mkdir(exist_ok=True)
        laid_out = tmp_path_factory.getbasetemp() / "laid-out.db"
        if not laid_out.exists():
            Connection(Stores(f"sqlite:///{laid_out}", f"sqlite:///{laid_out}")).open()
        if not (folder / "mlflow.db").exists():
            shutil.copy(laid_out, folder / "mlflow.db")
        (folder / "space.yaml").write_text(yaml.safe_dump(space))
        usual = {
            "workspace": str(folder / "workspace"),
            "space": str(folder / "space.yaml"),
            "backbone": PLAIN_BACKBONE,
            "weights": "none",
            "batch_size": 8,
            "precision": "fp32",
            "epochs": 3,
            "training": TrainingConfig(augment="none"),
            "sampler": "random",
        }
        uri = f"sqlite:///{folder}/mlflow.db"
        tracking = TrackingConfig(uri=uri, experiment="search", system_metrics=False)
        return TuneConfig(**{**tiny_settings, **usual, "tracking": tracking, **settings})

    return make


def study_of(config: TuneConfig) -> StudyFolder:
    (path,) = Path(config.workspace, "runs").glob("tune-*")
    return StudyFolder.open(path, config.tracking, config.storage)


def trials_of(config: TuneConfig) -> list[FrozenTrial]:
    return study_of(config).load().get_trials(deepcopy=False)


def runs_of(config: TuneConfig) -> dict[str, Any]:
    """The study's MLflow runs by name; no two of them bear the same."""
    client = mlflow.MlflowClient(config.tracking.uri, config.tracking.uri)
    experiment = client.get_experiment_by_name("search")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {run.info.run_name: run for run in runs}


# A study of two workers, in which one backbone does not exist ------------------------------------------------------


@pytest.fixture(scope="module")
def searched(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> TuneConfig:
    space = {
        "head.c": {"log_uniform": [1e-4, 1.0]},
        "backbone": {"categorical": {PLAIN_BACKBONE: {"image_size": {"categorical": [24, 32]}}, "resnot18": None}},
    }
    config = make_config(tmp_path_factory.mktemp("searched") / "s", space, stage="frozen", trials=8, workers=2)
    tune(config)
    return config


def test_each_trial_is_a_child_run_with_its_params_and_state(searched: TuneConfig) -> None:
    trials, runs = trials_of(searched), runs_of(searched)
    assert [trial.number for trial in trials] == list(range(8))
    assert sorted(runs) == [*(f"trial-{number:03d}" for number in range(8)), "tune"]
    states = {trial.state for trial in trials}
    assert states == {TrialState.COMPLETE, TrialState.FAIL}
    for trial in trials:
        run = runs[f"trial-{trial.number:03d}"]
        assert run.data.tags["mlflow.parentRunId"] == runs["tune"].info.run_id
        assert (run.data.tags["stage"], run.data.tags["trial.stage"]) == ("trial", "frozen")
        assert run.data.params["backbone"] == trial.params["backbone"]
        if trial.state is TrialState.COMPLETE:
            assert (run.info.status, run.data.tags["trial.state"]) == ("FINISHED", "complete")
            assert run.data.metrics["val/macro_f1"] == trial.values[0]
            assert run.data.params["image_size"] == str(trial.params[f"backbone={PLAIN_BACKBONE}/image_size"])
        else:
            assert (run.info.status, run.data.tags["trial.state"]) == ("FAILED", "failed")
            assert "resnot18" in run.data.tags["failure"]
            assert "resnot18" in trial.user_attrs["failure.reason"]


def test_no_trial_reads_the_test_split(searched: TuneConfig) -> None:
    for name, run in runs_of(searched).items():
        tested = [metric for metric in run.data.metrics if metric.startswith("test/")]
        assert bool(tested) == (name == "tune")


def test_the_study_s_run_has_its_table_figures_and_the_best_model(searched: TuneConfig) -> None:
    folder = study_of(searched)
    run = runs_of(searched)["tune"]
    client = mlflow.MlflowClient(searched.tracking.uri, searched.tracking.uri)
    there = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"best.yaml", "figures", "space.yaml", "trials.csv", "checkpoint", "evaluation"} <= there
    table = pd.read_csv(folder.path / "artifacts" / "trials.csv")
    best = table.loc[table["val/macro_f1"].idxmax()]
    assert run.data.metrics["val/macro_f1"] == pytest.approx(best["val/macro_f1"])
    assert run.data.tags["best"] == f"trial-{best['number']:03d}"
    assert (folder.path / "artifacts" / "figures" / "history.png").stat().st_size > 5000
    assert run.data.metrics["trials/fail"] == (table["state"] == "fail").sum()


def test_the_best_experiment_trains_the_best_model_again(searched: TuneConfig) -> None:
    best = study_of(searched).path / "artifacts" / "best.yaml"
    config = parse("frozen", ["--experiment", str(best)])
    again = frozen(replace(config, workspace=searched.workspace, tracking=searched.tracking))
    assert again.metrics["val/macro_f1"] == runs_of(searched)["tune"].data.metrics["val/macro_f1"]


def test_a_later_study_begins_with_what_was_best(
    searched: TuneConfig, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = max((trial for trial in trials_of(searched) if trial.values), key=lambda trial: trial.values[0])
    space = {"head.c": {"log_uniform": [1e-4, 1.0]}}
    later = make_config(tmp_path / "later", space, stage="frozen", trials=1, warm_start=1, tracking=searched.tracking)
    tune(later)
    assert trials_of(later)[0].params["head.c"] == pytest.approx(best.params["head.c"])
    assert "begins with the settings of" in capsys.readouterr().out


# Failures, pruning, objectives -------------------------------------------------------------------------------------


def test_three_failures_of_a_kind_end_the_study(make_config: MakeConfig, tmp_path: Path) -> None:
    space = {"lr": {"log_uniform": [1e-4, 1e-3]}}
    config = make_config(tmp_path / "s", space, trials=20, weights="none", backbone="resnot18")
    with pytest.raises(StocktakeError, match=r"three trials in a row failed for the same reason.*resnot18"):
        tune(config)
    assert 3 <= len(trials_of(config)) <= 4  # the worker may be at the next one already
    runs = runs_of(config)
    assert runs["tune"].info.status == "FAILED"
    assert "resnot18" in runs["tune"].data.tags["failure"]
    assert not [name for name, run in runs.items() if run.info.status == "RUNNING"]


def test_trials_that_fall_behind_are_pruned(make_config: MakeConfig, tmp_path: Path) -> None:
    space = {"lr": {"log_uniform": [1e-8, 3e-3]}}
    config = make_config(tmp_path / "s", space, trials=6, epochs=4, pruner="asha")
    tune(config)
    trials, runs = trials_of(config), runs_of(config)
    pruned = [trial for trial in trials if trial.state is TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        run = runs[f"trial-{trial.number:03d}"]
        assert (run.info.status, run.data.tags["trial.state"]) == ("FINISHED", "pruned")
        assert max(trial.intermediate_values) < 4
        client = mlflow.MlflowClient(config.tracking.uri, config.tracking.uri)
        curve = client.get_metric_history(run.info.run_id, "val/macro_f1")
        assert {point.step: point.value for point in curve} == trial.intermediate_values


def test_two_objectives_of_a_fine_tuning(make_config: MakeConfig, tmp_path: Path) -> None:
    space = {"image_size": {"categorical": [24, 32]}}
    config = make_config(tmp_path / "s", space, trials=2, epochs=1, objectives=("macro_f1", "latency"))
    tune(config)
    assert [trial.state for trial in trials_of(config)] == [TrialState.COMPLETE] * 2
    assert all(trial.values[1] > 0 for trial in trials_of(config))


def test_macro_f1_against_latency(make_config: MakeConfig, tmp_path: Path) -> None:
    space = {"image_size": {"categorical": [24, 32, 64]}}
    config = make_config(tmp_path / "s", space, stage="frozen", trials=4, objectives=("macro_f1", "latency"))
    tune(config)
    front = pd.read_csv(study_of(config).path / "artifacts" / "pareto" / "front.csv")
    table = pd.read_csv(study_of(config).path / "artifacts" / "trials.csv")
    for _, one in front.iterrows():
        beaten = (table["val/macro_f1"] > one["val/macro_f1"]) & (table["latency_ms"] < one["latency_ms"])
        assert not beaten.any()
        written = study_of(config).path / "artifacts" / "pareto" / f"trial-{one['number']:03.0f}.yaml"
        assert parse("frozen", ["--experiment", str(written)]).image_size == one["image_size"]
    assert (table["latency_ms"] > 0).all()
    assert (study_of(config).path / "artifacts" / "figures" / "pareto_front.png").is_file()


def test_no_trial_begins_after_the_timeout(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "s", {"head.c": {"log_uniform": [1e-4, 1.0]}}, stage="frozen", timeout=0.0)
    with pytest.raises(StocktakeError, match="no trial was completed"):
        tune(config)
    assert trials_of(config) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objectives": ("macro_f1", "latency"), "pruner": "asha"}, "cannot weigh"),
        ({"space": "nowhere"}, "--space nowhere: no such file"),
        ({"storage": "sqlite:////proc/study.db"}, "cannot be used"),
        ({"resume": "nowhere"}, "nowhere holds no study"),
    ],
)
def test_what_cannot_be_searched_is_told(
    settings: dict[str, Any], said: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(StocktakeError, match=said):
        tune(make_config(tmp_path / "s", {"lr": {"uniform": [0.001, 0.01]}}, **settings))


def test_a_trial_of_two_processes_is_the_trial_of_one(make_config: MakeConfig, tmp_path: Path) -> None:
    """The same settings in both processes: with others, or half of a prune, the curves would part or the job hang."""
    space = {"lr": {"log_uniform": [1e-7, 1e-3]}}
    curves = []
    for nproc in (1, 2):
        settings = {"trials": 3, "epochs": 4, "pruner": "asha", "backbone": TINY_BACKBONE, "seed": 3}
        config = make_config(tmp_path / str(nproc), space, nproc=nproc, **settings)
        tune(config)
        states, run = [trial.state for trial in trials_of(config)], runs_of(config)["trial-000"]
        assert TrialState.PRUNED in states
        assert TrialState.FAIL not in states
        assert run.data.tags.get("world_size", "1") == str(nproc)
        client = mlflow.MlflowClient(config.tracking.uri, config.tracking.uri)
        curves.append([point.value for point in client.get_metric_history(run.info.run_id, "train/loss")])
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_a_failed_process_fails_its_trial(make_config: MakeConfig, tmp_path: Path) -> None:
    space = {"backbone": {"categorical": [TINY_BACKBONE, "resnot18"]}}
    config = make_config(tmp_path / "s", space, trials=3, epochs=1, nproc=2, seed=1)
    tune(config)
    trials, runs = trials_of(config), runs_of(config)
    failed = [trial for trial in trials if trial.params["backbone"] == "resnot18"]
    assert 0 < len(failed) < 3
    for trial in trials:
        is_failed = trial in failed
        assert trial.state is (TrialState.FAIL if is_failed else TrialState.COMPLETE)
        assert runs[f"trial-{trial.number:03d}"].info.status == ("FAILED" if is_failed else "FINISHED")
    assert all("resnot18" in trial.user_attrs["failure.reason"] for trial in failed)


# Killed ------------------------------------------------------------------------------------------------------------

LONG = {"lr": {"log_uniform": [1e-5, 1e-3]}, "training.freeze_epochs": {"integer": [0, 1]}}


def begin(config: TuneConfig, *more: str) -> subprocess.Popen[bytes]:
    """`stocktake tune` in a process of its own, with the settings that `make_config` gave."""
    words = ["tune", "--root", str(config.root), "--task", "1-3", "--image_size", "32", "--backbone", PLAIN_BACKBONE]
    words += ["--split.fractions", "[0.6,0.2,0.2]", "--split.twin_distance", "0", "--weights", "none"]
    words += ["--batch_size", "8", "--precision", "fp32", "--sampler", "random", "--pruner", "none"]
    words += ["--epochs", str(config.epochs), "--training.augment", "none", "--space", str(config.space)]
    words += ["--trials", str(config.trials), "--workers", str(config.workers), "--workspace", config.workspace]
    words += ["--tracking.uri", str(config.tracking.uri), "--tracking.experiment", "search"]
    words += ["--tracking.system_metrics", "false", *more]
    log = Path(config.workspace).parent / "log.txt"
    with log.open("ab") as out:
        return subprocess.Popen([sys.executable, "-m", "stocktake", *words], stdout=out, stderr=out)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        assert process.poll() is None, f"it ended with {process.returncode}"
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def running(config: TuneConfig, least_epochs: int = 0) -> list[FrozenTrial]:
    """Trials in work that have reported so many epochs and whose worker is known."""
    if not list(Path(config.workspace, "runs").glob("tune-*/study.json")):
        return []
    return [
        trial
        for trial in trials_of(config)
        if trial.state is TrialState.RUNNING
        and len(trial.intermediate_values) >= least_epochs
        and {"worker", "folder"} <= trial.user_attrs.keys()
    ]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_killed_worker_fails_its_trial_and_the_study_goes_on(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "s", LONG, trials=3, epochs=8)
    process = begin(config)
    try:
        (victim,) = wait_for(lambda: running(config, 1), process)
        os.kill(victim.user_attrs["worker"], signal.SIGKILL)
        assert process.wait(200) == 0, (tmp_path / "s" / "log.txt").read_text()
    finally:
        process.kill()
    trials, runs = trials_of(config), runs_of(config)
    assert [trial.state.name for trial in trials].count("COMPLETE") == 2
    assert trials[victim.number].state is TrialState.FAIL
    assert trials[victim.number].user_attrs["failure.reason"] == "its process was killed by SIGKILL"
    run = runs[f"trial-{victim.number:03d}"]
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "its process was killed by SIGKILL")
    assert runs["tune"].info.status == "FINISHED"


def test_a_killed_study_is_gone_on_with(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "s", LONG, trials=4, workers=2, epochs=6)
    process = begin(config)
    try:
        wait_for(lambda: len(running(config, 2)) == 2, process)
        before = running(config)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 40
        while not all(gone(trial.user_attrs["worker"]) for trial in before):
            assert time.monotonic() < deadline, "workers outlive the study"
            time.sleep(0.1)
    finally:
        process.kill()
    cut_off = running(config)
    assert len(cut_off) == 2
    reported = {trial.number: dict(trial.intermediate_values) for trial in cut_off}

    folder = study_of(config)
    with pytest.raises(StocktakeError, match=r"was begun with --epochs 6 \(now 7\)"):
        tune(replace(config, epochs=7, resume=str(folder.path)))
    tune(replace(config, resume=str(folder.path), trials=None))

    trials, runs = trials_of(config), runs_of(config)
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert all(trial.state is TrialState.COMPLETE for trial in trials)
    for trial in cut_off:
        again = trials[trial.number]
        assert again.params == trial.params
        assert reported[trial.number].items() <= again.intermediate_values.items()
        assert again.user_attrs["folder"] == trial.user_attrs["folder"]
        client = mlflow.MlflowClient(config.tracking.uri, config.tracking.uri)
        run = runs[f"trial-{trial.number:03d}"]
        points = client.get_metric_history(run.info.run_id, "train/loss")
        # each epoch with one value, though one whose checkpoint was not written yet is trained twice
        steps = sorted(step for step, _ in {(point.step, point.value) for point in points})
        assert steps == [*range(1, len(again.intermediate_values) + 1)]
        assert len(steps) >= 5, "a trial that was best after its first epoch ends early"
        assert len(points) <= 7  # only an epoch whose checkpoint was not written yet is trained twice
    assert sorted(runs) == ["trial-000", "trial-001", "trial-002", "trial-003", "tune"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert LocalRun.open(folder.path).state.status == "FINISHED"


def test_sigterm_ends_the_workers_and_every_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "s", LONG, trials=4, workers=2, epochs=50)
    process = begin(config)
    try:
        wait_for(lambda: len(running(config, 1)) == 2, process)
        workers = [trial.user_attrs["worker"] for trial in running(config)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert all(gone(worker) for worker in workers)
    assert {run.info.status for run in runs_of(config).values()} == {"KILLED"}
