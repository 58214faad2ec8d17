"""The search space: what it draws is a valid config, what is wrong in it is named, and a config survives its file."""

from __future__ import annotations

import dataclasses
import math
import operator
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stocktake.cli import parse
from stocktake.config import (
    ClassicalConfig,
    FinetuneConfig,
    FrozenConfig,
    HeadConfig,
    PcaSvmConfig,
    SplitConfig,
    SyntheticConfig,
    TrainingConfig,
)
from stocktake.errors import StocktakeError
from stocktake.tuning.config_overrides import with_overrides
from stocktake.tuning.experiment import write_experiment
from stocktake.tuning.search_defaults import DEFAULT_SPACES
from stocktake.tuning.space import Choice, Range, Space, parse_space, read_space

CONDITIONAL = """
lr: {log_uniform: [1.0e-4, 3.0e-3]}
weight_decay: {uniform: [0.0, 0.2]}
training.freeze_epochs: {integer: [0, 2]}
epochs: {integer: [2, 32], log: true}
batch_size: {categorical: [16, 32, 64]}
backbone:
  categorical:
    efficientnet_lite0: {image_size: {categorical: [96, 128]}}
    resnet18:
      weights:
        categorical:
          none: {image_size: {integer: [64, 96], step: 16}}
          models/resnet18.pth:
      training.head_lr_factor: {log_uniform: [1, 10]}
    resnet34:
"""


@cache
def conditional() -> Space:
    return parse_space(yaml.safe_load(CONDITIONAL), FinetuneConfig(), "space.yaml")


def refused(content: Any, config: Any = None) -> str:
    """What the error of a space says."""
    content = yaml.safe_load(content) if isinstance(content, str) else content
    with pytest.raises(StocktakeError) as caught:
        parse_space(content, config or FinetuneConfig(), "space.yaml")
    message = str(caught.value)
    assert message.startswith("space.yaml")
    assert "\n" not in message
    return message


def drawn(space: Space, seed: int) -> optuna.trial.Trial:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    space.suggest(trial)
    return trial


# Drawing --------------------------------------------------------------------------------------------------------------


def test_only_what_holds_under_the_choices_is_drawn() -> None:
    always = {"lr", "weight_decay", "training.freeze_epochs", "epochs", "batch_size", "backbone"}
    seen = set()
    for seed in range(40):
        trial = drawn(conditional(), seed)
        found = conditional().suggest(trial)
        under = set(found) - always
        assert always <= set(found)
        if found["backbone"] == "efficientnet_lite0":
            assert under == {"image_size"}
            assert found["image_size"] in (96, 128)
        elif found["backbone"] == "resnet34":
            assert under == set()
        elif found["weights"] == "none":
            assert under == {"weights", "training.head_lr_factor", "image_size"}
            assert found["image_size"] in (64, 80, 96)
        else:
            assert under == {"weights", "training.head_lr_factor"}
        seen.add((found["backbone"], found.get("weights")))
    assert len(seen) == 4


def test_the_same_setting_in_two_branches_is_two_parameters_of_optuna() -> None:
    names = [dimension.name for dimension in conditional().all_dimensions()]
    assert len(names) == len(set(names))
    assert {"lr", "backbone", "backbone=efficientnet_lite0/image_size", "backbone=resnet18/weights"} <= set(names)
    assert "backbone=resnet18/weights=none/image_size" in names


def test_the_order_in_a_file_changes_nothing() -> None:
    content = yaml.safe_load(CONDITIONAL)
    turned = parse_space(dict(reversed(content.items())), FinetuneConfig(), "turned")
    assert turned == conditional()
    assert drawn(turned, 3).params == drawn(conditional(), 3).params


def test_a_finished_trial_gives_its_settings_again() -> None:
    study = optuna.create_study(direction="maximize")
    trial = study.ask()
    found = conditional().suggest(trial)
    study.tell(trial, 0.5)
    assert conditional().suggest(study.best_trial) == found


