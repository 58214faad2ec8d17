"""Promotions and rollbacks: aliases that move, and a history that says who moved them, when and why.

The history is a JSON list in the tag `promotion.history` of each version: what happened to that version. All events
of a model have numbers of one row, given under the promotion lock, so that clocks do not matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from stocktake.errors import StocktakeError
from stocktake.registry.promotion_lock import PromotionLock, who
from stocktake.registry.versions import CHALLENGER, CHAMPION, ModelRegistry, Version

HISTORY_TAG = "promotion.history"
CHALLENGED, PROMOTED, FORCED, REFUSED, ROLLED_BACK = "challenger", "promoted", "forced", "refused", "rolled back"
_HISTORY_LENGTH = 30_000  # characters; MySQL's stores keep 65,535 bytes
_REASON_LENGTH = 500


@dataclass(frozen=True)
class Event:
    """One thing that happened to a version."""

    number: int
    """Of all events of the registered model, in their order."""
    action: str
    """challenger, promoted, forced, refused or rolled back."""
    at: str
    """2026-11-03T12:00:00Z"""
    by: str
    """user@host"""
    why: str | None
    before: int | None
    """The champion's version before it."""
    after: int | None
    """The champion's version after it."""
    version: int
    """What it is about."""
    figures: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As it is kept."""
        return {
            "n": self.number,
            "action": self.action,
            "at": self.at,
            "by": self.by,
            "why": self.why,
            "from": self.before,
            "to": self.after,
            "version": self.version,
            "figures": self.figures,
        }


def history(versions: Sequence[Version]) -> list[Event]:
    """What happened to the versions, in order."""
    events = [event for version in versions for event in _events(version)]
    return sorted(events, key=lambda event: (event.number, event.at))


def earlier_champion(events: Sequence[Event], champion: int, existing: set[int]) -> int | None:
    """The version that was the champion before this one was promoted; None if none was, or it was deleted.

    A rollback takes the promotions after it back, so that one rollback after another goes further back.

    Args:
        events: in order.
        champion: the version that is the champion now.
        existing: the versions that there are.
    """
    reigned: list[int] = []
    for event in events:
        if event.action in (PROMOTED, FORCED) and event.after is not None:
            if event.before is not None and (not reigned or reigned[-1] != event.before):
                reigned.append(event.before)  # moved there by other hands than these
            reigned.append(event.after)
        elif event.action == ROLLED_BACK and event.after in reigned:
            del reigned[len(reigned) - reigned[::-1].index(event.after) :]
    if champion in reigned:
        del reigned[len(reigned) - 1 - reigned[::-1].index(champion) :]
    return next((number for number in reversed(reigned) if number in existing and number != champion), None)


def challenge(registry: ModelRegistry, version: Version) -> None:
    """Put the alias challenger on the version.

    Raises:
        StocktakeError: it is the champion.
    """
    if registry.aliases().get(CHAMPION) == version.number:
        raise StocktakeError(f"{version.label} is the champion already: choose another --version")
    registry.set_alias(CHALLENGER, version)


def note_challenger(registry: ModelRegistry, version: Version, reason: str | None) -> Event:
    """Note that the version was made the challenger, and no more than that."""
    champion = registry.aliases().get(CHAMPION)
    return _record(registry, version, CHALLENGED, reason, champion, champion, {})


def refuse(
    registry: ModelRegistry, version: Version, champion: Version | None, reason: str | None, figures: Mapping[str, Any]
) -> Event:
    """Note that the gate did not let the version pass. It stays the challenger."""
    number = champion.number if champion else None
    return _record(registry, version, REFUSED, reason, number, number, figures)


def set_champion(
    registry: ModelRegistry,
    lock: PromotionLock,
    version: Version,
    champion: Version | None,
    *,
    forced: bool,
    reason: str | None,
    figures: Mapping[str, Any],
) -> Event:
    """Make the version the champion.

    Args:
        registry: opened.
        lock: held.
        version: the challenger.
        champion: what the gate held it against.
        forced: whether the gate was overruled.
        reason: for the history.
        figures: for the history.

    Raises:
        StocktakeError: the champion is another one by now, or the lock was taken over; nothing was changed.
    """
    lock.still_held()
    now = registry.aliases().get(CHAMPION)
    before = champion.number if champion else None
    if now != before:
        raise StocktakeError(
            f"the champion of {registry.name} is {_named(now)} by now, and the gate compared with {_named(before)};"
            " nothing was changed: promote again"
        )
    registry.set_alias(CHAMPION, version)
    registry.drop_alias(CHALLENGER, version)
    return _record(registry, version, FORCED if forced else PROMOTED, reason, before, version.number, figures)


def roll_back(registry: ModelRegistry, lock: PromotionLock, reason: str | None) -> tuple[Version, Version, Event]:
    """Make the champion before this one the champion again.

    Returns:
        The version that was the champion, the one that is now, and the event.

    Raises:
        StocktakeError: there is no champion, or none before it.
    """
    champion = registry.champion()
    if champion is None:
        raise StocktakeError(f"{registry.name} has no champion to roll back from: `stocktake promote` makes one")
    versions = registry.versions()
    numbers = {version.number: version for version in versions}
    earlier = earlier_champion(history(versions), champion.number, set(numbers))
    if earlier is None:
        raise StocktakeError(
            f"{champion.label} is the first champion, there is none to go back to: promote another version"
            " (`stocktake registry` lists them)"
        )
    lock.still_held()
    registry.set_alias(CHAMPION, numbers[earlier])
    registry.drop_alias(CHALLENGER, numbers[earlier])
    event = _record(registry, champion, ROLLED_BACK, reason, champion.number, earlier, {})
    return champion, registry.version(str(earlier)), event


def _record(
    registry: ModelRegistry,
    version: Version,
    action: str,
    why: str | None,
    before: int | None,
    after: int | None,
    figures: Mapping[str, Any],
) -> Event:
    """Append an event to the history of the version it is about."""
    versions = registry.versions()
    number = max((event.number for event in history(versions)), default=0) + 1
    moment = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    why = why.strip()[:_REASON_LENGTH] if why else None
    event = Event(number, action, moment, who(), why or None, before, after, version.number, dict(figures))
    held = next((_events(one) for one in versions if one.number == version.number), [])
    registry.set_tag(version, HISTORY_TAG, _shortened([*held, event]))
    return event


def _shortened(events: list[Event]) -> str:
    """The events as text of a length that every store takes: refusals go first, then what is oldest."""
    events = list(events)
    while len(text := json.dumps([event.as_json() for event in events])) > _HISTORY_LENGTH and len(events) > 1:
        unimportant = (place for place, one in enumerate(events[:-1]) if one.action in (REFUSED, CHALLENGED))
        del events[next(unimportant, 0)]
    return text


def _events(version: Version) -> list[Event]:
    """The history of one version; what cannot be read, because somebody edited it, is none."""
    try:
        return [
            Event(
                int(one["n"]),
                one["action"],
                one["at"],
                one["by"],
                one["why"],
                one["from"],
                one["to"],
                one["version"],
                one["figures"],
            )
            for one in json.loads(version.tags.get(HISTORY_TAG, "[]"))
        ]
    except (ValueError, KeyError, TypeError):
        return []


def _named(number: int | None) -> str:
    return "none" if number is None else f"version {number}"
