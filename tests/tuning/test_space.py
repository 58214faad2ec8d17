"""The search space: what it draws is a valid config, and what is wrong in it is named."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from stocktake.config.training import ClassicalConfig, FinetuneConfig, FrozenConfig, TrainingConfig
from stocktake.errors import StocktakeError
from stocktake.stages.table import STAGES
from stocktake.tuning.config_overrides import with_overrides
from stocktake.tuning.space import Space, find_space, parse_space, read_space

WRITTEN = """
lr: {type: float, low: 1e-4, high: 3e-3, log: true}
weight_decay: {type: float, low: 0.0, high: 0.2}
training.freeze_epochs: {type: int, low: 0, high: 5, step: 2}
epochs: {type: int, low: 2, high: 32, log: true}
batch_size: {choices: [16, 32, 64]}
backbone: {choices: [efficientnet_lite0, resnet18]}
training.workers: {choices: [null, 0, 2]}
"""


def space_of(written: str | dict[str, Any]) -> Space:
    content = yaml.safe_load(written) if isinstance(written, str) else written
    return parse_space(content, FinetuneConfig(), "space.yaml")


SPACE = space_of(WRITTEN)


def drawn(space: Space, seed: int) -> optuna.trial.Trial:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    space.suggest(trial)
    return trial


def test_a_space_is_optunas_distributions() -> None:
    assert SPACE.distributions == {
        "lr": FloatDistribution(1e-4, 3e-3, log=True),
        "weight_decay": FloatDistribution(0.0, 0.2),
        "training.freeze_epochs": IntDistribution(0, 4, step=2),
        "epochs": IntDistribution(2, 32, log=True),
        "batch_size": CategoricalDistribution((16, 32, 64)),
        "backbone": CategoricalDistribution(("efficientnet_lite0", "resnet18")),
        "training.workers": CategoricalDistribution((None, 0, 2)),
    }
    assert space_of(SPACE.to_dict()) == SPACE
    assert SPACE.highest("epochs", 6) == 32
    assert SPACE.highest("batch_size", 6) == 64
    assert SPACE.highest("image_size", 6) == 6


def test_the_order_in_a_file_changes_nothing() -> None:
    turned = space_of(dict(reversed(yaml.safe_load(WRITTEN).items())))
    assert turned == SPACE
    assert drawn(turned, 3).params == drawn(SPACE, 3).params


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1000))
def test_every_suggestion_is_a_valid_config_and_is_found_again(seed: int) -> None:
    space, trial = SPACE, drawn(SPACE, seed)
    suggested = space.suggest(trial)
    config = with_overrides(FinetuneConfig(), suggested)
    assert {name: operator.attrgetter(name)(config) for name in suggested} == suggested
    as_text = {name: str(value) for name, value in suggested.items()}
    for known in (suggested, as_text, {name: f"[{text}]" for name, text in as_text.items()}, {**suggested, "x": 1}):
        assert space.params_of(known) == trial.params
    assert space.params_of({name: suggested[name] for name in [*suggested][1:]}) is None
    study = optuna.create_study()
    study.enqueue_trial(space.params_of(as_text) or {})
    assert space.suggest(study.ask()) == suggested


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": "0.5"},
        {"lr": "fast"},
        {"lr": "nan"},
        {"lr": True},
        {"lr": None},
        {"lr": "[0.001, 0.002]"},
        {"epochs": "6.5"},
        {"training.freeze_epochs": 3},
        {"batch_size": "48"},
        {"backbone": "resnet50"},
        {"backbone": "None"},
    ],
    ids=str,
)
def test_settings_outside_of_the_space_are_no_trial(changed: dict[str, Any]) -> None:
    assert SPACE.params_of({**SPACE.suggest(drawn(SPACE, 0)), **changed}) is None


@pytest.mark.parametrize("stage", [name for name in STAGES if STAGES[name].search_space])
def test_the_default_spaces_hold_the_defaults(stage: str) -> None:
    """Else a search would leave out what is known to work."""
    config = STAGES[stage].config()
    space = find_space(None, STAGES[stage].search_space, config)
    known = {name: operator.attrgetter(name)(config) for name in space.distributions}
    known |= {"head.c": 1e-3} if stage == "frozen" else {}
    assert space.params_of(known) is not None


@pytest.mark.parametrize(
    ("written", "part"),
    [
        ("", "space.yaml"),
        ("- lr", "space.yaml"),
        ("learning_rate: {choices: [1]}", "learning_rate"),
        ("freeze_epochs: {type: int, low: 0, high: 1}", "training.freeze_epochs"),
        ("training: {choices: [1]}", "training"),
        ("task: {choices: [1-5, 0-5]}", "--task"),
        ("split.seed: {type: int, low: 0, high: 3}", "split.seed"),
        ("3: {choices: [1]}", "3"),
        ("lr: 0.1", "lr"),
        ("lr: {log_uniform: [1e-4, 1e-2]}", "lr"),
        ("lr: {type: float, low: 0.1}", "lr"),
        ("lr: {type: float, low: 0.2, high: 0.1}", "lr"),
        ("lr: {type: float, low: 0, high: 0.1, log: true}", "lr"),
        ("lr: {type: float, low: 0.1, high: fast}", "lr"),
        ("lr: {type: float, low: 0.1, high: nan}", "lr"),
        ("lr: {type: float, low: 0.1, high: 0.2, log: 1}", "log"),
        ("lr: {type: float, low: 0.1, high: 0.2, step: 0.1}", "lr"),
        ("lr: {type: float, low: 0.1, high: 1000}", "lr"),
        ("epochs: {type: float, low: 1, high: 3}", "epochs"),
        ("epochs: {type: int, low: 1.5, high: 3}", "epochs"),
        ("epochs: {type: int, low: 1, high: 3, step: 0}", "epochs"),
        ("epochs: {type: int, low: 1, high: 9, step: 2, log: true}", "epochs"),
        ("epochs: {type: int, low: 0, high: 3}", "epochs"),
        ("batch_size: {choices: []}", "batch_size"),
        ("batch_size: {choices: 16}", "batch_size"),
        ("batch_size: {choices: [16, 16]}", "batch_size"),
        ("batch_size: {choices: [[16, 32]]}", "batch_size"),
        ("batch_size: {choices: [0, 16]}", "batch_size"),
        ("weights: {choices: [yes]}", "weights"),
        ("training.augment: {choices: [flip, fulll]}", "training.augment"),
        ("backbone: {choices: [resnet18], lr: 3}", "backbone"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(written: str, part: str) -> None:
    with pytest.raises(StocktakeError) as caught:
        space_of(written)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"lr: {uniform: [0.1", b"\xff\xfe\x00", b"[" * 5000])
def test_a_file_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(content)
    with pytest.raises(StocktakeError, match=r"space\.yaml"):
        read_space(path, FinetuneConfig())
    with pytest.raises(StocktakeError, match=r"--space nowhere"):
        find_space("nowhere", {}, FinetuneConfig())


def test_overrides_replace_settings_and_check_them() -> None:
    before = FinetuneConfig(lr=0.5, training=TrainingConfig(patience=9))
    after = with_overrides(before, {"epochs": 3, "training.freeze_epochs": 1, "weight_decay": 1})
    assert after == FinetuneConfig(
        lr=0.5, epochs=3, weight_decay=1.0, training=TrainingConfig(patience=9, freeze_epochs=1)
    )
    assert before == FinetuneConfig(lr=0.5, training=TrainingConfig(patience=9))
    assert with_overrides(FrozenConfig(), {"head.c": 0.5}).head.c == (0.5,)
    assert with_overrides(FrozenConfig(), {"head.c": [0.5, 1]}).head.c == (0.5, 1.0)
    assert with_overrides(ClassicalConfig(), {"classical.gamma": None}).classical.gamma is None
    assert with_overrides(before, {}) == before
    for settings_, name in (
        ({"training.freeze_epochs": -1}, "freeze_epochs"),
        ({"epochs": 2.5}, "epochs"),
        ({"epoch": 2}, "epochs"),
    ):
        with pytest.raises(StocktakeError, match=name):
            with_overrides(before, settings_)
