"""The command line: help, options, experiments, and one line for whatever is wrong with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stocktake.cli import COMMANDS, parse
from stocktake.config.parser import examples
from stocktake.errors import StocktakeError

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("torch", "mlflow", "pandas", "sklearn", "matplotlib", "lightning", "pytorch_lightning", "scipy", "PIL", "cv2")


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """experiments/small.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "small.yaml").write_text("epochs: 2\nlr: 0.5\ntraining:\n  augment: flip\n")
    return tmp_path / "experiments"


def test_the_overview_names_every_command(stocktake: Callable[..., Any]) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        ended = stocktake(*words)
        assert (ended.code, ended.err) == (0, "")
        for name, command in COMMANDS.items():
            assert f"\n  {name} " in ended.out
            assert examples(command.config)[0] in ended.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_tells_its_options_and_examples(name: str, stocktake: Callable[..., Any]) -> None:
    ended = stocktake(name, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"usage: stocktake {name} ")
    for example in examples(COMMANDS[name].config):
        assert f"\n  {example}\n" in f"{ended.out}\n"
    options = ("--model MODEL", "--workspace WORKSPACE", "--root ROOT", "--study STUDY", "--model_name MODEL_NAME")
    options += ("--region REGION", "--base BASE")
    assert any(option in ended.out for option in options)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_understood(name: str, experiments: Path) -> None:
    (experiments / "quick.yaml").write_text("epochs: 2\n")
    for example in examples(COMMANDS[name].config):
        program, command, *words = example.replace("'", "").split()
        assert (program, command) == ("stocktake", name)
        parse(name, words)


def test_the_overview_is_instant_and_imports_nothing_heavy() -> None:
    code = "import sys; from stocktake.cli import overview; overview(); print(*sorted(sys.modules))"
    began = time.monotonic()
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert time.monotonic() - began < 2  # half a second on an idle machine
    assert not set(HEAVY) & set(loaded)
    assert "stocktake.cli" in loaded


