"""Every shipped experiment begins with its command, and that command takes all of its settings."""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stocktake.cli import COMMANDS, parse
from stocktake.config.parser import ALIASES, find_experiment
from stocktake.errors import StocktakeError
from stocktake.stages.table import STAGES, stage_config
from stocktake.tuning.space import find_space

REPOSITORY = Path(__file__).parents[1]
SPACES = sorted((REPOSITORY / "experiments").glob("*.space.yaml"))
EXPERIMENTS = sorted(set((REPOSITORY / "experiments").glob("*")) - set(SPACES))
COMMAND = re.compile(
    r"# mlflow run \.(?: --env-manager=\w+)?(?: -e (?P<entry>\w+))?"
    r"(?: -P [\w.]+=\S+)*? -P experiment=(?P<name>[\w./-]+)(?: -P [\w.]+=\S+)*"
)


def command_of(path: Path) -> re.Match[str]:
    first = path.read_text().splitlines()[0]
    match = COMMAND.fullmatch(first)
    assert match, f"{path.name} begins with {first!r}, not with `# mlflow run . [-e ENTRY] -P experiment=NAME`"
    return match


def settings_of(path: Path) -> Any:
    entry = command_of(path)["entry"] or "main"
    return parse(ALIASES.get(entry, entry), ["--experiment", str(path)])


def test_there_are_experiments_and_nothing_else() -> None:
    assert EXPERIMENTS
    assert {path.suffix for path in EXPERIMENTS} == {".yaml"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_begins_with_its_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    command = command_of(path)
    entry = command["entry"] or "main"
    assert ALIASES.get(entry, entry) in COMMANDS
    assert entry in yaml.safe_load((REPOSITORY / "MLproject").read_text())["entry_points"]
    assert find_experiment(command["name"]).resolve() == path


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiments_settings_are_taken_and_differ_from_the_defaults(path: Path) -> None:
    """A setting that is as by default would hide what the experiment is about."""
    entry = command_of(path)["entry"] or "main"
    settings, defaults = settings_of(path), parse(ALIASES.get(entry, entry), [])
    for name, value in flat(yaml.safe_load(path.read_text()) or {}):
        taken = operator.attrgetter(name)(settings)
        assert (list(taken) if isinstance(taken, tuple) else taken) == value
        assert taken != operator.attrgetter(name)(defaults), f"{path.name}: {name} is as by default"


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_search_space_lies_beside_the_experiment_that_it_is_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = settings_of(path.with_name(path.name.replace(".space", "")))
    assert config.space == path.name.removesuffix(".space.yaml")
    assert find_space(config.space, STAGES[config.stage].search_space, stage_config(config)).distributions


def flat(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """Settings by their dotted names."""
    return [
        (f"{name}.{part}" if part else name, inner)
        for name, value in settings.items()
        for part, inner in (flat(value) if isinstance(value, dict) else [("", value)])
    ]


def test_a_setting_that_no_command_has_would_be_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("# mlflow run . -e data -P experiment=wrong\nepochs: 2\n")
    with pytest.raises(StocktakeError, match="epochs"):
        settings_of(wrong)
    wrong.write_text("epochs: 2\n# mlflow run . -P experiment=wrong\n")
    with pytest.raises(AssertionError, match="begins with"):
        settings_of(wrong)
