"""How often the gate has used the bins of a test split, and the level at which it judges next.

A split on which challenger after challenger is tried dethrones a champion by luck: with an interval of 95 % each time,
one of 20 equally good challengers did so in a third of simulations. The uses therefore spend one budget of error,
alpha-spending as of Foster & Stine, Alpha-investing (2008), sec. 2, and Tian & Ramdas, Online control of the familywise
error rate (2021): the k-th is judged at the level FAMILY_LEVEL * 6 / (pi^2 k^2), and these sum to FAMILY_LEVEL. By the
union bound, the probability that any of however many challengers that are no better dethrones the champion is at most
FAMILY_LEVEL. It does not matter how their figures depend on each other, and they do: by the bins and the champion.

A use that shows a gain does not count for k. Until a challenger that is no better is promoted, all such challengers
have counted, so that the j-th of them is judged at k = j or later, and the union bound holds. A line of true gains is
judged at the first level each time. Why no other method: a ladder mechanism (Blum & Hardt 2015) bounds by how much a
leaderboard is off, not how often a champion falls to an equal one; a sealed second split would have to be counted too.

The uses are tags of the registered model, one each, and only ever added: nothing that happens to a version, and no
promotion at the same time, loses one. A use is written before it is counted: the j-th that is written sees j or more.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from stocktake.registry.versions import ModelRegistry

FAMILY_LEVEL = 0.04
"""Budget of the probability that any of the challengers that are no better than the champion dethrones it: 5 % less
what the interval misses on few bins (at n = 113 its error is 4 % short). The first use is judged by a 95 % interval."""
USE_TAG = "gate.use."
_SAMPLE = 32
"""Bins of a use, the smallest by hash, by which it is recognised on a test split that has grown or shrunk: if a tenth
of its bins are in the other split too, none of these is with a probability of 0.9 ** 32 = 3 %."""


@dataclass(frozen=True)
class SplitUse:
    """One comparison on a test split."""

    number: int = 1
    """Of the uses of the same bins, this one included."""
    without_gain: int = 0
    """Earlier uses of the same bins that showed no gain, or have not ended."""
    key: str = ""
    """Tells this comparison from others."""

    @property
    def level(self) -> float:
        """One-sided level at which the gain is judged."""
        return FAMILY_LEVEL * 6 / (math.pi * (self.without_gain + 1)) ** 2

    def __str__(self) -> str:
        return f"use {self.number} of these test bins, {self.without_gain} before it without a gain"


def record_use(registry: ModelRegistry, key: str, bins: pd.DataFrame) -> SplitUse:
    """Count a comparison, before anything of it is seen.

    Args:
        registry: opened.
        key: of `gate.comparison_key`. A comparison that was counted before has its number and level again.
        bins: id and quantity of the test split.
    """
    hashes = {_hash(bin_id, quantity) for bin_id, quantity in zip(bins["id"], bins["quantity"], strict=True)}
    tag = f"{USE_TAG}{key}"
    use = _uses(registry).get(tag)
    if use is None:
        at = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        use = {"at": at, "bins": len(bins), "sample": sorted(hashes)[:_SAMPLE]}
        _write(registry, tag, use)
    if "number" not in use:
        earlier = [
            other for name, other in _uses(registry).items() if name != tag and not hashes.isdisjoint(other["sample"])
        ]
        use |= {"number": len(earlier) + 1, "without_gain": sum(not other.get("gain") for other in earlier)}
        _write(registry, tag, use)
    return SplitUse(use["number"], use["without_gain"], key)


def record_outcome(registry: ModelRegistry, use: SplitUse, *, has_gain: bool) -> None:
    """Record whether a use showed a gain."""
    tag = f"{USE_TAG}{use.key}"
    _write(registry, tag, _uses(registry)[tag] | {"gain": has_gain})


def _hash(bin_id: str, quantity: int) -> str:
    return hashlib.blake2b(f"{bin_id} {quantity}".encode(), digest_size=4).hexdigest()


def _uses(registry: ModelRegistry) -> dict[str, dict[str, Any]]:
    """What is recorded of each use, by its tag."""
    tags = registry.registered().tags
    return {tag: json.loads(text) for tag, text in tags.items() if tag.startswith(USE_TAG)}


def _write(registry: ModelRegistry, tag: str, use: dict[str, Any]) -> None:
    registry.client.set_registered_model_tag(registry.name, tag, json.dumps(use))
