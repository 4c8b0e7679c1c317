"""Both halves of the protocol in one thread, under a seeded heap of events with virtual time.

What runs here is the product: the cores of trainer and server, the codec between them, the checkpoint store, and the engine on
a tiny layer. Simulated are the network, the disk, the clock, and the deaths and pauses of processes. Every choice comes from
one seed, so that a schedule can be played again.
"""
