"""A search space as SageMaker's ranges, and back: what comes out is always what the space allows."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution

from stocktake.aws.jobs import is_tuning_name, new_name
from stocktake.aws.parameters import SPACE, as_arguments, read_parameters
from stocktake.aws.request import tuning_job
from stocktake.aws.settings import JobSettings
from stocktake.aws.tuning_spec import chosen_settings, parameter_ranges, tuned_names
from stocktake.cli import parse
from stocktake.config.training import FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.tuning.config_overrides import get_setting
from stocktake.tuning.space import Space, parse_space

PROJECT = Path(__file__).parents[2]
SETTINGS = JobSettings(role="arn:aws:iam::123456789012:role/jobs", bucket="s3://some-bucket/here", image="image:1")
INPUTS = {"code": "s3://some-bucket/here/code/1/", "files": "s3://some-bucket/here/files/1/"}
WRITTEN: dict[str, Any] = {
    "lr": {"type": "float", "low": 3e-4, "high": 3e-3, "log": True},
    "weight_decay": {"type": "float", "low": 0.05, "high": 0.05},
    "training.optimizer": {"choices": ["adamw", "sgd"]},
    "training.world_size": {"choices": [None, 1]},
    "training.sync_batchnorm": {"choices": [True, False]},
    "batch_size": {"type": "int", "low": 16, "high": 70, "step": 16},
    "epochs": {"type": "int", "low": 2, "high": 5},
}


def space_of(written: dict[str, Any]) -> Space:
    return parse_space(written, FinetuneConfig(), "test")


SPACE_WRITTEN = space_of(WRITTEN)


def request_of(settings: JobSettings = SETTINGS, **parameters: str) -> dict[str, Any]:
    checked = read_parameters(PROJECT, "tune", parameters, settings)
    assert checked.tuning is not None
    return tuning_job(new_name("tune"), settings, checked, checked.tuning, INPUTS, run_id="0" * 32)


# Ranges ---------------------------------------------------------------------------------------------------------------


def test_every_dimension_is_a_range_of_its_kind() -> None:
    ranges = parameter_ranges(SPACE_WRITTEN)
    by_name = {entry["Name"]: entry for kind in ranges.values() for entry in kind}
    assert by_name.keys() == WRITTEN.keys() - {"weight_decay"}, "one value is no range"
    (lr,) = ranges["ContinuousParameterRanges"]
    assert lr == {"Name": "lr", "MinValue": "0.0003", "MaxValue": "0.003", "ScalingType": "Logarithmic"}
    assert by_name["epochs"]["ScalingType"] == "Linear"
    assert (by_name["batch_size"]["MinValue"], by_name["batch_size"]["MaxValue"]) == ("16", "79")
    assert by_name["training.world_size"]["Values"] == ["null", "1"]
    assert by_name["training.sync_batchnorm"]["Values"] == ["true", "false"]
    assert by_name["training.optimizer"]["Values"] == ["adamw", "sgd"]


@given(data=st.data())
def test_whatever_sagemaker_chooses_is_of_the_space(data: st.DataObject) -> None:
    space = SPACE_WRITTEN
    chosen = {"_tuning_objective_metric": "val/macro_f1", "stage": "finetune"}
    for kind, ranges in parameter_ranges(space).items():
        for bounds in ranges:
            if kind == "CategoricalParameterRanges":
                chosen[bounds["Name"]] = data.draw(st.sampled_from(bounds["Values"]))
            elif kind == "IntegerParameterRanges":
                chosen[bounds["Name"]] = str(data.draw(st.integers(int(bounds["MinValue"]), int(bounds["MaxValue"]))))
            else:
                number = data.draw(st.floats(float(bounds["MinValue"]), float(bounds["MaxValue"])))
                chosen[bounds["Name"]] = data.draw(st.sampled_from([repr(number), f"{number:.17g}", f"{number:.20f}"]))
    settings = chosen_settings(space, chosen)
    assert space.params_of(settings) is not None, settings
    assert settings["batch_size"] in (16, 32, 48, 64)
    assert settings["weight_decay"] == 0.05


def test_a_stepped_range_gives_every_value_the_same_share() -> None:
    space = space_of({"batch_size": WRITTEN["batch_size"]})
    drawn = [chosen_settings(space, {"batch_size": str(number)})["batch_size"] for number in range(16, 80)]
    assert {size: drawn.count(size) for size in set(drawn)} == dict.fromkeys((16, 32, 48, 64), 16)


def test_choices_that_look_alike_are_refused() -> None:
    with pytest.raises(StocktakeError, match="backbone"):
        parameter_ranges(Space({"backbone": CategoricalDistribution((1, "1"))}))


def test_a_value_outside_of_the_space_is_refused() -> None:
    space = space_of({"batch_size": {"choices": [16, 32]}})
    for chosen in ({"batch_size": "17"}, {}):
        with pytest.raises(StocktakeError, match="not of this search's space"):
            chosen_settings(space, chosen)


@pytest.mark.parametrize("stage", ["finetune", "frozen", "classical"])
def test_a_trial_gets_its_command_line(stage: str, tmp_path: Path) -> None:
    """From -P to the parser of the container's command, with the default space of each stage."""
    checked = read_parameters(
        PROJECT, "tune", {"stage": stage, "trials": "6", "task": "0-5", "lr": "0.5", "pruner": "none"}, SETTINGS
    )
    assert checked.tuning is not None
    space = checked.tuning.space
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / SPACE).write_bytes(checked.files[SPACE])
    chosen = {}
    for ranges in parameter_ranges(space).values():
        chosen |= {bounds["Name"]: bounds.get("MinValue") or bounds["Values"][0] for bounds in ranges}
    command, arguments = as_arguments(checked.hyperparameters | chosen | {"_tuning_objective_metric": "x"}, tmp_path)
    assert command == "remote_trial"
    config = parse(command, arguments)
    assert (config.stage, config.task) == (stage, "0-5")
    assert "trials" not in checked.hyperparameters
    for name, distribution in space.distributions.items():
        first = distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low
        assert get_setting(config, name) == first


