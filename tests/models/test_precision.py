from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stocktake.models import precision as precision_module
from stocktake.models.network import NetworkModel, create_network
from stocktake.models.precision import MARGIN, PLAIN, Precision, choose_precision
from tiny_bins import TINY_BACKBONE

CPU = torch.device("cpu")


@pytest.fixture
def model() -> NetworkModel:
    return create_network((1, 2, 3), 32, TINY_BACKBONE, "none", seed=0)


def speeds_are(monkeypatch: pytest.MonkeyPatch, *speeds: float) -> None:
    """What is measured, in the order of the candidates: fp32 channels_last, fp32, bf16 channels_last, bf16."""
    monkeypatch.setattr(precision_module, "_has_bf16", lambda _device: True)
    monkeypatch.setattr(precision_module, "_measure", lambda _model, candidates, *_: list(speeds)[: len(candidates)])


def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[float]:
        raise AssertionError("measured again")

    monkeypatch.setattr(precision_module, "_measure", refuse)


@pytest.mark.parametrize("purpose", ["train", "infer"])
def test_a_measured_choice_is_remembered(
    purpose: str, model: NetworkModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose_precision(model, purpose, "auto", CPU, tmp_path)
    assert chosen.photos_per_second is not None
    assert chosen.photos_per_second > 0
    (remembered,) = json.loads((tmp_path / "cache" / "precision.json").read_text()).values()
    assert Precision(**remembered) == chosen
    nothing_is_measured(monkeypatch)
    assert choose_precision(model, purpose, "auto", CPU, tmp_path) == chosen
    other_size = create_network((1, 2, 3), 40, TINY_BACKBONE, "none")
    with pytest.raises(AssertionError, match="measured again"):
        choose_precision(other_size, purpose, "auto", CPU, tmp_path)


@pytest.mark.parametrize("requested", ["fp32", "bf16"])
@pytest.mark.parametrize("purpose", ["train", "infer"])
def test_a_requested_format_is_respected(purpose: str, requested: str, model: NetworkModel, tmp_path: Path) -> None:
    chosen = choose_precision(model, purpose, requested, CPU, tmp_path)
    assert chosen.dtype == requested
    with chosen.autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[requested]


def test_auto_infers_in_fp32_whatever_is_faster(
    model: NetworkModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds_are(monkeypatch, 10, 11, 100, 100)
    assert choose_precision(model, "infer", "auto", CPU, tmp_path).dtype == "fp32"
    assert choose_precision(model, "train", "auto", CPU, tmp_path).dtype == "bf16"


def test_bf16_is_not_tried_on_a_processor_without_it(
    model: NetworkModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds_are(monkeypatch, 10, 11, 100, 100)
    monkeypatch.setattr(precision_module, "_has_bf16", lambda _device: False)
    assert choose_precision(model, "train", "auto", CPU, tmp_path).dtype == "fp32"


def test_another_format_must_be_faster_by_a_margin(
    model: NetworkModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds_are(monkeypatch, 100, 100 * MARGIN - 1, 90, 80)
    plain = choose_precision(model, "train", "auto", CPU, tmp_path / "within")
    assert (plain.dtype, plain.channels_last, plain.photos_per_second) == ("fp32", True, 100)
    speeds_are(monkeypatch, 100, 110, 90, 100 * MARGIN + 1)
    faster = choose_precision(model, "train", "auto", CPU, tmp_path / "beyond")
    assert (faster.dtype, faster.channels_last, faster.photos_per_second) == ("bf16", False, 100 * MARGIN + 1)


@pytest.mark.parametrize("purpose", ["train", "infer"])
def test_measuring_changes_neither_weights_nor_random_numbers(
    purpose: str, model: NetworkModel, tmp_path: Path
) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    choose_precision(model, purpose, "auto", CPU, tmp_path)
    assert torch.equal(before, torch.random.get_rng_state()), "a first run would differ from a second"
    assert torch.get_num_threads() == threads
    assert any("running_mean" in name for name in state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}'])
def test_a_damaged_memory_is_measured_anew(content: str, model: NetworkModel, tmp_path: Path) -> None:
    memory = tmp_path / "cache" / "precision.json"
    memory.parent.mkdir()
    memory.write_text(content)
    chosen = choose_precision(model, "infer", "fp32", CPU, tmp_path)
    assert Precision(**list(json.loads(memory.read_text()).values())[-1]) == chosen


def test_layouts_give_the_same_figures(model: NetworkModel) -> None:
    photos = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        last = model.eval().lay_out(True)(photos)
        torch.testing.assert_close(model.lay_out(False)(photos), last, rtol=1e-4, atol=1e-4)
    assert str(PLAIN) == "fp32 channels_last"
    assert str(Precision("bf16", channels_last=False)) == "bf16 contiguous"
