"""Promotions and rollbacks: aliases that move, and who moved them, when and why.

Tags of the registered model keep what aliases do not: `champion.previous`, the versions that were the champion before,
latest first, so that a rollback is one lookup; and a tag `promotion.<time>` for each event.
"""

from __future__ import annotations

import getpass
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from filelock import FileLock

from stocktake.errors import StocktakeError
from stocktake.registry.versions import CHALLENGER, CHAMPION, ModelRegistry, Version
from stocktake.tracking.addresses import sqlite_file

CHALLENGED, PROMOTED, FORCED, REJECTED, ROLLED_BACK = "challenger", "promoted", "forced", "rejected", "rolled back"
PREVIOUS_TAG = "champion.previous"
EVENT_TAG = "promotion."
_PREVIOUS = 50
"""Earlier champions that are remembered."""
_REASON_LENGTH = 500
_TAG_LENGTH = 5000
"""Characters of a registered model's tag that every store keeps."""


class ChampionMovedError(StocktakeError):
    """Somebody else moved the alias champion meanwhile; nothing was changed."""

    def __init__(self, name: str, expected: int | None, actual: int | None) -> None:
        self.expected, self.actual = expected, actual
        shown = ["none" if number is None else f"version {number}" for number in (actual, expected)]
        super().__init__(
            f"the champion of {name} is {shown[0]} by now and was {shown[1]}: somebody else promotes or rolls back;"
            " nothing was changed, try again"
        )


@dataclass(frozen=True)
class Event:
    """One change of a registered model's aliases, or a rejection by the gate."""

    at: str
    """2026-11-03T12:00:00Z"""
    action: str
    """challenger, promoted, forced, rejected or rolled back."""
    version: int
    """The version that it is about."""
    before: int | None
    """The champion's version before it."""
    after: int | None
    """The champion's version after it."""
    by: str
    """user@host"""
    reason: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def history(registry: ModelRegistry) -> list[Event]:
    """Return all events in order, without those that somebody edited beyond reading."""
    tags: Mapping[str, str] = registry.registered().tags
    events = []
    for _, text in sorted((key, text) for key, text in tags.items() if key.startswith(EVENT_TAG)):
        try:
            events.append(Event(**json.loads(text)))
        except (ValueError, TypeError):
            continue
    return events


def set_challenger(registry: ModelRegistry, version: Version) -> None:
    """Put the alias challenger on the version.

    Raises:
        StocktakeError: it is the champion.
    """
    if registry.aliases().get(CHAMPION) == version.number:
        raise StocktakeError(f"{version.label} is the champion already: choose another --version")
    registry.set_alias(CHALLENGER, version)


def record_challenger(registry: ModelRegistry, version: Version, reason: str | None) -> Event:
    """Record that the version was made the challenger and nothing more."""
    champion = registry.aliases().get(CHAMPION)
    return _record(registry, CHALLENGED, version, champion, champion, reason)


def record_rejection(
    registry: ModelRegistry, version: Version, champion: Version | None, reason: str | None, figures: Mapping[str, Any]
) -> Event:
    """Record that the gate rejected the version. It stays the challenger."""
    number = champion.number if champion else None
    return _record(registry, REJECTED, version, number, number, reason, figures)


def set_champion(
    registry: ModelRegistry,
    version: Version,
    champion: Version | None,
    *,
    forced: bool = False,
    reason: str | None = None,
    figures: Mapping[str, Any] | None = None,
) -> Event:
    """Make the version the champion if the champion is still the expected one.

    MLflow has no compare-and-set. In a local store the comparison and the writing are one step under a lock beside the
    database. On a server the alias is compared before and after the writing: of two promotions within milliseconds the
    later one counts, and the earlier one is told unless it had finished.

    Args:
        registry: opened.
        version: the challenger.
        champion: the expected champion, which the gate compared the version with.
        forced: whether the gate was overruled.
        reason: for the history.
        figures: for the history.

    Raises:
        ChampionMovedError: the champion is another one by now.
    """
    before = champion.number if champion else None
    _move(registry, before, version, ([before] if before else []) + _previous(registry))
    return _record(registry, FORCED if forced else PROMOTED, version, before, version.number, reason, figures)


def roll_back(registry: ModelRegistry, reason: str | None = None) -> tuple[Version, Version, Event]:
    """Make the champion before this one the champion again; once more goes further back.

    Returns:
        The version that was the champion, the one that is now, and the event.

    Raises:
        StocktakeError: there is no champion, or none before it.
        ChampionMovedError: the champion is another one by now.
    """
    champion = registry.champion()
    if champion is None:
        raise StocktakeError(f"{registry.name} has no champion to roll back from: `stocktake promote` makes one")
    versions = {version.number: version for version in registry.versions()}
    existing = [number for number in _previous(registry) if number in versions]
    previous = [*itertools.dropwhile(lambda number: number == champion.number, existing)]
    if not previous:
        raise StocktakeError(
            f"{champion.label} is the first champion, there is none to go back to: promote another version"
            " (`stocktake registry` lists them)"
        )
    _move(registry, champion.number, versions[previous[0]], previous[1:])
    event = _record(registry, ROLLED_BACK, champion, champion.number, previous[0], reason)
    return champion, registry.version(str(previous[0])), event


def _previous(registry: ModelRegistry) -> list[int]:
    """The versions that were the champion before, latest first."""
    text = registry.registered().tags.get(PREVIOUS_TAG, "")
    return [int(number) for number in text.split(",") if number.isdecimal()]


def _move(registry: ModelRegistry, expected: int | None, version: Version, previous: list[int]) -> None:
    """Compare-and-set of the alias champion."""
    with _local_lock(registry):
        _compare(registry, expected)
        # Before the alias: a process killed in between leaves a list whose first entry is the champion, and is skipped.
        text = ",".join(map(str, previous[:_PREVIOUS]))
        registry.client.set_registered_model_tag(registry.name, PREVIOUS_TAG, text)
        registry.set_alias(CHAMPION, version)
    registry.delete_alias(CHALLENGER, version)
    _compare(registry, version.number)


def _compare(registry: ModelRegistry, expected: int | None) -> None:
    actual = registry.aliases().get(CHAMPION)
    if actual != expected:
        raise ChampionMovedError(registry.name, expected, actual)


@contextmanager
def _local_lock(registry: ModelRegistry) -> Iterator[None]:
    database = sqlite_file(registry.connection.stores.registry)
    if database is None:
        yield
        return
    with FileLock(f"{database}.promotion.lock"):
        yield


def _record(
    registry: ModelRegistry,
    action: str,
    version: Version,
    before: int | None,
    after: int | None,
    reason: str | None,
    figures: Mapping[str, Any] | None = None,
) -> Event:
    reason = (reason or "").strip()[:_REASON_LENGTH] or None
    at = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    event = Event(at, action, version.number, before, after, _user(), reason, dict(figures or {}))
    while len(text := json.dumps(asdict(event))) > _TAG_LENGTH and event.figures:
        event.figures.popitem()
    registry.client.set_registered_model_tag(registry.name, f"{EVENT_TAG}{time.time_ns()}", text)
    return event


def _user() -> str:
    """user@host"""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may have no user name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
