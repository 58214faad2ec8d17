"""One process of a server: loads the model, answers on the socket that it was given, ends with its supervisor.

Started by serving/serve.py with its order, a JSON object, as the only argument. It tells over its line to the
supervisor that it is ready, or why it is not to be.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import traceback
from pathlib import Path

from stocktake.errors import StocktakeError
from stocktake.serving.settings import ServerSettings

READY = b"ready "
"""Told with the model's version and a line's end behind it."""


def main() -> None:
    """Serve until SIGTERM."""
    order = json.loads(sys.argv[1])
    line = socket.socket(fileno=order["line"])
    threading.Thread(target=_end_with_the_supervisor, args=(line,), daemon=True).start()
    try:
        from stocktake.serving.predictor import Predictor
        from stocktake.serving.server import run_worker

        settings = ServerSettings(**order["settings"])
        counter = Predictor(Path(order["model"]), threads=settings.threads, version=order["version"])
        listener = socket.socket(fileno=order["listener"])
        run_worker(counter, settings, listener, lambda: line.sendall(READY + counter.version.encode() + b"\n"))
    except Exception as error:
        if not isinstance(error, StocktakeError):
            traceback.print_exc()
        line.sendall(f"{error or type(error).__name__}".encode())
        sys.exit(1)


def _end_with_the_supervisor(line: socket.socket) -> None:
    """The line is cut when the supervisor ends, however it ends; nothing is ever sent on it to here."""
    line.recv(1)
    os._exit(1)


if __name__ == "__main__":
    main()
