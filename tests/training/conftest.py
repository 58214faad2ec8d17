"""The tiny root is shared with the other rooms that train on it."""

from process_pair import one_thread, pair
from tiny_bins import few_bins, tiny_bench, tiny_root, tiny_settings

__all__ = ["few_bins", "one_thread", "pair", "tiny_bench", "tiny_root", "tiny_settings"]
