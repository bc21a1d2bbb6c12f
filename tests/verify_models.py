"""Models whose twins the tests of verify-layout hold against the oracle."""

from dataclasses import replace
from pathlib import Path

from megagrok.config import load_model_config

_MODELS = Path(__file__).parents[1] / "configs" / "model"

TINY = load_model_config(_MODELS / "tiny.yaml")
GROK1 = load_model_config(_MODELS / "grok1-314b.yaml")
GROK2 = load_model_config(_MODELS / "grok2-270b.yaml")
KINDS = {
    "plain": TINY,
    "grok-1: tied, no router soft-cap": GROK1,
    "grok-2: residual MLP, temperature": GROK2,
    "balance over micro-batches": replace(GROK2, moe=replace(GROK2.moe, balance_loss="micro_batch")),
    "renormalized, one kv head a query head": replace(
        TINY, num_kv_heads=4, moe=replace(TINY.moe, renormalize_top_k=True)
    ),
}
