"""Pieces of work for the native engine, in what order they run, and the memory they need. Knows no members and no gRPC."""
