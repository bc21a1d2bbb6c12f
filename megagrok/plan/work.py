"""What one rank does for one micro-batch: matmuls, bytes moved by element-wise work, messages. Counts, no seconds.

The one idea: a layer is a short list of each, written once for the forward pass; the backward pass follows from it.
The rehearsal (`megagrok rehearse`) counts the same in the real code, and the two are held together by tests.
"""

# t tokens of a micro-batch on a tensor group, T = t / tensor tokens that one rank dispatches, R rows of its experts,
# h hidden, f expert width

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megagrok.plan.memory import RankParams, held_params, weight_bytes
from megagrok.plan.shape import Habits, Layout, Shape

Group = Literal["tensor", "context", "expert", "pipeline", "data", "expert_data"]
Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]

ATTENTION_BLOCKS = 32
"""Runs of queries at most in which megagrok's attention in torch leaves out later keys (kernels/attention)."""
SHORTEST_BLOCK = 64
"""Queries of one run at least."""
ATTENTION_BLOCK_BYTES, CPU_ATTENTION_BLOCK_BYTES = 2**28, 2**20
"""Of the fp32 scores that exist at once, if that holds one kv head."""
CPU_EXPERT_ROWS = 1536
"""Rows of an expert that are worked on at once on a CPU; on a GPU all (kernels/experts)."""
ATTENTION_PASSES = 3.5
"""Forward 1, backward 2.5: it computes the scores again (FlashAttention, Dao et al. 2022)."""
SCORE_BYTES = 60
"""Forward, per score: written 2, made fp32 2 + 4, capped 8, its highest sought 4, scaled 8, shifted 8, exponential 8,
added up 4, rounded 4 + 2, read 2; 4 more for masks."""
HEAD_CHUNK_BYTES, HEAD_CHUNK_TOKENS = 256 * 2**20, 2048
CPU_HEAD_CHUNK_BYTES, CPU_HEAD_CHUNK_TOKENS = 4 * 2**20, 512
"""Of the fp32 logits that exist at once, or so many tokens' if that is more (kernels/cross_entropy)."""


@dataclass(frozen=True, slots=True)
class Matmul:
    """`count` products [rows, inner] x [inner, outer]; the weight is inner x outer."""

    rows: float
    inner: float
    outer: float
    count: int = 1

    @property
    def flops(self) -> float:
        """2 for each multiplication and its addition."""
        return 2.0 * self.rows * self.inner * self.outer * self.count


@dataclass(frozen=True, slots=True)
class Message:
    """`calls` collectives; `size` is the bytes of the whole tensor that one gathers, reduces, exchanges or sends."""

    group: Group
    op: Op
    size: float
    calls: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """Forward and backward pass of one part of the model on one rank, one micro-batch, routing balanced."""

    matmuls: tuple[Matmul, ...]
    """Forward; each has two of the same size for its gradients."""
    expert_matmuls: tuple[Matmul, ...]
    attention_flops: float
    """Forward: scores and weighted values as they are computed."""
    score_bytes: float
    """Forward: read and written by what lies between those two, 0 where scores stay on chip."""
    moved_bytes: float
    """Forward: read and written by everything that is no matmul and no attention."""
    kernels: float
    """Launches of the forward pass."""
    forward: tuple[Message, ...]
    backward: tuple[Message, ...]
    makes_gradients_forward: bool = False
    """The matmuls of the backward pass belong to the forward pass, as the output head's do."""

    @property
    def matmul_flops(self) -> float:
        """Forward, experts too, attention not."""
        return sum(matmul.flops for matmul in self.matmuls) + sum(matmul.flops for matmul in self.expert_matmuls)


