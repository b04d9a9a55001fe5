"""Tokens that pass by the middle blocks: which, at which positions, and how they come back."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.run_blocks import get_runner, get_spec
from tests.tiny.dits import DITS, TinyDit, dit_called
from training.features.tread_runner import Route, bypassing_blocks
from wan.model import WanModel

SIZE = (1, 8, 8, 5)
BATCH = 2
ROUTED = [tiny for tiny in DITS if not tiny.spec.side_list and "ltx" not in tiny.name]


def draw_half(grid: tuple[int, ...]) -> Tensor:
    """Half of the places, others in each sample."""
    generator = torch.Generator().manual_seed(3)
    count = torch.Size(grid).numel()
    order = torch.rand(BATCH, count, generator=generator).argsort(dim=1)
    return order[:, : count - count // 2].sort(dim=1).values


HALF = Route(1, -2, draw_half)


def watch_blocks(dit: nn.Module) -> list[tuple[Tensor, Any, Tensor]]:
    """Return a list that fills with each block's input, record of tokens and output."""
    seen: list[tuple[Tensor, Any, Tensor]] = []
    for blocks in get_spec(dit).blocks(dit).values():
        for block in blocks:
            block.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    return seen


@pytest.mark.parametrize("tiny", ROUTED, ids=lambda tiny: tiny.name)
def test_the_middle_blocks_see_half_of_the_picture_at_its_own_positions(tiny: TinyDit) -> None:
    """Text, references and padding stay; what was left out comes back as it was."""
    dit = tiny.make(4)
    seen = watch_blocks(dit)
    runner = get_runner(dit)
    with torch.no_grad(), bypassing_blocks(dit, HALF):
        dit(**tiny.inputs(SIZE, BATCH))

    assert get_runner(dit) == runner
    _, tokens, before = seen[0]
    chosen = draw_half(tokens.grid)
    size = torch.Size(tokens.grid).numel()
    start = tokens.first_noisy_token
    count = before.shape[1]
    middle, last = seen[1:-1], seen[-1]
    for sample in range(BATCH):
        places = [*range(start), *(chosen[sample] + start).tolist(), *range(start + size, count)]
        left_out = sorted({*range(count)} - {*places})
        assert torch.equal(middle[0][0][sample], before[sample, places])
        table = tokens.rotary if tokens.rotary.ndim == 4 else tokens.rotary[sample]
        for x, record, _ in middle:
            assert x.shape[1] == count - size // 2
            rows = [place for place in places if place < len(table)]
            assert torch.equal(record.rotary[sample], table[rows])
        assert torch.equal(last[0][sample, places], middle[-1][2][sample])
        assert torch.equal(last[0][sample, left_out], before[sample, left_out])
    assert last[1].rotary is tokens.rotary  # the record itself may be new: Fibo 2.0 adds what a block reads


@pytest.mark.parametrize("tiny", ROUTED, ids=lambda tiny: tiny.name)
def test_gradients_of_a_batch_are_those_of_its_samples(tiny: TinyDit) -> None:
    """Also of padded texts, whose lengths count the tokens that are left."""
    dit, network = tiny.with_lora(4)
    inputs = tiny.inputs(SIZE, BATCH)
    with bypassing_blocks(dit, HALF):
        output = dit(**inputs)
    full = dit(**inputs)
    assert output.shape == full.shape
    assert not torch.allclose(output, full)
    everything = replace(
        HALF, select_tokens=lambda grid: torch.arange(torch.Size(grid).numel()).expand(BATCH, -1)
    )
    with bypassing_blocks(dit, everything):
        assert torch.equal(dit(**inputs), full)
    output.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())


def run_by_hand(dit: WanModel, inputs: dict[str, Any]) -> Tensor:
    """The blocks of each sample by itself, with indexed tokens and rotations."""
    hidden = dit.embed(**inputs)
    x, tokens = hidden.x, hidden.tokens
    chosen = draw_half(tokens.grid)
    rows = []
    for sample in range(BATCH):
        own = replace(
            tokens,
            text_tokens=tuple((text[sample : sample + 1], repeats) for text, repeats in tokens.text_tokens),
            modulation=tokens.modulation[sample : sample + 1],
        )
        places = chosen[sample]
        few = replace(own, rotary=tokens.rotary[places])
        first, *middle, last = dit.blocks
        row = first(x[sample : sample + 1], own)
        part = row[:, places]
        for block in middle:
            part = block(part, few)
        filled = row.clone()
        filled[:, places] = part
        rows.append(last(filled, own))
    return dit.unembed(torch.cat(rows), tokens)


def test_output_and_gradient_are_those_of_plain_torch() -> None:
    tiny = dit_called("wan t2v")
    dit, network = tiny.with_lora(4)
    assert isinstance(dit, WanModel)
    inputs = tiny.inputs((3, 8, 8, 5), BATCH)
    weights = [*network.parameters()]

    expected = run_by_hand(dit, inputs)
    with bypassing_blocks(dit, HALF):
        output = dit(**inputs)

    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    expected_gradients = torch.autograd.grad(expected.square().mean(), weights)
    gradients = torch.autograd.grad(output.square().mean(), weights)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-7)