@pytest.mark.parametrize("stage", DEFAULT_SPACES)
def test_the_default_spaces_hold_the_defaults(stage: str) -> None:
    """Else a search would leave out what is known to work."""
    config = {"finetune": FinetuneConfig, "frozen": FrozenConfig, "classical": ClassicalConfig}[stage]()
    space = parse_space(DEFAULT_SPACES[stage], config, "default")
    known = {one.setting: operator.attrgetter(one.setting)(config) for one in space.dimensions}
    known |= {"head.c": 1e-3} if stage == "frozen" else {}
    params = space.params(known)
    assert params is not None
    assert space.suggest(optuna.trial.FixedTrial(params)) == known


# Properties -----------------------------------------------------------------------------------------------------------

NUMBERS = {
    "lr": (1e-9, 50.0),
    "weight_decay": (0.0, 10.0),
    "training.head_lr_factor": (1e-3, 1e3),
    "training.label_smoothing": (0.0, 0.9),
}
WHOLE = {"epochs": (1, 50), "batch_size": (1, 512), "image_size": (8, 512), "training.freeze_epochs": (0, 9)}
NAMED = {
    "backbone": ["efficientnet_lite0", "resnet18", "resnet50"],
    "weights": ["none", "imagenet", "a/b.pth"],
    "training.optimizer": ["adamw", "sgd"],
    "training.workers": [None, 0, 2],
}


@st.composite
def contents(draw: st.DrawFn, free: frozenset[str] = frozenset([*NUMBERS, *WHOLE, *NAMED]), depth: int = 2) -> Any:
    """A space's content; no setting stands twice on one way."""
    content: dict[str, Any] = {}
    for setting in draw(st.lists(st.sampled_from(sorted(free)), min_size=1, max_size=4, unique=True)):
        if setting in NUMBERS:
            low, high = sorted(draw(st.lists(st.floats(*NUMBERS[setting]), min_size=2, max_size=2)))
            kinds = ["uniform", "log_uniform"] if low > 0 else ["uniform"]
            content[setting] = {draw(st.sampled_from(kinds)): [low, high]}
        elif setting in WHOLE:
            low, high = sorted(draw(st.lists(st.integers(*WHOLE[setting]), min_size=2, max_size=2)))
            extra = draw(st.sampled_from([{}, {"step": 3}, *([{"log": True}] if low else [])]))
            content[setting] = {"integer": [low, high], **extra}
        else:
            content[setting] = {"categorical": draw(st.lists(st.sampled_from(NAMED[setting]), min_size=1, unique=True))}
    rest = free - content.keys()
    for setting in [name for name in content if name in NAMED]:
        if depth and rest and draw(st.booleans()):
            choices = content[setting]["categorical"]
            inner = contents(frozenset(rest), depth - 1)
            content[setting] = {"categorical": {choice: draw(st.none() | inner) for choice in choices}}
            rest = frozenset()  # what one choice holds no other one at the same level may
    return content


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(contents(), st.integers(0, 1000))
@example({"weight_decay": {"uniform": [0.0, 5e-324]}}, 0)  # Optuna draws a numpy.float64
def test_every_suggestion_is_a_valid_config_within_the_bounds_and_is_found_again(content: Any, seed: int) -> None:
    config = FinetuneConfig()
    space = parse_space(content, config, "drawn")
    trial = drawn(space, seed)
    found = space.suggest(trial)

    configured = with_overrides(config, found)
    for setting, value in found.items():
        assert operator.attrgetter(setting)(configured) == value
    by_name = {dimension.name: dimension for dimension in space.all_dimensions()}
    for name, value in trial.params.items():
        dimension = by_name[name]
        if isinstance(dimension, Range):
            assert dimension.low <= value <= dimension.high
            assert dimension.step is None or (value - dimension.low) % dimension.step == 0
        else:
            assert value in [choice for choice, _ in dimension.branches]

    as_text = {setting: str(value) for setting, value in found.items()}
    in_lists = {setting: f"[{value!r}]" for setting, value in found.items()}
    for known in (found, as_text, in_lists, {**found, "unknown": 1}):
        params = space.params(known)
        assert params == trial.params
        assert params is not None
        assert {type(value) for value in (*params.values(), *found.values())} <= {int, float, str, type(None)}
    assert space.params({setting: found[setting] for setting in [*found][1:]}) is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(contents(), contents())
