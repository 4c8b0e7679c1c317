"""Trainers on this host: a unix socket for frames, and memory that both ends see for tensors."""
