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
import psutil
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState

from stocktake.cli import parse
from stocktake.commands.train import train
from stocktake.commands.tune import tune
from stocktake.config.runs import TrackingConfig
from stocktake.config.training import TrainingConfig, TuneConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.local_store import LocalRun
from stocktake.tuning.storage import STORAGE_VARIABLE, open_storage, sqlite_url
from stocktake.tuning.study import load_study
from tiny_bins import PLAIN_BACKBONE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MakeConfig = Callable[..., TuneConfig]
HEAD = {"head.c": {"type": "float", "low": 1e-4, "high": 1.0, "log": True}}
TRIALS = 6
RATE = {"lr": {"type": "float", "low": 1e-5, "high": 1e-3, "log": True}}


@pytest.fixture(scope="module")
def make_config(tiny_settings: dict[str, Any], empty_store: Path) -> MakeConfig:
    """make_config(folder, space, **settings): a search over the tiny root, with a store of its own in the folder."""

    def make(folder: Path, space: dict[str, Any], /, **settings: Any) -> TuneConfig:
        folder.mkdir(exist_ok=True)
        if not (folder / "mlflow.db").exists():
            shutil.copy(empty_store, folder / "mlflow.db")
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


def study_folder(config: TuneConfig) -> Path:
    (path,) = Path(config.workspace, "runs").glob("tune-*")
    return path


def trials_of(config: TuneConfig) -> list[FrozenTrial]:
    path = study_folder(config)
    return load_study(open_storage(sqlite_url(path)), path.name)[0].get_trials(deepcopy=False)


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
    space = {**HEAD, "backbone": {"choices": [PLAIN_BACKBONE, "resnot18"]}, "image_size": {"choices": [32, 48]}}
    config = make_config(tmp_path_factory.mktemp("searched") / "s", space, stage="frozen", trials=TRIALS, workers=2)
    tune(config)
    return config


def test_each_trial_is_a_child_run_with_its_params_and_state(searched: TuneConfig) -> None:
    trials, runs = trials_of(searched), runs_of(searched)
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert sorted(runs) == [*(f"trial-{number:03d}" for number in range(TRIALS)), "tune"]
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.FAIL}
    for trial in trials:
        run = runs[f"trial-{trial.number:03d}"]
        assert run.data.tags["mlflow.parentRunId"] == runs["tune"].info.run_id
        assert (run.data.tags["stage"], run.data.tags["trial.stage"]) == ("trial", "frozen")
        assert run.data.params["image_size"] == str(trial.params["image_size"])
        if trial.state is TrialState.COMPLETE:
            assert (run.info.status, run.data.tags["trial.state"]) == ("FINISHED", "complete")
            assert run.data.metrics["val/macro_f1"] == trial.values[0]
        else:
            assert (run.info.status, run.data.tags["trial.state"]) == ("FAILED", "failed")
            assert "resnot18" in run.data.tags["failure"]
            assert "resnot18" in trial.user_attrs["failure.reason"]


def test_no_trial_reads_the_test_split(searched: TuneConfig) -> None:
    for name, run in runs_of(searched).items():
        tested = [metric for metric in run.data.metrics if metric.startswith("test/")]
        assert bool(tested) == (name == "tune")


def test_the_study_s_run_has_its_table_plots_and_the_best_model(searched: TuneConfig) -> None:
    folder, run = study_folder(searched), runs_of(searched)["tune"]
    client = mlflow.MlflowClient(searched.tracking.uri, searched.tracking.uri)
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"best.yaml", "figures", "space.yaml", "trials.csv", "checkpoint", "evaluation"} <= artifacts
    table = pd.read_csv(folder / "artifacts" / "trials.csv")
    best = table.loc[table["value_val/macro_f1"].idxmax()]
    assert run.data.metrics["val/macro_f1"] == pytest.approx(best["value_val/macro_f1"])
    assert run.data.tags["best"] == f"trial-{best['number']:03d}"
    assert (folder / "artifacts" / "figures" / "history.png").stat().st_size > 5000
    assert run.data.metrics["trials/fail"] == (table["state"] == "FAIL").sum()


def test_the_best_experiment_trains_the_best_model_again(searched: TuneConfig) -> None:
    best = study_folder(searched) / "artifacts" / "best.yaml"
    config = parse("frozen", ["--experiment", str(best)])
    again = train(replace(config, workspace=searched.workspace, tracking=searched.tracking))
    assert again.metrics["val/macro_f1"] == runs_of(searched)["tune"].data.metrics["val/macro_f1"]


def test_a_later_study_begins_with_what_was_best(searched: TuneConfig, make_config: MakeConfig, tmp_path: Path) -> None:
    completed = [trial for trial in trials_of(searched) if trial.values]
    best_value = max(trial.values[0] for trial in completed)
    best = [trial.params["head.c"] for trial in completed if trial.values[0] == pytest.approx(best_value)]
    later = make_config(tmp_path / "later", HEAD, stage="frozen", trials=1, warm_start=1, tracking=searched.tracking)
    tune(later)
    (trial,) = trials_of(later)
    assert any(trial.params["head.c"] == pytest.approx(c) for c in best)  # of several that are equally good, one
    assert "warm_start" in trial.user_attrs


