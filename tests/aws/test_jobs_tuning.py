"""`tune` as tuning jobs of the emulator: trials as child runs, failures, early ends, throttling, warm starts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.exceptions import ExecutionException

from aws_site import Site, make_site
from emulated_aws import EmulatedAws, eventually
from faulty_aws import FaultyAws
from stocktake.aws.connection import Aws
from stocktake.aws.jobs import Job, stop_job
from stocktake.aws.tuning_watch import follow_tuning_job
from stocktake.cli import parse
from stocktake.commands.jobs import jobs
from stocktake.config.aws import JobsConfig
from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from tiny_bins import PLAIN_BACKBONE, tiny_root

__all__ = ["tiny_root"]
pytestmark = [pytest.mark.aws, pytest.mark.slow, pytest.mark.timeout(600)]
SEARCH = {"sampler": "random", "pruner": "none", "workers": "2"}
SPACE = {
    "lr": {"type": "float", "low": 3e-4, "high": 3e-3, "log": True},
    "training.optimizer": {"choices": ["adamw", "sgd"]},
    "weights": {"choices": ["none", "not-there.pth"]},  # the second fails in the container
    "epochs": {"type": "int", "low": 1, "high": 2},
}


@pytest.fixture(scope="module")
def site(
    emulator: EmulatedAws, rights: Any, tiny_root: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    with make_site(emulator, rights, tiny_root, folder, f"sqlite:///{folder}/mlflow.db") as site:
        yield site


def children(site: Site, run: Run) -> list[Run]:
    """The trials' runs, by number."""
    runs = site.client.search_runs([site.experiment], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    return sorted(runs, key=lambda child: int(child.data.tags["trial"]))


@pytest.fixture(scope="module")
def searched(site: Site) -> Run:
    """A search that was submitted, left alone, and then followed while AWS throttles and the network drops."""
    run = site.submit("tune", wait=False, space=SPACE, trials="2", seed="15", **SEARCH)  # a bad choice, then a good one
    assert run.info.status == "RUNNING"
    assert children(site, run) == []
    proxy = FaultyAws(site.emulator.endpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        faults = {
            "DescribeHyperParameterTuningJob": ["", "throttle", "drop"],
            "ListTrainingJobsForHyperParameterTuningJob": ["", "drop"],
            "DescribeTrainingJob": ["", "throttle"],
        }
        proxy.faults |= faults  # type: ignore[arg-type]
        jobs(JobsConfig(follow=run.data.tags["job.name"], workspace=str(site.workspace)))
        assert not any(proxy.faults.values()), "every fault was met"
    proxy.close()
    return site.client.get_run(run.info.run_id)


def test_every_trial_is_a_child_run(site: Site, searched: Run) -> None:
    assert searched.info.status == "FINISHED"
    assert searched.info.run_name == "tune"
    trials = children(site, searched)
    assert [child.info.run_name for child in trials] == ["trial-001", "trial-002"]
    states = [child.info.status for child in trials]
    assert states == ["FAILED", "FINISHED"]
    for child in trials:
        params, tags = child.data.params, child.data.tags
        assert 3e-4 <= float(params["lr"]) <= 3e-3
        assert (tags["stage"], tags["trial.stage"], tags["data.root"]) == ("trial", "finetune", site.root)
        assert params["root"] == site.root
        job = site.emulator.job(tags["job.name"])
        assert int(tags["job.billed_seconds"]) == job["BillableTimeInSeconds"]
        assert tags["job.name"] in tags["job.logs"]
        assert not [name for name in child.data.metrics if name.startswith("test/")], "no trial sees the test split"
        if child.info.status == "FAILED":
            assert params["weights"] == "not-there.pth"
            assert "not-there.pth" in tags["failure"]
            assert tags["trial.state"] == "failed"
            continue
        history = site.client.get_metric_history(child.info.run_id, "val/macro_f1")
        assert sorted(point.step for point in history) == [*range(1, int(params["epochs"]) + 2)]
        stored = {entry.path for entry in site.client.list_artifacts(child.info.run_id)}
        assert {"checkpoint", "evaluation", "config.yaml", "experiment.yaml"} <= stored


def test_the_best_trial_is_an_experiment(site: Site, searched: Run, tmp_path: Path) -> None:
    trials = children(site, searched)
    finished = [child for child in trials if child.info.status == "FINISHED"]
    best = max(finished, key=lambda child: (child.data.metrics["val/macro_f1"], -int(child.data.tags["trial"])))
    tags = searched.data.tags
    assert (tags["best"], tags["best.run"]) == (best.info.run_name, best.info.run_id)
    assert searched.data.metrics["best/val_macro_f1"] == pytest.approx(best.data.metrics["val/macro_f1"], abs=1e-6)
    assert f"| {best.data.tags['trial']} | " in tags["mlflow.note.content"]
    assert "2 trials of finetune (1 complete, 1 failed) by SageMaker's Random search." in tags["mlflow.note.content"]
    billed = sum(int(child.data.tags["job.billed_seconds"]) for child in trials)
    assert int(tags["job.billed_seconds"]) == billed
    path = Path(site.client.download_artifacts(searched.info.run_id, "best.yaml", str(tmp_path)))
    assert path.read_text().startswith("# stocktake finetune --experiment best.yaml\n")
    config = parse("finetune", ["--experiment", str(path)])
    assert (config.root, config.task, config.backbone) == (site.root, "1-3", PLAIN_BACKBONE)
    assert config.training.optimizer == best.data.params["training.optimizer"]
    assert config.lr == pytest.approx(float(best.data.params["lr"]))
    table = Path(site.client.download_artifacts(searched.info.run_id, "trials.csv", str(tmp_path))).read_text()
    assert len(table.splitlines()) == 3


def test_following_it_again_from_elsewhere_changes_nothing(
    site: Site, searched: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {child.info.run_id: dict(child.data.metrics) for child in children(site, searched)}
    points = site.client.get_metric_history(searched.info.run_id, "best/val_macro_f1")
    jobs(JobsConfig(follow=searched.data.tags["job.name"], workspace=str(tmp_path)))
    assert {child.info.run_id: dict(child.data.metrics) for child in children(site, searched)} == before
    again = site.client.get_run(searched.info.run_id)
    assert again.data.tags == searched.data.tags
    assert len(site.client.get_metric_history(searched.info.run_id, "best/val_macro_f1")) == len(points)
    capsys.readouterr()
    jobs(JobsConfig())
    lines = [line for line in capsys.readouterr().out.splitlines() if searched.data.tags["job.name"] in line]
    assert len(lines) == 1, "its trials are not listed beside it"
    assert "Completed, 2 of 2 trials" in lines[0]


def test_another_store_is_refused_by_name(site: Site, searched: Run, tmp_path: Path, empty_store: Path) -> None:
    (tmp_path / "other.db").write_bytes(empty_store.read_bytes())
    other = TrackingConfig(uri=f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(StocktakeError, match=r"--tracking\.uri"):
        jobs(JobsConfig(follow=searched.data.tags["job.name"], workspace=str(tmp_path), tracking=other))


def test_a_search_begins_with_an_earlier_one(site: Site, searched: Run) -> None:
    earlier = searched.data.tags["job.name"]
    space = {"classical.components": {"type": "int", "low": 5, "high": 20}, "classical.pixels": {"choices": [8, 16]}}
    changes = SEARCH | {"stage": "classical", "trials": "1", "sampler": "tpe"}
    with pytest.raises(ExecutionException, match="nobody"):
        site.submit("tune", site.settings(warm_start=["nobody"]), space=space, **changes)
    run = site.submit(
        "tune", site.settings(warm_start=[earlier], warm_start_type="TransferLearning"), space=space, **changes
    )
    assert run.info.status == "FINISHED"
    assert run.data.tags["job.strategy"] == "Bayesian"
    job = site.emulator.client("sagemaker").describe_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=run.data.tags["job.name"]
    )
    assert job["WarmStartConfig"]["WarmStartType"] == "TransferLearning"
    (child,) = children(site, run)
    assert child.data.metrics["val/macro_f1"] == pytest.approx(run.data.metrics["best/val_macro_f1"], abs=1e-6)


def test_trials_that_are_ended_keep_what_they_have(site: Site) -> None:
    space = {"lr": {"type": "float", "low": 1e-4, "high": 1e-3, "log": True}}
    forever = SEARCH | {"trials": "2", "workers": "1", "epochs": "100000", "training.patience": "100000"}
    # Spot jobs keep checkpoints, each trial its own: what a busy machine kills before it has closed its run is there
    run = site.submit("tune", site.settings(spot=True), wait=False, space=space, **forever)
    name = run.data.tags["job.name"]
    ended: list[Job] = []
    watcher = threading.Thread(
        target=lambda: ended.append(
            follow_tuning_job(Aws(), name, site.workspace, TrackingConfig(uri=site.uri), poll_seconds=0.5)
        )
    )
    watcher.start()
    eventually(lambda: any("epoch=1 " in line for line in site.emulator.log(f"{name}-001-")))
    first = children(site, run)[0]
    assert first.info.status == "RUNNING"
    # As SageMaker ends a trial that has fallen behind
    site.emulator.client("sagemaker").stop_training_job(TrainingJobName=first.data.tags["job.name"])
    eventually(lambda: children(site, run)[0].info.status == "KILLED")
    stop_job(Aws(), name)
    watcher.join(120)
    assert [job.status for job in ended] == ["Stopped"]
    run = site.client.get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["failure"]) == ("KILLED", "the tuning job was stopped")
    trials = children(site, run)
    assert {child.info.status for child in trials} == {"KILLED"}
    assert trials[0].data.tags["trial.state"] == "pruned"
    assert trials[0].data.tags["trial.reason"].startswith("stopped early by SageMaker")
    assert {child.data.tags["trial.state"] for child in trials[1:]} == {"interrupted"}
    assert site.client.get_metric_history(first.info.run_id, "val/macro_f1")[0].step == 1
    assert "best" not in run.data.tags, "none has trained to its end"


def test_a_search_whose_trials_all_fail_says_why(site: Site) -> None:
    space = {"classical.components": {"type": "int", "low": 5, "high": 20}}
    with pytest.raises(ExecutionException):
        site.submit("tune", space=space, **SEARCH | {"stage": "classical", "trials": "1", "task": "7-9"})
    run = site.newest("tags.stage = 'tune'")
    assert run.info.status == "FAILED"
    assert "trial-001: AlgorithmError: " in run.data.tags["failure"]
    assert "7-9" in run.data.tags["failure"]
    with pytest.raises(StocktakeError, match="Failed: All training jobs failed"):
        jobs(JobsConfig(follow=run.data.tags["job.name"], workspace=str(site.workspace)))
