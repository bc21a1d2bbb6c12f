"""The router with its backward pass written by hand: two matmuls there and one here, and little in between.

Softmax, z-loss and balance statistics share one exponential and its sum; their gradients and that of the weights meet
in one [T, E] buffer, which goes back through the soft-cap once. Kept: x as it came (not its fp32 copy), the squashed
logits, the probabilities, and three numbers or so a token.
"""
# T tokens, D hidden, E experts, K top-k

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megagrok.kernels.router.door import Routed, Scores, check_shapes
from megagrok.kernels.router.logits import gradients, make_logits

_SAFE_EXPONENT = 80.0
"""exp of no more than this, summed over any number of experts, is finite in fp32: e^80 = 5.5e34."""
_FEW_EXPERTS = 16
_RUN_TOKENS = 512


def route(
    x_TD: Tensor, weight_ED: Tensor, *, cap: float | None, top_k: int, scores: Scores, renormalize: bool
) -> Routed:
    """See `Router`."""
    check_shapes(x_TD, weight_ED, top_k)
    return Routed(*_routed(x_TD, weight_ED, cap, top_k, scores == "sigmoid", renormalize))


class _Route(torch.autograd.Function):
    """Gradients of p = softmax(l), given dw of the weights, dP of the sums of p, dz of the sum of lse^2:

    a_k = w_k dw_k, or w_k (dw_k - <w, dw>) if renormalised; scattered to a_e
    dl_e = p_e (dP_e - <p, dP>) + a_e - p_e sum(a) + 2 dz lse p_e, times 1 - tanh^2 of the cap
    Sigmoids s: dl_e = (p_e (dP_e - <p, dP>) + a_e) (1 - s_e) + 2 dz lse softmax_e, with p = s / sum(s).
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_ED: Tensor, cap: float | None, top_k: int, is_sigmoid: bool, renormalize: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits_TE = _make_few_logits(x_TD, weight_ED) if _are_few(x_TD, weight_ED) else make_logits(x_TD, weight_ED)
        tanh_TE = None
        if cap is not None:
            tanh_TE = logits_TE.div_(cap).tanh_()
            logits_TE = tanh_TE * cap
        softmax_TE, lse_T1 = _softmax(logits_TE, is_bounded=cap is not None and cap <= _SAFE_EXPONENT)
        scores_TE, p_TE = softmax_TE, softmax_TE
        if is_sigmoid:
            scores_TE = logits_TE.sigmoid()
            p_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        weights_TK, experts_TK = scores_TE.topk(top_k, dim=-1)
        if renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        tokens_per_expert_E = experts_TK.flatten().bincount(minlength=len(weight_ED))
        ctx.save_for_backward(
            x_TD,
            weight_ED,
            tanh_TE,
            softmax_TE,
            lse_T1,
            weights_TK,
            experts_TK,
            *((scores_TE, p_TE) if is_sigmoid else ()),
        )
        ctx.renormalize = renormalize
        ctx.mark_non_differentiable(experts_TK, tokens_per_expert_E)
        return weights_TK, experts_TK, tokens_per_expert_E, p_TE.sum(dim=0), lse_T1.square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        dweights_TK, _, _, dP_E, dz = grads
        x_TD, weight_ED, tanh_TE, softmax_TE, lse_T1, weights_TK, experts_TK, *sigmoid = ctx.saved_tensors
        a_TK = weights_TK * dweights_TK
        total_T1 = a_TK.sum(dim=-1, keepdim=True)
        if ctx.renormalize:
            a_TK.addcmul_(weights_TK, total_T1, value=-1)
        z_T1 = lse_T1 * (2 * dz)
        if sigmoid:
            scores_TE, p_TE = sigmoid
            dlogits_TE = torch.sub(dP_E, torch.mv(p_TE, dP_E)[:, None]).mul_(p_TE).scatter_add_(1, experts_TK, a_TK)
            dlogits_TE.mul_(1 - scores_TE).addcmul_(softmax_TE, z_T1)
        else:
            # Renormalised weights sum to 1, so their gradient along the softmax is none.
            along_T1 = z_T1 if ctx.renormalize else z_T1.sub_(total_T1)
            along_T1 = along_T1.sub_(torch.mv(softmax_TE, dP_E)[:, None])
            dlogits_TE = torch.add(dP_E, along_T1).mul_(softmax_TE).scatter_add_(1, experts_TK, a_TK)
        if tanh_TE is not None:
            dlogits_TE = torch.ops.aten.tanh_backward(dlogits_TE, tanh_TE)
        return *gradients(dlogits_TE, x_TD, weight_ED, ctx.needs_input_grad), None, None, None, None


_routed: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = _Route.apply


def _are_few(x_TD: Tensor, weight_ED: Tensor) -> bool:
    return len(weight_ED) <= _FEW_EXPERTS and x_TD.dtype == weight_ED.dtype == torch.float32 and not x_TD.is_cuda


def _make_few_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """`make_logits` on a CPU, whose matmul is twice as fast where a result this narrow is laid out expert by expert,
    and run by run of tokens. So are then all buffers that are made from it."""
    logits_ET = x_TD.new_empty(len(weight_ED), len(x_TD))
    runs = -(-len(x_TD) // _RUN_TOKENS) or 1
    for x_tD, logits_Et in zip(x_TD.chunk(runs), logits_ET.chunk(runs, dim=1), strict=True):
        torch.mm(weight_ED, x_tD.t(), out=logits_Et)
    return logits_ET.t()


def _softmax(logits_TE: Tensor, *, is_bounded: bool) -> tuple[Tensor, Tensor]:
    """softmax over E and logsumexp, [T, 1]. Bounded logits need no maximum taken off before their exponential."""
    if is_bounded:
        exponentials_TE = logits_TE.exp()
        total_T1 = exponentials_TE.sum(dim=-1, keepdim=True)
        return exponentials_TE.div_(total_T1), total_T1.log_()
    highest_T1 = logits_TE.amax(dim=-1, keepdim=True)
    exponentials_TE = (logits_TE - highest_T1).exp_()
    total_T1 = exponentials_TE.sum(dim=-1, keepdim=True)
    return exponentials_TE.div_(total_T1), total_T1.log() + highest_T1