# Failures, pruning, objectives -------------------------------------------------------------------------------------


def test_three_failures_alike_end_the_study(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "s", RATE, trials=20, backbone="resnot18")
    with pytest.raises(StocktakeError, match="resnot18"):
        tune(config)
    assert len(trials_of(config)) == 3
    runs = runs_of(config)
    assert runs["tune"].info.status == "FAILED"
    assert "resnot18" in runs["tune"].data.tags["failure"]
    assert not [name for name, run in runs.items() if run.info.status == "RUNNING"]


def test_trials_that_fall_behind_are_pruned(make_config: MakeConfig, tmp_path: Path) -> None:
    space = {"lr": {"type": "float", "low": 1e-8, "high": 3e-3, "log": True}}
    config = make_config(tmp_path / "s", space, trials=6, epochs=4, pruner="asha")
    tune(config)
    trials, runs = trials_of(config), runs_of(config)
    pruned = [trial for trial in trials if trial.state is TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        run = runs[f"trial-{trial.number:03d}"]
        assert (run.info.status, run.data.tags["trial.state"]) == ("FINISHED", "pruned")
        assert "val/macro_f1" in run.data.tags["trial.reason"]
        assert max(trial.intermediate_values) < 4
        client = mlflow.MlflowClient(config.tracking.uri, config.tracking.uri)
        curve = client.get_metric_history(run.info.run_id, "val/macro_f1")
        assert {point.step: point.value for point in curve} == trial.intermediate_values


def test_macro_f1_against_latency(make_config: MakeConfig, tmp_path: Path) -> None:
    space = {"image_size": {"choices": [32, 64]}}
    config = make_config(tmp_path / "s", space, trials=3, epochs=1, objectives=("macro_f1", "latency"))
    tune(config)
    artifacts = study_folder(config) / "artifacts"
    trials = {trial.number: trial for trial in trials_of(config)}
    assert all(trial.state is TrialState.COMPLETE and trial.values[1] > 0 for trial in trials.values())
    front = [int(path.stem.removeprefix("trial-")) for path in (artifacts / "pareto").iterdir()]
    assert front
    for number in front:
        macro_f1, latency = trials[number].values
        assert not any(t.values[0] > macro_f1 and t.values[1] < latency for t in trials.values())
        written = parse("finetune", ["--experiment", str(artifacts / "pareto" / f"trial-{number:03d}.yaml")])
        assert written.image_size == trials[number].params["image_size"]
    assert (artifacts / "figures" / "pareto_front.png").is_file()


def test_no_trial_begins_after_the_timeout(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "s", HEAD, stage="frozen", timeout=0.0)
    with pytest.raises(StocktakeError, match=r"trials\.csv"):
        tune(config)
    assert trials_of(config) == []


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"objectives": ("macro_f1", "latency"), "pruner": "asha"}, "--pruner"),
        ({"space": "nowhere"}, "--space nowhere"),
        ({"storage": "sqlite:////proc/study.db"}, "/proc/study.db"),
        ({"storage": "postgresql://u:pa55word@host/s"}, "--storage"),
        ({"resume": "nowhere"}, "--resume nowhere"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_a_run_is_made(
    settings: dict[str, Any], part: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "s", HEAD, stage="frozen", **settings)
    with pytest.raises(StocktakeError, match=part) as caught:
        tune(config)
    assert "pa55word" not in str(caught.value)
    assert not Path(config.workspace, "runs").exists()


# Killed ------------------------------------------------------------------------------------------------------------


def begin(config: TuneConfig, *more: str, storage: str | None = None) -> subprocess.Popen[bytes]:
    """`stocktake tune` in a process of its own, with the settings that `make_config` gave."""
    words = ["tune", "--root", str(config.root), "--task", "1-3", "--image_size", "32", "--backbone", PLAIN_BACKBONE]
    words += ["--split.fractions", "[0.6,0.2,0.2]", "--split.near_duplicate_distance", "0", "--weights", "none"]
    words += ["--batch_size", "8", "--precision", "fp32", "--sampler", "random", "--pruner", "none"]
    words += ["--stage", config.stage, "--epochs", str(config.epochs), "--training.augment", "none"]
    words += ["--trials", str(config.trials), "--workers", str(config.workers), "--workspace", config.workspace]
    words += ["--space", str(config.space), "--tracking.uri", str(config.tracking.uri)]
    words += ["--tracking.experiment", "search", "--tracking.system_metrics", "false", *more]
    environment = {**os.environ, **({STORAGE_VARIABLE: storage} if storage else {})}
    with (Path(config.workspace).parent / "log.txt").open("ab") as out:
        return subprocess.Popen([sys.executable, "-m", "stocktake", *words], stdout=out, stderr=out, env=environment)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        assert process.poll() is None, f"it ended with {process.returncode}"
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def running(config: TuneConfig, least_epochs: int = 1) -> list[FrozenTrial]:
    """Running trials that have reported so many epochs."""
    if not list(Path(config.workspace, "runs").glob("trial-*")):
        return []
    trials = [trial for trial in trials_of(config) if trial.state is TrialState.RUNNING]
    return [trial for trial in trials if len(trial.intermediate_values) >= least_epochs]


def worker_of(trial: FrozenTrial, config: TuneConfig) -> int:
    return LocalRun.open(Path(config.workspace, "runs", trial.user_attrs["folder"])).state.pid


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # of an init that does not wait for orphans
    except psutil.NoSuchProcess:
        return True


def test_a_killed_workers_trial_fails_and_is_repeated(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "s", RATE, trials=2, epochs=8)
    process = begin(config)
    try:
        (victim,) = wait_for(lambda: running(config), process)
        os.kill(worker_of(victim, config), signal.SIGKILL)
        assert process.wait(200) == 0, (tmp_path / "s" / "log.txt").read_text()
    finally:
        process.kill()
    trials, runs = trials_of(config), runs_of(config)
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    repeated = next(trial for trial in trials if trial.params == victim.params and trial.number != victim.number)
    assert len(repeated.intermediate_values) >= len(victim.intermediate_values)
    run = runs[f"trial-{victim.number:03d}"]
    assert (run.info.status, "killed" in run.data.tags["failure"]) == ("FAILED", True)
    assert runs["tune"].info.status == "FINISHED"


def test_a_killed_study_goes_on(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "s", RATE, trials=3, workers=2, epochs=6)
    process = begin(config)
    try:
        wait_for(lambda: len(running(config)) == 2, process)
        workers = [worker_of(trial, config) for trial in running(config)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 40
        while not all(gone(worker) for worker in workers):
            assert time.monotonic() < deadline, "workers outlive the study"
            time.sleep(0.1)
    finally:
        process.kill()
    interrupted = running(config)
    assert interrupted  # one may have reached its end while its worker closed
    folder = study_folder(config)
    with pytest.raises(StocktakeError, match="--epochs 6"):
        tune(replace(config, epochs=7, resume=str(folder)))
    tune(replace(config, resume=str(folder), trials=None))

    trials, runs = trials_of(config), runs_of(config)
    assert [trial.state for trial in trials].count(TrialState.COMPLETE) == 3
    assert [trial.state for trial in trials].count(TrialState.FAIL) == len(interrupted)
    for trial in interrupted:
        (again,) = [other for other in trials if other.params == trial.params and other.number != trial.number]
        assert trial.intermediate_values.items() <= again.intermediate_values.items()
        run = runs[f"trial-{again.number:03d}"]
        assert run.data.tags["resumed_from"].endswith(trial.user_attrs["folder"]), "not from its last checkpoint"
        assert runs[f"trial-{trial.number:03d}"].info.status in ("KILLED", "FAILED")
    assert runs["tune"].info.status == "FINISHED"
    assert LocalRun.open(folder).state.status == "FINISHED"


def test_sigterm_ends_the_workers_and_every_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "s", RATE, trials=4, workers=2, epochs=50)
    process = begin(config)
    try:
        wait_for(lambda: len(running(config)) == 2, process)
        workers = [worker_of(trial, config) for trial in running(config)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert all(gone(worker) for worker in workers)
    assert {run.info.status for run in runs_of(config).values()} == {"KILLED"}


def test_two_machines_share_a_study_and_nobody_sees_its_password(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two workspaces as two machines; SQLite takes the token in its URL without a look at it."""
    database = f"sqlite:///file:{tmp_path}/shared.db?uri=true&token=pa55word"
    open_storage(database)  # Optuna makes the tables of a new database once
    configs = [make_config(tmp_path / name, HEAD, stage="frozen", trials=3) for name in ("one", "two")]
    processes = [begin(config, "--study", "shared", storage=database) for config in configs]
    command_lines = set()
    try:
        while any(process.poll() is None for process in processes):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    command_lines.add(path.read_bytes())
                except OSError:  # of a process that has ended
                    continue
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    study, _ = load_study(open_storage(database), "shared")
    assert 3 <= len(study.trials) <= 4, "each machine may start one at the same moment"
    assert all(trial.state is TrialState.COMPLETE for trial in study.trials)
    children = [name for config in configs for name in runs_of(config) if name.startswith("trial")]
    assert len(children) == len(study.trials)
    tested = [run for config in configs for run in runs_of(config).values() if "test/macro_f1" in run.data.metrics]
    assert tested, "one of the two evaluates the best model"
    assert not any(b"pa55word" in line for line in command_lines)
    written = [path for name in ("one", "two") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert not [path for path in written if b"pa55word" in path.read_bytes()]
