"""Floor 4: from photo bytes to a count."""
