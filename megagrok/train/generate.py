"""Text from a checkpoint, by the reference model in one process: slow, exact, and of any layout's checkpoint.

For looking at a run. It keeps no cache of keys and values; serving is for the engines that load an export.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megagrok.checkpoint import Checkpoint, find_checkpoint
from megagrok.config import RunConfig, from_dict
from megagrok.data.tokenizer import Tokenizer
from megagrok.errors import CheckpointError, DataError
from megagrok.model.reference import Grok
from megagrok.parallel.ranks import Alone
from megagrok.train.files import RunFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int = 120
    """Tokens to write at the most; the end-of-document token ends earlier."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    seed: int = 0
    """The same seed, checkpoint and prompt give the same text."""


def generate_from_run(files: RunFiles, prompt: str, sampling: Sampling, *, step: int | None = None) -> str:
    """The text that follows `prompt`, by the newest sound checkpoint of a run, or that of `step`.

    Raises CheckpointError if there is none, DataError if the run has no tokenizer.
    """
    checkpoint = find_checkpoint(files.checkpoints, ranks=Alone(), step=step)
    if checkpoint is None:
        raise CheckpointError(f"{files.checkpoints} has no checkpoint yet")
    if not files.tokenizer.exists():
        raise DataError(f"{files.tokenizer} is missing: the run had ready-made tokens. Copy their tokenizer there.")
    run = from_dict(checkpoint.facts["config"], source=str(checkpoint.path))  # type: ignore[arg-type]  # it checks
    return generate(load_reference(checkpoint, run), run, Tokenizer.load(files.tokenizer), prompt, sampling)


@torch.no_grad()
def load_reference(checkpoint: Checkpoint, run: RunConfig) -> Grok:
    """The reference model with a checkpoint's weights, fp32, on the CPU."""
    model = Grok(run.model)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        parameter.copy_(checkpoint.read(f"weight/{name}", (0,) * len(shape), shape))
    return model


@torch.no_grad()
def generate(model: Grok, run: RunConfig, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> str:
    """Continue a prompt token by token, inside the model's context; returns the continuation only."""
    random = torch.Generator().manual_seed(sampling.seed)
    tokens = tokenizer.encode(prompt) or [tokenizer.eos_id]
    written: list[int] = []
    for _ in range(sampling.max_tokens):
        context = torch.tensor([(tokens + written)[-run.model.max_positions :]])
        logits_V = model(context).logits_BSV[0, -1, : tokenizer.vocab_size]
        token = _choose(logits_V, sampling.temperature, random)
        if token == tokenizer.eos_id:
            break
        written.append(token)
    return tokenizer.decode(written)


def _choose(logits_V: Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(dim=-1), 1, generator=random))
