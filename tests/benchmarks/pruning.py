"""What pruning saves: a pruned search beside an unpruned one of the same trials, on synthetic bins.

    python tests/benchmarks/pruning.py [--trials 8] [--pruner asha] [--seeds 0 1 2]

Both studies draw their trials at random from the same seed, so they try the same settings in the same order, one at a
time, over the same photos on disk. Printed, for each seed: how long the unpruned search took, what it found best, and
after how long the pruned one had found as much, as a share of that time. To reach: at most one half.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from optuna.trial import FrozenTrial

from stocktake.commands.tune import tune
from stocktake.config.data import SyntheticConfig
from stocktake.config.runs import TrackingConfig
from stocktake.config.training import TuneConfig
from stocktake.tuning.storage import open_storage, sqlite_url
from stocktake.tuning.study import load_study

SPACE = """\
lr: {type: float, low: 1.0e-5, high: 1.0e-1, log: true}
weight_decay: {type: float, low: 1.0e-3, high: 0.3, log: true}
batch_size: {choices: [16, 32, 64]}
training.freeze_epochs: {type: int, low: 0, high: 2}
"""


def search(folder: Path, pruner: str, trials: int, seed: int) -> list[FrozenTrial]:
    """The finished trials of a study, in the order in which they ended."""
    workspace = folder / "workspace"
    (folder / "space.yaml").write_text(SPACE)
    before = set((workspace / "runs").glob("tune-*"))
    config = TuneConfig(
        workspace=str(workspace),
        space=str(folder / "space.yaml"),
        synthetic=SyntheticConfig(count=400, size=96),
        image_size=64,
        epochs=6,
        precision="fp32",
        trials=trials,
        pruner=pruner,  # type: ignore[arg-type]
        sampler="random",
        seed=seed,
        tracking=TrackingConfig(offline=True, system_metrics=False),
    )
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        tune(config)
    (path,) = set((workspace / "runs").glob("tune-*")) - before
    return load_study(open_storage(sqlite_url(path)), path.name)[0].get_trials()


def seconds(trials: list[FrozenTrial]) -> float:
    """Of the trials alone, without what comes before and after them."""
    return sum(trial.duration.total_seconds() for trial in trials if trial.duration)


def main() -> None:
    """Print a line a seed, and the ratio of all."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trials", type=int, default=8)
    arguments.add_argument("--pruner", default="asha")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = arguments.parse_args()
    ratios = []
    print(f"{given.trials} trials of up to 6 epochs, 400 synthetic bins at 64 px; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            whole = search(Path(folder), "none", given.trials, seed)
            target, total = max(trial.values[0] for trial in whole if trial.values), seconds(whole)
            pruned = search(Path(folder), given.pruner, given.trials, seed)
            complete = [trial for trial in pruned if trial.state.name == "COMPLETE"]
            reached = [trial for trial in complete if trial.values[0] >= target]
            ended = f"{len(pruned) - len(complete)} pruned, whole search {seconds(pruned) / total:.2f} of the time"
            if reached:
                ratio = seconds(pruned[: reached[0].number + 1]) / total
                found = f"reached in trial {reached[0].number} after {ratio:.2f} of the time"
            else:
                ratio = float("inf")
                found = f"not reached: {max((trial.values[0] for trial in complete), default=0):.3f}"
            ratios.append(ratio)
            print(
                f"seed {seed}: unpruned {total:.0f} s, best {target:.3f}; {given.pruner}: {found}; {ended}", flush=True
            )
    print(
        f"ratio: {' '.join(f'{ratio:.2f}' for ratio in ratios)}, median {statistics.median(ratios):.2f} (target 0.50)"
    )


if __name__ == "__main__":
    main()
