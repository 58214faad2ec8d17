"""How often the gate lets equal and better challengers pass: `python tests/benchmarks/gate.py [--trials N]`.

Predictions are simulated: a model sees the quantity plus noise, part of which is the photo's (the same for all models)
and part of which the bin's (the same for the snapshots of a group). With NOISE, macro-F1 is about 0.44 and the standard
error of a difference at n = 801 about 0.021, as of the models of the ladder on real bins. Each row is judged by the
rules of the gate, and by those that it had before: lower end of the 95 % percentile interval above 0, no recall lower
by more than 0.10.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import brentq

from stocktake.config.versions import GateConfig
from stocktake.evaluation.metrics import confusion_matrix, scores
from stocktake.registry.gate import Reference, compare_predictions
from stocktake.registry.split_uses import SplitUse
from stocktake.tables import show_table

LABELS = (1, 2, 3, 4, 5)
SHARES = (0.12, 0.23, 0.26, 0.23, 0.16)
"""Of the quantities, as in the real test split."""
NOISE = 1.14
"""Standard deviation, in items."""
PHOTO, BIN = 0.25, 0.25
"""Shares of the noise's variance that all models, and all snapshots of a bin, have in common."""
GROUP = 1.76
"""Snapshots of a bin, on average: 801 in 455 groups."""


class Bins:
    """Bins of a test split, on which models predict."""

    def __init__(self, n: int, rng: np.random.Generator) -> None:
        self._rng = rng
        self._group = np.sort(rng.integers(0, max(1, round(n / GROUP)), n))
        self._quantity = rng.choice(LABELS, n, p=SHARES)
        of_bins = rng.standard_normal(self._group.max() + 1)[self._group]
        self._shared = np.sqrt(PHOTO) * rng.standard_normal(n) + np.sqrt(BIN) * of_bins

    def predictions(self, noise: float = NOISE, blind_to: int | None = None) -> pd.DataFrame:
        """Of a new model; blind_to: takes half of the bins of this quantity for one less."""
        n = len(self._quantity)
        own = np.sqrt(1 - PHOTO - BIN) * self._rng.standard_normal(n)
        predicted = np.rint(self._quantity + noise * (self._shared + own)).clip(LABELS[0], LABELS[-1]).astype(int)
        if blind_to is not None:
            predicted[(self._quantity == blind_to) & (self._rng.random(n) < 0.5)] = blind_to - 1
        columns = {"id": np.arange(n).astype(str), "group": self._group, "quantity": self._quantity}
        return pd.DataFrame(
            {**columns, "predicted": predicted, "expected": predicted, **{f"p_{label}": 0.2 for label in LABELS}}
        )


def verdicts(challenger: pd.DataFrame, champion: pd.DataFrame, without_gain: int = 0) -> npt.NDArray[np.bool_]:
    """Whether gain and recalls pass: (gain before, recalls before, gain now, recalls now)."""
    recorded, ours, theirs = (
        table[column].to_numpy()
        for table, column in ((challenger, "quantity"), (challenger, "predicted"), (champion, "predicted"))
    )
    after, before = (scores(confusion_matrix(LABELS, recorded, column), LABELS) for column in (ours, theirs))
    drop = max(before[f"recall_{label}"] - after[f"recall_{label}"] for label in LABELS)
    reference, use = Reference("champion", champion), SplitUse(without_gain + 1, without_gain)
    (gain, recalls), figures = compare_predictions(challenger, reference, GateConfig(), use)
    return np.array([figures["gain_low"] > 0, drop <= 0.1, gain.passed, recalls.passed])


def dethroned(n: int, challengers: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Whether any of so many equal challengers dethrones the champion: (before, now)."""
    bins = Bins(n, rng)
    champion = bins.predictions()
    reached = measured_macro_f1(champion)
    ended = np.zeros(2, dtype=bool)
    for number in range(challengers):
        challenger = bins.predictions()
        if measured_macro_f1(challenger) <= reached:
            continue  # neither lets it pass
        gain_before, recalls_before, gain, recalls = verdicts(challenger, champion, number)
        ended |= [gain_before and recalls_before, gain and recalls]
    return ended


def macro_f1(noise: float) -> float:
    """Of a model with this noise, on very many bins."""
    return measured_macro_f1(Bins(200_000, np.random.default_rng(0)).predictions(noise))


def measured_macro_f1(table: pd.DataFrame) -> float:
    """Of predictions."""
    return float(scores(confusion_matrix(LABELS, table["quantity"], table["predicted"]), LABELS)["macro_f1"])


def main() -> None:
    """Simulate and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args().trials
    began, rows = time.process_time(), []

    def row(case: str, n: int, passed: npt.NDArray[np.floating]) -> None:
        """Shares: promoted before and now, refused by a recall before and now."""
        shares = [f"{share:.1%}" for share in passed]
        names = ("promoted before", "promoted now", "recall refuses before", "recall refuses now")
        rows.append({"case": case, "n": str(n), **dict(zip(names, shares, strict=False))})
        print(rows[-1], flush=True)

    def judged(n: int, seed: int, noise: float = NOISE, *, blind_to: int | None = None, use: int = 0) -> None:
        rng = np.random.default_rng(seed)
        results = []
        for _ in range(trials):
            bins = Bins(n, rng)
            results.append(verdicts(bins.predictions(noise, blind_to), bins.predictions(), use))
        gain_before, recalls_before, gain, recalls = np.array(results).T
        promoted = (gain_before & recalls_before).mean(), (gain & recalls).mean()
        row(case, n, np.array([*promoted, 1 - recalls_before.mean(), 1 - recalls.mean()]))

    for n, times in ((113, 3), (801, 1)):
        rng = np.random.default_rng(1)
        row("any of 20 equal challengers", n, np.mean([dethroned(n, 20, rng) for _ in range(times * trials)], axis=0))
    for n in (113, 801):
        case = "an equal model"
        judged(n, 2)
    better = float(brentq(lambda noise: macro_f1(noise) - macro_f1(NOISE) - 0.05, 0.6, NOISE, xtol=1e-3))
    for use in (0, 1, 4, 19):
        case = f"5 points better, {use} before without"
        judged(801, 3, better, use=use)
    for n in (113, 801):
        case = "recall of 3 halved"
        judged(n, 4, blind_to=3)
    show_table(rows, title=f"The gate, {trials} trials, macro-F1 {macro_f1(NOISE):.3f}", style=lambda _: None)
    print(f"{time.process_time() - began:.0f} s of CPU")


if __name__ == "__main__":
    main()
