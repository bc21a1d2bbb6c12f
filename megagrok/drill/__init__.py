"""Faults injected on purpose, and the proof that they cost time and nothing else.

A drill runs one small model twice: once untouched, once while ranks are killed, stopped, starved or fed with rot. What
comes out has to be the same, bit by bit (oracle.py). Operators run it on their own machines, and so does CI.
"""