# The request ----------------------------------------------------------------------------------------------------------


def test_the_search_of_an_experiment_as_a_tuning_job() -> None:
    request = request_of(experiment="search", root="s3://bins/all", trials="6", workers="2", image_size="96")
    assert is_tuning_name(request["HyperParameterTuningJobName"])
    config, definition = request["HyperParameterTuningJobConfig"], request["TrainingJobDefinition"]
    assert config["Strategy"] == "Bayesian"
    assert config["TrainingJobEarlyStoppingType"] == "Auto"
    assert config["ResourceLimits"] == {"MaxNumberOfTrainingJobs": 6, "MaxParallelTrainingJobs": 2}
    assert definition["StaticHyperParameters"] == {"command": "tune", "image_size": "96"}, "-P wins over the experiment"
    assert "ContainerEntrypoint" not in definition["AlgorithmSpecification"]
    assert "CheckpointConfig" not in definition
    assert definition["Environment"]["STOCKTAKE_ROOT"] == "s3://bins/all"
    assert "MLFLOW_RUN_ID" not in definition["Environment"], "no trial is the search's own run"
    (metric,) = definition["AlgorithmSpecification"]["MetricDefinitions"]
    line = "epoch=1 train_loss=0.1 train_acc=0.5 val_loss=0.1 val_acc=0.4 val_macro_f1=0.312500 elapsed_sec=3.1"
    assert re.search(metric["Regex"], line)[1] == "0.312500"  # type: ignore[index]
    space = yaml.safe_load((PROJECT / "experiments" / "search.space.yaml").read_text())
    assert {entry["Name"] for kind in config["ParameterRanges"].values() for entry in kind} == space.keys()


def test_settings_that_are_tuned_are_not_fixed_too() -> None:
    request = request_of(lr="0.1", weights="none")
    assert set(request["TrainingJobDefinition"]["StaticHyperParameters"]) == {"command", "weights"}


def test_strategies_and_early_ends() -> None:
    hyperband = request_of(pruner="hyperband", epochs="9")["HyperParameterTuningJobConfig"]
    assert hyperband["Strategy"] == "Hyperband"
    assert hyperband["StrategyConfig"]["HyperbandStrategyConfig"] == {"MinResource": 1, "MaxResource": 10}
    assert hyperband["TrainingJobEarlyStoppingType"] == "Off", "Hyperband ends them itself"
    plain = request_of(sampler="random", pruner="none")["HyperParameterTuningJobConfig"]
    assert (plain["Strategy"], plain["TrainingJobEarlyStoppingType"]) == ("Random", "Off")
    assert plain["ResourceLimits"] == {"MaxNumberOfTrainingJobs": 20, "MaxParallelTrainingJobs": 1}
    assert request_of(stage="frozen")["HyperParameterTuningJobConfig"]["TrainingJobEarlyStoppingType"] == "Off"


def test_warm_starts_warm_pools_and_spot() -> None:
    settings = dataclasses.replace(SETTINGS, warm_start=["earlier"], keep_alive_seconds=600)
    request = request_of(settings)
    assert request["WarmStartConfig"] == {
        "ParentHyperParameterTuningJobs": [{"HyperParameterTuningJobName": "earlier"}],
        "WarmStartType": "IdenticalDataAndAlgorithm",
    }
    assert request["TrainingJobDefinition"]["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600
    spot = request_of(dataclasses.replace(SETTINGS, spot=True))
    assert spot["TrainingJobDefinition"]["CheckpointConfig"]["S3Uri"].endswith(spot["HyperParameterTuningJobName"])


@pytest.mark.parametrize(
    ("parameters", "change", "named"),
    [
        ({"objectives": "[macro_f1,latency]", "pruner": "none"}, {}, "-P objectives"),
        ({"storage": "sqlite:///study.db"}, {}, "-P storage"),
        ({"study": "mine"}, {}, "-P study"),
        ({"resume": "workspace/runs/tune-1"}, {}, "-P resume"),
        ({"timeout": "60"}, {}, "-P timeout"),
        ({"warm_start": "3"}, {}, "-P warm_start"),
        ({"space": "nowhere"}, {}, "--space nowhere"),
        ({"stage": "frozen", "pruner": "hyperband"}, {}, "-P pruner=hyperband"),
        ({}, {"instance_count": 2}, "instance_count 2"),
        ({"nproc": "3"}, {}, "nproc"),
        ({"lr": "abc"}, {}, "lr"),
    ],
)
def test_what_sagemaker_cannot_do_is_refused(parameters: dict[str, str], change: dict[str, Any], named: str) -> None:
    with pytest.raises(StocktakeError) as refused:
        request_of(dataclasses.replace(SETTINGS, **change), **parameters)
    assert named in str(refused.value)


def test_a_space_that_varies_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.space.yaml"
    path.write_text(json.dumps({"lr": {"type": "float", "low": 0.1, "high": 0.1}}))
    with pytest.raises(StocktakeError, match="-P space"):
        request_of(space=str(path))


def test_the_names_of_ranges_are_those_of_the_space() -> None:
    space = SPACE_WRITTEN
    assert sorted(tuned_names(space)) == sorted(
        entry["Name"] for kind in parameter_ranges(space).values() for entry in kind
    )
