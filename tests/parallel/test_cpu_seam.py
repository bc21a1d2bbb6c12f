"""The CPU seam touches only the modules it names, does what their CUDA would, and every entry is still needed.

When an upstream version cures an entry, its case here fails and names the entry: delete it from the seam then. The last
tests pin what megagrok calls of both libraries, so that an upgrade fails by name and not by number.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups
from layouts import batch_of, make_run, start
from megatron.core import parallel_state
from megatron.core import utils as megatron_utils
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks

from megagrok.config.schema import ParallelConfig
from megagrok.engine.engine import build_engine
from megagrok.errors import RankError
from megagrok.model.transformer_config import GrokTransformerConfig, make_transformer_config
from megagrok.parallel import cpu_seam
from megagrok.parallel.cpu_seam import CpuRngTracker, install_cpu_seam
from megagrok.parallel.ranks import Ranks
from megagrok.platform import Platform, find_platform

CPU = Platform(torch.device("cpu"), "gloo")
TENSOR = ParallelConfig(tensor=2, sequence=True)
PIPELINE = ParallelConfig(pipeline=2)
STREAM = "model-parallel-rng"


def give_back_torch(module: ModuleType) -> Callable[[], None]:
    return lambda: vars(module).update(torch=torch)


def give_back(name: str) -> Callable[[], None]:
    original = vars(megatron_random)[name]
    return lambda: vars(megatron_random).update({name: original})


def give_back_tracker() -> None:
    tracker = megatron_random.CudaRNGStatesTracker()
    tracker.add(STREAM, 0)
    vars(megatron_random)["_CUDA_RNG_STATE_TRACKER"] = tracker


# Originals, kept before any seam is installed.
give_back_set_state = give_back("_set_cuda_rng_state")
# Entry of the seam: how to take it away, and a run that needs it.
ENTRIES: dict[str, tuple[Callable[[], None], ParallelConfig, str]] = {
    "tensor_parallel/mappings.py": (give_back_torch(mappings), TENSOR, "none"),
    "tensor_parallel/layers.py": (give_back_torch(layers), TENSOR, "none"),
    "core/utils.py": (give_back_torch(megatron_utils), TENSOR, "none"),
    "pipeline_parallel/p2p_communication.py": (give_back_torch(p2p_communication), PIPELINE, "none"),
    "pipeline_parallel/schedules.py": (give_back_torch(schedules), PIPELINE, "none"),
    "random.py _get_cuda_rng_state": (give_back("_get_cuda_rng_state"), ParallelConfig(), "full"),
    "random.py tracker": (give_back_tracker, TENSOR, "none"),
}


def train_without(ranks: Ranks, entry: str | None) -> None:
    """One step with one entry of the seam taken away."""
    take_away, parallel, recompute = ENTRIES[entry] if entry else (None, TENSOR, "full")
    run = make_run(parallel=parallel, recompute=recompute)
    groups = start(run, timeout_seconds=5)
    if take_away is not None:
        take_away()
    engine = build_engine(run, groups, find_platform())
    engine.forward_backward(batch_of(run, 0, groups))
    engine.update(1e-2)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_is_still_needed(entry: str) -> None:
    parallel = ENTRIES[entry][1]
    with pytest.raises(RankError) as failed:
        run_ranks(train_without, parallel.tensor * parallel.pipeline, timeout_seconds=5, entry=entry)
    text = str(failed.value)
    # The failure is CUDA's absence, met in the file that the entry names.
    assert "CUDA" in text or "cuda" in text or "NVIDIA" in text
    assert entry.split()[0] in text


def calls_kept_for_a_gpu(ranks: Ranks, *, without: bool) -> int:
    """What a recomputed step leaves in torch's queue of things to do once CUDA starts."""
    run = make_run(recompute="full")
    groups = start(run)
    if without:
        give_back_set_state()
    engine = build_engine(run, groups, find_platform())
    before = len(torch.cuda._queued_calls)
    engine.forward_backward(batch_of(run, 0, groups))
    return len(torch.cuda._queued_calls) - before


def test_random_states_are_still_set_through_the_seam() -> None:
    """random.py _set_cuda_rng_state: without it every recomputed layer leaves a state for a GPU that never comes."""
    assert run_ranks(calls_kept_for_a_gpu, 1, without=True)[0] > 0
    assert run_ranks(calls_kept_for_a_gpu, 1, without=False) == [0]


def test_the_table_names_every_module_that_the_seam_touches() -> None:
    touched = {module.__name__.rpartition(".")[2] for module in cpu_seam._MODULES_THAT_ASK_FOR_A_DEVICE}
    assert touched == {
        entry.rpartition("/")[2].removesuffix(".py") for entry in ENTRIES if not entry.startswith("random")
    }


