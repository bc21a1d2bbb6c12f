"""megagrok: train Grok-2-class mixture-of-experts models on Megatron-core x DeepSpeed x Transformer Engine.

Importing this package touches no device and no library; the rooms are described in CONTRIBUTING.md.
"""

__version__ = "0.1.0"
