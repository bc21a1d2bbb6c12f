"""The plan counts the blocks in which the kernels in torch work; it imports no torch, so it has their sizes again."""

from megagrok.kernels.attention import torch_ops as attention
from megagrok.kernels.cross_entropy import torch_ops as cross_entropy
from megagrok.kernels.experts import torch_ops as experts
from megagrok.plan import work


def test_the_plan_has_the_block_sizes_of_the_kernels() -> None:
    assert (work.ATTENTION_BLOCKS, work.SHORTEST_BLOCK) == (attention.MOST_RUNS, attention.SHORTEST_RUN)
    assert work.ATTENTION_BLOCK_BYTES == attention.DEVICE_BLOCK_BYTES
    assert work.CPU_ATTENTION_BLOCK_BYTES == attention.CPU_BLOCK_BYTES
    assert work.CPU_EXPERT_ROWS == experts.CPU_RUN_ROWS
    assert {"cpu": work.CPU_HEAD_CHUNK_BYTES, "cuda": work.HEAD_CHUNK_BYTES} == cross_entropy.CHUNK_BYTES
    assert {"cpu": work.CPU_HEAD_CHUNK_TOKENS, "cuda": work.HEAD_CHUNK_TOKENS} == cross_entropy.FEWEST_TOKENS