def look_at_torch(ranks: Ranks) -> dict[str, bool]:
    """What the seam has changed, seen from inside and outside of the modules that it names."""
    before = {name: vars(torch)[name] for name in ("zeros", "empty", "cuda")}
    device_before = torch.cuda.current_device
    named = {module.__name__ for module in cpu_seam._MODULES_THAT_ASK_FOR_A_DEVICE}
    others = {
        module: vars(module).get("torch")
        for name, module in list(sys.modules.items())
        if name.startswith(("megatron.", "deepspeed.", "torch.", "megagrok.")) and name not in named
    }
    install_cpu_seam(CPU)
    install_cpu_seam(CPU)
    return {
        "torch is as it was": all(vars(torch)[name] is value for name, value in before.items()),
        "torch.cuda is as it was": torch.cuda.current_device is device_before,
        "every other module is as it was": all(vars(module).get("torch") is own for module, own in others.items()),
        "there are other modules": torch in others.values() and len(others) > 500,
        "a named module finds the CPU": mappings.torch.cuda.current_device() == torch.device("cpu"),
        "a literal cuda is the CPU": schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type == "cpu",
        "another device is that device": schedules.torch.zeros(2, device="meta").device.type == "meta",
        "the rest is torch's own": mappings.torch.empty is torch.empty and mappings.torch.nn is torch.nn,
    }  # fmt: skip


def test_torch_itself_and_every_module_not_named_stay_untouched() -> None:
    assert all(run_ranks(look_at_torch, 1)[0].values())


def fork_streams(ranks: Ranks) -> dict[str, bool]:
    """Draws inside and outside of forked streams."""
    tracker = CpuRngTracker()
    torch.manual_seed(11)
    expected_outside = torch.rand(4)
    torch.manual_seed(11)
    first = torch.rand(2)
    with tracker.fork():
        inside = torch.rand(3)
    try:
        with tracker.fork():
            again = torch.rand(3)
            raise KeyError
    except KeyError:
        pass
    second = torch.rand(2)
    torch.manual_seed(0)
    one_stream = torch.rand(6)
    outside = torch.get_rng_state()
    tracker.add("other", 5)
    is_unmoved = torch.equal(torch.get_rng_state(), outside)
    with tracker.fork("other"):
        other = torch.rand(2)
    torch.manual_seed(5)
    return {
        "the outside goes on where it was": torch.equal(torch.cat([first, second]), expected_outside),
        "a stream goes on where it was": torch.equal(torch.cat([inside, again]), one_stream),
        "streams have their own seeds": torch.equal(other, torch.rand(2)),
        "megatron knows it as its own": isinstance(tracker, megatron_random.CudaRNGStatesTracker),
        "adding a stream draws nothing": is_unmoved,
    }


def test_a_forked_stream_leaves_the_surrounding_one_as_it_was() -> None:
    assert all(run_ranks(fork_streams, 1)[0].values())


def test_with_every_entry_in_place_nothing_is_missing() -> None:
    run_ranks(train_without, 2, entry=None)


SCHEDULE = (
    "forward_step_func", "data_iterator", "model", "num_microbatches", "seq_length", "micro_batch_size", "forward_only",
)  # fmt: skip
CALLED = {
    parallel_state.initialize_model_parallel: (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
        "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
        "create_gloo_process_groups", "distributed_timeout_minutes",
    ),
    schedules.forward_backward_no_pipelining: SCHEDULE,
    schedules.forward_backward_pipelining_without_interleaving: SCHEDULE,
    schedules.forward_backward_pipelining_with_interleaving: SCHEDULE,
    deepspeed.init_distributed: ("dist_backend", "dist_init_required"),
    deepspeed.initialize: ("model", "optimizer", "config", "mpu", "dist_init_required"),
    deepspeed_groups._create_expert_and_data_parallel: ("expert_parallel_size_",),
    deepspeed_groups._get_expert_parallel_group: ("group_name",),
    deepspeed_groups._get_expert_data_parallel_group: ("group_name",),
    DeepSpeedZeroOptimizer.reduce_gradients: ("pipeline_parallel",),
    DeepSpeedZeroOptimizer.set_gradient_accumulation_boundary: ("is_boundary",),
    DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state: (),
    BF16_Optimizer._lazy_init_hp_params_optimizer_state: (),
    BF16_Optimizer.get_grads_for_reduction: (),
    DeepSpeedEngine.buffered_allreduce_fallback: (),
    DeepSpeedEngine.step: (),
    DeepSpeedEngine.zero_grad: (),
    DeepSpeedEngine.zero_optimization: (),
    MoE.set_deepspeed_parallelism: ("use_data_before_expert_parallel_",),
}  # fmt: skip


@pytest.mark.parametrize("function", CALLED, ids=lambda function: function.__qualname__)
def test_upstream_still_takes_what_we_give(function: Callable[..., object]) -> None:
    parameters = inspect.signature(function).parameters
    assert set(CALLED[function]) <= set(parameters)
    needed = {
        name for name, value in parameters.items() if value.default is value.empty and value.kind < value.VAR_POSITIONAL
    }
    assert needed - {"self"} <= set(CALLED[function])


def test_megatron_still_orders_ranks_as_the_topology_does_by_default() -> None:
    assert inspect.signature(parallel_state.initialize_model_parallel).parameters["order"].default == "tp-cp-ep-dp-pp"


def test_every_field_that_the_translation_sets_is_megatrons() -> None:
    """Our own subclass adds three; a field that Megatron has dropped would otherwise be set and read by nobody."""
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    source = inspect.getsource(make_transformer_config)
    call = source[source.index("GrokTransformerConfig(\n") :]
    named = {
        line.split("=")[0].strip()
        for line in call.splitlines()
        if line.startswith(" " * 8) and "=" in line and "#" not in line
    }
    assert len(named) > 40
    assert named - fields == {"grok", "groups", "kernels", "dropout_seed"}
    assert {field.name for field in dataclasses.fields(GrokTransformerConfig)} - fields == named - fields
