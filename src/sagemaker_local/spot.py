"""Managed spot training: capacity that has to be waited for and that is taken back, by a job's own schedule."""

from __future__ import annotations

import re
from typing import Any

from moto.sagemaker.exceptions import ValidationError

PRICE = 0.3
"""In terms of the full price: what is billed is that share of the seconds."""
_INTERRUPT = ("rehearsal:interrupt-after", "REHEARSAL_INTERRUPT_AFTER")
"""Tag of a job, or variable in its environment: seconds, or a regular expression for a log line, after which its
machines are taken back, once.
"""
_CAPACITY = ("rehearsal:capacity-after", "REHEARSAL_CAPACITY_AFTER")
"""The same: seconds that it waits for machines, at its beginning and after an interruption."""


class Spot:
    """What happens to one job's machines; nothing to those of a job that is not on spot."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Raises ValidationError when the seconds of capacity-after are no number."""
        self._is_spot = bool(request.get("EnableManagedSpotTraining"))
        self._after = _told(request, _INTERRUPT) if self._is_spot else ""
        self._is_line_seen = False
        try:
            self.capacity_seconds = float(_told(request, _CAPACITY) or 0) if self._is_spot else 0.0
        except ValueError:
            raise ValidationError(message=f"{_CAPACITY[0]} takes seconds") from None

    def billed(self, seconds: float) -> float:
        """Of the seconds that it ran, those that are paid for."""
        return seconds * (PRICE if self._is_spot else 1)

    def read(self, line: str) -> bool:
        """Whether this line of the log is the one after which the machines go."""
        if self._after and re.search(self._after, line):
            self._is_line_seen = True
        return self._is_line_seen

    def takes_back(self, ran: float) -> bool:
        """Whether the machines go now, `ran` seconds after the containers started; True once."""
        try:
            is_due = bool(self._after) and ran > float(self._after)
        except ValueError:
            is_due = self._is_line_seen
        if is_due:
            self._after, self._is_line_seen = "", False
        return is_due


def _told(request: dict[str, Any], names: tuple[str, str]) -> str:
    tag, variable = names
    tags = {one["Key"]: one["Value"] for one in request.get("Tags") or []}
    return str((request.get("Environment") or {}).get(variable) or tags.get(tag, ""))
