from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from stocktake.config.training import FinetuneConfig, TrainingConfig
from stocktake.errors import StocktakeError
from stocktake.models.network import create_network
from stocktake.training.module import NetworkModule, smoothed_targets
from tiny_bins import TINY_BACKBONE

COUNTS = [10, 30, 60]
LABELS = (1, 2, 3)


def config(lr: float = 0.01, **training: Any) -> FinetuneConfig:
    return FinetuneConfig(
        backbone=TINY_BACKBONE, weights="none", image_size=32, lr=lr, training=TrainingConfig(**training)
    )


def module(given: FinetuneConfig, counts: list[int] = COUNTS) -> NetworkModule:
    return NetworkModule(create_network(LABELS, 32, TINY_BACKBONE, "none", seed=0), given, counts)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    photos = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return photos, torch.tensor([0, 1, 2, 2, 1, 0])


# --- targets and loss


@pytest.mark.parametrize(("label", "ordinal"), [(0, 0), (0.1, 0), (0, 0.2), (0.3, 0.4), (0.9, 0)])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_target_shares_sum_to_one(classes: int, label: float, ordinal: float) -> None:
    table = smoothed_targets(classes, config(label_smoothing=label, ordinal_smoothing=ordinal))
    torch.testing.assert_close(table.sum(1), torch.ones(classes))
    assert (table >= 0).all()


def test_label_smoothing_spreads_evenly_and_ordinal_smoothing_to_the_neighbours() -> None:
    spread = smoothed_targets(4, config(label_smoothing=0.3))
    torch.testing.assert_close(spread[1], torch.tensor([0.1, 0.7, 0.1, 0.1]))
    near = smoothed_targets(4, config(ordinal_smoothing=0.2))
    torch.testing.assert_close(near[0], torch.tensor([0.8, 0.2, 0.0, 0.0]))
    torch.testing.assert_close(near[2], torch.tensor([0.0, 0.1, 0.8, 0.1]))


def test_smoothing_that_gives_away_more_than_everything_is_refused() -> None:
    with pytest.raises(StocktakeError, match=r"label_smoothing 0\.6 .*ordinal_smoothing 0\.5"):
        smoothed_targets(3, config(label_smoothing=0.6, ordinal_smoothing=0.5))


@pytest.mark.parametrize("class_weight", ["none", "balanced"])
def test_the_loss_is_torchs_cross_entropy(class_weight: str, batch) -> None:
    trained = module(config(class_weight=class_weight)).eval()
    weights = {"none": torch.ones(3), "balanced": torch.tensor([100 / 30, 100 / 90, 100 / 180])}[class_weight]
    with torch.no_grad():
        expected = F.cross_entropy(trained.model(batch[0]), batch[1], weight=weights)
        torch.testing.assert_close(trained.training_step(batch, 0), expected)


def test_the_loss_with_smoothing_is_torchs_with_soft_targets(batch) -> None:
    given = config(label_smoothing=0.1, ordinal_smoothing=0.2)
    trained = module(given).eval()
    with torch.no_grad():
        expected = F.cross_entropy(trained.model(batch[0]), smoothed_targets(3, given)[batch[1]])
        torch.testing.assert_close(trained.training_step(batch, 0), expected)


