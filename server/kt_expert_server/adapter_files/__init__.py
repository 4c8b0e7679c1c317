"""Adapters as files: what PEFT and kt-kernel write, what serving engines read of it, and whether both are the same."""