def test_a_space_survives_its_json_and_differs_from_others_only(content: Any, other: Any) -> None:
    space, second = (parse_space(one, FinetuneConfig(), "drawn") for one in (content, other))
    assert Space.from_json(space.to_json()) == space
    assert space.difference(Space.from_json(space.to_json())) is None
    assert (space.difference(second) is None) == (space == second)


def test_enqueued_settings_are_the_next_trials() -> None:
    space = conditional()
    known = {"lr": "0.001", "weight_decay": "0.1", "training.freeze_epochs": "1", "epochs": "6", "batch_size": "32"}
    known |= {"backbone": "resnet18", "weights": "none", "image_size": "80", "training.head_lr_factor": "5.0"}
    params = space.params(known)
    assert params is not None
    study = optuna.create_study()
    study.enqueue_trial(params)
    expected: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "training.freeze_epochs": 1, "epochs": 6}
    expected |= {"batch_size": 32, "backbone": "resnet18", "weights": "none", "image_size": 80}
    assert space.suggest(study.ask()) == expected | {"training.head_lr_factor": 5.0}


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": "0.5"},
        {"lr": "fast"},
        {"lr": "nan"},
        {"lr": True},
        {"lr": None},
        {"lr": "[0.001, 0.002]"},
        {"lr": (1e-3, 2e-3)},
        {"epochs": "6.5"},
        {"training.freeze_epochs": 3},
        {"image_size": "72"},
        {"image_size": 81},
        {"batch_size": "48"},
        {"backbone": "resnet50"},
        {"weights": "None"},
        {"weights": ""},
    ],
    ids=str,
)
def test_settings_outside_of_the_space_are_not_enqueued(changed: dict[str, Any]) -> None:
    known = {"lr": 1e-3, "weight_decay": 0.1, "training.freeze_epochs": 1, "epochs": 6, "batch_size": 32}
    known |= {"backbone": "resnet18", "weights": "none", "image_size": 80, "training.head_lr_factor": 5.0}
    assert conditional().params(known) is not None
    assert conditional().params({**known, **changed}) is None


def test_null_and_true_are_found_by_their_texts() -> None:
    space = parse_space({"classical.gamma": {"categorical": [None, 0.1]}}, ClassicalConfig(), "gamma")
    for text in (None, "None", "null"):
        assert space.params({"classical.gamma": text}) == {"classical.gamma": None}
    for text in (0.1, "0.1", "1e-1"):
        assert space.params({"classical.gamma": text}) == {"classical.gamma": 0.1}


# What is wrong in a space ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["root", "seed", "task", "split.by", "tracking.uri", "workspace", "resume", "list"])
def test_the_data_and_the_run_must_stay_the_same(setting: str) -> None:
    message = refused({setting: {"categorical": ["a", "b"]}})
    assert f"space.yaml: {setting} cannot be varied: the data and the run must stay the same" in message
    assert f"--{setting}" in message


