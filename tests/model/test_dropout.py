"""What is dropped is a function of seed, layer, branch, sample, position and feature, fair and independent in each."""

import math
from dataclasses import replace

import pytest
import torch
from layouts import MODEL
from torch import Tensor

from megagrok.errors import DataError
from megagrok.model.dropout import dropout, dropped, scale_of, stream_of, token_numbers
from megagrok.model.reference import Drops, accumulate, make_reference

NUMBERS = token_numbers(torch.arange(8), torch.arange(64), 64)
WIDTH = 128


def splitmix64(state: int) -> int:
    """The finalizer as published, on Python's integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def dropped_by_hand(number: int, stream: int, width: int, rate: float) -> list[bool]:
    golden = 0x9E3779B97F4A7C15
    start = splitmix64(splitmix64(number * golden % 2**64) ^ stream)
    hashes = [splitmix64((start + (i + 1) * golden) % 2**64) for i in range(-(-width // 4))]
    chances = [value >> (16 * i) & 0xFFFF for value in hashes for i in range(4)]
    # Chances are compared as int16, so the upper half comes first.
    return [(chance + 2**15) % 2**16 < round(rate * 2**16) for chance in chances][:width]


@pytest.mark.parametrize("number", [0, 1, 4096 * 131072 + 17, 2**62, 2**63 - 1])
@pytest.mark.parametrize("width", [1, 3, 4, 30])
def test_the_hash_is_splitmix64(number: int, width: int) -> None:
    for stream in (0, 1, stream_of(7, 3, 1), 2**64 - 1):
        ours = dropped(torch.tensor([number]), stream, width, 0.4)[0].tolist()
        assert ours == dropped_by_hand(number, stream, width, 0.4)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate_and_the_mean_stays(rate: float) -> None:
    is_dropped = dropped(NUMBERS, stream_of(1, 0, 0), WIDTH, rate)
    # Five standard deviations of a fair coin, once for all and once for each feature.
    assert abs(float(is_dropped.double().mean()) - rate) < 5 * math.sqrt(rate / is_dropped.numel())
    worst = float((is_dropped.double().mean((0, 1)) - rate).abs().max())
    assert worst < 5 * math.sqrt(rate / NUMBERS.numel())
    x = torch.full((*NUMBERS.shape, WIDTH), 3.0)
    values = set(dropout(x, NUMBERS, stream_of(1, 0, 0), rate).unique().tolist())
    assert values == {0.0, float(torch.tensor(3.0) * scale_of(rate))}
    assert scale_of(rate) == pytest.approx(1 / (1 - rate), rel=1e-4 if rate < 0.9 else 1e-3)


def test_seeds_layers_branches_samples_and_positions_drop_independently() -> None:
    streams = {stream_of(seed, layer, branch) for seed in range(4) for layer in range(64) for branch in range(2)}
    assert len(streams) == 4 * 64 * 2
    masks = [dropped(NUMBERS, stream_of(*key), WIDTH, 0.5) for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]
    first = masks[0]
    others = [*masks[1:], first.roll(1, 0), first.roll(1, 1), first.roll(1, 2), first.roll(4, 2)]
    num_values = first.numel()
    for other in others:
        # Two fair independent masks agree on half of the values.
        assert abs(float((first == other).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(num_values)


def test_a_part_asks_for_its_part_of_the_mask() -> None:
    """Any tokens, in any order and shape, as sequence and context parallelism hold them."""
    stream = stream_of(5, 1, 0)
    whole = dropped(NUMBERS, stream, WIDTH, 0.3)
    mixed = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(dropped(NUMBERS[:, mixed].t().contiguous(), stream, WIDTH, 0.3), whole[:, mixed].transpose(0, 1))
    assert torch.equal(dropped(NUMBERS[3, 5], stream, WIDTH, 0.3), whole[3, 5])


def test_the_backward_pass_drops_what_the_forward_pass_dropped_and_no_mask_is_kept() -> None:
    x = torch.randn(*NUMBERS.shape, WIDTH, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = dropout(x, NUMBERS, 3, 0.2)
    assert [tensor.shape for tensor in saved] == [NUMBERS.shape]
    weight = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    kept = (~dropped(NUMBERS, 3, WIDTH, 0.2)).double() * scale_of(0.2)
    torch.testing.assert_close(y, x * kept, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, weight * kept, rtol=1e-12, atol=0)


def test_the_reference_drops_in_training_only_and_only_what_is_added() -> None:
    model = replace(MODEL, dropout=0.5)
    grok = make_reference(model, 1)
    tokens_BS = torch.arange(32).view(2, 16)
    plain = grok(tokens_BS).logits_BSV
    assert torch.equal(plain, make_reference(MODEL, 1)(tokens_BS).logits_BSV)
    ids_B = torch.tensor([4, 9])
    some = grok(tokens_BS, drops=Drops(1, ids_B)).logits_BSV
    assert not torch.allclose(some, plain)
    assert torch.equal(grok(tokens_BS, drops=Drops(1, ids_B)).logits_BSV, some)
    other = grok(tokens_BS, drops=Drops(1, torch.tensor([4, 10]))).logits_BSV
    assert torch.equal(other[0], some[0])
    assert not torch.allclose(other[1], some[1])
    # Nearly everything dropped leaves the embedding, normed: layers add to the stream and never replace it.
    empty = replace(MODEL, dropout=0.99999)
    h_BSD = grok.model.embed_tokens(tokens_BS) * model.embedding_multiplier
    kept = make_reference(empty, 1).model(tokens_BS, None, Drops(1, ids_B))[0]
    close = torch.isclose(kept, grok.model.norm(h_BSD), atol=1e-5)
    assert close.double().mean() > 0.9


def test_training_with_dropout_asks_for_the_ids_of_its_samples() -> None:
    grok = make_reference(replace(MODEL, dropout=0.1), 1)
    tokens_BS = torch.arange(32).view(2, 16)
    with pytest.raises(DataError, match=r"1 sample ids for 2 samples: dropout needs one for each"):
        accumulate(grok, [tokens_BS], [tokens_BS], None, seed=1, sample_ids=(4,))
