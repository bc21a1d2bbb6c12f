"""The engine: Megatron's schedules forward and backward, DeepSpeed's reduction, clipping and step, one door to both."""
