"""Figures of the trainer's side: `kt-expert bench trainer`."""