def test_figures_are_exact_over_uneven_batches_and_start_anew(batch) -> None:
    photos, targets = batch
    trained = module(config()).eval()
    with torch.no_grad():
        for part in (slice(0, 5), slice(5, 6)):
            trained.training_step((photos[part], targets[part]), 0)
        logits = trained.model(photos)
    figures = trained.train_figures()
    assert figures["loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(float((logits.argmax(1) == targets).float().mean()))
    with torch.no_grad():
        trained.training_step((photos[:1], targets[:1]), 0)
    assert trained.train_figures()["loss"] == pytest.approx(float(F.cross_entropy(logits[:1], targets[:1])), rel=1e-5)


# --- parameters, optimizer, schedule


def optimizers(trained: NetworkModule, steps: int = 30) -> dict[str, Any]:
    trained._trainer = SimpleNamespace(estimated_stepping_batches=steps)  # type: ignore[assignment]
    return trained.configure_optimizers()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_parameter_groups(optimizer: str) -> None:
    given = config(lr=0.01, optimizer=optimizer, head_lr_factor=4.0, schedule="constant")
    given.weight_decay = 0.3
    trained = module(given)
    found = optimizers(trained)["optimizer"]
    assert type(found).__name__.lower() == optimizer
    names = {id(parameter): name for name, parameter in trained.model.named_parameters()}
    seen = []
    for group in found.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            is_head = name.startswith("head.")
            assert group["lr"] == pytest.approx(0.04 if is_head else 0.01), name
            # biases, scales and shifts of a normalisation are vectors
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0), name
            if name.endswith(".bias"):
                assert group["weight_decay"] == 0.0, name
    assert sorted(seen) == sorted(names.values()), "every parameter exactly once"


def rates(schedule: str, steps: int = 30) -> tuple[list[float], list[float]]:
    """The learning rates of backbone and head at each step."""
    found = optimizers(module(config(lr=0.01, schedule=schedule, head_lr_factor=5.0)), steps)
    backbone, head = [], []
    for _ in range(steps):
        backbone.append(found["optimizer"].param_groups[0]["lr"])
        head.append(found["optimizer"].param_groups[-1]["lr"])
        found["optimizer"].step()
        if "lr_scheduler" in found:
            assert found["lr_scheduler"]["interval"] == "step"
            found["lr_scheduler"]["scheduler"].step()
    assert head == pytest.approx([5 * rate for rate in backbone])
    return backbone, head


def test_one_cycle_rises_to_the_peak_and_falls_to_almost_nothing() -> None:
    backbone, _ = rates("one_cycle")
    top = backbone.index(max(backbone))
    assert max(backbone) == pytest.approx(0.01, rel=0.02)
    assert 0 < top < 15
    assert backbone[:top] == sorted(backbone[:top])
    assert backbone[top:] == sorted(backbone[top:], reverse=True)
    assert backbone[0] < 0.2 * 0.01
    assert backbone[-1] < 0.02 * 0.01


def test_cosine_falls_from_the_peak_through_the_half() -> None:
    backbone, _ = rates("cosine")
    assert backbone[0] == pytest.approx(0.01)
    assert backbone[15] == pytest.approx(0.005, rel=0.01)
    assert backbone == sorted(backbone, reverse=True)
    assert backbone[-1] < 0.01 * 0.01


def test_step_divides_by_ten_every_third() -> None:
    backbone, _ = rates("step")
    assert backbone == pytest.approx([0.01] * 10 + [0.001] * 10 + [0.0001] * 10)


def test_constant_stays() -> None:
    assert rates("constant")[0] == pytest.approx([0.01] * 30)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "step"])
def test_a_run_of_few_steps_has_a_schedule(schedule: str, steps: int) -> None:
    found, _ = rates(schedule, steps=steps)
    assert len(found) == steps
    assert 0 < max(found) <= 0.01 + 1e-9


# --- freezing


def test_freezing_holds_the_backbone_still_and_then_lets_go(batch) -> None:
    trained = module(config(freeze_epochs=1, optimizer="sgd", schedule="constant"))
    trained._trainer = SimpleNamespace(estimated_stepping_batches=4, current_epoch=0)  # type: ignore[assignment]
    optimizer = trained.configure_optimizers()["optimizer"]

    def changed_by_an_epoch(epoch: int) -> set[str]:
        trained._trainer.current_epoch = epoch
        before = {name: value.clone() for name, value in trained.model.state_dict().items()}
        trained.on_train_epoch_start()
        for _ in range(2):
            optimizer.zero_grad()
            trained.training_step(batch, 0).backward()
            optimizer.step()
        return {name for name, value in trained.model.state_dict().items() if not torch.equal(value, before[name])}

    assert changed_by_an_epoch(0) == {"head.weight", "head.bias"}
    changed = changed_by_an_epoch(1)
    assert {name for name in trained.model.state_dict() if not name.endswith("num_batches_tracked")} <= changed
