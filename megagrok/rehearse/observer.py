"""Sees every operation of torch while a step is walked, and tells those who count: messages, FLOPs, storages.

The one idea: nothing of the trainer is asked. What runs inside a module is the forward pass; what autograd runs is the
backward pass, unless a module runs inside it: then it is computed again.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megagrok.model.grok import GrokModel
from megagrok.model.moe.router import Routing
from megagrok.model.spec import GrokLayer
from megagrok.rehearse.collectives import Collectives
from megagrok.rehearse.known import NOT_HERE, KnownNumbers
from megagrok.rehearse.rehearsal import Direction, Flops, LayerShape
from megagrok.rehearse.storages import Storages


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """numbers: answers for tensors that hold none; None where they hold some, as in a real run."""

    def __init__(self, collectives: Collectives, numbers: KnownNumbers | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = Storages()
        self.phase = "build"
        self.forward_ends: list[int] = []
        """Moments at which a chunk's forward pass of one micro-batch was over."""
        self._collectives, self._numbers = collectives, numbers
        self._flops: Counter[tuple[Direction, str]] = Counter()
        self._modules: list[nn.Module] = []
        self._is_head_backward = False
        self._has_left_decoder = False
        self._layer: nn.Module | None = None
        self._names: dict[nn.Module, str] = {}
        self._shapes: dict[str, LayerShape] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func.namespace == "prim":  # a fake tensor is asked for its device, which is no work
            return func(*args, **options)
        result = NOT_HERE if self._numbers is None else self._numbers.answer(func, args, options)
        if result is NOT_HERE:
            result = func(*args, **options)
        if self._numbers is not None:
            self._numbers.follow(func, args, options, result)
        direction = self._direction()
        if func.namespace == "c10d":
            self._collectives.note(func.name(), args, self.phase, direction)
        elif (count := flop_registry.get(func.overloadpacket)) is not None and direction is not None:
            self._flops[direction, func.name()] += count(*args, **options, out_val=result)
        self.storages.note(
            (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)),
            phase=self.phase,
            is_head=self._is_head(direction),
            is_backward=direction in ("backward", "recompute"),
        )
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, everything is seen."""
        with ExitStack() as stack:
            for hook in (
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ):
                stack.callback(hook.remove)
            stack.enter_context(self)
            yield

    def flops(self, micro_batches: int) -> tuple[Flops, ...]:
        """Of one micro-batch."""
        return tuple(Flops(direction, op, count / micro_batches) for (direction, op), count in self._flops.items())

    def shapes(self) -> tuple[LayerShape, ...]:
        """Of the first layer that ran."""
        return tuple(self._shapes.values())

    def _direction(self) -> Direction | None:
        if torch._C._current_graph_task_id() < 0:
            return "forward" if self._modules else None
        return "recompute" if self._modules else "backward"

    def _is_head(self, direction: Direction | None) -> bool:
        """Between the last layer and the loss, or on the way back from it."""
        if direction == "backward":
            return self._is_head_backward
        return direction == "forward" and len(self._modules) > 0 and self._is_in_head()

    def _is_in_head(self) -> bool:
        chunk = self._modules[0]
        if not isinstance(chunk, GrokModel) or not chunk.post_process:
            return False
        inner = self._modules[1] if len(self._modules) > 1 else None
        return self._has_left_decoder and inner is not chunk.decoder

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if not self._modules:
            self._has_left_decoder = False
        self._modules.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._modules.pop()
        if len(self._modules) == 1 and isinstance(chunk := self._modules[0], GrokModel) and module is chunk.decoder:
            self._has_left_decoder = True
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(self._reach_layers)  # type: ignore[no-untyped-call]
        if isinstance(module, GrokModel):
            self.forward_ends.append(self.storages.moment)
            self._is_head_backward = module.post_process
        if not (inputs and output is inputs[0]):  # Megatron's empty slots hand on what they get
            self._note_shape(module, output)

    def _reach_layers(self, _gradient: Tensor) -> None:
        self._is_head_backward = False

    def _note_shape(self, module: nn.Module, output: Any) -> None:
        """What the modules of the first layer return; in a backward pass they only run again."""
        layer = next((outer for outer in [*self._modules, module] if isinstance(outer, GrokLayer)), None)
        self._layer = layer if self._layer is None else self._layer
        name = None if layer is None or layer is not self._layer else self._names_in(layer).get(module)
        tensor = output.experts_TK if isinstance(output, Routing) else output
        tensor = output[0] if isinstance(output, tuple) else tensor
        if name is not None and isinstance(tensor, Tensor) and name not in self._shapes:
            weights = tuple(tuple(weight.shape) for weight in module.parameters(recurse=False))
            self._shapes[name] = LayerShape(name, weights, tuple(tensor.shape))

    def _names_in(self, layer: nn.Module) -> dict[nn.Module, str]:
        if not self._names:
            self._names = {module: name or "layer" for name, module in layer.named_modules()}
        return self._names
