"""Estimates and costs."""

from __future__ import annotations

from pathlib import Path

import botocore.session
import pytest

from stocktake.aws.prices import Prices, read_prices, told
from stocktake.errors import StocktakeError

SHIPPED = Path(__file__).parents[2] / "deploy" / "prices.yaml"


def test_an_estimate_is_hours_times_machines_times_price() -> None:
    prices = Prices("2026-01-01", "us-east-1", {"ml.a": 2.0}, spot=0.25)
    assert prices.estimate("ml.a", 3, 1800, spot=False) == pytest.approx(3.0)
    assert prices.estimate("ml.a", 3, 1800, spot=True) == pytest.approx(0.75)
    assert prices.billed("ml.a", 2, 900) == pytest.approx(1.0)  # billable seconds hold spot's saving already
    assert prices.estimate("ml.b", 1, 60, spot=False) is None
    assert [told(one) for one in (None, 0.0123, 12.345)] == ["unknown cost", "$0.0123", "$12.35"]


def test_the_shipped_table_names_machines_of_sagemaker() -> None:
    prices = read_prices(SHIPPED)
    assert prices is not None
    model = botocore.session.get_session().get_service_model("sagemaker")
    known = model.shape_for("TrainingInstanceType").metadata["enum"]
    assert len(prices.on_demand) >= 12
    assert set(prices.on_demand) <= set(known)


def test_no_table_is_no_estimate_and_a_broken_one_is_said(tmp_path: Path) -> None:
    assert read_prices(tmp_path / "none.yaml") is None
    broken = tmp_path / "prices.yaml"
    for content in ("on_demand: [1]", "date: x\nregion: y\nspot: 2\non_demand: {}", "a: [", "", "- 1"):
        broken.write_text(content)
        with pytest.raises(StocktakeError, match=r"prices\.yaml"):
            read_prices(broken)
