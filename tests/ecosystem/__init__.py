"""What trainers do with models, in process and with the experts on a server: the same figures, or a refusal with its cause."""
