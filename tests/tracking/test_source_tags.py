from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import stocktake
from stocktake.tracking.attached_run import VARIABLE
from stocktake.tracking.source_tags import git


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose configuration names a program that git would run."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    program = folder / "program"
    program.write_text(f"#!/bin/sh\ntouch {folder / 'was-run'}\n")
    program.chmod(0o755)
    for arguments in (
        ["init", "-q"],
        ["add", "program"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
        ["config", "core.fsmonitor", str(program)],
    ):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    return folder


def test_a_checkout_runs_no_program(checkout: Path) -> None:
    assert git(checkout, "status", "--porcelain", "--untracked-files=no") is None
    assert len(git(checkout, "rev-parse", "HEAD") or "") == 40
    assert not (checkout / "was-run").exists()
    subprocess.run(["git", "-C", str(checkout), "status"], capture_output=True, check=True)
    assert (checkout / "was-run").exists(), "git itself runs it"


def test_one_place_reads_the_run_of_mlflow_run() -> None:
    package = Path(stocktake.__file__).parent
    readers = [path.relative_to(package) for path in package.rglob("*.py") if f'"{VARIABLE}"' in path.read_text()]
    assert readers == [Path("tracking/attached_run.py")]
