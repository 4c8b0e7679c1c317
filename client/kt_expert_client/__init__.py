"""The kt-expert client."""
