"""Cut off within an epoch and gone on with: the same figures and weights as never stopped, to the last bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from process_pair import ProcessGroup
from stocktake.commands.stage_runs import PreparedData
from stocktake.config import FinetuneConfig
from stocktake.models.precision import PLAIN
from stocktake.training.checkpoints import LAST, Renamed
from stocktake.training.fit import FitResult
from stocktake.training.module import NetworkModule
from tiny_training import assert_same_curve, config, train

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_STEP = {"checkpoint_minutes": 1e-9}
BATCHES = 6
"""Of two photos, of the twelve bins that few_bins trains on."""
Trained = tuple[list[dict[str, float]], FitResult, dict[str, torch.Tensor]]


class CutOffError(Exception):
    """What ends a training in a test."""


def cut() -> None:
    raise CutOffError


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def at_step(epoch: int, batch: int, deed: Callable[[], None], step: str = "training_step") -> Iterator[list[Any]]:
    """Do the deed as a step begins (both from 0); yields the (epoch, batch) of all steps."""
    seen: list[tuple[int, int]] = []

    def run(module: NetworkModule, given: Any, index: int) -> Any:
        seen.append((module.current_epoch, index))
        if seen[-1] == (epoch, batch):
            deed()
        return original(module, given, index)

    with pytest.MonkeyPatch.context() as patch:
        original = getattr(NetworkModule, step)
        patch.setattr(NetworkModule, step, run)
        yield seen


def train_until(epoch: int, batch: int, *arguments: Any, **settings: Any) -> None:
    """A training that is cut off as the batch begins; runs in other processes too."""
    with at_step(epoch, batch, cut), pytest.raises(CutOffError):
        train(*arguments, **settings)


def position(checkpoints: Path) -> tuple[int, int]:
    """The epoch, from 0, and the batches of it that are in last.ckpt."""
    state = torch.load(checkpoints / LAST, weights_only=True)["BinsDataModule"]
    return state["epoch"], state["batches"]


def assert_same_end(resumed: Trained, whole: Trained) -> None:
    assert resumed[0] == whole[0][len(whole[0]) - len(resumed[0]) :]
    assert resumed[1] == whole[1]
    for name, value in whole[2].items():
        assert torch.equal(resumed[2][name], value), name


def assert_same_files(one: Path, other: Path) -> None:
    """All that last.ckpt holds of a training: weights, optimizer, schedule, counters, what was counted."""
    assert _without_places(one / LAST) == _without_places(other / LAST)


def _without_places(value: Any) -> Any:
    """As it can be compared: tensors as lists; without paths, seconds and what Lightning does not restore."""
    if isinstance(value, Path):
        return _without_places(torch.load(value, weights_only=True))
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_without_places(part) for part in value]
    if not isinstance(value, dict):
        return value
    places = {"dirpath", "best_model_path", "kth_best_model_path", "best_k_models", "seconds", "current_score"}
    return {key: _without_places(part) for key, part in value.items() if key not in places}


# Alone ----------------------------------------------------------------------------------------------------------------

BRANCHES: dict[str, tuple[dict[str, Any], tuple[int, int], int]] = {
    # settings, where it is cut off, batches in the checkpoint
    "adamw": ({"augment": "full"}, (1, 4), 4),
    "sgd": ({"optimizer": "sgd", "schedule": "cosine", "gradient_clip": 0.1}, (1, 5), 5),
    "accumulated": ({"accumulate": 2, "class_weight": "balanced", "label_smoothing": 0.1}, (1, 5), 4),
    "frozen": ({"freeze_epochs": 2, "schedule": "step"}, (1, 3), 3),
    "limited": ({"max_steps": 9}, (1, 2), 2),
    "stopped early": ({"epochs": 12, "lr": 1e-12, "patience": 2, "schedule": "constant"}, (1, 3), 3),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_cut_off_within_an_epoch_is_the_same_as_never_cut_off(
    branch: str, few_bins: PreparedData, tmp_path: Path
) -> None:
    settings, (epoch, batch), kept = BRANCHES[branch]
    given = config(**{"epochs": 3, "batch_size": 2, **EVERY_STEP, **settings})
    whole = train(few_bins, given, tmp_path / "whole", dropout=0.2)
    train_until(epoch, batch, few_bins, given, tmp_path / "cut", dropout=0.2)
    assert position(tmp_path / "cut") == (epoch, kept)
    torch.rand(33)
    with at_step(-1, 0, cut) as steps:
        resumed = train(few_bins, given, tmp_path / "cut", dropout=0.2)
    assert steps[0] == (epoch, kept)
    assert steps[: BATCHES - kept] == [(epoch, index) for index in range(kept, BATCHES)][: len(steps)]
    assert len(set(steps)) == len(steps), "no batch twice"
    assert [one["epoch"] for one in resumed[0]] == [one["epoch"] for one in whole[0]][epoch:]
    assert_same_end(resumed, whole)
    assert_same_files(tmp_path / "cut", tmp_path / "whole")


def test_cut_off_again_and_again(few_bins: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=4, batch_size=2, augment="full", **EVERY_STEP)
    whole = train(few_bins, given, tmp_path / "whole", dropout=0.2)
    for place in ((0, 1), (0, 5), (1, 3), (1, 4), (3, 0), (3, 2)):
        train_until(*place, few_bins, given, tmp_path / "cut", dropout=0.2)
        assert position(tmp_path / "cut") == place
    assert_same_end(train(few_bins, given, tmp_path / "cut", dropout=0.2), whole)
    assert_same_files(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 3])
def test_workers_begin_with_the_right_batch(batch: int, few_bins: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=3, batch_size=2, augment="full", workers=2, **EVERY_STEP)
    whole = train(few_bins, given, tmp_path / "whole")
    train_until(1, batch, few_bins, given, tmp_path / "cut")
    assert_same_end(train(few_bins, given, tmp_path / "cut"), whole)


def test_a_checkpoint_is_written_when_its_time_has_come(few_bins: PreparedData, tmp_path: Path) -> None:
    for name, minutes in (("ends of epochs", 0.0), ("later", 10.0)):
        given = config(batch_size=2, checkpoint_minutes=minutes)
        train_until(1, 4, few_bins, given, tmp_path / name)
        assert position(tmp_path / name) == (1, 0)
    given = config(batch_size=2, checkpoint_minutes=0.3 / 60)
    with at_step(0, 3, lambda: time.sleep(0.4)):
        train_until(0, 5, few_bins, given, tmp_path / "after a while")
    assert position(tmp_path / "after a while") == (0, 4)


def test_how_often_may_change(few_bins: PreparedData, tmp_path: Path) -> None:
    whole = train(few_bins, config(batch_size=2), tmp_path / "whole")
    train_until(1, 4, few_bins, config(batch_size=2, **EVERY_STEP), tmp_path / "cut")
    assert_same_end(train(few_bins, config(batch_size=2, checkpoint_minutes=0), tmp_path / "cut"), whole)


# Told to end ----------------------------------------------------------------------------------------------------------


def test_sigterm_ends_after_the_step_and_keeps_it(few_bins: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=3, batch_size=2, checkpoint_minutes=0)
    whole = train(few_bins, given, tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    with at_step(1, 3, sigterm) as steps, pytest.raises(SystemExit) as left:
        train(few_bins, given, tmp_path / "cut")
    assert left.value.code == 128 + signal.SIGTERM
    assert steps[-1] == (1, 3)
    assert position(tmp_path / "cut") == (1, 4)
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same_end(train(few_bins, given, tmp_path / "cut"), whole)


@pytest.mark.parametrize(
    ("step", "batch", "deed"),
    [
        ("validation_step", 1, sigterm),
        ("training_step", BATCHES - 1, sigterm),
        ("training_step", 2, lambda: (sigterm(), sigterm())),
    ],
    ids=["in validation", "in the last step", "told twice"],
)
def test_where_nothing_can_be_kept_sigterm_ends_at_once(
    step: str, batch: int, deed: Callable[[], None], few_bins: PreparedData, tmp_path: Path
) -> None:
    given = config(epochs=3, batch_size=2, checkpoint_minutes=0)
    whole = train(few_bins, given, tmp_path / "whole")

    def heed(*_: Any) -> None:
        raise CutOffError

    before = signal.signal(signal.SIGTERM, heed)
    try:
        with at_step(1, batch, deed, step) as steps, pytest.raises(CutOffError):
            train(few_bins, given, tmp_path / "cut")
        assert signal.getsignal(signal.SIGTERM) is heed
    finally:
        signal.signal(signal.SIGTERM, before)
    assert steps[-1] == (1, batch)
    assert position(tmp_path / "cut") == (1, 0)
    assert_same_end(train(few_bins, given, tmp_path / "cut"), whole)


@pytest.mark.parametrize("epoch", [1, 2])
def test_sigterm_waits_for_an_epochs_checkpoint(
    epoch: int, few_bins: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(epochs=3, batch_size=2, checkpoint_minutes=0)
    whole = train(few_bins, given, tmp_path / "whole")
    save = Renamed.save_checkpoint

    def told(files: Renamed, checkpoint: dict[str, Any], path: str, **settings: Any) -> None:
        if checkpoint["epoch"] == epoch and Path(path).name == LAST:
            sigterm()
        save(files, checkpoint, path, **settings)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Renamed, "save_checkpoint", told)
        train(few_bins, given, tmp_path / "cut")
    assert position(tmp_path / "cut") == (epoch + 1, 0)
    resumed = train(few_bins, given, tmp_path / "cut")
    assert len(resumed[0]) == 2 - epoch
    assert_same_end(resumed, (whole[0][epoch + 1 :], *whole[1:]))


@pytest.mark.parametrize("settings", [{"epochs": 3}, BRANCHES["stopped early"][0]], ids=["to the end", "stopped early"])
def test_killed_after_an_epochs_checkpoint_its_line_was_told_and_early_stopping_has_counted_it(
    settings: dict[str, Any],
    few_bins: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = config(**{"batch_size": 2, "checkpoint_minutes": 0, **settings})
    whole = train(few_bins, given, tmp_path / "whole")
    save = Renamed.save_checkpoint
    capsys.readouterr()

    def killed(files: Renamed, checkpoint: dict[str, Any], path: str, **settings: Any) -> None:
        save(files, checkpoint, path, **settings)
        if checkpoint["epoch"] == 1 and Path(path).name == LAST:
            raise CutOffError

    with monkeypatch.context() as patch, pytest.raises(CutOffError):
        patch.setattr(Renamed, "save_checkpoint", killed)
        train(few_bins, given, tmp_path / "cut")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["epoch=1", "epoch=2"]
    resumed = train(few_bins, given, tmp_path / "cut")
    assert_same_end(resumed, (whole[0][2:], *whole[1:]))


def _train_alone(prepared: PreparedData, given: FinetuneConfig, checkpoints: Path) -> None:
    torch.set_num_threads(1)
    train(prepared, given, checkpoints)


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_checkpoint(tiny_bench: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=3, batch_size=2, augment="full", **EVERY_STEP)
    whole = train(tiny_bench, given, tmp_path / "whole")
    process = multiprocessing.get_context("spawn").Process(
        target=_train_alone, args=(tiny_bench, given, tmp_path / "cut")
    )
    process.start()
    try:
        deadline = time.monotonic() + 120
        seen = 0
        while process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
            if (tmp_path / "cut" / LAST).exists():
                epoch, batches = position(tmp_path / "cut")  # whole whenever it is read
                seen += 1
                if epoch >= 1 and 5 <= batches <= 20:
                    break
    finally:
        process.kill()
        process.join()
    assert seen > 1
    epoch, batches = position(tmp_path / "cut")
    assert epoch >= 1
    assert batches > 0
    resumed = train(tiny_bench, given, tmp_path / "cut")
    assert len(resumed[0]) == 3 - epoch
    assert_same_end(resumed, whole)
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


# In two processes -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", [True, False], ids=["synchronised", "none"])
def test_two_processes_go_on_where_they_were(
    batchnorm: bool, pair: ProcessGroup, few_bins: PreparedData, tmp_path: Path
) -> None:
    given = config(epochs=3, batch_size=4, lr=1e-3, augment="full", **EVERY_STEP)
    settings = (None, PLAIN, batchnorm, 0.2)
    wholes = pair.run(train, few_bins, given, tmp_path / "whole", *settings)
    pair.run(train_until, 1, 2, few_bins, given, tmp_path / "cut", *settings)
    assert position(tmp_path / "cut") == (1, 2)
    for resumed, whole in zip(pair.run(train, few_bins, given, tmp_path / "cut", *settings), wholes, strict=True):
        assert_same_end(resumed, whole)
    assert_same_files(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("begun_by", ["one", "two"])
def test_another_number_of_processes_goes_on_with_the_same_batches(
    begun_by: str, pair: ProcessGroup, few_bins: PreparedData, tmp_path: Path
) -> None:
    given = config(epochs=3, batch_size=4, **EVERY_STEP)
    whole = train(few_bins, given, tmp_path / "whole")
    if begun_by == "two":
        pair.run(train_until, 1, 2, few_bins, given, tmp_path / "cut")
        resumed = train(few_bins, given, tmp_path / "cut")
    else:
        train_until(1, 2, few_bins, given, tmp_path / "cut")
        resumed, _ = pair.run(train, few_bins, given, tmp_path / "cut")
    assert_same_curve(resumed[0], whole[0][1:])
    assert resumed[1].best_epoch == whole[1].best_epoch
