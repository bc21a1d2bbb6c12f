"""Text to batches: corpus -> documents -> tokens -> samples -> batches, one small file a stage.

The position in the data is one integer, the number of samples consumed. What sample i is follows from the data's
fingerprint, the seed, seq_len and i alone: no layout, batch size or interruption changes it.
"""
