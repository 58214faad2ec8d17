"""Synthetic bins: drawn photos and records in the public bucket's layout."""
