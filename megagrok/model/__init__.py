"""The architecture: its definition in plain torch, its parameters' names and first values, and Megatron specs of it.

Importing this package imports nothing; `names` needs no torch, `reference` and `init` no Megatron.
"""
