"""The losses of training, as sums over tokens. No parameters, no ranks; used by the oracle, and meant for any model.

A step divides the sum over all its micro-batches once, by the number of tokens of the step that have a label; so each
loss is a token mean, whatever the number of micro-batches. The router sees every token of a call, padding too, and so
do its losses, which are also summed over layers.
"""
# B batch, S sequence, T = B*S tokens, E experts, V vocabulary, L layers.

import torch.nn.functional as F
from torch import Tensor

from megagrok.config.schema import BalanceLoss

IGNORED_LABEL = -100
"""A position with this label is not counted in the cross-entropy."""


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum over the tokens of -log p(label); labels_BS[b, s] is the token after position s, or IGNORED_LABEL."""
    return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def balance_loss_sum(
    kind: BalanceLoss, probability_sum_E: Tensor, tokens_per_expert_E: Tensor, load_E: Tensor | None
) -> Tensor:
    """E * sum_e f_e * sum_t p_te, of the router's probabilities p: T if all experts are used alike, up to E/K * T if
    every token likes the same K. probability_sum_E: the sums over t.

    f_e, the share of all choices that went to expert e, carries no gradient. It is measured over this call's tokens
    ("micro_batch"), or it is load_E, measured over the previous step's whole batch ("global_batch"; uniform if None).
    Sources: Switch Transformers (Fedus et al. 2021), sec. 2.2; global load: Qiu et al. 2025, arXiv 2501.11873, here one
    step late, so that the loss is the same for any number of micro-batches and any schedule of them.
    """
    if kind == "none":
        return probability_sum_E.new_zeros(())
    num_experts = len(probability_sum_E)
    if kind == "micro_batch":
        load_E = expert_load(tokens_per_expert_E)
    elif load_E is None:
        load_E = probability_sum_E.new_full((num_experts,), 1 / num_experts)
    return num_experts * (load_E.to(probability_sum_E) * probability_sum_E).sum()


def z_loss_sum(router_logits_TE: Tensor) -> Tensor:
    """Sum over the tokens of logsumexp(logits)^2, after any soft-cap of them (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return router_logits_TE.logsumexp(dim=-1).square().sum()


def expert_load(tokens_per_expert: Tensor) -> Tensor:
    """Share of a layer's choices that went to each expert, fp64: makes a step's counts the next step's load_LE."""
    return tokens_per_expert.double() / tokens_per_expert.sum(dim=-1, keepdim=True)
