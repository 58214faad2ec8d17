"""Bounds of settings."""

from __future__ import annotations

from stocktake.errors import StocktakeError


def bound(settings: object, name: str, *, least: float, most: float = float("inf"), option: str = "") -> None:
    """Raises StocktakeError unless the field is within its bounds."""
    value = getattr(settings, name)
    if value is not None and not least <= value <= most:
        reach = f"at least {least:g}" if most == float("inf") else f"from {least:g} to {most:g}"
        raise StocktakeError(f"--{option}{name} {value:g} must be {reach}")
