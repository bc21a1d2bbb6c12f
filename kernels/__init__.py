"""The operations that most of a step is spent in, each in a folder with its reference, tests, bench and maths.

It is `megagrok.kernels` (a link). An operation has several implementations under one signature; `choice.py` picks one
by name, once, when a model is built.
"""
