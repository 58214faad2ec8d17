"""What a bin is: record, source, manifest and splits, photos, synthetic bins."""
