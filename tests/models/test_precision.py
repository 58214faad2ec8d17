from __future__ import annotations

import pytest
import torch

from stocktake.models import precision as precision_module
from stocktake.models.network import NetworkModel, create_network
from stocktake.models.precision import autocast, choose_precision
from tiny_bins import TINY_BACKBONE

CPU = torch.device("cpu")


def network(backbone: str) -> NetworkModel:
    return create_network((1, 2, 3), 32, backbone, "none", seed=0)


@pytest.mark.parametrize(
    ("backbone", "has_bf16", "expected"),
    [
        (TINY_BACKBONE, True, "bf16"),
        (TINY_BACKBONE, False, "fp32"),
        ("efficientnet_lite0", True, "fp32"),
        ("test_vit", True, "bf16"),
    ],
)
def test_auto_is_a_rule_of_processor_and_network(
    backbone: str, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_module, "_cpu_has_bf16", lambda: has_bf16)
    assert choose_precision(network(backbone), "auto", CPU) == expected


@pytest.mark.parametrize("is_supported", [True, False])
def test_a_gpu_computes_in_bf16_where_it_has_it(is_supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: is_supported)
    chosen = choose_precision(network("efficientnet_lite0"), "auto", torch.device("cuda"))
    assert chosen == ("bf16" if is_supported else "fp32")


@pytest.mark.parametrize("requested", ["fp32", "bf16"])
def test_a_requested_format_is_respected(requested: str) -> None:
    chosen = choose_precision(network("efficientnet_lite0"), requested, CPU)
    assert chosen == requested
    with autocast(chosen, CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[requested]
