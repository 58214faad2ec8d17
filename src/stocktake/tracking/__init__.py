"""Runs on disk first, then mirrored to MLflow; the registry; the leaderboard."""
