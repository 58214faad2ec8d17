"""`stocktake rehearse`: a local AWS in the foreground, and the variables that lead programs to it."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from stocktake.config import RehearseConfig
from stocktake.errors import StocktakeError

READY = "# ready"
"""The last line that is printed once everything answers."""


def rehearse(config: RehearseConfig) -> None:
    """Run until Ctrl-C or SIGTERM. What it prints can be given to a shell: `eval`, or saved and sourced.

    Raises:
        StocktakeError: the port is in use, the state folder cannot be written, or moto is not installed.
    """
    try:
        from sagemaker_local.server import BUCKET, Rehearsal
    except ModuleNotFoundError as error:
        if (error.name or "stocktake").partition(".")[0] == "stocktake":
            raise
        raise StocktakeError(
            f"rehearse needs {error.name}, which is not installed: pip install 'stocktake[aws,rehearsal]'"
        ) from None
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    folder = None if config.state is None else str(Path(config.state).absolute())
    with Rehearsal(config.port, config.region, folder, config.grace, config.startup, config.images) as rehearsal:
        print(f"# A local AWS at {rehearsal.machine.endpoint}: the bucket {BUCKET} and a role are there.")
        for name, value in rehearsal.environment.items():
            print(f"export {name}={value}")
        if not rehearsal.machine.confined:
            print(
                "# This machine allows no private mount namespace: containers see no /opt/ml, but SAGEMAKER_BASE_DIR, "
                "and jobs of several hosts fail."
            )
        print(f"{READY}; Ctrl-C ends it, and all that runs in it", flush=True)
        ended.wait()
        print("stocktake: ending the local AWS", file=sys.stderr)