@dataclass(frozen=True, slots=True)
class Slice:
    """What of a layout decides a layer's work; many layouts share one."""

    tensor: int
    sequence: bool
    context: int
    expert: int
    expert_tensor: int
    seq_len: int
    micro_batch: int
    element_bytes: int

    @classmethod
    def of(cls, layout: Layout) -> "Slice":
        """Of a layout; fp8 training keeps bf16 between its matmuls."""
        element_bytes = 4 if layout.precision == "fp32" else 2
        return cls(
            layout.tensor,
            layout.sequence,
            layout.context,
            layout.expert,
            layout.expert_tensor,
            layout.seq_len,
            layout.micro_batch,
            element_bytes,
        )

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on this context rank, which its tensor ranks share."""
        return self.micro_batch * self.seq_len / self.context

    @property
    def own_tokens(self) -> float:
        """Tokens that a rank keeps between the split parts of a layer."""
        return self.tokens / self.tensor if self.sequence else self.tokens


@lru_cache(maxsize=4096)
def layer_work(shape: Shape, part: Slice, habits: Habits, has_experts: bool) -> Work:
    """One layer: attention, then experts or a dense MLP."""
    t, h, size = part.tokens, shape.hidden, part.element_bytes
    whole = t * h * size
    attention = Matmul(t, h, shape.attention_params / h / part.tensor)
    matmuls, expert_matmuls = [attention], []
    forward = [*_enter(part, whole), *_leave(part, whole), *_context_forward(shape, part)]
    backward = [*_enter_back(part, whole), *_leave_back(part, whole), *_context_backward(shape, part)]
    # Two norms before, two residual sums (and in Grok two norms after): each reads and writes the stream.
    moved = 10.0 * part.own_tokens * h * size + 4.0 * t * shape.heads * shape.head_dim / part.tensor * size
    kernels = 25.0
    dense_width = shape.shared_ffn if has_experts else shape.dense_ffn
    if dense_width:
        matmuls.append(Matmul(t, h, shape.ffn_matrices * dense_width / part.tensor))
        forward += [*_enter(part, whole), *_leave(part, whole)]
        backward += [*_enter_back(part, whole), *_leave_back(part, whole)]
        moved += shape.ffn_matrices * t * dense_width / part.tensor * size
        kernels += 4
    if has_experts:
        T, top_k = t / part.tensor, shape.top_k
        rows = T * part.expert_tensor * top_k * (1 - habits.dropped)
        local = max(1.0, shape.experts / part.expert)
        width = shape.expert_ffn / part.expert_tensor
        matmuls.append(Matmul(T if part.sequence else t, h, shape.experts))
        expert_matmuls.append(Matmul(rows / local, h, shape.ffn_matrices * width, round(local)))
        forward += _dispatch(shape, part, T)
        backward += _dispatch(shape, part, T)
        if part.tensor > 1 and not part.sequence and part.expert_tensor == 1:
            # Each tensor rank takes a part of the tokens that all of them hold, and gathers the results.
            forward.append(Message("tensor", "all_gather", whole))
            backward.append(Message("tensor", "all_gather", whole))
        # Sort, regroup and their inverses read and write every row; then the gated product.
        moved += (8.0 * rows * h + shape.ffn_matrices * rows * width) * size
        # Without a capacity, sizes follow the counts of tokens, which the host waits for and passes on.
        kernels += (100 if habits.dropped else 150) + (0 if habits.experts == "grouped" else 4 * local)
    return Work(
        tuple(matmuls),
        tuple(expert_matmuls),
        attention_flops(shape, part, habits),
        score_bytes(shape, part, habits),
        moved,
        kernels,
        tuple(forward),
        tuple(backward),
    )


@lru_cache(maxsize=1024)
def head_work(shape: Shape, part: Slice) -> Work:
    """Final norm, output head and cross-entropy: the end of the last stage."""
    t, h, size = part.tokens, shape.hidden, part.element_bytes
    whole = t * h * size
    logits = t * shape.vocab / part.tensor
    chunks = math.ceil(t / head_chunk_tokens(shape, part))
    # Sum of exponentials, the label's logit, and whether it is here.
    statistics = (Message("tensor", "all_reduce", 12.0 * t / chunks, chunks),) if part.tensor > 1 else ()
    # Hidden states are not gathered again, because the weight's gradient is made at once.
    back = [message for message in _enter_back(part, whole) if message.op != "all_gather"]
    return Work(
        (Matmul(t, h, shape.vocab / part.tensor),),
        (),
        0.0,
        0.0,
        2.0 * part.own_tokens * h * size + logits * (size + 4 * 4.0),
        30.0 * chunks,
        (*_enter(part, whole), *statistics),
        tuple(back),
        makes_gradients_forward=True,
    )


def head_chunk_tokens(shape: Shape, part: Slice, on_cpu: bool = False) -> float:
    """Tokens whose logits exist at once; all chunks about alike."""
    most_bytes, fewest = HEAD_CHUNK_BYTES, HEAD_CHUNK_TOKENS
    if on_cpu:
        most_bytes, fewest = CPU_HEAD_CHUNK_BYTES, CPU_HEAD_CHUNK_TOKENS
    most = max(most_bytes * part.tensor // (4 * shape.vocab), fewest)
    return math.ceil(part.tokens / math.ceil(part.tokens / most))


@lru_cache(maxsize=1024)
def embedding_work(shape: Shape, part: Slice) -> Work:
    """Look-up of the tokens: the beginning of the first stage."""
    whole = part.tokens * shape.hidden * part.element_bytes
    moved = 3.0 * whole / part.tensor
    return Work((), (), 0.0, 0.0, moved, 4.0, tuple(_leave(part, whole)), tuple(_leave_back(part, whole)))


def attention_flops(shape: Shape, part: Slice, habits: Habits) -> float:
    """Scores and weighted values of one layer and micro-batch on one rank, forward, as they are computed.

    The causal half where scores stay on chip, or where context ranks take an early and a late piece each. In torch, a
    run of queries meets all keys up to its last: with 32 runs 33/64 of the square, under context parallelism all of it.
    """
    square = 4.0 * part.tokens * part.seq_len * shape.heads * shape.head_dim / part.tensor
    if habits.attention != "scores":
        return square / 2
    if part.context > 1:
        return square
    size = max(SHORTEST_BLOCK, math.ceil(part.seq_len / ATTENTION_BLOCKS))
    runs = math.ceil(part.seq_len / size)
    return square * (runs + 1) / (2 * runs)


def score_bytes(shape: Shape, part: Slice, habits: Habits) -> float:
    """Where scores pass through memory: SCORE_BYTES for each of them."""
    if habits.attention != "scores":
        return 0.0
    return attention_flops(shape, part, habits) / (4.0 * shape.head_dim) * SCORE_BYTES


def stage_params(shape: Shape, layout: Layout, stage: int) -> RankParams:
    """Parameters of a rank of that stage."""
    return held_params(shape, layout.tensor, layout.pipeline, layout.expert, layout.expert_tensor, stage)


def update_messages(shape: Shape, layout: Layout, habits: Habits, stage: int) -> tuple[Message, ...]:
    """Gradients of a step on their way over the ranks that hold the same weights, and the weights' way back.

    ZeRO 0 adds whole gradients up. Above it, each rank keeps the sums of its shard; all-gather of the new weights.
    """
    params = stage_params(shape, layout, stage)
    weight = weight_bytes(layout.precision)
    messages: list[Message] = []
    copies = layout.data * layout.context
    expert_copies = max(1, layout.tensor * copies // (layout.expert * layout.expert_tensor))
    groups: tuple[tuple[Group, int, int], ...] = (
        ("data", params.dense, copies),
        ("expert_data", params.expert, expert_copies),
    )
    for group, held, ranks in groups:
        if ranks == 1 or not held:
            continue
        if layout.zero == 3:
            # FSDP: gathered for both passes and reduced in bf16, for each micro-batch.
            messages.append(Message(group, "all_gather", weight * held, 2 * layout.num_micro_batches))
            messages.append(Message(group, "reduce_scatter", weight * held, layout.num_micro_batches))
            continue
        whole = layout.zero == 0 or habits.reduces_whole
        messages.append(Message(group, "all_reduce" if whole else "reduce_scatter", 4.0 * held))
        if layout.zero:
            messages.append(Message(group, "all_gather", weight * held))
    return tuple(messages)


def _enter(part: Slice, whole: float) -> list[Message]:
    """Into a pair of split matrices: the tokens of all tensor ranks are gathered."""
    return [Message("tensor", "all_gather", whole)] if part.tensor > 1 and part.sequence else []


def _leave(part: Slice, whole: float) -> list[Message]:
    """Out of it: partial sums are added, and the tokens shared out again."""
    if part.tensor == 1:
        return []
    return [Message("tensor", "reduce_scatter" if part.sequence else "all_reduce", whole)]


def _enter_back(part: Slice, whole: float) -> list[Message]:
    """Megatron gathers the input again for the weight's gradient instead of keeping it."""
    if part.tensor == 1:
        return []
    if not part.sequence:
        return [Message("tensor", "all_reduce", whole)]
    return [Message("tensor", "all_gather", whole), Message("tensor", "reduce_scatter", whole)]


