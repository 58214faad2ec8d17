"""Managed spot training: capacity that has to be waited for and that is taken back, by a job's own schedule."""

from __future__ import annotations

import re
from typing import Any

from moto.sagemaker.exceptions import ValidationError

PRICE = 0.3
"""Share of the seconds that is billed."""
INTERRUPT_AFTER = "SAGEMAKER_LOCAL_INTERRUPT_AFTER"
"""Variable of a job's environment: seconds, or a regular expression for a log line, after which its machines are taken
back, once.
"""
CAPACITY_AFTER = "SAGEMAKER_LOCAL_CAPACITY_AFTER"
"""Variable of a job's environment: seconds that it waits for machines, at first and after an interruption."""


class Spot:
    """What happens to one job's machines; nothing to those of a job that is not on spot."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Raise ValidationError if the seconds of capacity-after are no number."""
        environment = request.get("Environment") or {}
        self._is_spot = bool(request.get("EnableManagedSpotTraining"))
        self._after = environment.get(INTERRUPT_AFTER, "") if self._is_spot else ""
        self._is_line_seen = False
        try:
            self.capacity_seconds = float(environment.get(CAPACITY_AFTER) or 0) if self._is_spot else 0.0
        except ValueError:
            raise ValidationError(message=f"{CAPACITY_AFTER} takes seconds") from None

    def billed(self, seconds: float) -> float:
        """Return the seconds that are paid for."""
        return seconds * (PRICE if self._is_spot else 1)

    def read(self, line: str) -> bool:
        """Return True once the line of the log came after which the machines go."""
        if self._after and re.search(self._after, line):
            self._is_line_seen = True
        return self._is_line_seen

    def takes_back(self, ran: float) -> bool:
        """Return True, once, if the machines go now, `ran` seconds after the containers started."""
        try:
            is_due = bool(self._after) and ran > float(self._after)
        except ValueError:
            is_due = self._is_line_seen
        if is_due:
            self._after, self._is_line_seen = "", False
        return is_due
