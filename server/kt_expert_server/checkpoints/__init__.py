"""Snapshots of runs on disk."""
