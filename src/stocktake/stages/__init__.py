"""The stages of the ladder: what each trains, and what all do alike. The table of them is in `table`."""

ROOT = "STOCKTAKE_ROOT"
"""Environment variable: the data root as whoever submitted a job knows it."""
