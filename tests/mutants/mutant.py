"""A fault put into the source on purpose, and the tests that must notice it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One text replaced in one file."""

    name: str
    file: str
    """Relative to the repository's root."""
    old: str
    """Occurs exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Pytest's node ids; at least one must fail."""
