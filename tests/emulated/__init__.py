"""Runs the native test binary on an emulated CPU that has AVX-512 and AMX, for machines that have neither.

Debian's Bochs emulates a Sapphire Rapids CPU and boots a small Linux built from Debian's kernel source; its only process
runs the test binary, and its output and exit status come out through Bochs' debug port. Everything is built from Debian's
packages, without root, into a cache directory named after what went in.
"""