def _leave_back(part: Slice, whole: float) -> list[Message]:
    return [Message("tensor", "all_gather", whole)] if part.tensor > 1 and part.sequence else []


def _context_forward(shape: Shape, part: Slice) -> list[Message]:
    if part.context == 1:
        return []
    keys = part.micro_batch * part.seq_len * shape.kv_heads * shape.head_dim / part.tensor * part.element_bytes
    return [Message("context", "all_gather", keys, 2)]


def _context_backward(shape: Shape, part: Slice) -> list[Message]:
    return [
        Message("context", "reduce_scatter", message.size, message.calls) for message in _context_forward(shape, part)
    ]


def _dispatch(shape: Shape, part: Slice, own: float) -> list[Message]:
    """To the experts and back; over the ranks that share an expert, rows are gathered and summed."""
    rows = own * shape.top_k * shape.hidden * part.element_bytes
    messages = []
    if part.expert > 1:
        # Rows there and back, and the weights of the rows, fp32.
        messages += [Message("expert", "all_to_all", rows, 2), Message("expert", "all_to_all", 4 * own * shape.top_k)]
    if part.expert_tensor > 1:
        size = rows * part.expert_tensor
        messages += [Message("tensor", "all_gather", size), Message("tensor", "reduce_scatter", size)]
    return messages
