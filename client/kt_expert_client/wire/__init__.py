"""What carries frames between trainer and server."""
