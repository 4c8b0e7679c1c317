"""Runs, members, tickets, barriers and the queue in front of the engine. Imports no gRPC: the edge adapts to it."""