def test_a_wrong_setting_inside_of_a_branch_is_named_with_the_way_there() -> None:
    inside = "backbone: {categorical: {resnet18: {weights: {categorical: {none: {%s}}}}}}"
    assert "space.yaml: backbone=resnet18/weights=none/seed cannot" in refused(inside % "seed: {integer: [0, 1]}")
    assert "space.yaml: backbone=resnet18/weights=none/lr: " in refused(inside % "lr: {uniform: [0, 1000]}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "must hold settings to vary"),
        ("[lr]", "must hold settings to vary"),
        ("lr: 0.1", "lr must hold one of uniform, log_uniform, integer, categorical"),
        ("lr: {gauss: [0, 1]}", "lr must hold one of uniform"),
        ("lr: {uniform: [0.1, 1], log_uniform: [0.1, 1]}", "lr must hold one of"),
        ("lr: {uniform: [0.1, 1], log: true}", "lr: log is not understood; beside uniform nothing may stand"),
        ("epochs: {integer: [1, 2], stepp: 2}", "epochs: stepp is not understood; beside integer log and step may"),
        ("lr: {uniform: 0.1}", "lr: uniform must hold two bounds"),
        ("lr: {uniform: [0.1]}", "lr: uniform must hold two bounds"),
        ("lr: {uniform: [a, b]}", "lr: 'a' is no number"),
        ("lr: {uniform: [true, 1]}", "lr: True is no number"),
        ("lr: {uniform: [0.1, .inf]}", "lr: inf is no number"),
        ("lr: {uniform: [0.1, .nan]}", "lr: nan is no number"),
        ("lr: {uniform: [1, 0.1]}", "lr: uniform [1, 0.1] has no value in it; give the lower bound first"),
        ("weight_decay: {log_uniform: [0, 1]}", "weight_decay: 0 has no logarithm; begin above 0, or use uniform"),
        ("training.freeze_epochs: {integer: [0, 2], log: true}", "training.freeze_epochs: 0 has no logarithm"),
        ("lr: {log_uniform: [1.0e-4, 1000]}", "lr: --lr 1000 must be from 1e-12 to 100"),
        ("training.label_smoothing: {uniform: [0, 1]}", "--training.label_smoothing 1 must be from 0 to 0.9"),
        ("epochs: {integer: [0.5, 2]}", "epochs: 0.5 is no whole number"),
        ("epochs: {integer: [0, 2]}", "epochs: --epochs 0 must be at least 1"),
        ("epochs: {integer: [1, 9], log: 2}", "epochs: log must be true or false, not 2"),
        ("epochs: {integer: [1, 9], step: 0}", "epochs: step must be a whole number from 1, not 0"),
        ("epochs: {integer: [1, 9], step: 2, log: true}", "epochs: log and step 2 do not go together"),
        ("epochs: {uniform: [1, 9]}", "epochs: uniform draws fractions, but it must be a whole number; use integer"),
        ("backbone: {integer: [1, 9]}", "backbone: backbone must be text (in quotes, if YAML sees more), not 1"),
        ("batch_size: {categorical: []}", "batch_size: categorical must hold choices"),
        ("batch_size: {categorical: 16}", "batch_size: categorical must hold choices"),
        ("batch_size: {categorical: [16, large]}", "batch_size: batch_size must be a whole number, not 'large'"),
        ("batch_size: {categorical: [16, 32, 16]}", "batch_size: the choice 16 is there twice"),
        ("lr: {categorical: [0.01, 1e-2]}", "lr: the choice 0.01 is there twice"),
        ("batch_size: {categorical: [16, 0]}", "batch_size: --batch_size 0 must be at least 1"),
        ("batch_size: {categorical: [[16, 32]]}", "batch_size: the choice [16, 32] must be a single value"),
        ("weights: {categorical: [yes]}", "weights: weights must be text (in quotes, if YAML sees more), not True"),
        ("training.augment: {categorical: [flip, fulll]}", "must be one of none, flip, full, not 'fulll'"),
        ("training.workers: {categorical: [few]}", "must be a whole number or null, not 'few'"),
        ("backbone: {categorical: {resnet18: 3}}", "backbone=resnet18 must hold the settings"),
        ("3: {uniform: [0, 1]}", "3 is no setting"),
        ("training: {uniform: [0, 1]}", "training is a group of settings: name one of training.optimizer, training."),
    ],
)
def test_what_is_wrong_is_named(content: str, said: str) -> None:
    assert said in refused(content)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("learning_rate", "the settings are"),
        ("weight_decai", "weight_decay"),
        ("freeze_epochs", "training.freeze_epochs"),
        ("training.freeze_epoch", "training.freeze_epochs"),
        ("optimizer.lr", "lr"),
        ("lr.max", "lr"),
    ],
)
def test_a_setting_that_nobody_knows_is_hinted_at(wrong: str, right: str) -> None:
    message = refused({wrong: {"uniform": [0.1, 0.2]}})
    assert f"space.yaml: {wrong} is no setting of FinetuneConfig: " in message
    assert right in message


