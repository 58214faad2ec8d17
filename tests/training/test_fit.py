"""Training for real, on photos that can be learnt in seconds: figures, stopping, resuming, every branch on the CPU."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer

import tiny_training
from stocktake.config.training import FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.evaluation.metrics import confusion_matrix, scores
from stocktake.models.inference import predict
from stocktake.models.network import NetworkModel, create_network
from stocktake.models.precision import Precision
from stocktake.stages.prepare import PreparedData
from stocktake.tracking.runs import sigterm_raises
from stocktake.training.checkpoints import BEST, LAST, SIGTERM, find_checkpoint, stored_precision
from stocktake.training.fit import EpochLogger, FitResult, fit
from tiny_bins import PLAIN_BACKBONE, TINY_BACKBONE, TINY_SIZE

NUMBER = r"-?\d+\.\d+"
EPOCH_LINE = re.compile(
    rf"epoch=(\d+) train_loss=({NUMBER}) train_acc=({NUMBER}) val_loss=({NUMBER}) val_acc=({NUMBER}) "
    rf"val_macro_f1=({NUMBER}) elapsed_sec=({NUMBER})"
)


@dataclass
class Training:
    """A finished one, with all that it told."""

    model: NetworkModel
    fitted: FitResult | None = None
    epochs: list[int] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)

    def of(self, name: str) -> list[float]:
        return [one[name] for one in self.figures]


LEARNS_FAST = {"backbone": PLAIN_BACKBONE, "lr": 3e-4, "head_lr_factor": 1.0}


def config(
    epochs: int = 3,
    lr: float = 3e-3,
    batch_size: int = 8,
    seed: int = 0,
    backbone: str = TINY_BACKBONE,
    **training: Any,
) -> FinetuneConfig:
    return replace(tiny_training.config(epochs, lr, batch_size, **training), seed=seed, backbone=backbone)


def train(
    prepared: PreparedData,
    given: FinetuneConfig,
    checkpoints: Path,
    *,
    precision: Precision = "fp32",
    interrupt_at: int | None = None,
    stop_at: int | None = None,
) -> Training:
    checkpoints.mkdir(parents=True, exist_ok=True)
    labels = prepared.manifest.labels
    training = Training(create_network(labels, TINY_SIZE, given.backbone, "none", seed=given.seed))

    def on_epoch(figures: Mapping[str, float], epoch: int) -> bool:
        if epoch == interrupt_at:
            raise KeyboardInterrupt
        training.epochs.append(epoch)
        training.figures.append({name: value for name, value in figures.items() if name != "epoch_seconds"})
        return epoch == stop_at

    training.fitted = fit(
        training.model, prepared.manifest, prepared.photos, given, precision, checkpoints=checkpoints, on_epoch=on_epoch
    )
    return training


def val_macro_f1(model: NetworkModel, prepared: PreparedData) -> float:
    val, labels = prepared.manifest.split("val"), prepared.manifest.labels
    shares = predict(model, prepared.photos, val["hash"].tolist(), 16, torch.device("cpu"))
    counted = np.array(labels)[shares.argmax(1)]
    return scores(confusion_matrix(labels, val["quantity"].to_numpy(), counted), labels)["macro_f1"]


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, value), wanted in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.slow
def test_it_learns_and_keeps_the_best_epoch(
    tiny_bench: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = train(tiny_bench, config(epochs=9, **LEARNS_FAST), tmp_path)
    scored = training.of("val/macro_f1")
    assert training.epochs == list(range(1, 10))
    assert max(scored) > 0.6, f"the majority class has 0.22: {scored}"
    assert training.of("train/loss")[-1] < 0.5 * training.of("train/loss")[0]

    fitted = training.fitted
    assert fitted is not None
    assert fitted.best_epoch == scored.index(max(scored)) + 1
    assert fitted.best_val_macro_f1 == pytest.approx(max(scored))
    assert fitted.epochs == 9
    assert not training.model.training
    assert val_macro_f1(training.model, tiny_bench) == pytest.approx(max(scored), abs=1e-6)

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch=")]
    found = [EPOCH_LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    assert [int(one[1]) for one in found if one] == training.epochs
    for column, name in enumerate(("train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/macro_f1"), 2):
        assert [float(one[column]) for one in found if one] == pytest.approx(training.of(name), abs=1e-6)

    for name in (BEST, LAST):
        state = torch.load(tmp_path / name, weights_only=True)
        assert {"state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"} <= set(state)
    assert not list(tmp_path.glob("*-v*.ckpt")), "one best, one last"


def test_patience_stops_early(few_bins: PreparedData, tmp_path: Path) -> None:
    # a rate of nothing: only the normalisation statistics move
    training = train(few_bins, config(epochs=30, lr=1e-12, patience=2, schedule="constant"), tmp_path)
    scored = training.of("val/macro_f1")
    assert len(scored) < 30
    best = scored.index(max(scored))
    assert len(scored) == best + 1 + 2
    assert training.fitted == FitResult(best + 1, len(scored), pytest.approx(max(scored)))


def test_a_verdict_ends_the_training(few_bins: PreparedData, tmp_path: Path) -> None:
    training = train(few_bins, config(epochs=6), tmp_path, stop_at=2)
    assert training.epochs == [1, 2]
    assert training.fitted is not None
    assert training.fitted.epochs == 2


def test_the_same_config_gives_the_same_figures(few_bins: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=2, augment="full")
    one = train(few_bins, given, tmp_path / "one")
    torch.rand(100)
    two = train(few_bins, given, tmp_path / "two")
    assert one.figures == two.figures
    assert one.fitted == two.fitted
    assert_same_weights(one.model, two.model)
    other = train(few_bins, config(epochs=2, augment="full", seed=1), tmp_path / "other")
    assert other.of("train/loss") != one.of("train/loss")


BRANCHES = {
    "sgd": {"optimizer": "sgd", "schedule": "cosine"},
    "adamw": {"optimizer": "adamw", "schedule": "one_cycle"},
    "smoothed": {"accumulate": 2, "label_smoothing": 0.1, "ordinal_smoothing": 0.1, "class_weight": "balanced"},
    "frozen": {"freeze_epochs": 2, "schedule": "step", "augment": "full", "gradient_clip": 0.1},
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_stopped_and_resumed_is_the_same_as_never_stopped(branch: str, few_bins: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=4, **BRANCHES[branch])
    whole = train(few_bins, given, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(few_bins, given, tmp_path / "stopped", interrupt_at=3)
    torch.rand(33)
    resumed = train(few_bins, given, tmp_path / "stopped")
    assert resumed.epochs == [3, 4]
    assert resumed.figures == whole.figures[2:]
    assert resumed.fitted == whole.fitted
    assert_same_weights(resumed.model, whole.model)
    one, other = (torch.load(tmp_path / name / LAST, weights_only=True) for name in ("whole", "stopped"))
    assert one["lr_schedulers"] == other["lr_schedulers"]
    for key, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][key]), key


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sigterm_ends_after_a_step_and_resuming_is_the_same_as_never_stopped(
    accumulate: int, few_bins: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(epochs=3, batch_size=2, accumulate=accumulate)
    whole = train(few_bins, given, tmp_path / "whole")

    def end(_line: EpochLogger, trainer: Trainer, _module: Any, _batch: Any, index: int) -> None:
        if (trainer.current_epoch, index) == (1, 1):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(EpochLogger, "on_train_batch_start", end)
        with pytest.raises(SystemExit) as ended, sigterm_raises():
            train(few_bins, given, tmp_path / "ended")
    assert ended.value.code == 128 + signal.SIGTERM, "the caller's handler"
    checkpoint = find_checkpoint(tmp_path / "ended")
    assert checkpoint == tmp_path / "ended" / SIGTERM
    assert torch.load(checkpoint, weights_only=True)["BinsDataModule"] == {"epoch": 1, "batches": 2}
    resumed = train(few_bins, given, tmp_path / "ended")
    assert resumed.epochs == [2, 3]
    assert resumed.of("val/loss") == whole.of("val/loss")[1:]
    assert resumed.figures[1] == whole.figures[2]
    assert_same_weights(resumed.model, whole.model)
    assert find_checkpoint(tmp_path / "ended") == tmp_path / "ended" / LAST


def test_patience_counts_on_when_resumed(few_bins: PreparedData, tmp_path: Path) -> None:
    """The bad epochs before count, and it is the patience that is given now."""
    still = {"lr": 1e-12, "schedule": "constant"}
    whole = train(few_bins, config(epochs=4, patience=100, **still), tmp_path / "whole").of("val/macro_f1")
    best = whole.index(max(whole))
    train(few_bins, config(epochs=12, patience=100, **still), tmp_path / "a", stop_at=best + 3)
    resumed = train(few_bins, config(epochs=12, patience=3, **still), tmp_path / "a")
    assert resumed.epochs == [best + 4], "two bad epochs before, and one more"


def test_the_number_format_of_a_checkpoint_is_known(few_bins: PreparedData, tmp_path: Path) -> None:
    train(few_bins, config(epochs=1), tmp_path, precision="bf16")
    assert stored_precision(tmp_path / LAST) == "bf16"
    with pytest.raises(StocktakeError, match="--precision bf16"):
        train(few_bins, replace(config(epochs=1), precision="fp32"), tmp_path)


def test_ctrl_c_is_still_heard_after_an_interrupted_training(few_bins: PreparedData, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(few_bins, config(), tmp_path, interrupt_at=1)
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_training_trains_no_further(few_bins: PreparedData, tmp_path: Path) -> None:
    first = train(few_bins, config(epochs=2), tmp_path)
    again = train(few_bins, config(epochs=2), tmp_path)
    assert again.epochs == []
    assert again.fitted == first.fitted
    assert_same_weights(again.model, first.model)


def test_a_moved_folder_still_knows_its_best_epoch(few_bins: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=6, schedule="constant", lr=1e-12)
    whole = train(few_bins, given, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(few_bins, given, tmp_path / "there", interrupt_at=5)
    (tmp_path / "there").rename(tmp_path / "here")
    resumed = train(few_bins, given, tmp_path / "here")
    assert resumed.figures == whole.figures[4:]
    assert resumed.fitted == whole.fitted
    assert not (tmp_path / "there").exists()


def test_more_epochs_than_the_schedule_was_made_for_is_told(few_bins: PreparedData, tmp_path: Path) -> None:
    train(few_bins, config(epochs=1), tmp_path / "a")
    with pytest.raises(StocktakeError, match="--epochs"):
        train(few_bins, config(epochs=3), tmp_path / "a")
    train(few_bins, config(epochs=1, schedule="constant"), tmp_path / "b")
    assert train(few_bins, config(epochs=3, schedule="constant"), tmp_path / "b").epochs == [2, 3]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "truncated"])
def test_a_damaged_checkpoint_is_told(content: bytes | None, few_bins: PreparedData, tmp_path: Path) -> None:
    train(few_bins, config(epochs=1), tmp_path)
    last = tmp_path / LAST
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2] if content is None else content)
    with pytest.raises(StocktakeError, match=re.escape(str(last))):
        train(few_bins, config(epochs=1), tmp_path)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"backbone": PLAIN_BACKBONE}, "--backbone"),
        ({"lr": 1e-4}, "--lr"),
        ({"accumulate": 2}, "--training.accumulate"),
    ],
)
def test_going_on_with_other_settings_is_told(
    changed: dict[str, Any], named: str, few_bins: PreparedData, tmp_path: Path
) -> None:
    train(few_bins, config(epochs=1), tmp_path)
    with pytest.raises(StocktakeError, match=rf"last\.ckpt was trained with {named} \S+ \(now "):
        train(few_bins, config(epochs=1, **changed), tmp_path)
    train(few_bins, config(epochs=1, patience=1, workers=0), tmp_path)


# --- every branch on the CPU


@pytest.mark.slow
def test_bf16_on_the_cpu(tiny_bench: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=3, **LEARNS_FAST)
    training = train(tiny_bench, given, tmp_path / "bf16", precision="bf16")
    assert training.of("train/loss")[-1] < training.of("train/loss")[0]
    assert {value.dtype for value in training.model.parameters()} == {torch.float32}
    plain = train(tiny_bench, given, tmp_path / "fp32")
    assert training.of("train/loss")[0] == pytest.approx(plain.of("train/loss")[0], rel=0.1)
    assert training.of("train/loss")[0] != plain.of("train/loss")[0], "it was computed in another format"


def test_gradients_are_clipped(few_bins: PreparedData, tmp_path: Path) -> None:
    given = {"epochs": 1, "optimizer": "sgd", "schedule": "constant", "lr": 0.01}
    fresh = create_network(few_bins.manifest.labels, TINY_SIZE, TINY_BACKBONE, "none", seed=0).state_dict()

    def distance(name: str, clip: float) -> float:
        trained = train(few_bins, config(gradient_clip=clip, **given), tmp_path / name).model
        moved = [value.detach() - fresh[key] for key, value in trained.named_parameters()]
        return float(torch.cat([part.flatten() for part in moved]).norm())

    hardly, freely = distance("hardly", 1e-4), distance("freely", 0)
    assert hardly < 0.25 * freely


@pytest.mark.slow
def test_accumulated_batches_make_fewer_steps(few_bins: PreparedData, tmp_path: Path) -> None:
    def steps(name: str, accumulate: int) -> int:
        train(few_bins, config(epochs=2, batch_size=2, accumulate=accumulate), tmp_path / name)
        return torch.load(tmp_path / name / LAST, weights_only=True)["global_step"]

    batches = len(few_bins.manifest.split("train")) // 2
    assert steps("one", 1) == 2 * batches
    assert steps("four", 4) == 2 * -(-batches // 4)


@pytest.mark.parametrize("max_steps", [1, 4])
def test_max_steps_ends_within_an_epoch(max_steps: int, few_bins: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=5, batch_size=4, max_steps=max_steps)
    assert len(few_bins.manifest.split("train")) // 4 == 3
    training = train(few_bins, given, tmp_path)
    assert training.epochs == list(range(1, -(-max_steps // 3) + 1))
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == max_steps
    assert max(training.of("val/macro_f1")) == pytest.approx(val_macro_f1(training.model, few_bins), abs=1e-6)
    losses = training.of("val/loss")
    assert len(set(losses)) == len(losses), "the epoch that was cut short was validated too"


def test_no_steps_at_all_are_refused(few_bins: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(StocktakeError, match=r"--training\.max_steps 0"):
        train(few_bins, config(max_steps=0), tmp_path)


def test_a_batch_larger_than_the_split(few_bins: PreparedData, tmp_path: Path) -> None:
    training = train(few_bins, config(epochs=2, batch_size=1000), tmp_path)
    assert training.epochs == [1, 2]
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2


def test_batches_of_one_are_refused(few_bins: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(StocktakeError, match="--batch_size 1"):
        train(few_bins, config(batch_size=1), tmp_path)


@pytest.mark.slow
def test_workers_do_not_change_the_figures(few_bins: PreparedData, tmp_path: Path) -> None:
    one, two = (train(few_bins, config(epochs=2, augment="full", workers=n), tmp_path / f"{n}") for n in (0, 2))
    assert one.figures == two.figures
    assert_same_weights(one.model, two.model)
