"""One model chunk of this rank: embedding, Megatron's TransformerBlock of Grok layers, head and loss.

A chassis of Megatron parts instead of its GPTModel, because Grok scales the embedding and caps the logits, and because
GPTModel moves a tied weight to a CUDA device by hand (megatron-core 0.16.1 language_module.py:244).
"""

# B micro-batch, s this rank's positions (after context parallelism), D hidden, v this rank's vocabulary rows

from typing import cast

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megagrok.model.dropout import token_numbers
from megagrok.model.loss import IGNORED_LABEL
from megagrok.model.moe.layer import GrokMoE
from megagrok.model.spec import grok_block_spec
from megagrok.model.transformer_config import GrokTransformerConfig


class GrokModel(MegatronModule):
    """Layers of one pipeline stage (or one interleaved chunk of it), with the ends of the model where they belong.

    pre_process and post_process say whether the model begins or ends here; Megatron's schedules read them, and
    `model_type`, `vp_stage` and `share_embeddings_and_output_weights`, by these names.
    """

    def __init__(
        self, config: GrokTransformerConfig, *, pre_process: bool, post_process: bool, vp_stage: int | None = None
    ) -> None:
        super().__init__(config)
        grok = config.grok
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = grok.tied_embeddings
        self.model_type = ModelType.encoder_or_decoder
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=grok.vocab_size,
                max_sequence_length=grok.max_positions,
                position_embedding_type="rope",
                scatter_to_sequence_parallel=True,
            )
        self.decoder = TransformerBlock(
            config,
            grok_block_spec(config, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                grok.hidden,
                grok.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                # A tied head has a weight of its own only where the embedding lives on another stage.
                skip_weight_param_allocation=grok.tied_embeddings and pre_process,
            )

    @property
    def moe_layers(self) -> list[GrokMoE]:
        """The MoE layer of every transformer layer of this chunk, in order."""
        return [layer.mlp for layer in self.decoder.layers]

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        """Where the schedule leaves the hidden states that came from the stage before."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens_Bs: Tensor,
        labels_Bs: Tensor | None,
        positions_s: Tensor,
        sample_ids_B: Tensor | None = None,
    ) -> Tensor:
        """Hidden states for the next stage [s, B, D]; at the end of the model the loss of each token [s, B], fp32,
        zero where the label is IGNORED_LABEL; without labels this rank's part of the logits [s, B, v], fp32.
        sample_ids_B decide what dropout drops; only training with dropout reads them."""
        hidden_sBD = None
        if self.pre_process:
            hidden_sBD = self.embedding(tokens_Bs, position_ids=None) * self.config.grok.embedding_multiplier
        hidden_sBD = self.decoder(
            hidden_sBD,
            # Grok's layers take the numbers of their tokens in this place (model/spec.py).
            attention_mask=None if sample_ids_B is None else self._token_numbers(sample_ids_B, positions_s),
            rotary_pos_emb=self._rotary_angles(positions_s),
        )
        if not self.post_process:
            return cast(Tensor, hidden_sBD)
        logits_sBv = self._logits(hidden_sBD)
        return logits_sBv if labels_Bs is None else _token_losses(logits_sBv, labels_Bs.t())

    def _token_numbers(self, sample_ids_B: Tensor, positions_s: Tensor) -> Tensor:
        """Numbers of the tokens in this rank's part of the residual stream: under sequence parallelism a run of s."""
        numbers_sB = token_numbers(sample_ids_B, positions_s, self.config.grok.max_positions).t()
        if self.config.sequence_parallel:
            groups = self.config.groups
            numbers_sB = numbers_sB.chunk(groups.topology.tensor)[groups.coordinates.tensor]
        return numbers_sB.contiguous()

    def _logits(self, hidden_sBD: Tensor) -> Tensor:
        grok = self.config.grok
        tied_weight = self.embedding.word_embeddings.weight if grok.tied_embeddings and self.pre_process else None
        logits_sBv, _ = self.output_layer(hidden_sBD, weight=tied_weight)
        cap = 1.0 if grok.final_softcap is None else grok.final_softcap
        # Scaled once for both, and capped in place: these are the largest activations of the model.
        logits_sBv = logits_sBv.float() * (grok.output_multiplier / cap)
        return cast(Tensor, logits_sBv if grok.final_softcap is None else logits_sBv.tanh_() * cap)

    def _rotary_angles(self, positions_s: Tensor) -> Tensor:
        """Angles of half-split RoPE, [s, 1, 1, head_dim], computed in fp64: at position 131071 fp32 is off by 1e-2."""
        head_dim = self.config.grok.head_dim
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_s.device) / head_dim
        angles = torch.outer(positions_s.double(), self.config.grok.rope_theta**-exponent)
        # cos and sin repeat every turn, so the turns can go before the precision does.
        angles = torch.remainder(angles, 2 * torch.pi).float()
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def _token_losses(logits_sBv: Tensor, labels_sB: Tensor) -> Tensor:
    """Cross-entropy of each token over the whole vocabulary, whose rows the tensor ranks share."""
    is_counted = labels_sB != IGNORED_LABEL
    losses_sB: Tensor = vocab_parallel_cross_entropy(logits_sBv, labels_sB.where(is_counted, 0).contiguous())
    return losses_sB * is_counted