def test_help_of_a_command_imports_nothing_heavy() -> None:
    code = (
        "import sys, atexit; from stocktake.cli import main;"
        "atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr)); main(['ladder', '--help'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--training.augment" in ended.stdout
    assert not set(HEAVY) & set(ended.stderr.split())


@pytest.mark.parametrize("started", [["-m", "stocktake"], [str(REPOSITORY / "src" / "stocktake")]])
def test_the_package_can_be_started_by_name_and_by_path(started: list[str], tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, *started, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert ended.stdout.startswith("stocktake 0.")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetun"], "'finetun' is no command: did you mean finetune?"),
        (["dta"], "did you mean data?"),
        (["xyzzy"], "the commands are ladder, data, "),
        (["finetune", "--bogus", "1"], "bogus"),
        (["finetune", "--epoch", "3"], "did you mean epochs?"),
        (["finetune", "surplus"], "surplus"),
        (["finetune", "--lr"], "--lr: expected one argument"),
        (["finetune", "--lr", "abc"], "--lr abc must be a valid number"),
        (["finetune", "--epochs", "2.5"], "--epochs 2.5 must be a valid integer"),
        (["finetune", "--training.augment", "upside"], '"training.augment": Expected'),
        (["data", "--split.fractions", "[0.5,0.5]"], '"split.fractions": Expected a tuple with 3'),
        (["data", "--split", "nonsense"], "nonsense"),
        (["ladder", "--stages", "[majority,penthouse]"], "penthouse"),
        (["finetune", "--epochs", "0"], "--epochs 0 must be at least 1"),
        (["finetune", "--epochs", "-1"], "--epochs -1 must be at least 1"),
        (["finetune", "--lr", ".nan"], "--lr .nan must be"),
        (["finetune", "--training.label_smoothing", "2"], "--training.label_smoothing 2 must be at most 0.9"),
        (["majority", "--image_size", "4"], "--image_size 4 must be at least 8"),
        (["data", "--split.near_duplicate_distance", "17"], "--split.near_duplicate_distance 17 must be at most 16"),
        (["data", "--synthetic.count", "0"], "--synthetic.count 0 must be at least 1"),
        (["evaluate", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_told_in_one_line(words: list[str], said: str, stocktake: Callable[..., Any]) -> None:
    ended = stocktake(*words)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("stocktake: ")
    assert ended.err.count("\n") == 1
    assert said in ended.err


@pytest.mark.parametrize("words", [["--lr", ""], ["--lr="], ["--epochs", ""], ["--experiment", ""]])
def test_an_empty_value_is_refused(words: list[str], stocktake: Callable[..., Any]) -> None:
    ended = stocktake("finetune", *words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert words[0].strip("-=") in ended.err


@pytest.mark.parametrize("given", ["experiments/small.yaml", "small.yaml", "small"])
def test_an_experiment_is_found_by_path_and_by_name(given: str, experiments: Path) -> None:
    for words in (["--experiment", given], [f"--experiment={given}"]):
        settings = parse("finetune", words)
        assert (settings.epochs, settings.lr, settings.training.augment) == (2, 0.5, "flip")
        assert settings.training.patience == 4


def test_options_override_the_experiment_wherever_it_stands(experiments: Path) -> None:
    option = ["--lr", "0.25", "--training.augment", "none"]
    for words in ([*option, "--experiment", "small"], ["--experiment", "small", *option]):
        settings = parse("finetune", words)
        assert (settings.epochs, settings.lr, settings.training.augment) == (2, 0.25, "none")


def test_dotted_options_reach_every_group() -> None:
    settings = parse(
        "ladder", ["--split.by=id", "--head.c", "[1,10]", "--classical.pixels", "16", "--tracking.offline=true"]
    )
    assert (settings.split.by, settings.head.c, settings.classical.pixels) == ("id", (1.0, 10.0), 16)
    assert settings.tracking.offline is True


def test_a_missing_experiment_lists_what_there_is(experiments: Path) -> None:
    (experiments / "other.yaml").touch()
    for missing in ("smal", str(experiments), "x" * 5000):
        with pytest.raises(StocktakeError, match=r"no such file.*other, small"):
            parse("finetune", ["--experiment", missing])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"epochs: [", "experiments/small.yaml cannot be read"),
        (b"\xff\xfe\x00", "experiments/small.yaml cannot be read"),
        (b"- 1\n", "experiments/small.yaml must hold settings"),
        (b"hello", "experiments/small.yaml must hold settings"),
        (b"training: 5", "training must hold settings, not 5"),
        (b"training:\n", "training must hold settings, not None"),
        (b"epocs: 3", "epocs is no setting; did you mean epochs?"),
        (b"training: {pacience: 3}", "pacience"),
        (b"epochs: many", "--epochs many must be"),
        (b"epochs: 0", "--epochs 0 must be at least 1"),
        (b"workspace: /somewhere/else", "workspace"),
        (b"tracking: {uri: http://elsewhere}", "--tracking"),
        (b"[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_wrong_with_an_experiment_is_told_in_one_line(
    content: bytes, said: str, experiments: Path, stocktake: Callable[..., Any]
) -> None:
    (experiments / "small.yaml").write_bytes(content)
    ended = stocktake("finetune", "--experiment", "small")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert said in ended.err


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        ("data", "publish: s3://elsewhere/bins"),
        ("data", "export: /elsewhere"),
        ("tune", "storage: postgresql://elsewhere/studies"),
        ("compare", "output: /elsewhere/page.html"),
        ("finetune", "resume: /elsewhere"),
    ],
)
def test_an_experiment_does_not_say_where_results_go(command: str, setting: str, experiments: Path) -> None:
    (experiments / "small.yaml").write_text(setting)
    with pytest.raises(StocktakeError, match=setting.partition(":")[0]):
        parse(command, ["--experiment", "small"])


def test_an_experiment_of_comments_only_is_the_defaults(experiments: Path) -> None:
    (experiments / "small.yaml").write_text("# mlflow run .\n")
    assert parse("finetune", ["--experiment", "small"]) == parse("finetune", [])
    with pytest.raises(StocktakeError, match=r"finetune with experiments/small.yaml: .*--lr"):
        parse("finetune", ["--experiment", "small", "--lr"])


def test_debug_shows_where_it_went_wrong() -> None:
    command = [sys.executable, "-m", "stocktake", "finetune", "--epochs", "0"]
    quiet = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (quiet.returncode, quiet.stderr.count("\n")) == (2, 1)
    loud = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert loud.returncode != 0
    assert "Traceback (most recent call last)" in loud.stderr
    assert "stocktake.errors.StocktakeError: finetune: --epochs 0 must be at least 1" in loud.stderr


def test_threads_that_wait_do_not_spin_unless_told_to(monkeypatch: pytest.MonkeyPatch, stocktake: Any) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    stocktake("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    stocktake("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_output_that_nobody_reads_any_more_ends_the_command_quietly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stocktake", "data", "--synthetic.count", "20", "--synthetic.size", "96"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 128 + signal.SIGPIPE)
    process.stderr.close()
