"""What a job costs: an estimate before it is submitted, and the sum of the billed seconds after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from stocktake.errors import StocktakeError

_HOUR = 3600.0


@dataclass(frozen=True)
class Prices:
    """US dollars an hour of each machine, at a date and in a region; `spot` is the usual share of it."""

    date: str
    region: str
    on_demand: dict[str, float]
    spot: float

    def estimate(self, instance_type: str, count: int, seconds: float, *, spot: bool) -> float | None:
        """Dollars for that long on that many machines; None where the table does not have them."""
        hourly = self.on_demand.get(instance_type)
        if hourly is None:
            return None
        return hourly * (self.spot if spot else 1.0) * count * seconds / _HOUR

    def billed(self, instance_type: str, count: int, billable_seconds: float) -> float | None:
        """Dollars for billable seconds, in which AWS has already counted what spot saves."""
        return self.estimate(instance_type, count, billable_seconds, spot=False)


def read_prices(path: Path) -> Prices | None:
    """The table of a file; None where there is no such file.

    Raises:
        StocktakeError: it is no such table.
    """
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        on_demand = {str(name): float(price) for name, price in content["on_demand"].items()}
        prices = Prices(str(content["date"]), str(content["region"]), on_demand, float(content["spot"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise StocktakeError(
            f"{path} is no table of prices ({type(error).__name__}: {error}): it needs date, region, spot and "
            "on_demand, as deploy/prices.yaml"
        ) from None
    if not 0 < prices.spot <= 1 or any(price < 0 for price in prices.on_demand.values()):
        raise StocktakeError(f"{path}: spot must be a share from 0 to 1, and no price below 0")
    return prices


def told(dollars: float | None) -> str:
    """For a terminal."""
    return "unknown cost" if dollars is None else f"${dollars:.4f}" if dollars < 1 else f"${dollars:.2f}"
