"""Where the time of a trainer's calls goes: measured at both ends, and put together here."""
