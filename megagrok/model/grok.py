"""One model chunk of this rank: embedding, Megatron's TransformerBlock of Grok layers, head and loss.

A chassis of Megatron parts instead of its GPTModel, because Grok scales the embedding and caps the logits, and because
GPTModel moves a tied weight to a CUDA device by hand (megatron-core 0.16.1 language_module.py:244).
"""

# B micro-batch, s this rank's positions (after context parallelism), D hidden, v this rank's vocabulary rows

from typing import cast

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megagrok.model.dropout import token_numbers
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
        """Hidden states for the next stage [s, B, D]; at the end of the model the sum of the tokens' losses, fp32,
        those with IGNORED_LABEL left out; without labels this rank's part of the logits [s, B, v], fp32.
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
        return self._logits(hidden_sBD) if labels_Bs is None else self._loss_sum(hidden_sBD, labels_Bs.t())

    def _token_numbers(self, sample_ids_B: Tensor, positions_s: Tensor) -> Tensor:
        """Numbers of the tokens in this rank's part of the residual stream: under sequence parallelism a run of s."""
        numbers_sB = token_numbers(sample_ids_B, positions_s, self.config.grok.max_positions).t()
        if self.config.sequence_parallel:
            groups = self.config.groups
            numbers_sB = numbers_sB.chunk(groups.topology.tensor)[groups.coordinates.tensor]
        return numbers_sB.contiguous()

    def _logits(self, hidden_sBD: Tensor) -> Tensor:
        grok = self.config.grok
        logits_sBv, _ = self.output_layer(hidden_sBD, weight=self._head_weight())
        logits_sBv = logits_sBv.float() * grok.output_multiplier
        cap = grok.final_softcap
        return cast(Tensor, logits_sBv if cap is None else (logits_sBv / cap).tanh() * cap)

    def _loss_sum(self, hidden_sBD: Tensor, labels_sB: Tensor) -> Tensor:
        """Of all tokens over the whole vocabulary, whose rows the tensor ranks share; logits are never whole."""
        grok, group = self.config.grok, self.config.groups.tensor
        # As ColumnParallelLinear begins: each rank's part of the gradient is summed on the way back.
        if self.config.sequence_parallel:
            hidden_sBD = gather_from_sequence_parallel_region(hidden_sBD, group=group)
        else:
            hidden_sBD = copy_to_tensor_model_parallel_region(hidden_sBD, group=group)
        weight_vD = self._head_weight()
        loss_sum, _ = self.config.kernels.cross_entropy(
            hidden_sBD.flatten(0, 1),
            weight_vD,
            labels_sB.flatten(),
            multiplier=grok.output_multiplier,
            cap=grok.final_softcap,
            group=group if dist.get_world_size(group) > 1 else None,
            first_token=dist.get_rank(group) * len(weight_vD),
        )
        return cast(Tensor, loss_sum)

    def _head_weight(self) -> Tensor:
        """A tied head has a weight of its own only where the embedding lives on another stage."""
        is_here = not (self.share_embeddings_and_output_weights and self.pre_process)
        return cast(Tensor, self.output_layer.weight if is_here else self.embedding.word_embeddings.weight)

    def _rotary_angles(self, positions_s: Tensor) -> Tensor:
        """Angles of half-split RoPE, [s, 1, 1, head_dim], computed in fp64: at position 131071 fp32 is off by 1e-2."""
        head_dim = self.config.grok.head_dim
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_s.device) / head_dim
        angles = torch.outer(positions_s.double(), self.config.grok.rope_theta**-exponent)
        # cos and sin repeat every turn, so the turns can go before the precision does.
        angles = torch.remainder(angles, 2 * torch.pi).float()
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]
