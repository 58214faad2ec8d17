"""Floor 1: what a bin is: record, source, manifest and splits, photos, synthetic bins."""
