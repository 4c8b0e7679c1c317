"""Checkpoints on the server's disk."""
