"""Contender: megagrok's engine and model with DeepSpeed's stock MoE layer, which keeps every token, in each mlp slot.

The same first values; with the same router settings the same losses.
"""

# s this rank's positions, b micro-batch, T = s * b tokens, D hidden, F expert width, E experts

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from megagrok.bench.peers.contender import count_parameters, engine_step
from megagrok.config import RunConfig
from megagrok.data.batches import Batch
from megagrok.engine.engine import Engine
from megagrok.model.grok import GrokModel
from megagrok.model.moe.layer import RouterTotals
from megagrok.model.names import parameter_shapes
from megagrok.model.parts import LocalParameter, Part, fill_initial_values, local_parameters
from megagrok.model.transformer_config import GrokTransformerConfig, make_transformer_config
from megagrok.parallel.groups import Mpu, ProcessGroups
from megagrok.platform import Platform


class StockMoeStep:
    """The same engine and model with DeepSpeed's stock MoE layer, which keeps every token, in each mlp slot.

    Make it after every other contender: its last act tells DeepSpeed's layer, through a module global that each
    deepspeed.initialize sets anew, that the tensor ranks hold different tokens.
    """

    name = "deepspeed stock MoE"

    def __init__(self, run: RunConfig, groups: ProcessGroups, platform: Platform) -> None:
        config = make_transformer_config(run, groups, platform)
        chunk = GrokModel(config, pre_process=groups.is_first_stage, post_process=groups.is_last_stage)
        parameters = _with_stock_layers(chunk)
        fill_initial_values(parameters, run.model, run.train.seed)
        self.num_params = count_parameters(parameters, groups)
        self._engine = Engine(run, groups, platform, config, [chunk], parameters)
        deepspeed_groups.mpu = _TokensOfTheirOwn(groups)

    def step(self, batch: Batch, lr: float) -> float:
        """See Contender."""
        return engine_step(self._engine, batch, lr, self.name)


class _TokensOfTheirOwn(Mpu):
    """Says that there is no tensor parallelism, which under sequence parallelism is true of the tokens.

    The stock layer takes the tensor ranks' tokens for copies of each other and would drop all but one rank's
    (deepspeed 0.19.8 moe/sharded_moe.py:686). Told otherwise it does with them what it does with those of data ranks.
    """

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1


class _Expert(nn.Module):
    """One expert as DeepSpeed wants it, a module; the maths and the fused gate and up of megagrok's."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        down: Tensor = self.down(F.gelu(gate, approximate="tanh") * up)
        return down


class _Load(nn.Module):
    """Where the engine leaves the previous step's load; the stock router does not read it."""

    load_E: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("load_E", torch.zeros(num_experts, dtype=torch.float64))


class _StockMoe(MoE):
    """DeepSpeed's layer with Megatron's mlp interface, and with what the engine asks of an MoE layer."""

    def __init__(self, config: GrokTransformerConfig) -> None:
        moe = config.grok.moe
        super().__init__(
            config.hidden_size,
            _Expert(config.hidden_size, moe.ffn_hidden),
            num_experts=moe.num_experts,
            ep_size=config.expert_model_parallel_size,
            k=moe.top_k,
            drop_tokens=False,
            use_rts=False,
            # By default the second expert is drawn at random.
            top2_2nd_expert_sampling=False,
        )
        self.moe = moe
        self.router = _Load(moe.num_experts)
        self.deepspeed_moe.gate.wg.weight.sequence_parallel = config.tensor_model_parallel_size > 1
        self._totals = self._no_totals()

    def forward(self, x_sbD: Tensor, padding_mask: None = None) -> tuple[Tensor, None]:
        y_sbD, balance, tokens_per_expert_E = super().forward(x_sbD)
        balance_sum = balance * x_sbD[..., 0].numel()
        self._totals.tokens_per_expert_E += tokens_per_expert_E
        self._totals.balance_sum += balance_sum.detach()
        return MoEAuxLossAutoScaler.apply(y_sbD, self.moe.balance_coefficient * balance_sum), None

    def take_totals(self) -> RouterTotals:
        totals, self._totals = self._totals, self._no_totals()
        return totals

    def _no_totals(self) -> RouterTotals:
        return RouterTotals.zeros(self.moe.num_experts, self.router.load_E.device)


def _with_stock_layers(chunk: GrokModel) -> list[LocalParameter]:
    """Put a stock layer into every mlp slot; returns what the chunk's parameters hold then, by global name."""
    replaced = {id(parameter) for layer in chunk.decoder.layers for parameter in layer.mlp.parameters()}
    parameters = [item for item in local_parameters(chunk) if id(item.parameter) not in replaced]
    for layer in chunk.decoder.layers:
        layer.mlp = _StockMoe(chunk.config)
        parameters += _stock_parameters(layer.mlp, layer.layer_number - 1, chunk.config)
    return parameters


def _stock_parameters(layer: _StockMoe, number: int, config: GrokTransformerConfig) -> list[LocalParameter]:
    prefix = f"model.layers.{number}.block_sparse_moe"
    shapes = parameter_shapes(config.grok)

    def whole(name: str, offset: int = 0) -> Part:
        return Part(name, (0, 0), shapes[name], offset)

    gate = layer.deepspeed_moe.gate.wg.weight
    found = [LocalParameter(gate, (whole(f"{prefix}.gate.weight"),), is_replicated_over_tensor=True)]
    first_expert = config.groups.coordinates.expert * layer.num_local_experts
    for expert, module in enumerate(layer.deepspeed_moe.experts.deepspeed_experts, start=first_expert):
        name = f"{prefix}.experts.{expert}"
        half = module.gate_up.weight.numel() // 2
        gate_up = (whole(f"{name}.w1.weight"), whole(f"{name}.w3.weight", half))
        found.append(LocalParameter(module.gate_up.weight, gate_up, is_expert=True))
        found.append(LocalParameter(module.down.weight, (whole(f"{name}.w2.weight"),), is_expert=True))
    return found
