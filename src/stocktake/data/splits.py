"""Train, val and test, decided by a hash, so that they hardly move when bins are added."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from stocktake.errors import StocktakeError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def assign_split(key: str, fractions: Sequence[float], seed: int) -> Split:
    """The split of a group (or of an id): its hash, seen as a number in [0, 1), falls into one of three shares."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < fractions[0]:
        return "train"
    return "val" if position < fractions[0] + fractions[1] else "test"


def check_fractions(fractions: Sequence[float]) -> None:
    """Raises StocktakeError unless there are three positive shares that sum to 1."""
    if not (len(fractions) == 3 and min(fractions) > 0 and abs(sum(fractions) - 1) < 1e-6):  # nan neither
        raise StocktakeError(
            f"--split.fractions {list(fractions)} must be three positive shares that sum to 1, such as [0.8,0.1,0.1]"
        )