def test_a_setting_that_would_have_two_values_at_once_is_refused() -> None:
    twice = "lr: {uniform: [0.1, 1]}\nbackbone: {categorical: {resnet18: {lr: {uniform: [0.1, 1]}}}}"
    assert "backbone=resnet18/lr" in refused(twice)
    sides = "%s: {categorical: {%s: {lr: {uniform: [0.1, 1]}}}}\n"
    assert "would hold at once" in refused(sides % ("backbone", "resnet18") + sides % ("weights", "none"))
    assert "would hold at once" in refused("weights: {categorical: {none: {weights: {categorical: [none]}}}}")
    apart = "backbone: {categorical: {resnet18: {lr: {uniform: [0.1, 1]}}, resnet34: {lr: {uniform: [0.1, 1]}}}}"
    assert len([*parse_space(yaml.safe_load(apart), FinetuneConfig(), "apart").all_dimensions()]) == 3


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    with pytest.raises(StocktakeError, match=r"the search space .*space.yaml cannot be read: .*No such file"):
        read_space(path, FinetuneConfig())
    path.write_text("lr: {uniform: [0.1")
    with pytest.raises(StocktakeError, match=r"space.yaml cannot be read"):
        read_space(path, FinetuneConfig())
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StocktakeError, match=r"space.yaml cannot be read"):
        read_space(path, FinetuneConfig())
    path.write_text(CONDITIONAL)
    assert read_space(path, FinetuneConfig()) == conditional()


def test_numbers_as_people_write_them_are_taken() -> None:
    """PyYAML sees text in 1e-4."""
    space = parse_space(yaml.safe_load("lr: {log_uniform: [1e-4, 3e-3]}"), FinetuneConfig(), "space.yaml")
    assert space.dimensions == (Range("lr", "lr", 1e-4, 3e-3, log=True),)
    space = parse_space(yaml.safe_load("head.c: {categorical: [1e-4, 1]}"), FrozenConfig(), "space.yaml")
    assert space.dimensions == (Choice("head.c", "head.c", ((1e-4, ()), (1.0, ()))),)


def test_a_difference_is_told_in_words() -> None:
    content = yaml.safe_load(CONDITIONAL)
    before = conditional()
    content["lr"] = {"log_uniform": [1e-4, 1e-2]}
    del content["epochs"]
    content["training.patience"] = {"integer": [1, 9], "step": 2}
    content["backbone"]["categorical"]["resnet34"] = {"weights": {"categorical": ["none"]}}
    after = parse_space(content, FinetuneConfig(), "after")
    assert after.difference(before) == (
        "backbone=resnet34/weights is new; epochs is gone; "
        "lr is log_uniform [0.0001, 0.01], it was log_uniform [0.0001, 0.003]; training.patience is new"
    )
    assert after != before
    turned = parse_space({"batch_size": {"categorical": [64, 32]}}, FinetuneConfig(), "turned")
    first = parse_space({"batch_size": {"categorical": [32, 64]}}, FinetuneConfig(), "first")
    assert turned.difference(first) == "batch_size is categorical [64, 32], it was categorical [32, 64]"
    with pytest.raises(StocktakeError, match="no search space"):
        Space.from_json("[1]")


# Configs --------------------------------------------------------------------------------------------------------------


def test_configure_replaces_settings_and_checks_them() -> None:
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
    with pytest.raises(StocktakeError, match=r"--training\.freeze_epochs -1 must be"):
        with_overrides(before, {"training.freeze_epochs": -1})
    with pytest.raises(StocktakeError, match=r"epochs must be a whole number, not 2\.5"):
        with_overrides(before, {"epochs": 2.5})
    with pytest.raises(StocktakeError, match=r"epoch is no setting of FinetuneConfig: did you mean epochs\?"):
        with_overrides(before, {"epoch": 2})


# Experiments ----------------------------------------------------------------------------------------------------------


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

    @settings(max_examples=12, deadline=None)
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
