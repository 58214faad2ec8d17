"""`python -m stocktake` is `stocktake`."""

from stocktake.cli import main

if __name__ == "__main__":
    main()
