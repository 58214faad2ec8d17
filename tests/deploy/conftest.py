"""The tiny root is shared with the rooms that train on it."""

from tiny_bins import few_bins, tiny_bench, tiny_root, tiny_settings

__all__ = ["few_bins", "tiny_bench", "tiny_root", "tiny_settings"]
