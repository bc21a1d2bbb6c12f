"""What can be asked of `megagrok bench compare`, for a command line that starts without torch."""

PEER_NAMES = ("megatron", "ddp", "autoep", "stock")
"""Of the contenders in peers/."""
