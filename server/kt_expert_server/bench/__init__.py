"""Measures the engine's layers on this machine against what bounds them and against peers.

Owns no engine code and is imported by the command line only. torch, matplotlib and other engines are optional: what is asked
for and not there is an error.
"""
