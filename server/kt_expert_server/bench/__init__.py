"""Measures the engine's layers on this machine against what bounds them and against peers.

Owns no engine code and is imported by the command line only. torch, matplotlib and other engines are optional: a
contender that is not installed is left out, and the table says so.
"""
