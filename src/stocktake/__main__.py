"""`python -m stocktake`, or `python src/stocktake` from a checkout where nothing is installed, is `stocktake`."""

import sys
from pathlib import Path

if not __package__:  # run by its path: this checkout's package, and nothing in it under a bare name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stocktake.cli import main

if __name__ == "__main__":
    main()
