"""What holds the repository together: entry points and commands, the lock file, the licence, the import rule."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stocktake.cli import COMMANDS, parse
from stocktake.config.parser import ALIASES

REPOSITORY = Path(__file__).parents[1]
PROJECT: dict[str, Any] = yaml.safe_load((REPOSITORY / "MLproject").read_text())
ENTRY_POINTS: dict[str, Any] = PROJECT["entry_points"]
WANTED = {"main", "data", "eda", "majority", "classical", "frozen", "finetune", "ddp", "evaluate", "compare"}
VALUES = {"root": "../bins", "task": "0-5", "backbone": "resnet18", "weights": "none", "epochs": "3", "batch_size": "8"}
VALUES |= {"lr": "0.01", "weight_decay": "0.1", "image_size": "64", "seed": "7"}
INDEX = re.compile(r"https?://[^\s\"'`)]*/simple\b|pypi\.o[r]g|files\.pythonhosted\.o[r]g|(?<!no-emit-)index[-_]url")
"""An address of a package index, or the option for one; written so that this file has none."""


def tracked_files() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if names.returncode:
        pytest.skip("no git checkout")
    return [REPOSITORY / name for name in names.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


# Entry points ---------------------------------------------------------------------------------------------------------


def test_the_entry_points_are_commands() -> None:
    assert ENTRY_POINTS.keys() >= WANTED
    assert PROJECT["conda_env"] == "conda.yaml"


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_an_entry_point_runs_the_command_of_its_name(name: str) -> None:
    """And declares no parameter: MLflow appends those that are given, and would log a default as the run's value."""
    assert ENTRY_POINTS[name] == {"command": f"python src/stocktake {ALIASES.get(name, name)}"}
    assert ALIASES.get(name, name) in COMMANDS


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_parameters_as_mlflow_appends_them_are_understood(name: str, tmp_path: Path) -> None:
    """`--NAME VALUE` after the command; main takes all that the ladder's users set."""
    (tmp_path / "experiment.yaml").write_text("# none\n")
    values = {**VALUES, "experiment": str(tmp_path / "experiment.yaml")}
    command = ALIASES.get(name, name)
    known = {field.name for field in dataclasses.fields(COMMANDS[command].config)} | {"experiment"}
    assert name != "main" or values.keys() <= known
    given = {parameter: value for parameter, value in values.items() if parameter in known}
    settings = parse(command, [word for parameter, value in given.items() for word in (f"--{parameter}", value)])
    for parameter in given.keys() - {"experiment"}:
        assert str(getattr(settings, parameter)) == values[parameter]


# The environment ------------------------------------------------------------------------------------------------------


def test_the_environments_digest_is_the_lock_files() -> None:
    """Else MLflow would go on with the environment of an older lock file."""
    digest = hashlib.sha256((REPOSITORY / "requirements.lock").read_bytes()).hexdigest()[:16]
    pip = next(part["pip"] for part in yaml.safe_load((REPOSITORY / "conda.yaml").read_text())["dependencies"][-1:])
    assert pip == [f"-r requirements.lock # sha256 {digest}"]


def test_every_locked_package_is_pinned_and_has_hashes() -> None:
    text = (REPOSITORY / "requirements.lock").read_text().replace("\\\n", " ")
    packages = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert len(packages) > 50
    for line in packages:
        assert re.match(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[\w.+!]+( ; .*?)?( +--hash=sha256:[0-9a-f]{64})+\s*$", line), (
            line
        )


def test_every_dependency_is_locked() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = [one for extra in project["project"]["optional-dependencies"].values() for one in extra]
    named = [*project["project"]["dependencies"], *extras, *project["dependency-groups"]["dev"]]
    locked = set(re.findall(r"^([\w.-]+)", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE))
    assert {re.split(r"[^\w.-]", name.lower())[0] for name in named} <= locked


def test_no_file_names_a_package_index() -> None:
    """Which index packages come from is a matter of the machine."""
    found = [
        f"{path.relative_to(REPOSITORY)}: {match[0]}"
        for path in tracked_files()
        if (match := INDEX.search(path.read_text(encoding="utf-8", errors="replace")))
    ]
    assert found == []
    assert not (REPOSITORY / "uv.lock").exists()


@pytest.mark.parametrize(
    "text",
    [
        "--index" + "-url x",
        "extra_index" + "_url",
        "pypi." + "org",
        "https://host/a/" + "simple/",
        "http://h:1/" + "simple",
    ],
)
def test_a_package_index_would_be_found(text: str) -> None:
    assert INDEX.search(text)


def test_the_licence_is_apache_2() -> None:
    text = (REPOSITORY / "LICENSE").read_text()
    assert re.match(r"\s*Apache License\s+Version 2\.0, January 2004\s", text)
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (REPOSITORY / "pyproject.toml").read_text()


# The import rule ------------------------------------------------------------------------------------------------------


def lint_imports(copy: Path) -> subprocess.CompletedProcess[str]:
    """Import-linter over a copy of the package, with the repository's contracts.

    The copy stands first on the path; the installed package is this checkout, not the copy.
    """
    code = (
        f"import sys; sys.path.insert(0, {str(copy / 'src')!r});"
        "from importlinter.cli import lint_imports_command as command; command(['--no-cache'])"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "src" / "stocktake", tmp_path / "src" / "stocktake", ignore=ignore)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_import_rule_is_kept(copy: Path) -> None:
    ended = lint_imports(copy)
    assert ended.returncode == 0, ended.stdout
    assert "0 broken" in ended.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("data/task.py", "import stocktake.commands.data", "stocktake.data.task -> stocktake.commands.data"),
        (
            "evaluation/metrics.py",
            "from stocktake.tracking import runs",
            "stocktake.evaluation.metrics -> stocktake.tracking.runs",
        ),
        ("errors.py", "import stocktake.config", "stocktake.errors -> stocktake.config"),
        ("commands/train.py", "import mlflow", "stocktake.commands.train -> mlflow"),
        ("serving/predictor.py", "import torch", "stocktake.serving.predictor -> torch"),
    ],
)
def test_an_import_up_the_floors_is_reported(file: str, line: str, broken: str, copy: Path) -> None:
    path = copy / "src" / "stocktake" / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    ended = lint_imports(copy)
    assert ended.returncode == 1
    assert re.search(rf"^\s*-?\s*{re.escape(broken)} \(l", ended.stdout, re.MULTILINE), ended.stdout


def test_a_new_room_without_a_floor_is_reported(copy: Path) -> None:
    (copy / "src" / "stocktake" / "attic.py").write_text("")
    ended = lint_imports(copy)
    assert ended.returncode == 1
    assert "attic" in ended.stdout
