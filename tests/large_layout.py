"""A layout of configs/run/pretrain-286b.yaml for laws whose numbers must not move when the file's own layout does."""

TENSOR_8 = (
    "parallel.tensor=8",
    "parallel.virtual_pipeline=2",
    "parallel.data=8",
    "train.recompute=selective",
    "checkpoint.every_steps=500",
)
"""512 ranks: tensor 8 x pipeline 8 x data 8, two chunks a stage."""
