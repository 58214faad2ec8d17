"""A config survives its experiment's file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stocktake.cli import parse
from stocktake.config.data import SplitConfig, SyntheticConfig
from stocktake.config.training import (
    ClassicalConfig,
    FinetuneConfig,
    FrozenConfig,
    HeadConfig,
    PcaSvmConfig,
    TrainingConfig,
)
from stocktake.config.yaml_io import write_experiment


def is_null(text: str) -> bool:
    try:
        return yaml.safe_load(text) is None
    except yaml.YAMLError:
        return False


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
WORDS = st.sampled_from(
    ["none", "null", "1e3", "12", "true", "yes", "0x1f", "~", "a: b", "- a", "# a", "1-5", "{a}", "é"]
)
PATHS = (WORDS | TEXT).filter(lambda text: not is_null(text))
"""Null in quotes is still none where none may stand: jsonargparse reads it so on the command line too."""
POSITIVE = st.floats(1e-6, 50, allow_subnormal=False) | st.integers(1, 50)
FRACTIONS = st.sampled_from([(0.8, 0.1, 0.1), (0.7, 0.2, 0.1)])
BINS: dict[str, Any] = {
    "root": st.none() | PATHS,
    "task": st.sampled_from(["1-5", "0-5", "2-3"]),
    "list": st.none() | st.just("ids.json"),
    "seed": st.integers(0, 2**32 - 1),
    "split": st.builds(SplitConfig, by=st.sampled_from(["group", "id"]), fractions=FRACTIONS, seed=st.integers(-9, 9)),
    "synthetic": st.builds(SyntheticConfig, count=st.integers(1, 500)),
    "image_size": st.integers(8, 256),
}
NETWORK: dict[str, Any] = {
    "backbone": WORDS | TEXT,
    "weights": WORDS | TEXT,
    "batch_size": st.integers(1, 512),
    "precision": st.sampled_from(["auto", "fp32", "bf16"]),
}
TRAINING: st.SearchStrategy[TrainingConfig] = st.builds(
    TrainingConfig,
    optimizer=st.sampled_from(["adamw", "sgd"]),
    head_lr_factor=POSITIVE,
    freeze_epochs=st.integers(0, 3),
    label_smoothing=st.floats(0, 0.9),
    class_weight=st.sampled_from(["balanced", "none"]),
    workers=st.none() | st.integers(0, 3),
    max_steps=st.integers(-1, 9),
)
CONFIGS = {
    "finetune": st.builds(
        FinetuneConfig,
        **BINS,
        **NETWORK,
        lr=POSITIVE,
        weight_decay=POSITIVE,
        epochs=st.integers(1, 9),
        training=TRAINING,
    ),
    "frozen": st.builds(
        FrozenConfig,
        **BINS,
        **NETWORK,
        head=st.builds(
            HeadConfig, c=st.lists(POSITIVE, min_size=1, max_size=3).map(tuple), class_weight=st.just("none")
        ),
    ),
    "classical": st.builds(
        ClassicalConfig, **BINS, classical=st.builds(PcaSvmConfig, c=POSITIVE, gamma=st.none() | POSITIVE)
    ),
}


@pytest.mark.parametrize("command", CONFIGS)
def test_a_config_survives_its_experiment(command: str, tmp_path: Path) -> None:
    path = tmp_path / "made" / "experiment.yaml"
    header = [f"mlflow run . -e {command} -P experiment={path}", "", "Seen: a lot\nof it"]

    @settings(max_examples=12)
    @given(CONFIGS[command])
    def survives(config: Any) -> None:
        write_experiment(path, config, header)
        assert parse(command, ["--experiment", str(path)]) == config

    survives()


def test_an_experiment_holds_what_differs_under_its_header(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    config = FinetuneConfig(
        task="0-5", lr=3e-4, weights="none", workspace="elsewhere", resume="run", training=TrainingConfig(patience=2)
    )
    write_experiment(path, config, ["mlflow run . -e finetune", "", "Seen: 0.5"])
    assert path.read_text() == (
        "# mlflow run . -e finetune\n#\n# Seen: 0.5\ntask: 0-5\nweights: none\nlr: 0.0003\ntraining:\n  patience: 2\n"
    )
    write_experiment(path, FrozenConfig(head=HeadConfig(c=(1e-5,))), [])
    assert path.read_text() == "head:\n  c: [1.0e-05]\n"
    write_experiment(path, FinetuneConfig(), ["nothing"])
    assert path.read_text() == "# nothing\n"
    assert parse("finetune", ["--experiment", str(path)]) == FinetuneConfig()
    assert [one.name for one in tmp_path.iterdir()] == ["best.yaml"]


def test_every_number_of_a_config_keeps_its_value(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    for lr in (1e-12, 1e-05, 1 / 3, math.pi, 1, 100.0):
        write_experiment(path, dataclasses.replace(FinetuneConfig(), lr=lr), [])
        assert parse("finetune", ["--experiment", str(path)]).lr == lr
