"""Adapters to the libraries users train with."""
