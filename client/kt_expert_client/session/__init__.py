"""The trainer's half of the session protocol: a state machine without I/O, and what drives it."""
