"""The server's half of the session protocol: runs, members, barriers and leases as state machines without I/O."""
