"""`python faulty_rank.py ARGUMENTS` is `stocktake ARGUMENTS`, with a fault in one process at the start of an epoch.

FAULT in the environment is "RANK ATTEMPT EPOCH DEED", or "RANK ATTEMPT EPOCH DEED BATCH" for the start of a batch (from
0); a process that comes there writes its id into FAULT_FILE first. DEED is kill, raise, mend (an error that the user
can mend), term (SIGTERM to the launcher), or wait (for whoever does something to it).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """The command line, with the fault."""
    from stocktake import cli

    if sys.argv[1] == "ddp":
        from stocktake.commands import ddp

        ddp.PROGRAM = (sys.executable, __file__)
    else:
        _break()
    cli.main()


def _break() -> None:
    from stocktake import distributed
    from stocktake.errors import StocktakeError
    from stocktake.training.fit import EpochLogger

    rank, attempt, epoch, deed, *batch = os.environ["FAULT"].split()
    place_in_job = (int(rank), int(attempt), int(epoch), *map(int, batch))

    def fail(_line: EpochLogger, trainer: Any, _module: Any, _batch: Any = None, index: int = 0) -> None:
        world = distributed.world()
        here = (world.rank, world.restarts, trainer.current_epoch + 1, index)
        if here[: len(place_in_job)] != place_in_job:
            return
        place = Path(os.environ["FAULT_FILE"])
        place.with_suffix(".part").write_text(str(os.getpid()))
        place.with_suffix(".part").rename(place)
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "raise":
            raise ValueError("boom")
        if deed == "mend":
            raise StocktakeError("--lr is off: give another")
        if deed == "term":
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1 if deed == "term" else 120)

    if batch:
        EpochLogger.on_train_batch_start = fail  # type: ignore[method-assign]
    else:
        EpochLogger.on_train_epoch_start = fail  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
